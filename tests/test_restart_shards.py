"""Shards with restart markers: the same pictures as the originals, readable by anyone, verified, staged, resumed."""

import json
import shutil
import subprocess
from datetime import UTC, datetime
from io import BytesIO
from pathlib import Path

import fsspec
import numpy as np
import pytest
from PIL import Image

from pipeline.__main__ import main
from pipeline.dataset.index.index import is_sound, open_index
from pipeline.dataset.index.scan import build_index
from pipeline.dataset.shards import pack as pack_module
from pipeline.dataset.shards import stage_remote
from pipeline.dataset.shards.jpeg import read_frame
from pipeline.dataset.shards.pack import pack_tree
from pipeline.dataset.shards.plan import Options
from pipeline.dataset.shards.restart import make_entry
from pipeline.dataset.shards.stage import stage_shards
from pipeline.dataset.synthetic.generate import Settings, generate_tree
from pipeline.dataset.verify.verify import verify_root
from pipeline.errors import UserError

pytestmark = pytest.mark.skipif(shutil.which("jpegtran") is None, reason="jpegtran is not installed")
OPTIONS = Options(shard_mb=1, restart=4)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """An indexed tree of 2 MB with progressive, CMYK, gray and PNG images; never changed."""
    root = tmp_path_factory.mktemp("source") / "set"
    generate_tree(root, Settings(classes=3, train_per_class=60, val_per_class=8, size=160, oddities=30))
    build_index(root)
    return root


@pytest.fixture(scope="module")
def packed(source, tmp_path_factory) -> Path:
    dest = tmp_path_factory.mktemp("packed") / "shards"
    pack_tree(source, dest, OPTIONS)
    return dest


@pytest.fixture
def copy(packed, tmp_path) -> Path:
    return shutil.copytree(packed, tmp_path / "shards")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def table_entry(root: Path, split, sample: int) -> bytes:
    record = split.restart[sample]
    shard = split.shards[split.records["shard"][sample]]
    start = int(record["table_offset"])
    return (root / shard).with_suffix(".restart").read_bytes()[start : start + int(record["table_size"])]


def test_every_picture_is_the_original_and_has_markers_where_it_can(source, packed):
    tree, made = build_index(source), open_index(packed / "index")
    assert made.fingerprint == tree.fingerprint and is_sound(made)
    kinds = set()
    for name, split in made.splits.items():
        originals = tree.splits[name]
        for i in range(len(split)):
            before, after = originals.read(i), split.read(i)
            assert split.identity(i) == originals.identity(i)
            frame = read_frame(after)
            marked = frame is not None and frame.interval > 0
            with Image.open(BytesIO(before)) as image, Image.open(BytesIO(after)) as again:
                kinds.add((image.format, image.mode, marked))
                if not marked:
                    assert after == before and not split.restart["table_size"][i]
                    continue
                assert again.mode == image.mode and np.array_equal(np.asarray(again), np.asarray(image))
                assert not again.info.get("progressive") and frame.mcu_columns % frame.interval == 0
            assert table_entry(packed, split, i) == make_entry(after, int(split.records["digest"][i])) != b""
    assert kinds >= {
        ("JPEG", "RGB", True),
        ("JPEG", "L", True),
        ("JPEG", "CMYK", False),
        ("PNG", "RGB", False),
    }


def test_shards_are_plain_webdataset(source, packed):
    import webdataset

    index = build_index(source)
    urls = [str(packed / shard) for shard in open_index(packed / "index").splits["train"].shards]
    data = webdataset.WebDataset(urls, shardshuffle=False).decode("pil").to_tuple("__key__", "jpg;png", "cls")
    assert sum(1 for _ in data) == len(index.splits["train"])


def test_bytes_are_the_same_whoever_writes_them_and_a_marker_has_restart_only_where_asked(source, packed, tmp_path):
    argv = ["pack", str(source), str(tmp_path / "parts"), "--shard-mb", "1", "--restart", "4"]
    assert main([*argv, "--part", "2/2"]) == 0
    assert main([*argv, "--part", "1/2"]) == 0
    assert main(argv) == 0
    assert contents(tmp_path / "parts") == contents(packed)
    pack_tree(source, tmp_path / "plain", Options(shard_mb=1))
    assert "restart" not in json.loads((tmp_path / "plain/pack.json").read_text())["options"]
    with pytest.raises(UserError, match="was packed with restart 4 instead of None"):
        pack_tree(source, packed, Options(shard_mb=1))
    with pytest.raises(UserError, match="was packed with restart None instead of 4"):
        pack_tree(source, tmp_path / "plain", OPTIONS)


def test_a_lost_shard_or_table_is_written_again(source, packed, copy):
    (copy / "train-000001.restart").unlink()
    (copy / "train-000000.tar").unlink()
    pack_tree(source, copy, OPTIONS)
    assert contents(copy) == contents(packed)


def test_shards_of_shards_keep_the_identity(packed, tmp_path):
    """Repacked with and without markers, and re-encoded: what the picture is does not change on the way."""
    made = pack_tree(packed, tmp_path / "again", Options(shard_mb=2))
    assert made.fingerprint == open_index(packed / "index").fingerprint
    assert verify_root(tmp_path / "again").good
    split = made.splits["train"]
    assert (split.restart["table_size"] > 0).sum() > 0.5 * len(split)
    small = pack_tree(packed, tmp_path / "small", Options(short_side=64))
    marked = pack_tree(packed, tmp_path / "marked", Options(short_side=64, restart=1))
    assert small.fingerprint == marked.fingerprint != made.fingerprint


def test_alone_restart_means_auto(source, tmp_path):
    assert main(["pack", str(source), str(tmp_path / "a"), "--restart"]) == 0
    assert json.loads((tmp_path / "a/pack.json").read_text())["options"]["restart"] == 8


