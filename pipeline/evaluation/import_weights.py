"""The verb `import`: weights from elsewhere as a run folder that `evaluate` and `export` take."""

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

import torch

from pipeline.command import run_command
from pipeline.config import Config, DataConfig, ModelConfig, load_config, resolve_recipe, semantic_config, to_yaml
from pipeline.config.networks import is_torchvision, preprocessing_of
from pipeline.counts import count
from pipeline.dataset.index.index import Index, index_folder, open_index
from pipeline.dataset.synsets import SYNSETS
from pipeline.errors import EXIT_OK, UserError, complain
from pipeline.evaluation.class_map import class_positions, imagenet_classes, order_warning
from pipeline.model.build import AUXILIARY_WEIGHTS, auxiliary_weight_of, build_model, count_parameters
from pipeline.model.heads import count_outputs
from pipeline.model.legacy_checkpoint import convert_to_torchvision, guess_model_name, is_legacy
from pipeline.model.networks import check_name, make_without_data
from pipeline.model.weight_entries import named_as
from pipeline.model.weights import load_whole, pop_blurpool, read_weights
from pipeline.training.optim.optimizer import heads_for, make_optimizer
from pipeline.training.run_folder.checkpoint import write_checkpoint
from pipeline.training.run_folder.folder import RunFolder


def import_weights(
    file: str,
    run: str,
    name: str | None = None,
    config: str = "resnet152-torchvision-v1",
    data_root: str | None = None,
    kwargs: dict | None = None,  # not dict[str, Any]: there "5" would become 5
) -> int:
    """Make a run folder of weights from elsewhere: the original ResNet-152 script's resnet.pth, or torchvision's own.

    Args:
        file: state_dict as .pth, .pt or .safetensors; it is read without unpickling.
        run: the run folder to make; it must not be one yet.
        name: of the network: torchvision's, timm:NAME, or MODULE:FUNCTION; default: what FILE.json, as `export` writes
            it, says; else ResNet-50, -101 or -152, by what the file holds.
        config: recipe whose sizes and means go with the weights, unless FILE.json has them.
        data_root: data set to score them on.
        kwargs: further arguments of the network, as --model.kwargs has them; default: those of FILE.json.
    """
    folder = RunFolder(Path(run).expanduser().resolve())
    if folder.config.exists():
        raise UserError(f"{run} is a run already; give another folder")
    state, _, known = read_weights(Path(file).expanduser())
    blurpool = pop_blurpool(state)
    card = read_card(Path(file).expanduser())
    name = name or card.get("model") or guess_model_name(state)
    check_name(name, "--name")
    if kwargs is None and name == card.get("model"):
        kwargs = card.get("model_kwargs")
    network = ModelConfig(name=name, kwargs=kwargs or {})
    legacy = is_torchvision(name) and is_legacy(state)
    state = convert_to_torchvision(state) if legacy else state
    state = named_as(state, make_without_data(network, 3).state_dict())
    settings = load_config(Path(resolve_recipe(config)), ["--model.name", name], verb="import")
    outputs = count_outputs(network, state, file)
    auxiliary = auxiliary_weight_of(name, state)
    model_config = dataclasses.replace(
        network, num_classes=outputs, blurpool=as_blurpool(blurpool, file), aux_weight=auxiliary
    )
    data = dataclasses.replace(settings.data, root=data_root or "", **preprocessing_with(card, name))
    train = dataclasses.replace(settings.train, precision="fp32")  # scored as published weights are
    settings = dataclasses.replace(settings, model=model_config, data=data, train=train, run_dir=str(folder.path))
    model = build_model(model_config, outputs)
    load_strictly(model, state, file, name)
    index = open_index(index_folder(Path(data_root).expanduser())) if data_root else None
    facts: dict[str, Any] = {"classes": known} if known else {}
    if index and known:
        class_positions(index.synsets, known, outputs, str(index.root))  # raises where the data set has others
    elif index:
        facts = {"classes": classes_for(index, outputs)}
        warning = order_warning(index.synsets) if facts["classes"] == list(index.synsets) else None
        if warning:
            complain("pipeline import", warning)
    if index:
        facts["index_fingerprint"] = index.fingerprint
    write_run(folder, settings, model, facts)
    what = (
        "the original script's layout, biases folded into BatchNorm"
        if legacy
        else "as they were"
        if not is_torchvision(name)
        else "torchvision's layout"
    )
    sizes = f"{count(count_parameters(model), 'parameter')}, {count(outputs, 'class')}"
    print(f"{folder.path}: {name}, {sizes}; {what}")
    weights = folder.checkpoint(0)
    print(f"score it: pipeline evaluate {run} --checkpoint last; train on from it: --model.weights {weights}")
    return EXIT_OK


