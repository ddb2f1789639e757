"""How much a member costs: an archive of many small members on loopback, through the real client, into a tree.

Usage: python tests/bench_fetch.py FOLDER [--images 1331167] [--bytes 1000] [--boxes 0] [--local]
Prints wall time, CPU time a member, and peak memory of `fetch` (the server is another process). `--boxes` adds that
many annotations, which are not fetched, to the archive's directory: the real one has some 600,000.
"""

import argparse
import json
import multiprocessing
import os
import resource
import shutil
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests")]


def list_members(images: int, size: int, boxes: int) -> Iterator[tuple[str, bytes, int]]:
    """(name, deflated bytes, unpacked size): 26 of 27 images are for training, in 1,000 classes."""
    val = images // 27
    train, contents = images - val, [os.urandom(size) for _ in range(7)]
    packed = []
    for data in contents:
        stream = zlib.compressobj(1, zlib.DEFLATED, -zlib.MAX_WBITS)
        packed.append((stream.compress(data) + stream.flush(), zlib.crc32(data), size))
    for i in range(boxes):
        yield f"ILSVRC/Annotations/CLS-LOC/train/n{i % 1000:08d}/n{i % 1000:08d}_{i}.xml", *packed[i % 7]
    for i in range(train):
        synset = f"n{i * 1000 // train:08d}"
        yield f"ILSVRC/Data/CLS-LOC/train/{synset}/{synset}_{i}.JPEG", *packed[i % 7]
    for i in range(1, val + 1):
        yield f"ILSVRC/Data/CLS-LOC/val/ILSVRC2012_val_{i:08d}.JPEG", *packed[i % 7]
    rows = "".join(f"ILSVRC2012_val_{i:08d},n{i % 1000:08d} 1 2 3 4 \n" for i in range(1, val + 1))
    data = f"ImageId,PredictionString\n{rows}".encode()
    yield (
        "LOC_val_solution.csv",
        b"\1" + struct.pack("<2H", 0, 0xFFFF) if False else _deflate(data),
        zlib.crc32(data),
        len(data),
    )


def _deflate(data: bytes) -> bytes:
    stream = zlib.compressobj(1, zlib.DEFLATED, -zlib.MAX_WBITS)
    return stream.compress(data) + stream.flush()


def write_archive(path: Path, members: Iterator[tuple[str, bytes, int, int]]) -> int:
    """A zip64 without the memory that `zipfile` takes for a million members; the number of members."""
    count, directory = 0, path.with_suffix(".directory")
    with path.open("wb", 1 << 20) as file, directory.open("w+b", 1 << 20) as entries:
        place = 0
        for name, data, crc, size in members:
            raw = name.encode()
            file.write(
                struct.pack("<4s5H3L2H", b"PK\3\4", 20, 0, 8, 0, 33, crc, len(data), size, len(raw), 0) + raw + data
            )
            extra = struct.pack("<2HQ", 1, 8, place)
            fields = (45 | 3 << 8, 45, 0, 8, 0, 33, crc, len(data), size, len(raw), len(extra), 0, 0, 0, 0o100644 << 16)
            entries.write(struct.pack("<4s6H3L5H2L", b"PK\1\2", *fields, 0xFFFFFFFF) + raw + extra)
            place += 30 + len(raw) + len(data)
            count += 1
        length = entries.tell()
        entries.seek(0)
        shutil.copyfileobj(entries, file)
        file.write(struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, length, place))
        file.write(struct.pack("<4sLQL", b"PK\6\7", 0, place + length, 1))
        file.write(struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0))
    directory.unlink()
    return count


def serve(archive: Path, home: Path, connection) -> None:
    import kaggle_server

    kaggle_server.PIECE = 1 << 20
    with kaggle_server.KaggleServer(archive) as server:
        connection.send(server.environment(home))
        connection.recv()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", type=int, default=1_331_167)
    parser.add_argument("--bytes", type=int, default=1000)
    parser.add_argument("--boxes", type=int, default=0)
    parser.add_argument("--local", action="store_true", help="read the archive from disk instead of over HTTP")
    options = parser.parse_args()
    archive, dest = options.folder / "archive.zip", options.folder / "data"
    options.folder.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(dest, ignore_errors=True)
    begin = time.monotonic()
    count = write_archive(archive, list_members(options.images, options.bytes, options.boxes))
    print(
        f"archive: {count:,} members, {archive.stat().st_size / 1e6:,.0f} MB, {time.monotonic() - begin:.0f} s",
        flush=True,
    )
    ours, theirs = multiprocessing.Pipe()
    server = multiprocessing.Process(target=serve, args=(archive, options.folder / "home", theirs), daemon=True)
    server.start()
    env, command = ours.recv(), [sys.executable, "-m", "pipeline", "fetch", str(dest), "--index", "false"]
    begin = time.monotonic()
    local = ["--from", str(archive)] if options.local else []
    subprocess.run([*command, *local], env=env, cwd=REPOSITORY, check=True)
    wall, used = time.monotonic() - begin, resource.getrusage(resource.RUSAGE_CHILDREN)
    ours.send(None)
    server.join()
    cpu = used.ru_utime + used.ru_stime
    figures = {
        "images": options.images,
        "wall_s": round(wall, 1),
        "cpu_us_per_image": round(cpu / options.images * 1e6, 1),
        "user_us_per_image": round(used.ru_utime / options.images * 1e6, 1),
        "peak_memory_mb": round(used.ru_maxrss / 1024),
        "peak_disk_mb": round(sum(path.stat().st_size for path in dest.rglob("*") if path.is_file()) / 1e6),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
