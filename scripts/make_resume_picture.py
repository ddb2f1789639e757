"""Draw docs/images/resume.svg from two real runs: one undisturbed, one killed and resumed with other numbers of ranks.

Usage: python scripts/make_resume_picture.py FOLDER         (a new folder for data and runs; about three minutes, CPU)

Both runs train the same network on the same generated images. The second is ended by SIGKILL three times and resumed by
the same command: with one rank first, then two, then one again. The upper line of the picture is the loss of each
step; below it, the largest difference between the two runs' losses, and whether the batch digests of all steps agree.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from pipeline.tracking.ledger_rows import read_rows

PICTURE = Path(__file__).resolve().parents[1] / "docs/images/resume.svg"
PIPELINE = [sys.executable, "-m", "pipeline"]
#: the second run: ranks, and the step after which all processes are killed
STARTS = ((1, 17), (2, 43), (1, 71), (1, None))
WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 760, 330, 62, 62, 62
COLORS = {1: "#1f6feb", 2: "#d1570a"}


def train(data: Path, run: Path, ranks: int, kill_after: int | None) -> None:
    """Train until the end, or until SIGKILL after a step."""
    options = ["--config", "smoke", "--model.name", "resnet18", "--data.root", str(data), "--run_dir", str(run)]
    options += ["--schedule.epochs", "12", "--train.precision", "fp32", "--tracking.wandb", "disabled"]
    options += ["--tracking.report", "false", "--checkpoint.every_steps", "5", "--train.eval_every_epochs", "100"]
    options += ["--train.micro_batch_size", "16", "--optim.lr", "0.02"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m"]
    command = [*torchrun, "pipeline", "train", *options]
    with (run.parent / f"{run.name}.log").open("a") as log:
        job = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        while job.poll() is None:
            if kill_after is not None and len(losses(run)) >= kill_after:
                os.killpg(job.pid, signal.SIGKILL)
                job.wait()
                return
            time.sleep(0.02)
    if job.returncode:
        raise SystemExit(f"training ended with {job.returncode}; see {run}.log")


def rows(run: Path) -> list[dict]:
    return [row for row in read_rows(run / "metrics.jsonl") if row["kind"] == "train"]


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in rows(run)]


def path(points: list[tuple[float, float]]) -> str:
    return "M" + " L".join(f"{x:.1f} {y:.1f}" for x, y in points)


def draw(whole: list[dict], killed: list[dict], starts: list[dict]) -> str:
    """The picture: the undisturbed run as a broad gray line, the parts of the other run over it."""
    steps, top = len(whole), max(row["loss"] for row in whole) * 1.05
    right, floor = WIDTH - 24, HEIGHT - BOTTOM

    def at(row: dict) -> tuple[float, float]:
        x = LEFT + (right - LEFT) * (row["step"] - 1) / (steps - 1)
        return x, floor - (floor - TOP) * row["loss"] / top

    largest = max(abs(a["loss"] - b["loss"]) for a, b in zip(whole, killed, strict=True))
    digests = sum(a["batch_digest"] == b["batch_digest"] for a, b in zip(whole, killed, strict=True))
    same = "identical" if largest == 0 else f"largest difference {largest:.1e}"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        'font-size="13" role="img">',
        "<title>Training loss of an undisturbed run and of a run that was killed and resumed: one line</title>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
        f'<text x="{LEFT}" y="24" font-size="16" font-weight="bold">Killed three times, resumed on another number of '
        "ranks: the same curve</text>",
        f'<text x="{LEFT}" y="44" fill="#555">gray: undisturbed, 1 rank. '
        f'<tspan fill="{COLORS[1]}">blue: resumed on 1 rank.</tspan> '
        f'<tspan fill="{COLORS[2]}">orange: resumed on 2 ranks.</tspan></text>',
    ]
    for tick in range(int(top * 2) + 1):
        y = floor - (floor - TOP) * tick / 2 / top
        parts.append(f'<path d="M{LEFT} {y:.1f} H{right}" stroke="#e4e4e4"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end" fill="#555">{tick / 2:g}</text>')
    for step in range(20, steps + 1, 20):
        x, _ = at({"step": step, "loss": 0})
        parts.append(f'<text x="{x:.1f}" y="{floor + 18}" text-anchor="middle" fill="#555">{step}</text>')
    parts.append(f'<text x="{right}" y="{floor + 34}" text-anchor="end" fill="#555">step</text>')
    parts.append(f'<text x="14" y="{TOP - 4}" fill="#555">loss</text>')
    parts.append(f'<path d="{path([at(row) for row in whole])}" fill="none" stroke="#c9c9c9" stroke-width="9"/>')
    begins = [row["step"] for row in starts] + [steps]
    for start, end in zip(starts, begins[1:], strict=True):
        piece = [at(row) for row in killed if max(start["step"], 1) <= row["step"] <= end]
        color = COLORS[start["world_size"]]
        parts.append(f'<path d="{path(piece)}" fill="none" stroke="{color}" stroke-width="2.2"/>')
    for _, kill in STARTS[:-1]:
        x, _ = at({"step": kill, "loss": 0})
        parts.append(f'<path d="M{x:.1f} {TOP} V{floor}" stroke="#c00" stroke-dasharray="4 3"/>')
        parts.append(f'<text x="{x + 4:.1f}" y="{TOP + 12}" fill="#c00">kill -9</text>')
    parts.append(
        f'<text x="{LEFT}" y="{HEIGHT - 12}" fill="#333">batch digests: {digests} of {steps} identical; '
        f"losses: {same}. ResNet-18, fp32, CPU.</text>"
    )
    return "\n".join([*parts, "</svg>"]) + "\n"


def main(folder: Path) -> None:
    folder.mkdir(parents=True)
    data = folder / "data"
    size = ["--classes", "4", "--train-per-class", "64", "--val-per-class", "16", "--size", "128"]
    subprocess.run([*PIPELINE, "synth", str(data), *size], check=True)
    subprocess.run([*PIPELINE, "index", str(data)], check=True)
    whole, killed = folder / "whole", folder / "killed"
    train(data, whole, 1, None)
    for number, (ranks, kill_after) in enumerate(STARTS, 1):
        print(f"start {number} of {len(STARTS)}: {ranks} ranks", flush=True)
        train(data, killed, ranks, kill_after)
    starts = [row for row in read_rows(killed / "metrics.jsonl") if row.get("event") in ("started", "resumed")]
    print(json.dumps(starts))
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    PICTURE.write_text(draw(rows(whole), rows(killed), starts), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]).expanduser().resolve())