def as_blurpool(kind: str, file: str) -> Literal["none", "convs", "all"]:
    """The option's value. Raises UserError for a mark that this version does not know."""
    known: dict[str, Literal["none", "convs", "all"]] = {"none": "none", "convs": "convs", "all": "all"}
    if kind not in known:
        raise UserError(f"{file} is marked with BlurPool '{kind}', which is not known here; convs and all are")
    return known[kind]


def read_card(file: Path) -> dict[str, Any]:
    """What `export` writes beside a file of weights, {} where that is not there. Raises UserError for another file of
    that name."""
    card = file.with_name(file.name + ".json")
    if not card.is_file():
        return {}
    try:
        said = json.loads(card.read_text(encoding="utf-8"))
        preprocessing_with(said, said["model"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{card} is not a card of an export ({error!r}); fix or remove it") from error
    return said


def preprocessing_with(card: dict[str, Any], name: str) -> dict:
    """Options of `data` that belong to weights: those of their card; for GoogLeNet and Inception v3 without one the
    means and deviations of torchvision's weights, 0.5; {}: the recipe's."""
    if card:
        said = card["preprocessing"]
        sizes = {"val_size": int(said["center_crop"]), "val_resize": int(said["resize_shorter_side"])}
        how = str(said.get("interpolation", "")).partition(",")[0]
        resized = {"interpolation": how} if how in ("bilinear", "bicubic") else {}
        return {"mean": tuple(map(float, said["mean"])), "std": tuple(map(float, said["std"])), **sizes, **resized}
    if name in AUXILIARY_WEIGHTS:
        return {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    if not preprocessing_of(name):
        return {}
    seen = DataConfig().resolve(name)
    return {key: getattr(seen, key) for key in ("image_size", "val_size", "val_resize", "mean", "std", "interpolation")}


def load_strictly(model: torch.nn.Module, state: dict, file: str, name: str) -> None:
    """Load a whole state_dict. Raises UserError in one line for one that differs."""
    try:
        load_whole(model, state)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()[1:] if line.strip()]
        raise UserError(f"{file} is not a state_dict of {name}: {' '.join(lines)[:300]}") from error


def classes_for(index: Index, outputs: int) -> list[str]:
    """The data set's class of each output. Raises UserError where that is not known."""
    if outputs == len(SYNSETS) and all(name.isdecimal() and int(name) < outputs for name in index.synsets):
        return list(SYNSETS)  # folders named 0 to 999, as in ImageNet-V2
    classes = list(index.synsets) if index.num_classes == outputs else imagenet_classes(index, outputs)
    if classes is None:
        raise UserError(
            f"--data_root {index.root} has {count(index.num_classes, 'class')} and the network "
            f"{count(outputs, 'output')}, and nothing says which is which; put LOC_synset_mapping.txt into it, or "
            "leave --data_root out"
        )
    return classes


def write_run(folder: RunFolder, config: Config, model: torch.nn.Module, facts: dict) -> None:
    """A run folder that stands at step 0 with these weights. facts: what its checkpoint says of the data set."""
    try:
        folder.checkpoints.mkdir(parents=True, exist_ok=True)
        optimizer = make_optimizer(model, config.optim, heads_for(config)).state_dict()
        scaler = torch.amp.GradScaler("cpu", enabled=config.train.precision == "fp16").state_dict()
        state = {"model": model.state_dict(), "optimizer": {"optimizer": optimizer, "scaler": scaler}}
        meta = {
            "semantic_config": semantic_config(config),
            "index_fingerprint": "",
            "blacklist": [],
            "world_size": 1,
            **facts,
        }
        write_checkpoint(folder.checkpoints, 0, state, {**meta, "torch": torch.__version__})
        folder.config.write_text(to_yaml(config), encoding="utf-8")
    except OSError as error:
        raise UserError(f"run folder {folder.path} can't be written ({error.strerror}); give another") from error


def main(argv: list[str]) -> int:
    return run_command(import_weights, "import", argv)
