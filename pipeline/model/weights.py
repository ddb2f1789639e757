"""Starting from trained weights: torchvision's published ones by name, or a file. Never unpickles."""

import contextlib
import json
import re
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import nn

from pipeline.config import ModelConfig
from pipeline.config.networks import is_timm, is_torchvision
from pipeline.counts import count
from pipeline.errors import TransientError, UserError
from pipeline.model.heads import find_heads, is_auxiliary
from pipeline.model.networks import save_timms_weights
from pipeline.model.weight_entries import find_state, named_as, plain_names, safe_globals
from pipeline.run_paths import list_checkpoints

_BLURPOOL = "pipeline.blurpool."  # beginning of the key that marks a state_dict
_DOTTED = re.compile(r"^(.*denselayer\d+\.(?:norm|relu|conv))\.([12]\.\w+)$")


def start_from(
    model: nn.Module,
    config: ModelConfig,
    classes: Sequence[str] | None = None,
    say: Callable[[str], None] = lambda _: None,
    place: Path | None = None,
) -> None:
    """Load what `config.weights` names into a model; heads for other classes keep their fresh weights.

    Args:
        model: the network.
        config: names the weights.
        classes: of the data set; a head of as many but other classes starts fresh, unless `config.keep_head`.
        say: prints what was taken, in one line.
        place: the file or checkpoint folder that is meant, where `config.weights` is a run folder.

    Raises UserError for a name or a file that does not fit, TransientError where the download fails.
    """
    if config.weights is None:
        return
    if not config.weights or "://" in config.weights:
        what = "an address: download it first, and" if config.weights else "empty:"
        raise UserError(f"--model.weights {config.weights} is {what} give a file, a run, or a name of torchvision's")
    entry, known = "", None
    if is_published(config):
        state, known = published_state(config), _published_classes(config, classes)
    else:
        state, entry, known = read_weights(place or Path(config.weights).expanduser())
    blurpool = pop_blurpool(state)
    if blurpool not in ("none", config.blurpool):
        raise UserError(
            f"--model.weights {config.weights} belongs to a network with BlurPool; "
            f"give --model.blurpool {blurpool}, without which it is another network"
        )
    other = classes is not None and known is not None and list(known) != list(classes)
    fresh = load_body(model, state, config, config.weights, fresh_heads=other and not config.keep_head)
    source = f"{config.weights}" + (f" ({place.name})" if place else "") + (f", entry '{entry}'" if entry else "")
    without = not any(key.rpartition(".")[0] in fresh for key in named_as(state, model.state_dict()))
    told = _tell_head(fresh, classes, known, other, without)
    say(f"weights from {source}: {count(len(state), 'tensor')}; {told}")


def _tell_head(
    fresh: list[str], classes: Sequence[str] | None, known: Sequence[str] | None, other: bool, without: bool
) -> str:
    """What became of the head, in words. without: the weights have none of those that are fresh."""
    if fresh and without:
        return f"the head {', '.join(fresh)} starts fresh: the weights have none"
    if fresh and other and known is not None and classes is not None:
        return f"the head {', '.join(fresh)} starts fresh: it is for {_few(known)}, the data set has {_few(classes)}"
    if fresh:
        return f"the head {', '.join(fresh)} starts fresh: it is for another number of classes"
    if other:
        return "the head is kept (model.keep_head), though its classes are others"
    if known is None:
        return "the head is kept: it has as many outputs, the weights do not say of which classes"
    return "the head is kept: it is for the same classes"


def _few(names: Sequence[str]) -> str:
    return f"{count(len(names), 'class')} ({', '.join(names[:2])}{', ...' if len(names) > 2 else ''})"


def _published_classes(config: ModelConfig, classes: Sequence[str] | None) -> Sequence[str] | None:
    """torchvision's categories, unless the data set is ImageNet, whose folders are synsets."""
    if classes is None or config.weights is None or all(re.fullmatch(r"n\d{8}", name) for name in classes):
        return None
    return torchvision.models.get_model_weights(config.name)[config.weights].meta["categories"]


def mark_blurpool(state: dict[str, torch.Tensor], blurpool: str) -> None:
    """Add a key to a state_dict that says which BlurPool its network has. Blurring has no weights of its own, so the
    plain network would load a file without the key, and compute something else."""
    if blurpool != "none":
        state[_BLURPOOL + blurpool] = torch.ones(1)


