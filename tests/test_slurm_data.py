"""The batch scripts that fetch and pack, on a real Slurm cluster: parts, a signal, one clear line."""

import sys
from pathlib import Path

import pytest
from slurm_cluster import wait_for

from pipeline.dataset.index.index import open_index
from pipeline.dataset.index.scan import build_index
from pipeline.dataset.shards.pack import pack_tree
from pipeline.dataset.shards.plan import Options
from pipeline.dataset.synthetic.archive import write_kaggle_zip
from pipeline.dataset.synthetic.generate import Settings, generate_tree
from pipeline.dataset.verify.verify import verify_root

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.slurm


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("slurm-data") / "tree"
    generate_tree(root, Settings(classes=3, train_per_class=110, val_per_class=8, size=160))
    build_index(root)
    return root


def submit(cluster, folder: Path, *arguments: str, **env: str) -> str:
    settings = {"PYTHON": sys.executable, "PIPELINE_HOME": str(ROOT), "SITE_ENV": "/dev/null", **env}
    return cluster.sbatch(
        "--exclusive", "--cpus-per-task=2", "--output=%x-%A-%a.log", *arguments, cwd=folder, env=settings
    )


def logs(folder: Path) -> str:
    return "\n".join(path.read_text() for path in sorted(folder.glob("*.log")))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_an_array_packs_what_one_process_would(cluster, tree, tmp_path):
    env = {"DATA_ROOT": str(tree), "SHARDS": str(tmp_path / "shards")}
    options = ["--shard-mb", "1", "--processes", "1"]
    array = submit(cluster, tmp_path, "--array=4-6", str(ROOT / "slurm/pack.sh"), *options, **env)
    last = submit(cluster, tmp_path, f"--dependency=afterok:{array}", str(ROOT / "slurm/pack.sh"), *options, **env)
    state = cluster.wait_state(last, "COMPLETED", "FAILED", "CANCELLED")
    assert state == "COMPLETED", logs(tmp_path)
    for part in ("1/3", "2/3", "3/3"):
        assert f"part {part} is written" in logs(tmp_path)
    pack_tree(tree, tmp_path / "one", Options(shard_mb=1))
    assert contents(tmp_path / "shards") == contents(tmp_path / "one")


def test_a_signal_ahead_of_the_limit_requeues_the_fetch_and_it_goes_on(cluster, tree, tmp_path):
    write_kaggle_zip(tree, tmp_path / "archive.zip")
    # The first start waits at a gate, so that the signal is sure to meet it at work.
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/bash\nif mkdir {tmp_path}/started 2>/dev/null; then exec sleep 600; fi\nexec {sys.executable} "$@"\n'
    )
    python.chmod(0o755)
    env = {"DATA_ROOT": str(tmp_path / "root"), "PYTHON": str(python)}
    job = submit(cluster, tmp_path, str(ROOT / "slurm/fetch.sh"), "--from", str(tmp_path / "archive.zip"), **env)
    wait_for(lambda: (tmp_path / "started").exists(), 60, lambda: logs(tmp_path))
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    assert cluster.wait_state(job, "COMPLETED", "FAILED", "CANCELLED") == "COMPLETED", logs(tmp_path)
    assert cluster.show(job)["Restarts"] == "1"
    assert verify_root(tmp_path / "root").good
    assert open_index(tmp_path / "root/index").fingerprint == build_index(tree).fingerprint


def test_a_wrong_option_fails_once_with_one_line(cluster, tree, tmp_path):
    env = {"DATA_ROOT": str(tree), "SHARDS": str(tmp_path / "shards")}
    job = submit(cluster, tmp_path, str(ROOT / "slurm/pack.sh"), "--quality", "400", **env)
    assert cluster.wait_state(job, "COMPLETED", "FAILED", "CANCELLED") == "FAILED"
    assert cluster.show(job)["ExitCode"] == "2:0"
    assert cluster.show(job)["Restarts"] == "0"
    assert "--quality is 400; give a number from 1 to 100" in logs(tmp_path)
    assert "Traceback" not in logs(tmp_path)
