"""ImageNet's way from archive to shards at its full count of members, with tiny images: what does a member cost?

    python benchmarks/rehearse_full_count.py FOLDER [--scale 0.01]

Writes an archive as Kaggle's (1,281,167 + 50,000 images of a thousand classes, 100,000 test images, 594,546 boxes;
tiny real JPEGs of some hundred contents) into FOLDER, serves it on loopback to Kaggle's real client, and runs fetch,
valprep, index, verify and pack, then fetch --pack, each as a user would. Prints wall and CPU time, peak memory and disk
of every step, and writes them as JSON (--out). At full count FOLDER needs 20 GB and 2 million free inodes. Where it is
a file system of its own, the peak of its use during each step is measured, too.
"""

import argparse
import filecmp
import json
import multiprocessing
import os
import platform
import re
import shutil
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

HOME = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(HOME), str(HOME / "tests")]

from pipeline.dataset import imagenet  # noqa: E402
from pipeline.dataset.synthetic.plan import Recipe, Sample, make_image  # noqa: E402

BOXES, TEST_IMAGES, CONTENTS = 594_546, 100_000, 500
BASE = imagenet.CLS_LOC.as_posix()


@dataclass(frozen=True)
class Counts:
    """How many members the archive has of each kind, and in how many classes the images are."""

    train: int
    val: int
    test: int
    boxes: int
    classes: int = imagenet.CLASSES

    @classmethod
    def at(cls, scale: float) -> "Counts":
        numbers = (imagenet.TRAIN_IMAGES, imagenet.VAL_IMAGES, TEST_IMAGES, BOXES)
        return cls(*(max(imagenet.CLASSES, round(number * scale)) for number in numbers))


def make_contents() -> list[bytes]:
    """Small JPEGs, all different, of about 1 kB."""
    return [make_image(Sample("train", i, 1), Recipe(40, 0, 4.0, 60))[0] for i in range(CONTENTS)]


def synset(label: int) -> str:
    return f"n{2_000_000 + 37 * label:08d}"


def list_members(counts: Counts) -> Iterator[tuple[str, bytes]]:
    """(name, bytes) of each member, in the order of Kaggle's archive: boxes, test, train, val, lists."""
    contents = make_contents()
    box = b"<annotation>\n\t<object>\n\t\t<name>n02000000</name>\n\t</object>\n</annotation>\n"
    for i in range(counts.boxes):
        name = synset(i * counts.classes // counts.boxes)
        yield f"ILSVRC/Annotations/CLS-LOC/train/{name}/{name}_{i}.xml", box
    for i in range(1, counts.test + 1):
        yield f"{BASE}/test/ILSVRC2012_test_{i:08d}.JPEG", contents[i % CONTENTS]
    train_list = []
    for i in range(counts.train):
        name = synset(i * counts.classes // counts.train)
        train_list.append(f"{name}/{name}_{i} {i + 1}\n")
        yield f"{BASE}/train/{name}/{name}_{i}.JPEG", contents[i % CONTENTS]
    for i in range(1, counts.val + 1):
        yield f"{BASE}/val/ILSVRC2012_val_{i:08d}.JPEG", contents[i % CONTENTS]
    yield "ILSVRC/ImageSets/CLS-LOC/train_cls.txt", "".join(train_list).encode()
    rows = (f"ILSVRC2012_val_{i:08d},{synset(i * 7 % counts.classes)} 1 2 3 4 \n" for i in range(1, counts.val + 1))
    yield "LOC_val_solution.csv", ("ImageId,PredictionString\n" + "".join(rows)).encode()
    words = (f"{synset(label)} class {label}\n" for label in range(counts.classes))
    yield "LOC_synset_mapping.txt", "".join(words).encode()


def write_archive(path: Path, members: Iterator[tuple[str, bytes]]) -> int:
    """A zip64 with deflated members, written without holding its directory in memory; returns the members' number."""
    packed: dict[bytes, tuple[bytes, int]] = {}
    count, place, directory = 0, 0, path.with_suffix(".directory")
    with path.open("wb", 1 << 20) as file, directory.open("w+b", 1 << 20) as entries:
        for name, data in members:
            if data not in packed:
                stream = zlib.compressobj(1, zlib.DEFLATED, -zlib.MAX_WBITS)
                packed[data] = stream.compress(data) + stream.flush(), zlib.crc32(data)
            body, crc = packed[data]
            raw = name.encode()
            sizes = (crc, len(body), len(data), len(raw))
            file.write(struct.pack("<4s5H3L2H", b"PK\3\4", 20, 0, 8, 0, 33, *sizes, 0) + raw + body)
            extra = struct.pack("<2HQ", 1, 8, place)  # zip64: the offset
            entries.write(struct.pack("<4s6H3L2H", b"PK\1\2", 45 | 3 << 8, 45, 0, 8, 0, 33, *sizes, len(extra)))
            entries.write(struct.pack("<3H2L", 0, 0, 0, 0o100644 << 16, 0xFFFFFFFF) + raw + extra)
            place += 30 + len(raw) + len(body)
            count += 1
        length = entries.tell()
        entries.seek(0)
        shutil.copyfileobj(entries, file)
        file.write(struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, length, place))
        file.write(struct.pack("<4sLQL", b"PK\6\7", 0, place + length, 1))
        file.write(struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0))
    directory.unlink()
    return count


