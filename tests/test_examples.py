"""The examples, run as their first lines say."""

import importlib.util
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import runs
from launching import descendants, kill

EXAMPLES = Path(__file__).parents[1] / "examples"


def plain_loop(root, folder, processes, epochs=3):
    folder.mkdir(exist_ok=True)
    launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--rdzv-backend=c10d"]
    launcher += ["--rdzv-endpoint=localhost:0"]
    command = [sys.executable, *launcher, EXAMPLES / "plain_loop.py", root, folder, str(epochs)]
    return subprocess.Popen(
        command,
        env=runs.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def log(folder):
    """Step, digest of the plan, sum of the pixels of the global batch, loss: of each line."""
    path = folder / "log.txt"
    lines = path.read_text().splitlines() if path.exists() else []
    parts = [line.split() for line in lines if len(line.split()) == 4]
    return [(int(step), digest, float(pixels), float(loss)) for step, digest, pixels, loss in parts]


@pytest.mark.long
def test_plain_loop_is_killed_and_resumes_on_another_number_of_ranks(root, tmp_path):
    """The same batches, pixel for pixel, as without the kill."""
    undisturbed = plain_loop(root, tmp_path / "undisturbed", 1)
    output, _ = undisturbed.communicate(timeout=200)
    assert undisturbed.returncode == 0, output
    expected = log(tmp_path / "undisturbed")
    assert [step for step, *_ in expected] == list(range(1, 13))  # 3 epochs of 96 images in batches of 24

    killed = plain_loop(root, tmp_path / "killed", 2)
    deadline = time.monotonic() + 120
    while len(log(tmp_path / "killed")) < 5 and killed.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)  # polls a condition
    for pid in [killed.pid, *descendants(killed.pid)]:
        kill(pid, signal.SIGKILL)
    killed.communicate(timeout=60)
    assert killed.returncode == -signal.SIGKILL
    seen = log(tmp_path / "killed")
    assert 5 <= len(seen) < 12 and (tmp_path / "killed/checkpoint.pt").exists()

    resumed = plain_loop(root, tmp_path / "killed", 1)
    output, _ = resumed.communicate(timeout=200)
    assert resumed.returncode == 0, output
    again = log(tmp_path / "killed")[len(seen) :]
    assert again[0][0] in (4, 7, 10) and again[-1][0] == 12  # from a checkpoint inside an epoch of 4 steps
    for step, digest, pixels, loss in (*seen, *again):
        assert (digest, pixels) == (expected[step - 1][1], pytest.approx(expected[step - 1][2], rel=1e-9))
        assert loss > 0


def test_timm_model_is_trained_and_scored(root):
    pytest.importorskip("timm")
    command = [sys.executable, str(EXAMPLES / "timm_model.py"), str(root), "test_resnet", "2"]
    done = subprocess.run(command, env=runs.environment(), capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    lines = re.findall(r"^epoch (\d): loss \d+\.\d+, \d+ of 24 correct$", done.stdout, re.MULTILINE)
    assert lines == ["1", "2"]


def test_lightning_resumes_inside_the_epoch(root, tmp_path):
    """Lightning itself keeps the loader's position: the resumed run sees what the undisturbed one sees."""
    pytest.importorskip("pytorch_lightning")
    spec = importlib.util.spec_from_file_location("lightning_module", EXAMPLES / "lightning_module.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    (tmp_path / "first").mkdir()
    whole = example.fit(str(root), str(tmp_path), 7)
    example.fit(str(root), str(tmp_path / "first"), 3)  # an epoch has 4 steps
    resumed = example.fit(str(root), str(tmp_path / "first"), 7, str(tmp_path / "first/step-3.ckpt"))
    assert sorted(whole.digests) == list(range(7)) and sorted(resumed.digests) == [3, 4, 5, 6]
    assert all(whole.digests[step] == digest for step, digest in resumed.digests.items())
    assert len(set(whole.digests.values())) == 7
    for key, value in whole.network.state_dict().items():
        assert value.equal(resumed.network.state_dict()[key]), key
