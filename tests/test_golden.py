"""Frozen behavior: three tiny runs must give the batches, learning rates and losses that `golden.json` holds.

A change that is not meant to alter the mathematics leaves this test as it is. One that is meant to must say why in the
changelog, and write the file again: `python tests/test_golden.py`.
"""

import json
import tempfile
from pathlib import Path

import pytest
import runs

from pipeline.dataset.index.scan import build_index

GOLDEN = Path(__file__).with_name("golden.json")
STEPS = 8
EVERYTHING = str(runs.TINY.with_name("everything.yaml"))
#: name -> how far a loss may be off: sums are taken in another order on another processor
TOLERANCE = {"bf16-everything": 2e-2, "fp32-two-ranks": 1e-4, "fp32-killed-and-resumed": 1e-4}


def measure(name: str, root: Path, run: Path) -> list[dict]:
    """Train one of the three runs and return its training rows: digest, learning rate, loss."""
    steps = ["--train.max_steps", str(STEPS)]
    fp32 = ["--train.precision", "fp32", *steps]
    if name == "bf16-everything":
        runs.call(root, run, *steps, recipe=EVERYTHING)
    elif name == "fp32-two-ranks":
        runs.train(root, run, *fp32, "--model.dropout", "0.1", processes=2)
    else:
        runs.kill_once_saved(3, root, run, *fp32, "--checkpoint.every_steps", "3")
        runs.call(root, run, *fp32)
    return [{key: row[key] for key in ("batch_digest", "lr", "loss")} for row in runs.rows(run, "train")]


@pytest.mark.parametrize("name", TOLERANCE)
def test_nothing_but_what_was_meant_has_changed(synthetic_root, tmp_path, name):
    build_index(synthetic_root)
    expected, found = json.loads(GOLDEN.read_text())[name], measure(name, synthetic_root, tmp_path / "run")
    assert len(found) == STEPS
    assert [row["batch_digest"] for row in found] == [row["batch_digest"] for row in expected]
    assert [row["lr"] for row in found] == pytest.approx([row["lr"] for row in expected], rel=1e-12)
    assert [row["loss"] for row in found] == pytest.approx([row["loss"] for row in expected], abs=TOLERANCE[name])


if __name__ == "__main__":
    from conftest import SYNTHETIC

    from pipeline.dataset.synthetic.generate import generate_tree

    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch) / "imagenet"
        generate_tree(data, SYNTHETIC)
        build_index(data)
        golden = {name: measure(name, data, Path(scratch) / name) for name in TOLERANCE}
    GOLDEN.write_text(json.dumps(golden, indent=1) + "\n")
