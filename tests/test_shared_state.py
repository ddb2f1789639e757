"""A checkpoint is read by one rank of a run, and all ranks have the same state."""

import subprocess
import sys

import pytest
import runs

_READ = """
import os, sys
from collections import OrderedDict
import torch
from pipeline.config import TrainConfig
from pipeline.errors import TransientError
from pipeline.training.ranks.world import start_world
from pipeline.training.run_folder import shared_state
from pipeline.training.run_folder.checkpoint import load_state

shared_state.CHUNK_BYTES = 1000  # several chunks, and tensors larger than one
torch.manual_seed(0)
expected = {
    "model": torch.nn.Sequential(torch.nn.Conv2d(3, 40, 3), torch.nn.BatchNorm2d(40)).state_dict(),
    "optimizer": {
        "state": {0: {"step": torch.tensor(3.0), "buffer": torch.randn(4, 0)}},
        "groups": [{"lr": 0.1, "params": (0, 1)}, torch.randn(7).to(torch.bfloat16)],
        "flags": torch.tensor([True, False, True]),
    },
}
expected["model"]["0.weight"] = expected["model"]["0.weight"].to(memory_format=torch.channels_last)
world = start_world(TrainConfig(device="cpu"))
if world.is_rank_zero:
    torch.save(expected, sys.argv[1] + "/all.pt")
reads = []
def read():
    reads.append(world.rank)
    return torch.load(sys.argv[1] + "/all.pt", weights_only=True)
found = shared_state.read_on_rank_zero(read, world)
def same(a, b):
    assert type(a) is type(b), (a, b)
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b)
    elif isinstance(a, dict):
        assert list(a) == list(b)
        [same(a[key], b[key]) for key in a]
    elif isinstance(a, (list, tuple)):
        [same(x, y) for x, y in zip(a, b, strict=True)]
    else:
        assert a == b
same(found, expected)
assert found["model"]._metadata == expected["model"]._metadata
assert reads == ([0] if world.is_rank_zero else [])
from pathlib import Path
try:
    shared_state.read_on_rank_zero(lambda: load_state(Path("/nowhere"), ["model"]), world)
except TransientError as error:
    sys.stdout.write("refused\\n" if "/nowhere" in str(error) else f"{error}\\n")  # in one piece: three ranks write
world.close()
sys.stdout.flush()
os._exit(0)  # as the command line ends: other threads may abort while the interpreter shuts down
"""

_COUNTING = """
import os, sys
import torch
from pipeline.__main__ import main
real = torch.load
def load(path, **options):
    with open(os.environ["READS"], "a") as file:
        file.write(f"{os.environ.get('RANK', 0)} {os.path.basename(path)}\\n")
    return real(path, **options)
torch.load = load
if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
"""


def test_three_ranks_have_what_rank_0_read(tmp_path):
    program = tmp_path / "rank.py"
    program.write_text(_READ)
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3"]
    done = subprocess.run(
        [*run, str(program), str(tmp_path)], env=runs.environment(), capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0 and done.stdout.split() == ["refused"] * 3, done.stdout + done.stderr


@pytest.mark.slow
def test_a_resume_on_two_ranks_opens_each_file_once(root, tmp_path, monkeypatch):
    program = tmp_path / "counting.py"
    program.write_text(_COUNTING)
    run, options = tmp_path / "run", ["--checkpoint.every_steps", "2", "--ema.decay", "0.9"]
    runs.train(root, run, *options, "--train.max_steps", "2", processes=2)
    monkeypatch.setenv("READS", str(tmp_path / "reads"))
    runs.train(root, run, *options, "--train.max_steps", "4", processes=2, program=[str(program)])
    assert sorted((tmp_path / "reads").read_text().splitlines()) == ["0 ema.pt", "0 model.pt", "0 optimizer.pt"]
    assert [row["step"] for row in runs.rows(run, "train")] == [1, 2, 3, 4]
