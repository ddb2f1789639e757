"""What indexing costs, one commit against another: fresh scans of the same folder of tiny images, in turns.

    python benchmarks/index_cost.py --against COMMIT [--images 50000] [--rounds 7] [--json FILE]

Tiny images are the hard case: nearly all the time goes to listing, opening and bookkeeping, not to decoding. Both
commits are exported with `git archive`; the folder is generated once and read once before the first round. Each round
starts one process for each commit, in changing order, with one core: CPU seconds are the process's and its children's.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
CLASSES = 100


def make_folder(root: Path, images: int) -> None:
    """`images` JPEGs of 32 x 24 pixels, one in fifty of them for validation, in `CLASSES` class folders."""
    noise = np.random.default_rng(0)
    for number in range(images):
        folder = root / ("val" if number % 50 == 0 else "train") / f"n{number // 50 % CLASSES:08d}"
        folder.mkdir(parents=True, exist_ok=True)
        pixels = noise.integers(0, 255, (24, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:06d}.JPEG", quality=75)


def export(commit: str, folder: Path) -> None:
    archive = subprocess.run(["git", "archive", commit, "pipeline"], cwd=ROOT, capture_output=True, check=True).stdout
    subprocess.run(["tar", "-xf", "-", "-C", folder], input=archive, check=True)


def scan(package: Path, data: Path, out: Path) -> dict[str, float]:
    """Seconds of one fresh scan: {"wall_s", "cpu_s"}."""
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "pipeline", "index", str(data), "--out", str(out), "--processes", "1"]
    before, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, env=os.environ | {"PYTHONPATH": str(package)}, cwd=package, capture_output=True, check=True)
    wall, after = time.perf_counter() - begun, resource.getrusage(resource.RUSAGE_CHILDREN)
    return {"wall_s": wall, "cpu_s": after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime}


def main() -> None:
    parser = argparse.ArgumentParser(description="What indexing costs, one commit against another.")
    parser.add_argument("--against", required=True, help="the older commit")
    parser.add_argument("--commit", default="HEAD", help="the newer commit")
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        home = Path(temporary)
        commits = {"old": options.against, "new": options.commit}
        for name, commit in commits.items():
            export(commit, home / name)
        print(f"making {options.images:,} images", file=sys.stderr)
        make_folder(home / "data", options.images)
        found: dict[str, list[dict[str, float]]] = {name: [] for name in commits}
        for number in range(options.rounds + 1):
            for name in sorted(commits, reverse=bool(number % 2)):
                seconds = scan(home / name, home / "data", home / f"index-{name}")
                if number:  # the first fills the page cache
                    found[name].append(seconds)
            print(f"round {number} of {options.rounds}", file=sys.stderr)
        fingerprints = {json.loads((home / f"index-{name}/index.json").read_text())["fingerprint"] for name in commits}
    result = {"images": options.images, "rounds": options.rounds, "same_index": len(fingerprints) == 1}
    for key in ("wall_s", "cpu_s"):
        ratios = [new[key] / old[key] for old, new in zip(found["old"], found["new"], strict=True)]
        medians = {name: round(statistics.median(row[key] for row in rows), 3) for name, rows in found.items()}
        result[key] = medians | {
            "new_over_old": {
                "median": round(statistics.median(ratios), 4),
                "minimum": round(min(ratios), 4),
                "maximum": round(max(ratios), 4),
            }
        }
    print(json.dumps(result, indent=1))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
