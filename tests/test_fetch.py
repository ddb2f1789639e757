"""`fetch` from a Kaggle that works: whole, in part, again, from a file, by the client's own download."""

import gzip
import json
import shutil
import signal
import stat
import subprocess
import threading
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest
from fetching import BASE, assert_whole, command, fetch, fetch_from, read_images, sorted_images
from kaggle_server import Faults, KaggleServer

from pipeline.dataset import imagenet
from pipeline.dataset.acquire import kaggle
from pipeline.dataset.acquire.access.remote import LocalFile
from pipeline.dataset.acquire.zip_directory import read_directory
from pipeline.dataset.index.index import index_folder, open_index
from pipeline.dataset.synthetic.archive import NESTED
from pipeline.errors import UserError


def test_whole_fetch_ends_with_a_verified_index(kaggle_zip, kaggle_members, tmp_path):
    with KaggleServer(kaggle_zip) as server:
        env = server.environment(tmp_path / "home")
        done = fetch(tmp_path / "data", env, "--request_mb", "0.02")
        assert done.code == 0, done.err
        assert "complete and verified: 96 train and 24 val images" in done.out
        assert "Fetching images: 0 of 0 MB (100 %)" in done.err, "a plain line where there is no terminal"
        assert_whole(tmp_path / "data", kaggle_members)
        index = open_index(index_folder(tmp_path / "data"))
        assert {split: len(samples) for split, samples in index.splits.items()} == {"train": 96, "val": 24}
        assert not server.problems
        calls = len(server.api_calls)
        again = fetch(tmp_path / "data", env)
        assert (again.code, again.out) == (0, done.out)
        assert len(server.api_calls) == calls, "a finished fetch asks nothing of Kaggle"


def test_neighbours_share_a_request(kaggle_zip, kaggle_members, tmp_path):
    with KaggleServer(kaggle_zip) as server:
        done = fetch(tmp_path / "data", server.environment(tmp_path / "home"), "--index", "false", "--streams", "2")
        assert done.code == 0, done.err
        assert len(server.ranges()) < 12, "120 images and the lists"
    assert_whole(tmp_path / "data", kaggle_members)


def test_disk_never_holds_more_than_the_data_and_5_percent(kaggle_zip, kaggle_members, tmp_path):
    dest, largest = tmp_path / "data", [0]
    lock = threading.Lock()

    def measure(_total):
        with lock:
            sizes = {}  # by inode: a file that is moved while the folders are walked counts once
            for path in dest.rglob("*"):
                try:
                    facts = path.stat()
                except FileNotFoundError:
                    continue
                sizes[facts.st_ino] = facts.st_size if stat.S_ISREG(facts.st_mode) else 0
            largest[0] = max(largest[0], sum(sizes.values()))

    with KaggleServer(kaggle_zip, Faults(on_sent=measure)) as server:
        assert fetch_from(server, tmp_path).code == 0
    measure(0)
    lists = sum(len(data) for name, data in kaggle_members.items() if name.startswith(("LOC_", "ILSVRC/ImageSets")))
    data = lists + sum(map(len, sorted_images(kaggle_members).values()))
    assert data <= largest[0] <= 1.05 * data


def test_val_split_alone(kaggle_zip, kaggle_members, tmp_path):
    with KaggleServer(kaggle_zip) as server:
        done = fetch_from(server, tmp_path, "--split", "val")
        assert done.code == 0, done.err
        asked = sum(request.end - request.start for request in server.ranges())
    expected = {n: data for n, data in sorted_images(kaggle_members).items() if "/val/" in n}
    assert read_images(tmp_path / "data") == expected
    assert "complete and verified: 24 val images" in done.out
    assert asked < kaggle_zip.stat().st_size, "what is not wanted is not read"


