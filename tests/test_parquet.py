"""Hugging Face parquet files into shards: the bytes that the same images in folders give; resumed, refused."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_layouts import SYNSETS, expected, jpeg  # noqa: F401 - a fixture
from test_tar_layouts import NUMBER, samples

from pipeline.__main__ import main
from pipeline.dataset.index.index import open_index

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


def write_table(path: Path, rows: list[tuple[str | None, bytes, int]], names: tuple = (), group: int = 2) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    image = pa.array([{"bytes": data, "path": name} for name, data, _ in rows], kind)
    table = pa.table({"image": image, "label": pa.array([label for _, _, label in rows], pa.int64())})
    about = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(about)}), path, row_group_size=group)


@pytest.fixture
def parquet(tmp_path) -> Path:
    """As `ILSVRC/imagenet-1k` lies: `data/train-00000-of-00002.parquet`, words as names of the classes, a test split
    without labels."""
    root = tmp_path / "hf"
    words = tuple(f"words of {synset}, and more" for synset in sorted(SYNSETS.values()))
    for split, name in (("train", "train"), ("val", "validation")):
        rows = [
            (f"{key}_{synset}.JPEG" if split == "val" else f"{key}.JPEG", data, NUMBER[synset])
            for key, synset, data in samples(split)
        ]
        half = len(rows) // 2
        write_table(root / f"data/{name}-00000-of-00002.parquet", rows[:half], words)
        write_table(root / f"data/{name}-00001-of-00002.parquet", rows[half:], words)
    write_table(root / "data/test-00000-of-00001.parquet", [(None, jpeg(1), -1)], words)
    return root


def test_the_shards_are_those_of_the_tree(tmp_path, parquet, expected, capsys):  # noqa: F811
    packed = tmp_path / "packed"
    command = ["pack", str(parquet), str(packed)]
    assert main(["index", str(parquet)]) == 2
    assert "pipeline pack" in capsys.readouterr().err
    assert main(command) == 0
    index = open_index(packed / "index")
    assert index.synsets == tuple(sorted(SYNSETS.values()))
    assert [len(split) for split in index.splits.values()] == [9, 6]
    assert main(["pack", str(tmp_path / "expected"), str(tmp_path / "tree")]) == 0
    train = (tmp_path / "tree/train-000000.tar").read_bytes()
    assert (packed / "train-000000.tar").read_bytes() == train
    assert (
        open_index(tmp_path / "tree/index").splits["train"].records["digest"].tolist()
        == index.splits["train"].records["digest"].tolist()
    )
    assert index.fingerprint == expected
    assert main(["verify", str(packed)]) == 0
    assert not (packed / ".packing").exists()
    before = (packed / "train-000000.tar").stat().st_mtime_ns
    assert main(command) == 0
    assert (packed / "train-000000.tar").stat().st_mtime_ns == before


def test_a_killed_pack_goes_on(tmp_path):
    random.seed(0)
    for split in ("train", "test"):
        write_table(tmp_path / f"hf/{split}.parquet", [(None, jpeg(i), i % 3) for i in range(600)], group=10)
    packed = tmp_path / "packed"
    command = [sys.executable, "-m", "pipeline", "pack", str(tmp_path / "hf"), str(packed), "--processes", "1"]
    journal = packed / ".packing/source/scan.journal"
    for ready in (lambda: journal.exists() and journal.stat().st_size > 0, lambda: list(packed.glob(".*.tmp"))):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 90
        while not ready() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)  # polls a condition
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert main(command[3:]) == 0
    again = tmp_path / "again"
    assert main(["pack", str(tmp_path / "hf"), str(again)]) == 0
    for path in again.glob("*.tar"):
        assert (packed / path.name).read_bytes() == path.read_bytes()
    assert open_index(again / "index").synsets == ("0", "1", "2")


def test_names_of_classes_where_no_synset_is_told(tmp_path):
    for split in ("train", "valid"):
        rows = [(None, jpeg(i), i % 2) for i in range(4)]
        write_table(tmp_path / f"hf/{split}/0000.parquet", rows, ("dog", "cat"))
    assert main(["pack", str(tmp_path / "hf"), str(tmp_path / "out")]) == 0
    index = open_index(tmp_path / "out/index")
    assert index.synsets == ("cat", "dog")
    train = index.splits["train"]
    assert {train.read(i) for i in range(4) if train.records["label"][i] == 1} == {jpeg(0), jpeg(2)}


def test_what_will_not_do_is_one_line(tmp_path, parquet, capsys, monkeypatch):
    def says(*argv: str) -> str:
        assert main(["pack", str(parquet), str(tmp_path / "out"), *argv]) == 2
        error = capsys.readouterr().err.strip()
        assert len([line for line in error.splitlines() if line.startswith("pipeline pack")]) == 1
        return error

    assert "pack the shards" in says("--short-side", "32")
    assert "by one job" in says("--part", "1/2")
    write_table(parquet / "data/train-00002-of-00003.parquet", [("x_n01440764.JPEG", jpeg(5)[:-200], 0)])
    assert "1 images of" in says() and not (tmp_path / "out/pack.json").exists()
    assert main(["pack", str(parquet), str(tmp_path / "out"), "--unreadable", "skip"]) == 0
    assert open_index(tmp_path / "out/index").left_out["train"]["unreadable"]["count"] == 1
    pq.write_table(pa.table({"text": ["a"]}), parquet / "data/train-00002-of-00003.parquet")
    capsys.readouterr()
    assert "has the columns text" in says()
    (parquet / "data/train-00002-of-00003.parquet").write_bytes(b"PAR1 cut")
    assert "can't be read as parquet" in says()
    without = tmp_path / "without/pyarrow.py"
    without.parent.mkdir()
    without.write_text("raise ImportError('No module named pyarrow')\n")
    paths = os.pathsep.join([str(without.parent), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "pipeline", "pack", str(parquet), str(tmp_path / "new")]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "pip install 'imagenet-pipeline[parquet]'" in done.stderr
