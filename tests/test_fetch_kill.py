"""`fetch` under SIGKILL: at any moment, again and again, no file is wrong, and nothing whole is fetched twice."""

import random
import subprocess
import threading
from pathlib import Path

import pytest
from fetching import QUICK, REPOSITORY, assert_no_wrong_image, assert_whole, command, fetch_from, read_images
from kaggle_server import Faults, KaggleServer, Served

from pipeline.dataset.acquire.access.remote import LocalFile
from pipeline.dataset.acquire.zip_directory import read_directory

STREAMS = 3  # as in QUICK


def kill_when(reached: threading.Event, dest: Path, env: dict[str, str], *options: str) -> int:
    """Run the command; SIGKILL when `reached` is set. The exit code (-9 where it was killed)."""
    process = subprocess.Popen(
        command(dest, *QUICK, *options),
        env=env,
        cwd=REPOSITORY,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    threading.Thread(target=lambda: (process.wait(), reached.set()), daemon=True).start()
    assert reached.wait(60)
    process.kill()
    _, err = process.communicate(timeout=60)
    assert "Traceback" not in err, err
    return process.returncode


def spans(archive: Path) -> dict[str, tuple[int, int]]:
    """File name -> the bytes of the archive that hold it."""
    directory = read_directory(LocalFile(archive))
    places = zip(directory.entries["start"].tolist(), directory.entries["end"].tolist(), strict=True)
    return {directory.name(i).rpartition("/")[2]: place for i, place in enumerate(places)}


def assert_nothing_fetched_twice(served: list[Served], whole: set[str], archive: Path) -> None:
    """No request, but those for the archive's directory, covers a member that was whole before."""
    size, places = archive.stat().st_size, spans(archive)
    for request in served:
        if request.status == 206 and request.end < size:
            for name in whole:
                start, end = places[name]
                assert end <= request.start or request.end <= start, f"{name} was whole and is asked for again"


def test_killed_at_ten_random_moments(kaggle_zip, kaggle_members, tmp_path):
    rng, dest, images, midway = random.Random(1), tmp_path / "data", 0, 0
    directory = 1.5 * (len(read_directory(LocalFile(kaggle_zip)).blob) + 66_000)  # read at each start
    with KaggleServer(kaggle_zip) as server:
        env = server.environment(tmp_path / "home")
        for _ in range(10):
            whole, before = {path.rpartition("/")[2] for path in read_images(dest)}, len(server.served)
            reached, limit = threading.Event(), server.total_sent + int(directory) + rng.randrange(30_000)
            server.faults.on_sent = lambda total, e=reached, limit=limit: e.set() if total >= limit else None
            code = kill_when(reached, dest, env)
            assert code in (-9, 0)
            assert_no_wrong_image(dest, kaggle_members)
            assert_nothing_fetched_twice(server.served[before:], whole, kaggle_zip)
            halves = list((dest / ".fetch/parts").rglob("*/*"))
            assert len(halves) <= STREAMS, "one member a stream at most is half-written"
            assert len(read_images(dest)) >= images
            midway += images < len(read_images(dest)) < 120
            images = len(read_images(dest))
        assert midway >= 5, "most kills hit the transfer itself"
        whole, before = {path.rpartition("/")[2] for path in read_images(dest)}, len(server.served)
        assert fetch_from(server, tmp_path).code == 0
        assert_nothing_fetched_twice(server.served[before:], whole, kaggle_zip)
    assert_whole(dest, kaggle_members)
    assert not list((dest / ".fetch").glob("parts"))


@pytest.mark.parametrize("options", [("--via", "zip"), ()], ids=["the client's download", "a nested tar.gz"])
def test_killed_where_the_archive_comes_in_one_piece(kaggle_zip, nested_kaggle_zip, kaggle_members, tmp_path, options):
    """The body stalls in the middle, and the kill comes then."""
    reached, first = threading.Event(), 2 if options else 6
    faults = Faults(stall=lambda number: number >= first, on_stall=reached.set)
    with KaggleServer(kaggle_zip if options else nested_kaggle_zip, faults) as server:
        env = server.environment(tmp_path / "home")
        assert kill_when(reached, tmp_path / "data", env, *options) == -9
        assert_no_wrong_image(tmp_path / "data", kaggle_members)
        server.faults = Faults()
        done = fetch_from(server, tmp_path, *options)
        assert done.code == 0, done.err
    assert_whole(tmp_path / "data", kaggle_members)
