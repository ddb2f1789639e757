"""Shards with restart markers against the originals and other loaders: CPU time, bytes read, and what packing costs.

    python benchmarks/restart.py FOLDER [--images 300] [--rounds 5]
    python benchmarks/restart.py --table RESULT.json        its tables for docs/performance.md

FOLDER: JPEGs, in any folders below it. Some are packed as a tree, as shards, and as shards with a marker about every 8,
every 4, every 2 and every MCU, below --work. Then all loaders take turns, a process each; the ratios are found round by
round.
Some minutes with the defaults. The result goes to --json (default: runs/bench).
"""

import argparse
import json
import os
import random
import resource
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from pipeline.dataset.index.index import Split
from pipeline.dataset.index.scan import build_index
from pipeline.dataset.shards.pack import pack_tree
from pipeline.dataset.shards.plan import Options
from pipeline.dataset.shards.restart import TABLE, plan_cut
from pipeline.errors import UserError
from pipeline.insight.bench.interleaved import Candidate, Spread, run_interleaved
from pipeline.insight.bench.loader import report
from pipeline.insight.bench.results import default_path, write_result
from pipeline.insight.bench.streams import open_stream, stream_rounds
from pipeline.limits import available_cores

sys.path.insert(0, str(Path(__file__).parent))  # where another program starts this one
import loaders

INTERVALS = (8, 4, 2, 1)
CLASSES = 10
WARM_UP = 2
ORIGINALS, SHARDS, STRONGEST = "ours, originals", "ours, shards", "torchvision.io"


def name_of(interval: int) -> str:
    return f"ours, restart ~{interval}" if interval > 1 else "ours, restart 1"


def make_roots(folder: Path, count: int, work: Path) -> tuple[dict[str, Path], dict[str, dict[str, float]]]:
    """The same images in all forms, and what packing each cost, CPU ms an image, child processes included."""
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
    if len(files) < CLASSES:
        raise UserError(f"{folder} holds {len(files)} JPEGs; give a folder with at least {CLASSES}")
    files = random.Random(0).sample(files, min(count, len(files)))
    tree = work / "tree"
    for split in ("train", "val"):
        for i, file in enumerate(files):
            path = tree / split / f"class{i % CLASSES}" / f"{i:06d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, path)
    build_index(tree)
    roots, costs = {ORIGINALS: tree}, {}
    for name, options in {SHARDS: Options(), **{name_of(n): Options(restart=n) for n in INTERVALS}}.items():
        roots[name] = work / name.replace(",", "").replace(" ", "-")
        before = cpu_seconds()
        pack_tree(tree, roots[name], options, processes=1)
        cost = 1e3 * (cpu_seconds() - before) / (2 * len(files))
        size = sum(path.stat().st_size for path in roots[name].glob("train-*"))
        costs[name] = {"cpu_ms": round(cost, 3), "train_bytes": size}
        print(f"{name}: packed in {cost:.2f} CPU ms an image, {size / 1e6:.1f} MB")
    return roots, costs


def cpu_seconds() -> float:
    """User and system time of this process and of its children that have ended."""
    usages = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def read_counter(name: str) -> int:
    """rchar (bytes asked for) or read_bytes (from the disk, read-ahead included) of this process."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def evict(root: Path) -> None:
    """Drop a folder's files from the page cache."""
    for path in root.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)


