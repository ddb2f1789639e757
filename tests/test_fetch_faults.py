"""`fetch` over a bad line: whatever the server and the network do, a whole tree comes out, or one clear line."""

import os
import shutil
import subprocess
import zipfile
from itertools import pairwise
from pathlib import Path

import pytest
from fetching import BASE, assert_no_wrong_image, assert_whole, fetch_from, read_images
from kaggle_server import Faults, KaggleServer

from pipeline.dataset.acquire.access.backoff import parse_retry_after
from pipeline.dataset.acquire.access.remote import LocalFile
from pipeline.dataset.acquire.zip_directory import read_directory

MENDED = {
    "cut on every third request": Faults(cut=lambda number: number % 3 == 0),
    "stall": Faults(stall=lambda number: number in (6, 11)),
    "slower than a byte now and then": Faults(drip=lambda number: number in (6, 11)),
    "expired address in the middle": Faults(expire_after=9),
    "storage asks to wait": Faults(storage_statuses=lambda number: 429 if number in (5, 9) else None, retry_after="1"),
    "bursts of 5xx": Faults(storage_statuses=lambda number: (500, 502, 503)[number % 3] if number % 9 < 3 else None),
    "no lengths": Faults(length=False, cut=lambda number: number % 4 == 0),
    "a web page now and then": Faults(html=lambda number: number in (2, 7)),
    "bytes that tip over on the way": Faults(),
}


@pytest.mark.parametrize("fault", MENDED)
def test_line_that_can_be_mended_gives_a_whole_tree(kaggle_zip, kaggle_members, tmp_path, fault):
    faults = MENDED[fault]
    if fault == "bytes that tip over on the way":
        place, left = image_data_offset(kaggle_zip), [1]

        def corrupt(data: bytes, offset: int) -> bytes:
            if left[0] and offset <= place < offset + len(data):
                left[0] -= 1
                at = place - offset
                return data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :]
            return data

        faults.corrupt = corrupt
    with KaggleServer(kaggle_zip, faults) as server:
        done = fetch_from(server, tmp_path)
        assert done.code == 0, done.err
        assert not server.problems
        assert len(server.api_calls) <= 6
        if fault == "expired address in the middle":
            assert len(server.api_calls) > 2, "a new address was asked for"
    assert_whole(tmp_path / "data", kaggle_members)


def image_data_offset(archive: Path) -> int:
    """A place in the middle of some training image's packed bytes."""
    directory = read_directory(LocalFile(archive))
    number = next(i for i in range(len(directory)) if directory.name(i).startswith(f"{BASE}/train/"))
    return int(directory.entries["end"][number + 5]) - 200


@pytest.mark.parametrize(
    ("faults", "words"),
    [
        (Faults(html=lambda number: number > 5), "a web page came"),
        (Faults(html=lambda number: True), "a web page came"),
        (Faults(stall=lambda number: number > 5), "no progress for"),
        (Faults(storage_statuses=lambda number: 503 if number > 5 else None), "answered 503"),
        (Faults(storage_statuses=lambda number: 403 if number > 5 else None), "refuses a freshly signed address"),
        (Faults(storage_statuses=lambda n: 429 if n > 5 else None, retry_after="7200"), "asks to wait 7200 s"),
        (Faults(storage_statuses=lambda number: 418 if number > 5 else None), "answered 418"),
        (Faults(api_always=503), "answered 503"),
    ],
)
def test_line_that_stays_broken_is_one_line_and_exit_1(kaggle_zip, kaggle_members, tmp_path, faults, words):
    with KaggleServer(kaggle_zip, faults) as server:
        done = fetch_from(server, tmp_path, "--give_up_s", "1")
        assert done.code == 1, done.err
        assert words in done.last_line
        assert len(server.api_calls) <= 6, "Kaggle's calls are not hammered"
        assert_no_wrong_image(tmp_path / "data", kaggle_members)
        server.faults = Faults()
        assert fetch_from(server, tmp_path).code == 0, "the same command goes on"
    assert_whole(tmp_path / "data", kaggle_members)