def pop_blurpool(state: dict[str, torch.Tensor]) -> str:
    """The BlurPool that a state_dict is marked with, "none" without a mark. The mark is removed."""
    marks = [key for key in state if key.startswith(_BLURPOOL)]
    for key in marks:
        del state[key]
    return marks[0].removeprefix(_BLURPOOL) if marks else "none"


def is_published(config: ModelConfig) -> bool:
    """Does `config.weights` name torchvision's published weights? A file of that name comes first."""
    if config.weights is None or Path(config.weights).expanduser().exists():
        return False
    return config.weights.isidentifier()


def published_state(config: ModelConfig) -> dict[str, torch.Tensor]:
    """torchvision's weights by name ("DEFAULT", "IMAGENET1K_V1", ...), downloaded once and checked by their hash."""
    if not is_torchvision(config.name):
        remedy = f"; {save_timms_weights(config.name)}" if is_timm(config.name) else ""
        raise UserError(
            f"--model.weights {config.weights} is not a file, which {config.name} needs; names are torchvision's"
            + remedy
        )
    known = torchvision.models.get_model_weights(config.name)
    if config.weights not in known.__members__:
        names = ", ".join(dict.fromkeys(["DEFAULT", *known.__members__]))
        raise UserError(f"--model.weights {config.weights} is neither a file nor published for {config.name}: {names}")
    try:
        return renamed(known[config.weights].get_state_dict(progress=False, check_hash=True))
    except (OSError, RuntimeError) as error:
        raise TransientError(
            f"--model.weights {config.weights} could not be downloaded ({error}); or give a file"
        ) from error


def read_state(path: Path) -> dict[str, torch.Tensor]:
    """A state_dict from a .pth, .pt or .safetensors file, or from a checkpoint folder; see `pop_blurpool`. Raises
    UserError."""
    return read_weights(path)[0]


def read_weights(path: Path) -> tuple[dict[str, torch.Tensor], str, list[str] | None]:
    """(as `read_state`, the entry of the file that was taken, the classes of its outputs: None where nothing says
    them). Raises UserError."""
    there = [] if (path / "model.pt").exists() else list_checkpoints(path)
    if there:
        raise UserError(f"{path} is a folder of checkpoints; give one of them, such as the newest: {there[0][1]}")
    if path.is_dir():
        state, entry, classes = read_weights(path / "model.pt")
        with contextlib.suppress(OSError, ValueError, AttributeError):  # no meta.json: weights alone
            meta = json.loads((path / "meta.json").read_bytes())
            mark_blurpool(state, meta.get("semantic_config", {}).get("model.blurpool", "none"))
            classes = meta.get("classes") or None
        return state, entry, classes
    if not path.is_file():
        raise UserError(f"no weights at {path}: no such file; give a .pth, .pt or .safetensors file")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            with torch.serialization.safe_globals(safe_globals()), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of TorchScript, which is refused below
                state = torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # whatever a text or a torn file leads torch's reader to
        if "TorchScript" in str(error):
            raise UserError(
                f"{path} is a TorchScript program, which is not run here; save its weights with "
                f'torch.save(torch.jit.load("{path}").state_dict(), FILE)'
            ) from error
        lines = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip().splitlines() or [type(error).__name__]
        if path.suffix.lower() == ".onnx":
            raise UserError(
                f"{path} is an ONNX file, which is not read; give the weights as .pt or .safetensors"
            ) from error
        held = re.search(r"GLOBAL (\S+)", str(error))
        if held:
            reason = f"it holds a {held[1]}"
        elif isinstance(error, OSError | RuntimeError | _safetensors_error()):
            reason = lines[0][:200]
        else:
            reason = "torch.save did not write it, or it is cut off"
        raise UserError(
            f"{path} is not a file of weights that can be read safely ({reason}); "
            "save it again with torch.save(model.state_dict(), FILE)"
        ) from error
    found, entry = find_state(state)
    if found is None:
        inside = (
            f": its entries are {', '.join(map(str, list(state)[:8]))}" if isinstance(state, dict) and state else ""
        )
        raise UserError(f"{path} holds no state_dict (name -> tensor){inside}; save model.state_dict()")
    broken = [key for key, value in found.items() if value.is_floating_point() and not value.isfinite().all()]
    if broken:
        more = f" and {len(broken) - 1:,} more" if len(broken) > 1 else ""
        raise UserError(
            f"{path}: {broken[0]}{more} hold NaN or infinite values, as after a run that diverged; give others"
        )
    return renamed(found), entry, _classes_of_card(path)