def measure_reading(root: Path, size: int, batch: int) -> dict[str, dict[str, float]]:
    """Bytes an image that reading, without decoding, asks for and takes from the disk, and its time, cold and warm."""
    stream = open_stream(str(root), "train", size, batch, 1, "auto")
    steps = max(1, len(stream.source.split) // batch)
    found = {}
    stream._read(stream.plan.local(steps))  # files are opened
    for state in ("cold", "warm"):
        if state == "cold":
            evict(root)
        before = read_counter("rchar"), read_counter("read_bytes"), cpu_seconds(), time.perf_counter()
        for step in range(steps):
            stream._read(stream.plan.local(step))
        after = read_counter("rchar"), read_counter("read_bytes"), cpu_seconds(), time.perf_counter()
        asked, disk, cpu, wall = ((b - a) / (steps * batch) for a, b in zip(before, after, strict=True))
        found[state] = {"asked": round(asked), "from_disk": round(disk), "cpu_us": cpu * 1e6, "wall_us": wall * 1e6}
    stream.close()
    return found


def measure_cut(root: Path, size: int, batch: int, rounds: int = 9) -> dict[str, float]:
    """Microseconds of CPU to cut a window out: its place in the table, checksums of the rows, and the new JPEG."""
    stream = open_stream(str(root), "train", size, batch, 1, "auto")
    source, split = stream.source, stream.source.split
    jobs = []
    for step in range(max(1, len(split) // batch)):
        planned = stream.plan.local(step)
        windows = [tuple(window) for window in planned.windows.tolist()]
        jobs += [job for pair in zip(planned.ids.tolist(), windows, strict=True) if (job := cut_job(split, *pair))]
    times = []
    for _ in range(rounds):
        start = time.thread_time()
        for entry, digest, window, data in jobs:
            cut = plan_cut(entry, digest, window)
            assert cut is not None
            cut.assemble(data)
        times.append(1e6 * (time.thread_time() - start) / len(jobs))
    source.close()
    return Spread.of(times).as_dict(1)


def cut_job(split: Split, sample: int, window: tuple) -> tuple[bytes, int, tuple, bytes] | None:
    """The entry of a sample's table, its digest, the window, and the bytes of its rows; None where it is read whole."""
    record, restart = split.records[sample], split.restart
    assert restart is not None
    start, size = int(restart["table_offset"][sample]), int(restart["table_size"][sample])
    digest, path = int(record["digest"]), split.path(sample)
    entry = path.with_suffix(TABLE).read_bytes()[start : start + size]
    cut = plan_cut(entry, digest, window) if size else None
    if cut is None:
        return None
    with path.open("rb") as file:
        file.seek(int(record["offset"]) + cut.start)
        return entry, digest, window, file.read(cut.size)


def candidates(roots: dict[str, Path], split: str, common: dict[str, int], threads: int) -> list[Candidate]:
    ours = {"split": split, **common, "threads": threads, "loader": "auto"}
    own = [Candidate(name, stream_rounds, {"root": str(root), **ours}) for name, root in roots.items()]
    theirs = {"root": str(roots[ORIGINALS]), "split": split, **common, "workers": threads}
    return own + loaders.other_candidates(theirs)


def goals(result: dict[str, Any]) -> dict[str, dict[str, dict[str, Any]]]:
    """Interval -> what was to be reached: the goal, and what was found and whether it was reached; or why it is not
    known, where a loader did not run."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    asked = {name: one["warm"]["asked"] for name, one in result["reading"].items()}

    def ratio(split: str, other: str) -> float | str:
        seen = result["splits"][split]
        spread = seen["cpu_ratios"].get(f"{other} / {name}")
        return float(spread["median"]) if spread else f"{other}: {why_missing(seen['measured'], other, name)}"

    for name in map(name_of, INTERVALS):
        values: dict[str, tuple[float, float | str]] = {
            f"training, {STRONGEST} / restart": (1.6, ratio("train", STRONGEST)),
            "training, originals / restart": (1.25, ratio("train", ORIGINALS)),
            "validation, originals / restart": (1.15, ratio("val", ORIGINALS)),
            f"validation, {STRONGEST} / restart": (1.15, ratio("val", STRONGEST)),
            "bytes read, restart / originals": (0.75, asked[name] / asked[ORIGINALS]),
            "packing, CPU ms": (8.0, result["packing"][name]["cpu_ms"]),
            "cut, CPU us": (25.0, result["cut_us"][name]["median"]),
        }
        found[name] = {}
        for what, (goal, value) in values.items():
            if isinstance(value, str):
                found[name][what] = {"goal": goal, "missing": value}
            else:
                reached = value <= goal if what in AT_MOST else value >= goal
                found[name][what] = {"goal": goal, "found": round(value, 3), "reached": reached}
    return found


def goals_table(result: dict[str, Any]) -> str:
    """A row for each goal, in Markdown, and a column for each interval."""
    found = goals(result)
    lines = [f"| goal | to reach | {' | '.join(found)} |", "|---|---|" + "---|" * len(found)]
    for what, one in next(iter(found.values())).items():
        cells = []
        for row in (goals_of[what] for goals_of in found.values()):
            text = row.get("missing") or f"{row['found']:.2f}" + ("" if row["reached"] else ", not reached")
            cells.append(text)
        bound = "at most" if what in AT_MOST else "at least"
        lines.append(f"| {what} | {bound} {one['goal']:g} | {' | '.join(cells)} |")
    return "\n".join(lines)


def why_missing(measured: dict[str, dict], *names: str) -> str:
    """Why there is no ratio of these loaders."""
    return next((measured[name]["unavailable"] for name in names if "unavailable" in measured[name]), "not measured")


NEEDS = {
    ORIGINALS: "an index (one decode of each image)",
    SHARDS: "`pipeline pack`",
    **{name_of(n): f"`pipeline pack --restart {n}`" for n in INTERVALS},
    "torchvision": "class folders",
    STRONGEST: "class folders",
    "timm": "class folders",
    "litdata": "`litdata.optimize`: its own chunks",
    "ffcv": "its own format",
    "spdl": "files, and the libraries of FFmpeg",
}
TITLES = {
    "torchvision": "torchvision: ImageFolder, PIL, DataLoader",
    STRONGEST: "torchvision.io and v2 on uint8, without DataLoader",
    "timm": "timm: create_loader (PIL), without its work on the device",
    "litdata": "LitData with torchvision.io and v2, one process",
    "ffcv": "FFCV",
    "spdl": "SPDL: threads, FFmpeg's decoder and filters",
}
BASELINE = name_of(4)
AT_MOST = ("bytes read, restart / originals", "packing, CPU ms", "cut, CPU us")  # the other goals: at least


def table(result: dict[str, Any]) -> str:
    """A row for each loader, in Markdown: what it needs first, and CPU time over that of `BASELINE`."""
    lines = [f"| loader | needs first | training, x {BASELINE} | validation, x {BASELINE} |", "|---|---|---|---|"]
    for name in result["splits"]["train"]["measured"]:
        cells = []
        for split in ("train", "val"):
            found = result["splits"][split]
            ratio = found["cpu_ratios"].get(f"{name} / {BASELINE}")
            if name == BASELINE:
                cells.append("1")
            elif ratio is None:
                cells.append(why_missing(found["measured"], name, BASELINE))
            else:
                cells.append(f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})")
        lines.append(f"| {TITLES.get(name, name)} | {NEEDS[name]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="a folder with JPEGs in it or below")
    parser.add_argument("--table", type=Path, help="print the tables of a result instead of measuring")
    parser.add_argument("--images", type=int, default=300, help="images that are taken, and read a round")
    parser.add_argument("--size", type=int, default=224, help="pixels of an image's side")
    parser.add_argument("--batch_size", type=int, default=50, help="images a batch")
    parser.add_argument("--rounds", type=int, default=5, help=f"rounds that count, after {WARM_UP} that do not")
    parser.add_argument("--threads", type=int, help="decoding threads and worker processes; default: the cores")
    parser.add_argument("--work", type=Path, help="folder for the packed images; default: a temporary one")
    parser.add_argument("--json", type=Path, help="file for the result")
    options = parser.parse_args()
    if options.table:
        result = json.loads(options.table.read_text())["result"]
        print(f"{table(result)}\n\n{goals_table(result)}")
        return
    if options.folder is None:
        parser.error("give a folder with JPEGs")
    threads = options.threads or available_cores()
    common = {"size": options.size, "batch": options.batch_size, "images": options.images}
    with tempfile.TemporaryDirectory(prefix="bench-restart-", dir=options.work) as work:
        roots, packing = make_roots(options.folder, options.images, Path(work))
        result = {"threads": threads, **common, "rounds": options.rounds, "packing": packing}
        sizes = common["size"], common["batch"]
        result["reading"] = {name: measure_reading(root, *sizes) for name, root in roots.items()}
        result["cut_us"] = {name_of(n): measure_cut(roots[name_of(n)], *sizes) for n in INTERVALS}
        result["splits"] = {}
        for split in ("train", "val"):
            measured = run_interleaved(candidates(roots, split, common, threads), options.rounds, WARM_UP, split)
            baselines = [ORIGINALS, *map(name_of, INTERVALS)]
            result["splits"][split] = report(split, measured, baselines)
    print("\nbytes an image that reading asks for, cold: from the disk, wall us; warm: CPU us")
    for name, found in result["reading"].items():
        cold, warm = found["cold"], found["warm"]
        print(f"  {name:<18} {warm['asked']:>8,} {cold['from_disk']:>8,} {cold['wall_us']:8.0f} {warm['cpu_us']:8.0f}")
    result["goals"] = goals(result)
    print(f"\n{goals_table(result)}")
    write_result(options.json or default_path("restart"), "restart", ["python", *sys.argv], result)


if __name__ == "__main__":
    main()
