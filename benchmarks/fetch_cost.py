"""How much a member costs: an archive of many small members on loopback, through the real client, into a tree.

Usage: python benchmarks/fetch_cost.py FOLDER [--images 1331167] [--bytes 1000] [--boxes 0] [--local]
Prints wall time, CPU time a member, and peak memory of `fetch` (the server is another process). `--boxes` adds that
many annotations, which are not fetched, to the archive's directory: the real one has some 600,000.
"""

import argparse
import json
import multiprocessing
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests"), str(REPOSITORY / "benchmarks")]

from rehearse_full_count import write_archive  # noqa: E402


def list_members(images: int, size: int, boxes: int) -> Iterator[tuple[str, bytes]]:
    """(name, bytes) of each member: 26 of 27 images are for training, in 1,000 classes."""
    val = images // 27
    train, contents = images - val, [os.urandom(size) for _ in range(7)]
    for i in range(boxes):
        yield f"ILSVRC/Annotations/CLS-LOC/train/n{i % 1000:08d}/n{i % 1000:08d}_{i}.xml", contents[i % 7]
    for i in range(train):
        synset = f"n{i * 1000 // train:08d}"
        yield f"ILSVRC/Data/CLS-LOC/train/{synset}/{synset}_{i}.JPEG", contents[i % 7]
    for i in range(1, val + 1):
        yield f"ILSVRC/Data/CLS-LOC/val/ILSVRC2012_val_{i:08d}.JPEG", contents[i % 7]
    rows = (f"ILSVRC2012_val_{i:08d},n{i % 1000:08d} 1 2 3 4 \n" for i in range(1, val + 1))
    yield "LOC_val_solution.csv", ("ImageId,PredictionString\n" + "".join(rows)).encode()


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