@pytest.mark.parametrize("classes", ["2", "n99000003,n99000001"])
def test_some_classes_of_both_splits_then_all(kaggle_zip, kaggle_members, tmp_path, classes):
    chosen = {"2": {"n99000000", "n99000001"}}.get(classes, set(classes.split(",")))
    expected = {n: d for n, d in sorted_images(kaggle_members).items() if n.split("/")[-2] in chosen}
    with KaggleServer(kaggle_zip) as server:
        env = server.environment(tmp_path / "home")
        done = fetch(tmp_path / "data", env, "--classes", classes)
        assert done.code == 0, done.err
        assert read_images(tmp_path / "data") == expected
        assert open_index(index_folder(tmp_path / "data")).num_classes == 2
        assert json.loads((tmp_path / "data/fetch.json").read_text())["selected"]["val"] == sorted(chosen)
        before = len(server.served)
        done = fetch(tmp_path / "data", env)
        assert done.code == 0, done.err
        assert f"{len(expected)} of 120 images exist already" in done.err
        assert sum(r.end - r.start for r in server.served[before + 1 :]) < kaggle_zip.stat().st_size
    assert_whole(tmp_path / "data", kaggle_members)
    assert open_index(index_folder(tmp_path / "data")).num_classes == 4


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--classes", "n01440764"), "no class n01440764"),
        (("--classes", "9"), "has 4 classes"),
        (("--classes", "tench"), "--classes 'tench'"),
        (("--streams", "0"), "greater than 0"),
        (("--from", "/nowhere/archive.zip"), "/nowhere/archive.zip"),
        (("--split", "test"), "split"),
        (("--competition", "no-such"), "no competition 'no-such'"),
    ],
)
def test_wrong_option_is_one_line(kaggle_zip, tmp_path, options, words):
    with KaggleServer(kaggle_zip) as server:
        done = fetch_from(server, tmp_path, *options)
    assert done.code == 2
    assert words in done.last_line


def test_files_of_unknown_origin_are_checked_by_their_crc(kaggle_zip, kaggle_members, tmp_path):
    """Files from an earlier unpacking are kept where they are right; a wrong one of the right size is not."""
    expected = sorted_images(kaggle_members)
    train = sorted(name for name in expected if "/train/" in name)
    for name in train[:40]:
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(expected[name])
    wrong = tmp_path / "data" / train[7]
    wrong.write_bytes(expected[train[7]][:-1] + b"?")
    with KaggleServer(kaggle_zip) as server:
        done = fetch_from(server, tmp_path)
    assert done.code == 0, done.err
    assert "39 of 120 images exist already" in done.err
    assert_whole(tmp_path / "data", kaggle_members)


def test_annotations_tell_the_labels_where_the_solution_is_missing(kaggle_zip, kaggle_members, tmp_path):
    path = tmp_path / "no-solution.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in kaggle_members.items():
            if name != imagenet.VAL_SOLUTION:
                archive.writestr(name, data)
    done = fetch(tmp_path / "data", {}, "--from", str(path), "--classes", "3", "--split", "val")
    assert done.code == 0, done.err
    kept = {n: d for n, d in sorted_images(kaggle_members).items() if "/val/" in n and "n99000003" not in n}
    assert read_images(tmp_path / "data") == kept


def test_zip64_archive(kaggle_members, tmp_path, monkeypatch):
    """Every size and offset in 64-bit fields, members beyond 4 GiB (the file before them is a hole)."""
    path = tmp_path / "imagenet-object-localization-challenge.zip"
    with path.open("wb") as file:
        file.seek((4 << 30) + 12345)
        monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 100)
        monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 10)
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in kaggle_members.items():
                archive.writestr(name, data)
    directory = read_directory(LocalFile(path))
    assert directory.entries["start"].min() > 4 << 30
    with KaggleServer(path) as server:
        done = fetch_from(server, tmp_path)
    assert done.code == 0, done.err
    assert_whole(tmp_path / "data", kaggle_members)


