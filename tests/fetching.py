"""What the tests of `fetch` share: the archive's members, one run of the command, and the tree that must come out."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from kaggle_server import KEY, SIGNATURE, TOKEN, KaggleServer

from pipeline.dataset import imagenet

BASE = imagenet.CLS_LOC.as_posix()
REPOSITORY = Path(__file__).resolve().parents[1]
QUICK = ("--index", "false", "--request_mb", "0.02", "--streams", "3", "--stall_s", "2", "--give_up_s", "30")


@dataclass(frozen=True)
class Finished:
    """How one run ended."""

    code: int
    out: str
    err: str

    @property
    def last_line(self) -> str:
        return self.err.strip().splitlines()[-1]


def command(dest: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "pipeline", "fetch", str(dest), *options]


def fetch(dest: Path, env: dict[str, str], *options: str) -> Finished:
    """Run the command to its end; no secret may be in what it prints, and no traceback."""
    done = subprocess.run(
        command(dest, *options), env=env, cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=False
    )
    for secret in (KEY, TOKEN, SIGNATURE):
        assert secret not in done.stdout + done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return Finished(done.returncode, done.stdout, done.stderr)


def fetch_from(server: KaggleServer, tmp_path: Path, *options: str, dest: str = "data") -> Finished:
    """`fetch` with quick settings from `server` into `tmp_path/data`."""
    return fetch(tmp_path / dest, server.environment(tmp_path / "home"), *QUICK, *options)


def sorted_images(members: dict[str, bytes]) -> dict[str, bytes]:
    """Path -> bytes of the images that a tree must have after valprep, from the members of an archive."""
    solution = members[imagenet.VAL_SOLUTION].decode().splitlines()[1:]
    labels = {row.split(",")[0]: row.split(",")[1].split()[0] for row in solution}
    images = {}
    for name, data in members.items():
        if name.startswith(f"{BASE}/train/"):
            images[name] = data
        elif name.startswith(f"{BASE}/val/"):
            file = name.rpartition("/")[2]
            images[f"{BASE}/val/{labels[file.removesuffix('.JPEG')]}/{file}"] = data
    return images


def read_images(dest: Path) -> dict[str, bytes]:
    """Path -> bytes of every file below train/ and val/."""
    folder = dest / BASE
    return {path.relative_to(dest).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_whole(dest: Path, members: dict[str, bytes]) -> None:
    """The tree has every image of the archive, byte for byte, and nothing else."""
    expected, found = sorted_images(members), read_images(dest)
    assert sorted(found) == sorted(expected)
    assert all(found[name] == data for name, data in expected.items())
    assert (dest / imagenet.VAL_SOLUTION).read_bytes() == members[imagenet.VAL_SOLUTION]


def assert_no_wrong_image(dest: Path, members: dict[str, bytes]) -> None:
    """What lies in the tree, flat or sorted, is what the archive has: a part at most, never a wrong byte."""
    expected = {name.rpartition("/")[2]: data for name, data in members.items() if name.endswith(".JPEG")}
    for name, data in read_images(dest).items():
        assert data == expected[name.rpartition("/")[2]], name
