"""The verb `export`: a run's network for others, with its classes and preprocessing beside it."""

import contextlib
import json
import math
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from pipeline.command import run_command
from pipeline.config import Config, load_config
from pipeline.counts import count
from pipeline.dataset.index.index import has_index, locate_index, open_index
from pipeline.errors import EXIT_OK, UserError
from pipeline.evaluation.check_export import ExportError, check_export
from pipeline.evaluation.checkpoints import FILES, find_checkpoint
from pipeline.model.build import build_model, transforms_input
from pipeline.model.heads import count_outputs
from pipeline.model.weights import load_whole, mark_blurpool
from pipeline.run_paths import not_a_run_message
from pipeline.tracking.ledger_rows import read_rows
from pipeline.training.run_folder.checkpoint import load_state
from pipeline.training.run_folder.folder import RunFolder

OPSET = 18


def export(
    run: str,
    out: str,
    checkpoint: str = "auto",
    weights: Literal["auto", "raw", "ema"] = "auto",
    data_root: str | None = None,
) -> int:
    """Write a run's network: torchvision's state_dict (.pth, .pt), safetensors, or ONNX, by OUT's name.

    Beside it goes OUT.json: classes, preprocessing, scores.

    Args:
        run: the run folder.
        out: file ending in .pth, .pt, .safetensors or .onnx.
        checkpoint: best (highest top-1 so far), last, a step, or a checkpoint folder; auto: best, or last where the run
            has no evaluation.
        weights: raw: as they were trained; ema: their average; auto: what scored better, the average where neither did.
        data_root: where the data lies now, for the classes' names; default: where the run had it.
    """
    folder, target = RunFolder(Path(run).expanduser().resolve()), Path(out).expanduser()
    writers = {".pth": write_state, ".pt": write_state, ".safetensors": write_safetensors, ".onnx": write_onnx}
    if target.suffix not in writers:
        raise UserError(f"{out}: the format follows from the name; use one that ends in {', '.join(writers)}")
    if not folder.config.exists():
        raise UserError(not_a_run_message(run, checkpoints=True))
    config = load_config(folder.config, verb="export")
    path, meta = find_checkpoint(folder, checkpoint)
    scores = next((row for row in read_rows(folder.ledger) if _is_score_of(row, meta["step"])), {})
    chosen = choose_weights(weights, scores, "ema.pt" in meta["files"], path)
    state = load_state(path, [FILES[chosen]])[FILES[chosen]]
    classes = read_classes(config, data_root, meta.get("classes"))
    outputs = count_outputs(config.model, state)
    if classes and len(classes) > outputs:
        raise UserError(
            f"--data_root {data_root or config.data.root} has {count(len(classes), 'class')}, the network {outputs}; "
            "give the data set that it was trained on"
        )
    model = build_model(config.model, outputs)
    load_whole(model, state)
    other = next((key for key, value in model.state_dict().items() if not isinstance(value, torch.Tensor)), None)
    if other is not None and target.suffix != ".onnx":
        raise UserError(
            f"{out}: {config.model.name} keeps {other}, which is no tensor; give a name that ends in .onnx, or load "
            f"{path / f'{FILES[chosen]}.pt'} with torch.load"
        )
    card_file = target.with_name(target.name + ".json")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("ab"):  # can it be written? The writers raise errors of their own
            pass
        writers[target.suffix](model.eval(), config, target)
        card = describe(config, outputs, classes, meta["step"], chosen, scores, inside=target.suffix == ".onnx")
        card_file.write_text(json.dumps(card, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{out} can't be written ({error.strerror}); give another place") from error
    finally:
        with contextlib.suppress(OSError):  # what is raised above says more
            if target.is_file() and not target.stat().st_size:
                target.unlink()
    try:
        checked = check_export(target, card, model, config, data_root)
    except ExportError:
        target.unlink()
        card_file.unlink()
        raise
    size = target.stat().st_size / 1e6
    what = "averaged weights (EMA)" if chosen == "ema" else "weights"
    print(
        f"{target}: {config.model.name}, {what} of step {meta['step']:,}, {size:,.1f} MB; {target.name}.json beside it"
    )
    print(checked)
    if config.model.blurpool != "none":
        print(
            f"the network is not torchvision's {config.model.name}: BlurPool ({config.model.blurpool}) is part of it. "
            "A state_dict has a key that says so, which a strict load refuses; `pipeline import` reads it"
        )
    if config.evaluation.recalibrate_batches:
        print("BatchNorm's statistics are the training's; the scores are with recalibrated ones")
    if classes is None:
        print(f"the classes' names are not in it: no index at {config.data.root or 'data.root'}; give --data_root")
    return EXIT_OK


def _is_score_of(row: dict, step: int) -> bool:
    return row.get("kind") == "eval" and row["step"] == step


def choose_weights(wanted: str, scores: dict, averaged: bool, path: Path) -> str:
    """ "raw" or "ema". Raises UserError where the average is wanted and there is none."""
    if wanted == "ema" and not averaged:
        raise UserError(f"{path} has no averaged weights (no ema.decay or ema.last_epochs); give --weights raw")
    if wanted != "auto":
        return wanted
    better = scores.get("val_ema_top1", math.inf) >= scores.get("val_top1", -math.inf)
    return "ema" if averaged and better else "raw"


def read_classes(config: Config, data_root: str | None, known: list[str] | None) -> list[dict] | None:
    """[{synset, words}] in label order, or None where nothing says them.

    known: the classes that the checkpoint was trained on; the data set adds its words, and must not have others. Raises
    UserError for a `data_root` that has.
    """
    there = _classes_here(config, data_root)
    if known is None:
        return there
    if there is not None and set(known) <= {entry["synset"] for entry in there}:
        words = {entry["synset"]: entry["words"] for entry in there}
        return [{"synset": name, "words": words[name]} for name in known]
    if data_root and there is not None:
        strange = next((entry["synset"] for entry in there if entry["synset"] not in known), None)
        if strange is not None:
            raise UserError(
                f"--data_root {data_root} has the class '{strange}', which the run was not trained on; its classes are "
                f"like '{known[0]}'. Leave --data_root out, or give the data set that it was trained on"
            )
    return [{"synset": name, "words": name} for name in known]


def _classes_here(config: Config, data_root: str | None) -> list[dict] | None:
    folder = locate_index(config.data, data_root)
    if not (data_root or config.data.root) or not has_index(folder):
        if data_root:
            raise UserError(f"--data_root {data_root} has no index; build it with: pipeline index {data_root}")
        return None
    index = open_index(folder)
    return [{"synset": s, "words": w} for s, w in zip(index.synsets, index.words, strict=True)]


def expected_means(config: Config) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(mean, std) of each channel that a state_dict's plain network expects.

    The published GoogLeNet and Inception v3 are for means and deviations of 0.5; a run that starts from them keeps its
    own and lets the network convert them (`transform_input`), which is no part of a state_dict.
    """
    mean, std = config.data.mean, config.data.std
    if not transforms_input(config.model):
        return mean, std
    channels = list(zip(mean, std, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), strict=True))  # torchvision's figures
    stds = [s * 0.5 / there for _, s, _, there in channels]
    means = [m + (0.5 - there) / 0.5 * s for (m, _, there, _), s in zip(channels, stds, strict=True)]
    return tuple(round(m, 6) for m in means), tuple(round(s, 6) for s in stds)


def describe(
    config: Config, outputs: int, classes: list[dict] | None, step: int, weights: str, scores: dict, inside: bool
) -> dict:
    """What somebody needs to use the weights, "raw" or "ema". scores: the step's row of the ledger, or {}. inside: what
    the network does to its input by itself is in the file (ONNX)."""
    blurpool, data, infix = config.model.blurpool, config.data, "ema_" if weights == "ema" else ""
    mean, std = (data.mean, data.std) if inside else expected_means(config)
    named = {f"val_{key}": f"val_{infix}{key}" for key in ("loss", "top1", "top5")}
    return {
        "model": config.model.name,
        "model_kwargs": config.model.kwargs,
        "num_classes": outputs,
        "classes": classes,
        "preprocessing": {
            "input": "float32 [B, 3, H, W], RGB",
            "resize_shorter_side": data.val_resize,
            "interpolation": f"{data.interpolation}, antialiased",
            "center_crop": data.val_size,
            "scale": "1 / 255",
            "mean": list(mean),
            "std": list(std),
        },
        "output": "logits [B, num_classes]",
        "changes_to_torchvisions_network": {} if blurpool == "none" else {"blurpool": blurpool},
        "step": step,
        "weights": weights,
        "scores_are_means_with_mirrored_images": config.evaluation.flip,
        "scores": {key: scores[there] for key, there in named.items()} if scores else None,
        "scored_images": {key: scores.get(key) for key in ("images", "left_out")} if scores else None,
    }


def write_state(model: nn.Module, config: Config, path: Path) -> None:
    """A plain state_dict, which torchvision's model loads strictly. One of a network with BlurPool has a key of its own
    (`mark_blurpool`), which makes that load fail: it would be another network."""
    state = model.state_dict()  # its modules' versions, an attribute, go along: MNASNet refuses weights without
    for key in state:
        state[key] = state[key].contiguous()
    mark_blurpool(state, config.model.blurpool)
    with path.open("wb") as file:
        torch.save(state, file)


def write_safetensors(model: nn.Module, config: Config, path: Path) -> None:
    """As `write_state`. A tensor with two names (layers that share their weights) is written under both."""
    from safetensors.torch import save_file

    state = {key: value.clone(memory_format=torch.contiguous_format) for key, value in model.state_dict().items()}
    mark_blurpool(state, config.model.blurpool)
    save_file(state, path, metadata={"format": "pt", "model": config.model.name})


def write_onnx(model: nn.Module, config: Config, path: Path) -> None:
    """ONNX of normalized images float32 [B, 3, H, W] -> logits, for any B. Raises UserError where a package is missing,
    and for a network of which torch can't make a graph."""
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(f"{path}: ONNX needs {error.name}; pip install onnx onnxscript") from error
    size = config.data.val_size
    try:
        torch.onnx.export(
            model,
            (torch.zeros(2, 3, size, size),),
            path,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            opset_version=OPSET,
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    except (torch.onnx.OnnxExporterError, ValueError) as error:
        cause = error.__cause__ or error
        reason = (str(cause).strip().splitlines() or [type(cause).__name__])[0]
        raise UserError(
            f"{path}: {config.model.name} can't be written as ONNX ({reason:.200}); "
            "give a name that ends in .safetensors"
        ) from error


def main(argv: list[str]) -> int:
    return run_command(export, "export", argv)