def make_archive(path: Path, counts: Counts) -> int:
    return write_archive(path, list_members(counts))


def serve(archive: Path, home: Path, connection) -> None:
    """Kaggle on loopback, in a process of its own, until something comes over `connection`."""
    import kaggle_server

    kaggle_server.PIECE = 1 << 20
    with kaggle_server.KaggleServer(archive) as server:
        connection.send(server.environment(home))
        connection.recv()


def memory_of_tree(root: int) -> tuple[int, int]:
    """Bytes that a process and all below it hold now, shared pages counted once (PSS); the most that one ever held."""
    parents: dict[int, list[int]] = {}
    for path in Path("/proc").iterdir():
        if path.name.isdigit():
            try:
                parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            except (OSError, ValueError):
                continue
            parents.setdefault(parent, []).append(int(path.name))
    pending, total, largest = [root], 0, 0
    while pending:
        process = pending.pop()
        pending += parents.get(process, [])
        try:
            now = re.search(r"^Pss:\s+(\d+)", Path(f"/proc/{process}/smaps_rollup").read_text(), re.M)
            peak = re.search(r"^VmHWM:\s+(\d+)", Path(f"/proc/{process}/status").read_text(), re.M)
        except OSError:
            continue
        total += int(now[1]) * 1024 if now else 0
        largest = max(largest, int(peak[1]) * 1024 if peak else 0)
    return total, largest


@dataclass(frozen=True)
class Step:
    """What one command took.

    peak_memory_mb: of all its processes at once, sampled ten times a second; largest_process_mb: at its own peak.
    disk_mb, files: what FOLDER holds after it; peak_disk_mb: at most during it, where that can be told.
    load: processes that wanted a core at the end, on the whole machine, on average over a minute.
    """

    name: str
    wall_s: float
    cpu_s: float
    wall_us_per_image: float
    cpu_us_per_image: float
    peak_memory_mb: int
    largest_process_mb: int
    disk_mb: int
    peak_disk_mb: int | None
    files: int
    load: float
    says: str


