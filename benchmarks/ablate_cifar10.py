"""What each feature does for ResNet-18 on CIFAR-10 at 64 px in equal epochs: one run with it, one without.

    python benchmarks/ablate_cifar10.py DATA OUT [--epochs 1] [--seeds 3] [--only base BCE ...]

DATA: CIFAR-10 as JPEG class folders (`pipeline fetch cifar10 DATA`). OUT: a folder a run; a run that is there is not
made again, and one that was killed goes on, so the whole can be stopped and started at will. What only changes the
scoring is not trained again: base's last checkpoint is scored. Prints the table of all runs that are finished, as
Markdown, and writes their last scores into OUT/ablations.json.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
from pathlib import Path

HOME = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(HOME))

from pipeline.tracking.ledger_rows import read_rows  # noqa: E402

#: feature -> the options that turn it on, on top of the recipe cifar10-resnet18; the most often used come first
FEATURES: dict[str, str] = {
    "base": "",
    "label smoothing 0.1": "--optim.label_smoothing 0.1",
    "mixup 0.2": "--augment.mixup 0.2",
    "CutMix 1.0": "--augment.cutmix 1.0",
    "RandAugment 2, 9": "--augment.policy randaugment",
    "TrivialAugment": "--augment.policy trivialaugment",
    "erasing 0.1": "--augment.random_erase 0.1",
    "EMA 0.99 of batch 64": "--ema.decay 0.99 --ema.batch_size 64",
    "stochastic depth 0.05": "--model.stochastic_depth 0.05",
    "BlurPool": "--model.blurpool convs",
    "zero-init residual": "--model.zero_init_residual true",
    "linear schedule": "--schedule.name linear",
    "BCE": "--optim.loss bce",
    "bicubic": "--data.interpolation bicubic",
    "no Nesterov": "--optim.nesterov false",
    "weight decay on norms": "--optim.norm_weight_decay 0.0005",
    "AutoAugment": "--augment.policy autoaugment",
    "color jitter 0.4": "--augment.jitter [0.4,0.4,0.4,0.1]",
    "2 repeats": "--augment.repeats 2",
    "LAMB 0.005": "--optim.name lamb --optim.nesterov false --optim.lr 0.005 --optim.weight_decay 0.02",
    "AdamW 0.001": "--optim.name adamw --optim.nesterov false --optim.lr 0.001 --optim.weight_decay 0.05",
    "clip to 1.0": "--optim.clip_norm 1.0",
    "padded by 8 and cropped": "--data.pad_crop 8",
    "alternating flips": "--data.alternate_flips true",  # of no effect in one epoch
    "mean of the last fifth": "--ema.last_epochs 0.2 --ema.every_steps 10",
}

#: feature -> the options of `evaluate` that score base with it
SCORINGS: dict[str, str] = {
    "scored with mirror images": "--flip true",
    "BatchNorm recalibrated": "--recalibrate 50",
    "scored at 72 px": "--sizes 72",
}


def folder_of(out: Path, feature: str, seed: int) -> Path:
    return out / f"{feature.replace(' ', '_').replace(',', '')}-seed{seed}"


def train(data: str, folder: Path, options: list[str], seed: int, epochs: str) -> None:
    """One run, to its end."""
    command = [sys.executable, "-m", "pipeline", "train", "--config", "cifar10-resnet18", "--data.root", data]
    command += ["--run_dir", str(folder), "--train.seed", str(seed), "--schedule.epochs", epochs]
    command += ["--tracking.wandb", "disabled", "--tracking.report", "false", *options]
    subprocess.run(command, cwd=HOME, check=True)


def score(base: Path, folder: Path, options: list[str]) -> None:
    """The last checkpoint of base's run, scored another way."""
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "pipeline", "evaluate", str(base), "--checkpoint", "last", *options]
    subprocess.run([*command, "--json", str(folder / "scores.json")], cwd=HOME, check=True)


def scores(folder: Path) -> dict | None:
    """The last evaluation of a finished run."""
    if (folder / "scores.json").exists():
        return {
            key: value for key, value in json.loads((folder / "scores.json").read_text()).items() if key != "results"
        }
    if not (folder / "finished").exists():
        return None
    return [row for row in read_rows(folder / "metrics.jsonl") if row.get("kind") == "eval"][-1]


def table(out: Path, seeds: int) -> tuple[str, dict]:
    """The finished runs as Markdown, and as numbers: feature -> {seed: row}."""
    found = {
        name: {seed: scores(folder_of(out, name, seed)) for seed in range(seeds)} for name in (*FEATURES, *SCORINGS)
    }
    found = {name: {seed: row for seed, row in rows.items() if row} for name, rows in found.items()}
    lines = ["| feature | seeds | top-1 | against base, same seeds | averaged weights |", "|---|---|---|---|---|"]
    for name, rows in found.items():
        if not rows:
            continue
        tops = [row["val_top1"] for row in rows.values()]
        common = rows.keys() & found["base"].keys()
        gains = [rows[seed]["val_top1"] - found["base"][seed]["val_top1"] for seed in sorted(common)]
        spread = f" ({min(gains):+.2f} to {max(gains):+.2f})" if len(gains) > 1 else ""
        gain = "" if name == "base" or not gains else f"{statistics.mean(gains):+.2f}{spread}"
        averaged = [row["val_ema_top1"] for row in rows.values() if "val_ema_top1" in row]
        ema = f"{statistics.mean(averaged):.2f}" if averaged else ""
        lines.append(f"| {name} | {len(rows)} | {statistics.mean(tops):.2f} | {gain} | {ema} |")
    return "\n".join(lines), found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("out", type=Path)
    parser.add_argument("--epochs", default="1")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=[*FEATURES, *SCORINGS], default=[*FEATURES, *SCORINGS])
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    for seed in range(given.seeds):
        for name in (*FEATURES, *SCORINGS):
            folder = folder_of(given.out, name, seed)
            if name not in given.only or scores(folder) is not None:
                continue
            print(f"== {name}, seed {seed}", flush=True)
            if name in FEATURES:
                train(given.data, folder, FEATURES[name].split(), seed, given.epochs)
            else:
                score(folder_of(given.out, "base", seed), folder, SCORINGS[name].split())
            text, found = table(given.out, given.seeds)
            facts = {"machine": platform.processor() or platform.machine(), "epochs": given.epochs, "runs": found}
            (given.out / "ablations.json").write_text(json.dumps(facts, indent=1) + "\n")
    print(text)


if __name__ == "__main__":
    main()