@pytest.mark.parametrize("value", ["0", "70000"])
def test_an_impossible_interval_is_one_line(source, tmp_path, capsys, value):
    assert main(["pack", str(source), str(tmp_path / "x"), "--restart", value]) == 2
    assert "--restart is" in capsys.readouterr().err


def test_without_jpegtran_it_is_one_line(source, tmp_path, monkeypatch, capsys):
    def missing() -> str:
        raise UserError("adding restart markers requires the program jpegtran")

    monkeypatch.setattr(pack_module, "find_program", missing)
    assert main(["pack", str(source), str(tmp_path / "x"), "--restart", "8"]) == 2
    assert "requires the program jpegtran" in capsys.readouterr().err
    assert not list((tmp_path / "x").glob("*.tar"))


def test_stage_takes_the_tables_along(copy, tmp_path):
    staged, number = stage_shards(copy, tmp_path / "local", quiet=True)
    assert number == len(list(copy.glob("*.tar"))) and is_sound(staged)
    local = contents(tmp_path / "local")
    assert {name: data for name, data in contents(copy).items() if name in local and name != "index/index.json"} == {
        name: data for name, data in local.items() if name not in ("index/index.json", ".stage.lock")
    }
    assert len(list((tmp_path / "local").glob("*.restart"))) == number
    (tmp_path / "local/train-000000.restart").unlink()
    stage_shards(copy, tmp_path / "local", quiet=True)
    assert (tmp_path / "local/train-000000.restart").read_bytes() == (copy / "train-000000.restart").read_bytes()


def test_a_store_gives_tables_that_fit_by_one_listing(copy, tmp_path, monkeypatch, capsys):
    """What is left of another upload's table is no part of the copy, nor is a damaged one. Tables are no shards."""
    store = fsspec.filesystem("memory")
    store.put(f"{copy}/", "/bucket/shards/", recursive=True)
    asked: list[str] = []
    monkeypatch.setattr(stage_remote.Store, "info", lambda self, name: asked.append(name))
    local, name = tmp_path / "local", "train-000000.restart"
    local.mkdir()
    whole = (copy / name).read_bytes()
    (local / f".{name}.stage.tmp").write_bytes(whole[:8] + bytes(len(whole) - 1000))
    number = len(list(copy.glob("*.tar")))
    assert main(["stage", "memory://bucket/shards", str(local)]) == 0
    assert f"{number} of {number} shards copied, 0 existed already" in capsys.readouterr().out
    assert (local / name).read_bytes() == whole and not asked
    assert main(["stage", "memory://bucket/shards", str(local)]) == 0
    assert f"0 of {number} shards copied, {number} existed already" in capsys.readouterr().out
    store.pipe(f"/bucket/shards/{name}", whole[:-1] + bytes([whole[-1] ^ 1]))
    (local / name).unlink()
    assert main(["stage", "memory://bucket/shards", str(local)]) == 1
    assert f"{name} does not hold what its index names" in capsys.readouterr().err
    assert not (local / name).exists()
    store.rm("/bucket", recursive=True)


@pytest.mark.parametrize(
    "told", [{"updated": "2024-05-01T10:00:00.25Z"}, {"last_modified": datetime(2024, 5, 1, 10, tzinfo=UTC)}]
)
def test_times_of_stores_in_their_several_forms(told):
    assert stage_remote._mtime_ns(told) == 1_714_557_600 * 10**9
    assert stage_remote._mtime_ns({"mtime": "yesterday"}) is None and stage_remote._mtime_ns({"size": 3}) is None


def marked_sample(split) -> int:
    return int(np.flatnonzero(split.restart["table_size"])[5])


def test_verify_finds_a_flipped_bit_a_cut_shard_and_offsets_that_do_not_fit(copy):
    split = open_index(copy / "index").splits["train"]
    sample = marked_sample(split)
    table = split.path(sample).with_suffix(".restart")
    whole = split.path(sample).read_bytes(), table.read_bytes()

    def problems() -> list[str]:
        return [f"{named.name}: {named.problem}" for named in verify_root(copy).damaged]

    def flip(path: Path, at: int) -> None:
        data = bytearray(path.read_bytes())
        data[at] ^= 1
        path.write_bytes(data)

    assert problems() == []
    flip(split.path(sample), int(split.records["offset"][sample]) + int(split.records["size"][sample]) // 2)
    assert problems() == [f"{split.name(sample)}: bytes differ from those indexed"]
    split.path(sample).write_bytes(whole[0])
    record = split.restart[sample]
    flip(table, int(record["table_offset"]) + int(record["table_size"]) - 1)
    assert problems() == [f"{split.name(sample)}: its restart table is missing or damaged, or does not fit the shard"]
    table.unlink()
    in_shard = (split.records["shard"] == split.records["shard"][sample]) & (split.restart["table_size"] > 0)
    assert len(problems()) == in_shard.sum()
    table.write_bytes(whole[1])
    split.path(sample).write_bytes(whole[0][: len(whole[0]) // 2])
    assert len(problems()) > 3
    split.path(sample).write_bytes(whole[0])
    assert problems() == []


def test_a_damaged_identity_is_found(copy, capsys):
    path = next((copy / "index").glob("train-restart-*.npy"))
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    assert main(["verify", str(copy)]) == 2
    assert "its records were changed" in capsys.readouterr().err


def test_djpeg_reads_them(packed, tmp_path):
    """Another decoder than PIL's, without a word of complaint."""
    if shutil.which("djpeg") is None:
        pytest.skip("djpeg is not installed")
    split = open_index(packed / "index").splits["train"]
    done = subprocess.run(["djpeg"], input=split.read(marked_sample(split)), capture_output=True, check=True)
    assert not done.stderr