def test_kaggle_asks_to_wait(kaggle_zip, kaggle_members, tmp_path):
    with KaggleServer(kaggle_zip, Faults(api_statuses=[429, 429], retry_after="1")) as server:
        done = fetch_from(server, tmp_path)
        assert done.code == 0, done.err
        assert all(later - earlier >= 1 for earlier, later in pairwise(server.api_times[:3]))
    assert_whole(tmp_path / "data", kaggle_members)


@pytest.mark.parametrize("asked", ["0", "Wed, 21 Oct 2015 07:28:00 GMT"])
def test_a_server_that_asks_for_no_wait_is_not_hammered(kaggle_zip, tmp_path, asked):
    """A date is past, too, where this machine's clock is ahead."""
    faults = Faults(storage_statuses=lambda number: 503 if number > 5 else None, retry_after=asked)
    with KaggleServer(kaggle_zip, faults) as server:
        assert fetch_from(server, tmp_path, "--give_up_s", "2").code == 1
        assert len(server.served) < 60


@pytest.mark.parametrize(
    ("value", "seconds"), [("12", 12), ("0", None), ("-5", None), ("\u00b2", None), ("soon", None), ("", None)]
)
def test_what_a_server_may_ask_for(value, seconds):
    assert parse_retry_after(value) == seconds


def test_an_archive_that_a_proxy_packs_once_more(kaggle_zip, tmp_path):
    with KaggleServer(kaggle_zip, Faults(packed=lambda number: number > 6)) as server:
        done = fetch_from(server, tmp_path)
        assert done.code == 2 and "packed once more (gzip)" in done.last_line
        assert len(server.served) < 15


def test_server_without_ranges_names_the_way_out(kaggle_zip, kaggle_members, tmp_path):
    with KaggleServer(kaggle_zip, Faults(ranges=False)) as server:
        done = fetch_from(server, tmp_path)
        assert done.code == 2
        assert "--via zip" in done.last_line and "GB" in done.last_line
        assert not read_images(tmp_path / "data")


def test_web_page_in_place_of_the_clients_download(kaggle_zip, kaggle_members, tmp_path):
    """The client takes it for the archive and says 0."""
    with KaggleServer(kaggle_zip, Faults(html=lambda number: number > 1)) as server:
        done = fetch_from(server, tmp_path, "--via", "zip", "--give_up_s", "1")
        assert done.code == 1 and "web page" in done.last_line
        server.faults = Faults(ranges=False)
        assert fetch_from(server, tmp_path, "--via", "zip").code == 0
    assert_whole(tmp_path / "data", kaggle_members)


@pytest.mark.parametrize("fault", ["cut", "stall"])
def test_clients_download_goes_on_where_it_broke(kaggle_zip, kaggle_members, tmp_path, fault):
    """Request 1 asks for the address, request 2 is the download; without our limits the client would hang."""
    with KaggleServer(kaggle_zip, Faults(**{fault: lambda number: number == 2})) as server:
        done = fetch_from(server, tmp_path, "--via", "zip", "--give_up_s", "20")
        assert done.code == 0, done.err
    assert_whole(tmp_path / "data", kaggle_members)


def test_clients_download_that_was_cut_unseen_is_found_and_removed(kaggle_zip, kaggle_members, tmp_path):
    """Without a length, the client takes a cut for the end and says 0."""
    with KaggleServer(kaggle_zip, Faults(length=False, ranges=False, cut=lambda number: number == 2)) as server:
        done = fetch_from(server, tmp_path, "--via", "zip")
        assert done.code == 1 and "not a complete zip" in done.last_line
        assert fetch_from(server, tmp_path, "--via", "zip").code == 0
    assert_whole(tmp_path / "data", kaggle_members)