@pytest.mark.parametrize("form", ["remote zip", "local zip", "tar.gz"])
def test_nested_tar(nested_kaggle_zip, kaggle_members, tmp_path, form):
    inner = tmp_path / NESTED
    if form == "tar.gz":
        with zipfile.ZipFile(nested_kaggle_zip) as archive:
            archive.extract(NESTED, tmp_path)
            for name in (imagenet.VAL_SOLUTION, imagenet.SYNSET_MAPPING):
                archive.extract(name, tmp_path / "data")
    with KaggleServer(nested_kaggle_zip) as server:
        source = {"remote zip": (), "local zip": ("--from", str(nested_kaggle_zip)), "tar.gz": ("--from", str(inner))}[
            form
        ]
        done = fetch_from(server, tmp_path, *source)
        assert done.code == 0, done.err
        assert bool(server.api_calls) == (form == "remote zip")
        assert_whole(tmp_path / "data", kaggle_members)
        missing = next((tmp_path / "data" / BASE / "val").rglob("*.JPEG"))
        missing.unlink()
        kept = next((tmp_path / "data" / BASE / "train").rglob("*.JPEG"))
        before = kept.stat().st_mtime_ns
        assert fetch_from(server, tmp_path, *source).code == 0
    assert kept.stat().st_mtime_ns == before, "what is whole is not written again"
    assert_whole(tmp_path / "data", kaggle_members)


def test_nested_tar_gives_some_classes(nested_kaggle_zip, kaggle_members, tmp_path):
    done = fetch(tmp_path / "data", {}, "--from", str(nested_kaggle_zip), "--classes", "1")
    assert done.code == 0, done.err
    assert read_images(tmp_path / "data") == {
        name: data for name, data in sorted_images(kaggle_members).items() if name.split("/")[-2] == "n99000000"
    }


