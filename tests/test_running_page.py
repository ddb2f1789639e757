"""docs/running.md: every line of it is run, from top to bottom, in a folder that holds what it names."""

import contextlib
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import runs
import yaml

from pipeline.__main__ import main
from pipeline.dataset.synthetic.generate import Settings, generate_tree

PAGE = Path(__file__).parents[1] / "docs/running.md"


def blocks() -> list[tuple[str, str]]:
    """(language, text) of the page's code, in order."""
    return re.findall(r"^```(\w+)\n(.*?)^```$", PAGE.read_text(), re.S | re.M)


@pytest.fixture
def here(root, tmp_path, monkeypatch):
    """mine.yaml: 3 epochs of 4 steps; data, elsewhere: the same images; pets: three other classes."""
    settings = yaml.safe_load(runs.TINY.read_text())
    settings["model"] = {"name": "shufflenet_v2_x0_5", "zero_init_residual": False}  # small checkpoints: many are kept
    settings["schedule"]["epochs"] = 3
    settings["train"] |= {"global_batch_size": 24, "eval_every_epochs": 1}
    settings["checkpoint"] |= {"every_epoch": True, "keep": 3}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(settings))
    for name in ("data", "elsewhere"):
        shutil.copytree(root, tmp_path / name)
    generate_tree(tmp_path / "pets", Settings(classes=3, train_per_class=24, val_per_class=4, size=64, seed=5))
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/pipeline").write_text(f'#!/bin/sh\nexec {sys.executable} -m pipeline "$@"\n')
    (tmp_path / "bin/torchrun").write_text(f'#!/bin/sh\nexec {sys.executable} -m torch.distributed.run "$@"\n')
    for tool in (tmp_path / "bin").iterdir():
        tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(PAGE.parents[1]))
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_line(line: str) -> tuple[int, str]:
    """(exit code, output) of a shell command; a verb of one process is called here, which spares its imports."""
    if line.startswith("pipeline ") and not line.startswith("pipeline launch"):
        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            code = main(shlex.split(line)[1:])
        return code, said.getvalue()
    done = subprocess.run(
        ["bash", "-euc", line], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300, check=False
    )
    return done.returncode, done.stdout


@pytest.mark.long
def test_every_line_does_what_it_says(here):
    ran = 0
    for language, text in blocks():
        if language == "python":
            exec(compile(text, str(PAGE), "exec"), {})
            ran += 1
            continue
        for line in text.splitlines():
            command, _, words = line.partition("# prints: ")
            code, output = run_line(command.strip())
            assert code == 0, f"{command}\n{output[-3000:]}"
            assert words.strip() in output, f"{line}\n{output[-3000:]}"
            ran += 1
    assert ran >= 25
    assert (here / "sweep.html").is_file() and (here / "scores.json").is_file()
    assert not (here / "runs/first").exists()
    assert [row["step"] for row in runs.rows(here / "archive/first", "train")] == list(range(1, 13))
    assert len(runs.rows(here / "runs/patient", "train")) <= 12
    assert [row["step"] for row in runs.rows(here / "runs/first-to-5", "train")] == list(range(13, 21))


def test_every_command_of_the_page_is_in_a_block_that_is_run():
    """Blocks of another language would not be run, nor lines that are indented."""
    text = PAGE.read_text()
    assert {language for language, _ in blocks()} == {"bash", "python"}
    assert text.count("```") == 2 * len(blocks())
    assert not re.findall(r"^ {4,}\S", re.sub(r"```.*?```", "", text, flags=re.S), re.M)
