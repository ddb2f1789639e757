"""A precision that a CPU computes slowly is named before hours are lost."""

import json

import pytest
import runs
import torch

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