@pytest.mark.parametrize("via", ["ranges", "zip"])
def test_damaged_download_never_enters_the_tree(kaggle_zip, kaggle_members, tmp_path, via):
    """A member whose CRC-32 is wrong is named; everything else arrives; a mended archive completes the tree."""
    damaged = tmp_path / "served" / kaggle_zip.name
    damaged.parent.mkdir()
    shutil.copy(kaggle_zip, damaged)
    place = image_data_offset(damaged)
    with damaged.open("r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 0xFF]))
    with KaggleServer(damaged) as server:
        done = fetch_from(server, tmp_path, "--via", via)
        assert done.code == 1
        assert "1 of 120 members arrive damaged" in done.last_line and f"{BASE}/train/n99000000/" in done.last_line
        assert_no_wrong_image(tmp_path / "data", kaggle_members)
        assert len(read_images(tmp_path / "data")) == 119
        shutil.copy(kaggle_zip, damaged)
        before = len(server.served)
        assert fetch_from(server, tmp_path, "--via", via).code == 0
        if via == "ranges":
            assert len(server.served) - before < 8, "only the one is fetched, after the directory"
    assert_whole(tmp_path / "data", kaggle_members)


@pytest.mark.parametrize(("content", "if_range"), [("same", True), ("other", True), ("other", False)])
def test_archive_replaced_midway(kaggle_zip, kaggle_members, tmp_path, content, if_range):
    """A new ETag: the new version's directory is read, and the tree is the new version's alone."""
    served = tmp_path / "served" / kaggle_zip.name
    served.parent.mkdir()
    shutil.copy(kaggle_zip, served)
    expected = dict(kaggle_members)
    if content == "other":
        images = [name for name in expected if name.startswith(f"{BASE}/train/")]
        for one, other in zip(images[::7], images[3::7], strict=False):
            expected[one], expected[other] = expected[other], expected[one]
    newer = tmp_path / "newer.zip"
    with zipfile.ZipFile(newer, "w") as archive:
        for name, data in expected.items():
            archive.writestr(name, data)

    def replace(number: int) -> None:
        if number == 12:
            if content == "other":
                newer.replace(served)
            server.etag = '"version-2"'

    with KaggleServer(served, Faults(on_request=replace, if_range=if_range)) as server:
        done = fetch_from(server, tmp_path)
        assert done.code == 0, done.err
        assert "was replaced" in done.err
    assert_whole(tmp_path / "data", expected)


def test_archive_replaced_again_and_again_is_one_line(kaggle_zip, kaggle_members, tmp_path):
    def replace(number: int) -> None:
        server.etag = f'"version-{number // 8}"'

    with KaggleServer(kaggle_zip, Faults(on_request=replace)) as server:
        done = fetch_from(server, tmp_path, "--streams", "1")
        assert done.code == 1 and "was replaced" in done.last_line
    assert_no_wrong_image(tmp_path / "data", kaggle_members)


@pytest.fixture
def small_disk(tmp_path):
    """A tmpfs of 1 MB."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root")
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip(f"mounting a small disk failed: {done.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_disk_full_midway_is_one_line_and_goes_on_with_room(kaggle_zip, kaggle_members, tmp_path, small_disk):
    filler = small_disk / "filler"

    def fill(number: int) -> None:
        if number == 12:
            with filler.open("wb", buffering=0) as file:
                while file.write(b"\0" * 4096) == 4096:
                    if not shutil.disk_usage(small_disk).free:
                        break

    with KaggleServer(kaggle_zip, Faults(on_request=fill)) as server:
        done = fetch_from(server, tmp_path, dest="disk/data")
        assert done.code == 2, done.err
        assert "disk full" in done.last_line and "same command again" in done.last_line
        assert_no_wrong_image(small_disk / "data", kaggle_members)
        filler.unlink()
        server.faults = Faults()
        assert fetch_from(server, tmp_path, dest="disk/data").code == 0
    assert_whole(small_disk / "data", kaggle_members)


def test_too_small_a_disk_is_refused_before_the_first_byte(kaggle_zip, kaggle_members, tmp_path, small_disk):
    (small_disk / "filler").write_bytes(b"\0" * 700_000)
    with KaggleServer(kaggle_zip) as server:
        done = fetch_from(server, tmp_path, dest="disk/data")
    assert done.code == 2
    assert "GB free" in done.last_line and "GB are needed" in done.last_line
    assert not [path for path in (small_disk / "data").rglob("*") if path.suffix in (".JPEG", ".csv", ".txt")]
