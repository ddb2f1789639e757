"""A precision that a CPU computes slowly is named before hours are lost."""

import json
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import runs
import torch

from pipeline.insight.report import predictions
from pipeline.training.validate import precision_warning


@pytest.mark.parametrize(
    ("precision", "device", "fast", "warned"),
    [
        ("bf16", "cpu", False, True),
        ("fp16", "cpu", False, True),
        ("bf16", "cpu", True, False),
        ("fp32", "cpu", False, False),
        ("bf16", "cuda", False, False),
    ],
)
def test_what_is_slow_on_a_cpu(precision, device, fast, warned, monkeypatch):
    for name in ("_is_mkldnn_bf16_supported", "_is_mkldnn_fp16_supported"):
        assert isinstance(getattr(torch.ops.mkldnn, name)(), bool)  # torch has it
        monkeypatch.setattr(torch.ops.mkldnn, name, lambda: fast)
    line = precision_warning(precision, device)
    assert (line is not None) == warned
    assert not warned or (precision in line and "--train.precision fp32" in line)


def test_what_is_slow_on_a_gpu(monkeypatch):
    """A T4 of Colab or Kaggle emulates bf16, the default."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    for major, warned in ((7, True), (8, False), (10, False)):
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _, major=major: SimpleNamespace(major=major))
        line = precision_warning("bf16", "cuda")
        assert (line is not None) == warned
        assert precision_warning("fp16", "cuda") is None and precision_warning("fp32", "cuda") is None
        assert not warned or ("Tesla T4" in line and "--train.precision fp16" in line)


def test_a_run_says_so_and_goes_on(root, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    printed = runs.call(root, tmp_path / "run", "--train.max_steps", "1", "--train.precision", "bf16")
    assert printed.count("this CPU has no fast instructions for bf16") == 1
    assert len(runs.rows(tmp_path / "run", "train")) == 1
    scores = {}
    for precision in ("bf16", "fp32"):
        file = tmp_path / f"{precision}.json"
        printed = runs.capture(
            ["evaluate", str(tmp_path / "run"), "--device", "cpu", "--precision", precision, "--json", str(file)]
        )
        assert ("give --precision fp32" in printed) == (precision == "bf16")
        scores[precision] = json.loads(file.read_text())["val_loss"]
    assert scores["fp32"] == pytest.approx(scores["bf16"], rel=0.05) and scores["fp32"] != scores["bf16"]


def test_a_report_says_so_and_can_be_computed_in_fp32(root, tmp_path, monkeypatch):
    run = tmp_path / "run"
    runs.call(root, run, "--train.max_steps", "1", "--train.precision", "bf16", "--tracking.report", "false")
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    used = []
    monkeypatch.setattr(predictions, "autocast", lambda device, precision: used.append(precision) or nullcontext())
    page = run / "report" / "index.html"
    slow = "this CPU has no fast instructions for bf16"
    printed = runs.capture(["report", str(run), "--device", "cpu"])
    assert printed.count(slow) == 1 and "give --precision fp32" in printed
    assert set(used) == {"bf16"} and "Computed in" not in page.read_text()
    used.clear()
    printed = runs.capture(["report", str(run), "--device", "cpu", "--precision", "fp32"])
    assert slow not in printed and set(used) == {"fp32"}
    assert "Computed in fp32; the run's precision is bf16." in page.read_text()