def _classes_of_card(path: Path) -> list[str] | None:
    """The classes that the card of an export says, FILE.json."""
    try:
        classes = json.loads(path.with_name(path.name + ".json").read_bytes())["classes"]
        return [entry["synset"] for entry in classes] or None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def renamed(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The names that torchvision's networks have today, of those in older files: DenseNet's layers had dots in theirs
    (as the published files still have), and wrappers put their own before them (see `plain_names`)."""
    names = list(state)
    plain = plain_names(names)
    new = OrderedDict((_DOTTED.sub(r"\1\2", name), state[key]) for key, name in zip(names, plain, strict=True))
    if plain == names:
        set_versions(new, get_versions(state))
    return new


def get_versions(state: Mapping[str, torch.Tensor]) -> Any:
    """The versions of its modules that a state_dict carries; None where it has none."""
    return getattr(state, "_metadata", None)


def set_versions(state: Mapping[str, torch.Tensor], versions: Any) -> None:
    """Let an OrderedDict carry module versions, unless None."""
    if versions is not None:
        setattr(state, "_metadata", versions)  # noqa: B010 - torch's attribute, which no type declares


def _safetensors_error() -> type[Exception]:
    from safetensors import SafetensorError

    return SafetensorError


def load_whole(model: nn.Module, state: dict[str, torch.Tensor], strict: bool = True) -> None:
    """`model.load_state_dict(state)`. A state without the versions of its modules, as checkpoints and safetensors files
    are, counts as written by this version of theirs: some (MNASNet's) refuse one that does not say."""
    own = model.state_dict()
    state = named_as(state, own)
    versioned = OrderedDict(state)
    set_versions(versioned, get_versions(state) or get_versions(own))
    for key in own:  # files from before torch 0.4.1 have none
        if key.endswith("num_batches_tracked") and key.removesuffix("num_batches_tracked") + "running_mean" in state:
            versioned.setdefault(key, own[key])
    model.load_state_dict(versioned, strict=strict)


def load_body(
    model: nn.Module, state: dict[str, torch.Tensor], config: ModelConfig, source: str, fresh_heads: bool = False
) -> list[str]:
    """Load `state` strictly, but for the heads: one for another number of classes is left fresh, as are one that is
    missing (unless `config.keep_head`) and auxiliary arms that one side has not; all heads with `fresh_heads`. Returns
    the names of the heads that are fresh. Raises UserError that names what does not fit."""
    fresh: list[str] = []
    own, name = model.state_dict(), config.name
    state = named_as(state, own)
    heads = find_heads(config)
    usable: OrderedDict[str, torch.Tensor] = OrderedDict()
    wrong: list[str] = []
    for key, value in state.items():
        if key not in own:
            if not key.lower().startswith("aux"):
                wrong.append(f"{key} is not in {name}")
        elif value.shape != own[key].shape:
            if key.rpartition(".")[0] in heads:
                fresh.append(key.rpartition(".")[0])
            else:
                wrong.append(f"{key} is {list(value.shape)} in the weights and {list(own[key].shape)} in {name}")
        elif fresh_heads and key.rpartition(".")[0] in heads:
            fresh.append(key.rpartition(".")[0])
        else:
            usable[key] = value
    missing = [key for key in own if key not in state and not key.lower().startswith("aux")]
    if not config.keep_head:  # weights of a body alone
        there = {key.rpartition(".")[0] for key in state}
        absent = [head for head in heads if head and head not in there and not is_auxiliary(head)]
        missing = [key for key in missing if key.rpartition(".")[0] not in absent]
        fresh += absent
    wrong += [f"{key} is missing" for key in missing if not key.endswith("num_batches_tracked")]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise UserError(f"{source} does not fit --model.name {name}: {'; '.join(wrong[:3])}{more}")
    set_versions(usable, get_versions(state))
    load_whole(model, usable, strict=False)
    return [head for head in dict.fromkeys(fresh) if not is_auxiliary(head)]
