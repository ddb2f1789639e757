"""Whatever stands in a file that a user or a disk may have spoilt, only the project's own errors come out."""

import contextlib
import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import runs
import torch
import xxhash
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.config import load_config
from pipeline.dataset.imagenet import SYNSET_MAPPING, VAL_SOLUTION, read_synset_words, read_val_solution
from pipeline.dataset.index.decode import FileContent, inspect
from pipeline.dataset.index.index import open_index
from pipeline.dataset.index.scan import build_index
from pipeline.dataset.shards.pack import pack
from pipeline.errors import TransientError, UserError
from pipeline.loader.source import Source, UnreadableSample
from pipeline.tracking.ledger import Ledger
from pipeline.tracking.ledger_rows import last_steps, read_rows
from pipeline.training.run_folder.checkpoint import write_checkpoint
from pipeline.training.run_folder.manifest import DamagedCheckpoint, find_newest_good, seal
from pipeline.training.run_folder.same_recipe import check_fingerprints

OWN = (UserError, TransientError, DamagedCheckpoint, UnreadableSample)
bounded = settings(
    max_examples=60, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def spoilt(draw, data: bytes) -> bytes:
    """`data` with a piece replaced, cut out or doubled."""
    start = draw(st.integers(0, len(data)))
    end = draw(st.integers(start, min(len(data), start + 40)))
    return data[:start] + draw(st.binary(max_size=12)) + data[end:]


@st.composite
def with_another_value(draw, document: dict) -> dict:
    """`document` with one value, at any depth, replaced or removed."""
    document = json.loads(json.dumps(document))
    place = document
    while True:
        key = draw(st.sampled_from(sorted(place)) if isinstance(place, dict) else st.integers(0, len(place) - 1))
        if isinstance(place[key], dict | list) and place[key] and draw(st.booleans()):
            place = place[key]
        elif draw(st.booleans()):
            place[key] = draw(VALUES)
            return document
        else:
            del place[key]
            return document


@pytest.fixture(scope="module")
def packed(synthetic_root, tmp_path_factory):
    """The files of shards and their index: name -> bytes, and the folder they can be put back into."""
    folder = tmp_path_factory.mktemp("packed") / "shards"
    build_index(synthetic_root)
    pack(str(synthetic_root), str(folder))
    return folder


@contextlib.contextmanager
def written(path: Path, data: bytes):
    """Other bytes in a file, for a while."""
    before = path.read_bytes()
    path.write_bytes(data)
    try:
        yield
    finally:
        path.write_bytes(before)


CONFIG = yaml.safe_load(runs.TINY.read_text())


@settings(bounded, max_examples=12)  # a parser of the command line takes its time
@given(st.data())
def test_configurations(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    if data.draw(st.booleans()):
        path.write_bytes(data.draw(spoilt(runs.TINY.read_bytes())))
    else:
        path.write_text(yaml.safe_dump(data.draw(with_another_value(CONFIG))))
    with contextlib.suppress(*OWN), contextlib.redirect_stderr(None):
        try:
            load_config(path)
        except SystemExit as error:  # jsonargparse's one line
            assert error.code == 2


@bounded
@given(st.data())
def test_indices(packed, data):
    """A spoilt index.json, or spoilt records: refused, or its samples are read or refused one by one."""
    folder = packed / "index"
    path = data.draw(st.sampled_from(sorted(folder.iterdir())))
    content = path.read_bytes()
    if path.suffix == ".json" and data.draw(st.booleans()):
        content = json.dumps(data.draw(with_another_value(json.loads(content)))).encode()
    else:
        content = data.draw(spoilt(content))
    with written(path, content), contextlib.suppress(*OWN):
        index = open_index(folder)
        split = index.splits["train"]
        source = Source(split)
        try:
            for sample in range(0, len(split), 16):
                with contextlib.suppress(*OWN):
                    source.read(sample)
        finally:
            source.close()


@bounded
@given(st.data())
def test_shards(packed, data):
    """Of a spoilt shard only what is as it was is read."""
    path = next(packed.glob("train-*.tar"))
    split = open_index(packed / "index").splits["train"]
    with written(path, data.draw(spoilt(path.read_bytes()))):
        source = Source(split)
        read = source.read_batch(np.arange(len(split)))
        source.close()
    for sample, found in enumerate(read):
        if not isinstance(found, UnreadableSample):
            assert xxhash.xxh3_64_intdigest(found) == int(split.records["digest"][sample])


META = {
    "semantic_config": {"optim.lr": 0.1},
    "index_fingerprint": "abc",
    "blacklist": [[1, 2]],
    "rollbacks": [[5, 2, 0.5, 0]],
}


@bounded
@given(st.data())
def test_checkpoint_manifests(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp() / "fuzz-checkpoints"
    path = folder / "step-000000003"
    if not path.exists():
        write_checkpoint(folder, 3, {"model": {"w": torch.zeros(2)}, "optimizer": {}}, META)
    meta = json.loads((path / "meta.json").read_bytes())
    if data.draw(st.booleans()):
        content = data.draw(spoilt((path / "meta.json").read_bytes()))
    else:  # with a digest that is right, as somebody else's program may write it
        content = seal(data.draw(with_another_value(meta)))
    with written(path / "meta.json", content), contextlib.suppress(*OWN):
        found = find_newest_good(folder, lambda text: None)
        assert found is None or check_fingerprints(*found, META["semantic_config"], "abc") is None


@bounded
@given(st.data())
def test_lists_of_the_archive(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp() / "fuzz-lists"
    folder.mkdir(exist_ok=True)
    solution = b"ImageId,PredictionString\nILSVRC2012_val_00000001,n01440764 1 2 3 4\n"
    (folder / VAL_SOLUTION).write_bytes(data.draw(spoilt(solution)))
    (folder / SYNSET_MAPPING).write_bytes(data.draw(spoilt(b"n01440764 tench\nn01443537 goldfish\n")))
    for read in (lambda: read_val_solution(folder / VAL_SOLUTION), lambda: read_synset_words(folder)):
        with contextlib.suppress(*OWN):
            read()


@bounded
@given(st.data())
def test_ledgers(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "fuzz-metrics.jsonl"
    rows = [{"kind": "train", "step": step, "loss": 1.5} for step in (1, 2, 3)] + [{"kind": "eval", "step": 3}]
    path.write_bytes(data.draw(spoilt("".join(json.dumps(row) + "\n" for row in rows).encode())))
    with contextlib.suppress(*OWN):
        last_steps(path)
        ledger = Ledger(path, 2)
        ledger.append({"kind": "train", "step": 3})
        ledger.close()
        assert [row["step"] for row in read_rows(path) if row.get("kind") == "train"][-1] == 3


def test_an_image_of_300_megapixels_is_refused_before_it_takes_memory():
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 20_000, 15_000, 8, 2, 0, 0, 0)
    picture = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    seen = inspect(FileContent(picture, 0))
    assert "300000000 pixels" in seen.reason and seen.width == 0
