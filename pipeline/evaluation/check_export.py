"""Is an exported file the network that it was made of? It is read back as somebody else would, and computes logits."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipeline.config import Config, ModelConfig
from pipeline.counts import count
from pipeline.dataset.index.index import has_index, locate_index, open_index
from pipeline.errors import UserError
from pipeline.evaluation.import_weights import as_blurpool
from pipeline.loader.build import make_eval_stream
from pipeline.model.build import Normalized, auxiliary_weight_of, build_model
from pipeline.model.weights import load_whole, pop_blurpool, read_state
from pipeline.rank_info import RankInfo

IMAGES = 64
_CLOSE = 1e-3  # of the largest logit: an ONNX runtime multiplies in another order


class ExportError(UserError):
    """The file does not compute what the run's network does."""


@torch.no_grad()
def check_export(target: Path, card: dict[str, Any], model: nn.Module, config: Config, data_root: str | None) -> str:
    """Compare the logits of the written file, loaded as its card says, with those of the run's network.

    On 64 validation images, or on random ones where the data set is not here. target: a .pth, .pt, .safetensors or
    .onnx file. card: what `export` writes beside it. model: the run's, in evaluation mode. Returns what was checked, in
    one line. Raises ExportError if they differ.
    """
    images, kind = _images(config, data_root)
    means = (config.data.mean, config.data.std), (card["preprocessing"]["mean"], card["preprocessing"]["std"])
    ours, theirs = (Normalized(nn.Identity(), tuple(mean), tuple(std), False) for mean, std in means)
    expected = model(ours(images))
    if target.suffix == ".onnx":
        try:
            from onnxruntime import InferenceSession
        except ImportError:
            return "not checked: onnxruntime is not installed (pip install onnxruntime)"
        session = InferenceSession(str(target), providers=["CPUExecutionProvider"])
        found = torch.from_numpy(session.run(None, {"images": theirs(images).numpy()})[0])
    else:
        found = _load(target, card)(theirs(images))
    apart = (found - expected).abs().max().item() / max(expected.abs().max().item(), 1e-6)
    if not apart <= _CLOSE:
        raise ExportError(
            f"{target}: read back, its logits differ from the run's network by {apart:.2g} of the largest one; it is "
            "removed. Please report this, with the run's config.yaml"
        )
    return f"checked: read back, the file gives the same logits for {count(len(images), f'{kind} image')}"


def _images(config: Config, data_root: str | None) -> tuple[torch.Tensor, str]:
    """uint8 [B, H, W, 3] as the run's validation sees them, and what they are."""
    root = Path(data_root or config.data.root).expanduser()
    folder = locate_index(config.data, data_root)
    if has_index(folder) and root.is_dir():
        index = open_index(folder)
        if "val" in index.splits:
            stream = make_eval_stream(index, config.data, IMAGES, RankInfo())
            try:
                batch = next(iter(stream.batches(0, 1)))
            finally:
                stream.close()
            if len(batch):
                return batch.images, "validation"
    side = config.data.val_size
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (8, side, side, 3), dtype=torch.uint8, generator=generator), "random"


def _load(target: Path, card: dict[str, Any]) -> nn.Module:
    """The network of a state_dict's file and its card alone."""
    state = read_state(target)
    blurpool = as_blurpool(pop_blurpool(state), str(target))
    auxiliary = auxiliary_weight_of(card["model"], state)
    config = ModelConfig(name=card["model"], kwargs=card["model_kwargs"], blurpool=blurpool, aux_weight=auxiliary)
    network = build_model(config, card["num_classes"])
    load_whole(network, state)
    return network.eval()