def test_a_client_that_spoils_downloads_is_refused(monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", lambda name: "2.2.4")
    with pytest.raises(UserError, match=r"kaggle 2\.2\.4 can corrupt a partial zip; upgrade it: pip install"):
        kaggle.check_version()


@pytest.mark.skipif(version("kaggle") == "2.2.4", reason="the download of kaggle 2.2.4 is refused: the test above")
def test_clients_own_download_is_verified_and_removed(kaggle_zip, kaggle_members, tmp_path):
    with KaggleServer(kaggle_zip, Faults(ranges=False)) as server:
        done = fetch_from(server, tmp_path, "--via", "zip")
        assert done.code == 0, done.err
        assert not server.ranges()
    assert_whole(tmp_path / "data", kaggle_members)
    assert not list((tmp_path / "data").rglob("*.zip"))


def test_archive_that_is_only_a_part_is_refused(kaggle_zip, kaggle_members, tmp_path):
    path = tmp_path / "part.zip"
    left_out = f"{BASE}/train/n99000002/n99000002_5.JPEG"
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in kaggle_members.items():
            if name != left_out:
                archive.writestr(name, data)
    done = fetch(tmp_path / "data", {}, "--from", str(path))
    assert done.code == 2
    assert "lacks 1 of the 96 train images" in done.last_line and left_out in done.last_line
    assert not read_images(tmp_path / "data")


def test_local_zip_that_was_cut_is_refused(kaggle_zip, tmp_path):
    path = tmp_path / "cut.zip"
    path.write_bytes(kaggle_zip.read_bytes()[:-100_000])
    done = fetch(tmp_path / "data", {}, "--from", str(path))
    assert done.code == 2 and "not a complete zip" in done.last_line


def test_local_tar_that_was_cut_is_refused(nested_kaggle_zip, kaggle_members, tmp_path):
    with zipfile.ZipFile(nested_kaggle_zip) as archive:
        data = archive.read(NESTED)
    (tmp_path / "cut.tar.gz").write_bytes(data[:-2000])
    done = fetch(tmp_path / "data", {}, "--from", str(tmp_path / "cut.tar.gz"))
    assert done.code == 1 and "cut or damaged" in done.last_line
    late = gzip.compress(gzip.decompress(data) + bytes(3 << 20))  # the checksum lies far behind the tar's end
    (tmp_path / "late.tar.gz").write_bytes(late[:-8] + b"\0\0\0\0" + late[-4:])
    done = fetch(tmp_path / "data", {}, "--from", str(tmp_path / "late.tar.gz"))
    assert done.code == 1 and "cut or damaged" in done.last_line
    (tmp_path / "wrong.tar.gz").write_bytes(data[:-8] + b"\0\0\0\0" + data[-4:])
    done = fetch(tmp_path / "data", {}, "--from", str(tmp_path / "wrong.tar.gz"))
    assert done.code == 1 and "cut or damaged" in done.last_line


def test_undecodable_image_is_named(synthetic_root, kaggle_members, tmp_path):
    path, bad = tmp_path / "bad.zip", f"{BASE}/train/n99000001/n99000001_3.JPEG"
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in kaggle_members.items():
            archive.writestr(name, data[: len(data) // 2] if name == bad else data)
    done = fetch(tmp_path / "data", {}, "--from", str(path))
    assert done.code == 2
    assert "1 image can't be decoded" in done.last_line and bad in done.last_line


def test_only_one_fetch_works_in_a_folder_and_sigterm_stops_it(kaggle_zip, kaggle_members, tmp_path):
    started = threading.Event()
    faults = Faults(stall=lambda number: number > 6, on_request=lambda number: number > 8 and started.set())
    with KaggleServer(kaggle_zip, faults) as server:
        env = server.environment(tmp_path / "home")
        first = subprocess.Popen(
            command(tmp_path / "data", "--index", "false", "--request_mb", "0.02"),
            env=env,
            cwd=Path(__file__).parents[1],
            stderr=subprocess.PIPE,
            text=True,
        )
        assert started.wait(30)
        second = fetch_from(server, tmp_path)
        assert second.code == 2 and "another fetch is running" in second.last_line
        first.send_signal(signal.SIGTERM)
        _, err = first.communicate(timeout=30)
        assert first.returncode == 75
        assert "run the same command again to resume" in err and "Traceback" not in err
        server.faults = Faults()
        assert fetch_from(server, tmp_path).code == 0
    assert_whole(tmp_path / "data", kaggle_members)


def test_members_are_repaired_from_where_they_came(kaggle_zip, kaggle_members, tmp_path):
    from pipeline.dataset.acquire.fetch import repair

    shutil.copy(kaggle_zip, tmp_path / "archive.zip")
    assert fetch(tmp_path / "data", {}, "--from", str(tmp_path / "archive.zip"), "--index", "false").code == 0
    paths = sorted(read_images(tmp_path / "data"))
    broken = [paths[3], paths[60], paths[-1]]
    (tmp_path / "data" / broken[0]).write_bytes(b"damaged")
    (tmp_path / "data" / broken[1]).unlink()
    (tmp_path / "data" / broken[2]).write_bytes(b"")
    repair(tmp_path / "data", broken)
    assert_whole(tmp_path / "data", kaggle_members)
    with pytest.raises(ValueError, match="has no member"):
        repair(tmp_path / "data", [f"{BASE}/train/n99000000/unknown.JPEG"])


def test_client_speaks_the_other_calls_to_the_test_server(kaggle_zip, tmp_path):
    """The server's list and single-file calls are the client's own: kept honest by the client itself."""
    script = (
        "import kaggle; a = kaggle.api; c = 'imagenet-object-localization-challenge'\n"
        "print([f.name for f in a.competition_list_files(c).files])\n"
        f"a.competition_download_file(c, 'LOC_val_solution.csv', path={str(tmp_path)!r}, quiet=True)"
    )
    import sys

    with KaggleServer(kaggle_zip) as server:
        env = server.environment(tmp_path / "home")
        done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True)
        assert kaggle_zip.name in done.stdout
        assert server.api_calls == ["ListDataFiles", "DownloadDataFile"]