class Rehearsal:
    """Runs the commands one by one and keeps what they took."""

    def __init__(self, folder: Path, env: dict[str, str], images: int):
        self.folder, self.env, self.images = folder, env, images
        self.steps: list[Step] = []

    def run(self, name: str, *arguments: str | Path) -> None:
        """`pipeline ARGUMENTS`; exits where it fails."""
        peak, largest, disk_peak, over = 0, 0, 0, threading.Event()
        log = self.folder / f"{name}.log"
        begin = time.monotonic()
        with log.open("w") as err:
            command = [sys.executable, "-m", "pipeline", *map(str, arguments)]
            process = subprocess.Popen(
                command, env=self.env, cwd=HOME, stdout=subprocess.PIPE, stderr=err, text=True, bufsize=1
            )

            def watch() -> None:
                nonlocal peak, largest, disk_peak
                while not over.wait(0.1):
                    now, most = memory_of_tree(process.pid)
                    peak, largest = max(peak, now), max(largest, most)
                    disk_peak = max(disk_peak, shutil.disk_usage(self.folder).used)

            watcher = threading.Thread(target=watch)
            watcher.start()
            out = process.stdout.read()
            _, status, usage = os.wait4(process.pid, 0)
            over.set()
            watcher.join()
        wall, cpu = time.monotonic() - begin, usage.ru_utime + usage.ru_stime
        if status:
            sys.exit(f"{name} failed ({status}): {out}{log.read_text()}")
        disk, files = measure_disk(self.folder)
        step = Step(
            name,
            round(wall, 2),
            round(cpu, 2),
            round(1e6 * wall / self.images, 1),
            round(1e6 * cpu / self.images, 1),
            round(max(peak, largest) / 1e6),
            round(largest / 1e6),
            disk,
            round(disk_peak / 1e6) if self.folder.is_mount() else None,
            files,
            round(os.getloadavg()[0], 1),
            out.strip().splitlines()[-1].replace(str(self.folder), "FOLDER") if out.strip() else "",
        )
        self.steps.append(step)
        print(json.dumps(asdict(step)), flush=True)


def measure_disk(folder: Path) -> tuple[int, int]:
    """(MB that the files below `folder` occupy, number of files and folders)."""
    blocks = subprocess.run(["du", "--summarize", "--block-size=1", folder], capture_output=True, text=True, check=True)
    inodes = subprocess.run(["du", "--summarize", "--inodes", folder], capture_output=True, text=True, check=True)
    return round(int(blocks.stdout.split()[0]) / 1e6), int(inodes.stdout.split()[0])


def same_shards(one: Path, other: Path) -> bool:
    """Do two packed folders hold the same shards, byte for byte?"""
    names = sorted(path.name for path in one.glob("*.tar"))
    return names == sorted(path.name for path in other.glob("*.tar")) and all(
        filecmp.cmp(one / name, other / name, shallow=False) for name in names
    )


def unsort(root: Path) -> None:
    """Put the validation images back as the archive has them, so that valprep can be timed alone."""
    val = root / imagenet.CLS_LOC / "val"
    for folder in [path for path in val.iterdir() if path.is_dir()]:
        for path in folder.iterdir():
            path.rename(val / path.name)
        folder.rmdir()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a new or empty folder")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the full count [1.0]")
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    options = parser.parse_args()
    folder = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if any(path.name != "lost+found" for path in folder.iterdir()):
        sys.exit(f"{folder} is not empty; give a new folder")
    counts = Counts.at(options.scale)
    archive, root, shards = folder / "archive.zip", folder / "imagenet", folder / "shards"
    begin = time.monotonic()
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:  # what it takes in memory is no part of the steps
        members = pool.apply(make_archive, (archive, counts))
    size = archive.stat().st_size
    print(f"archive: {members:,} members, {size / 1e6:,.0f} MB, {time.monotonic() - begin:.0f} s", flush=True)
    ours, theirs = context.Pipe()
    server = context.Process(target=serve, args=(archive, folder / "home", theirs))
    server.start()
    try:
        rehearsal = Rehearsal(folder, ours.recv(), counts.train + counts.val)
        rehearsal.run("fetch", "fetch", root, "--index", "false")
        rehearsal.run("fetch again", "fetch", root, "--index", "false")
        unsort(root)
        rehearsal.run("valprep", "valprep", root)
        rehearsal.run("index", "index", root)
        rehearsal.run("index again", "index", root)
        rehearsal.run("verify", "verify", root)
        rehearsal.run("pack", "pack", root, shards)
        rehearsal.run("verify shards", "verify", shards)
        rehearsal.run("fetch --pack", "fetch", folder / "straight", "--pack")
        rehearsal.run("verify those", "verify", folder / "straight")
    finally:
        ours.send(None)
        server.join()
    report = {
        "images": counts.train + counts.val,
        "members": members,
        "archive_mb": round(size / 1e6),
        "machine": {"cores": len(os.sched_getaffinity(0)), "python": platform.python_version()},
        "shards_alike": same_shards(shards, folder / "straight"),
        "steps": [asdict(step) for step in rehearsal.steps],
    }
    if options.out:
        options.out.write_text(json.dumps(report, indent=1) + "\n")
        print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
