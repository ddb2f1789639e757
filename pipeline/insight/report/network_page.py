"""The part of a run's page that requires the weights: kernels, predictions for validation images, Grad-CAM."""

from collections.abc import Callable, Iterator
from html import escape
from typing import TYPE_CHECKING

import numpy as np

from pipeline.counts import count
from pipeline.errors import UserError
from pipeline.insight.report import page
from pipeline.insight.report.colormap import inferno
from pipeline.logs import logger

if TYPE_CHECKING:
    import torch
    from torch import nn

    from pipeline.config import Config
    from pipeline.dataset.index.index import Index
    from pipeline.insight.report.predictions import Predictions
    from pipeline.insight.report.run_record import Networks, Record

SavePicture = Callable[[str, np.ndarray], None]  #: (name, uint8 [h, w, 3]): writes a picture beside the page
ON_CPU = 1000  # validation images that are classified where there is no GPU, as `report --help` says
CLASSES, PAIRS, MISTAKES, CAMS = 100, 20, 24, 8  # the largest number that is shown of each


def parameters(model: "nn.Module") -> str:
    """Every tensor's shape, and the sum."""
    rows = [[name, " x ".join(map(str, p.shape)), f"{p.numel():,}"] for name, p in model.named_parameters()]
    total = sum(p.numel() for p in model.parameters())
    return page.fold(
        f"{count(total, 'parameter')} in {count(len(rows), 'tensor')}",
        page.table(["layer", "shape", "parameters"], rows, {2}),
    )


def kernels(networks: "Networks", save: SavePicture) -> Iterator[str]:
    from pipeline.insight.report.filters import before_after

    if networks.before is None:
        yield f'<p class="none">The kernels before and after training are not shown: {escape(networks.missing)}</p>'
        return
    for number, (caption, pictures) in enumerate(before_after(networks.before, networks.after), 1):
        yield f"<h3>{escape(caption)}</h3>"
        shown = []
        for name, picture in pictures.items():
            save(f"convolution-{number}-{name}", picture)
            shown.append(f"<div>{page.image(picture, f'{caption}, {name}')}{name}</div>")
        yield f'<div class="pictures">{"".join(shown)}</div>'


def class_names(index: "Index") -> list[str]:
    return [
        f"{words.split(',')[0]}" if words else synset for synset, words in zip(index.synsets, index.words, strict=True)
    ]


def accuracy(found: "Predictions", names: list[str], index: "Index", config: "Config") -> Iterator[str]:
    """Accuracy of each class, confusions, and the most confident mistakes."""
    from pipeline.insight.report.predictions import load_image

    note = "" if len(found.ids) == found.total else ", evenly spread"
    lost = f"; {found.unreadable} could not be read" if found.unreadable else ""
    yield f"<p>{len(found.ids):,} of {found.total:,} validation images{note}: top-1 {found.top1:.2f} %{lost}.</p>"
    share, count = found.by_class(len(names))
    order = [i for i in np.argsort(np.where(np.isnan(share), np.inf, share), kind="stable") if count[i]]
    rows = [[names[i], f"{share[i]:.1f} %", page.Bar(share[i]), int(count[i])] for i in order]
    head = ["class", "top-1", "", "images"]
    yield "<h3>Accuracy of each class, the worst first</h3>"
    yield page.table(head, rows[: CLASSES // 5], {1, 3})
    if len(rows) > CLASSES // 5:
        yield page.fold(f"All {len(rows)} classes", page.table(head, rows, {1, 3}))
    confused = [[names[a], names[b], n] for a, b, n in found.confusions(PAIRS)]
    if confused:
        yield "<h3>Most confused</h3>"
        yield page.table(["is", "predicted as", "images"], confused, {2})
    shots = []
    for position in found.mistakes(MISTAKES):
        picture = load_image(index, config, int(found.ids[position]))
        if picture is not None:
            label, predicted = names[found.labels[position]], names[found.predicted[position]]
            text = f"<b>{escape(predicted)}</b> {100 * found.confidence[position]:.0f} %<br>is {escape(label)}"
            shots.append(f"<div>{page.image(small(picture), f'{label} predicted as {predicted}', 'JPEG')}{text}</div>")
    if shots:
        yield "<h3>Most confident mistakes</h3>"
        yield f'<div class="shots">{"".join(shots)}</div>'


def small(picture: np.ndarray, side: int = 192) -> np.ndarray:
    """A thumbnail of at most `side` pixels; tiny pictures are enlarged by a whole factor."""
    from PIL import Image

    height = picture.shape[0]
    if height > side:
        return np.asarray(Image.fromarray(picture).resize((side, side), Image.Resampling.LANCZOS))
    return picture.repeat(side // height, 0).repeat(side // height, 1)


def grad_cams(
    network: "nn.Module",
    found: "Predictions",
    names: list[str],
    index: "Index",
    config: "Config",
    device: "torch.device",
    save: SavePicture,
) -> Iterator[str]:
    """Grad-CAM of validation images: half of them classified correctly, half not."""
    import torch
    from PIL import Image

    from pipeline.insight.report.filters import grad_cam
    from pipeline.insight.report.predictions import load_image

    right = np.flatnonzero(found.labels == found.predicted)
    right = right[np.unique(np.linspace(0, len(right) - 1, CAMS // 2).astype(int))] if len(right) else right
    chosen = [*right, *found.mistakes(CAMS - len(right))]
    loaded = [(position, load_image(index, config, int(found.ids[position]))) for position in chosen]
    readable = [(position, picture) for position, picture in loaded if picture is not None]
    if not readable:
        return
    chosen, pictures = [position for position, _ in readable], [picture for _, picture in readable]
    targets = torch.from_numpy(found.predicted[chosen]).to(device)
    heat = grad_cam(network, torch.from_numpy(np.stack(pictures)).to(device), targets)
    if heat is None:
        yield '<p class="none">Grad-CAM is for convolutional networks with a feature map of more than one pixel.</p>'
        return
    shots = []
    for position, picture, one in zip(chosen, pictures, heat, strict=True):
        size = picture.shape[1::-1]
        wide = np.asarray(Image.fromarray((255 * one).astype(np.uint8)).resize(size, Image.Resampling.BICUBIC)) / 255
        laid = (0.45 * picture + 0.55 * inferno(wide)).astype(np.uint8)
        label, predicted = names[found.labels[position]], names[found.predicted[position]]
        both = page.image(small(picture), label, "JPEG") + page.image(small(laid), f"Grad-CAM of {predicted}", "JPEG")
        verdict = "right" if label == predicted else f"is {escape(label)}"
        text = f"<b>{escape(predicted)}</b> {100 * found.confidence[position]:.0f} %, {verdict}"
        shots.append(f'<div><div class="pair">{both}</div>{text}</div>')
        save(f"grad-cam-{len(shots)}", np.concatenate([picture, laid], axis=1))
    yield "<p>Each image beside its Grad-CAM map: the brighter, the more a region counts for the predicted class.</p>"
    yield f'<div class="shots pairs">{"".join(shots)}</div>'


def network_sections(
    record: "Record",
    data_root: str | None,
    device_name: str,
    most: int | None,
    save: SavePicture,
    index_folder: str | None = None,
    precision: str | None = None,
) -> Iterator[str]:
    """The sections that require the weights; where something is missing, a sentence says what. precision: of the
    predictions; None: as in the run."""
    import torch

    from pipeline.dataset.index.left_out import describe
    from pipeline.evaluation.class_map import class_positions
    from pipeline.insight.report.predictions import predict
    from pipeline.insight.report.run_record import load_networks, open_index_of
    from pipeline.model.build import Normalized
    from pipeline.training.validate import precision_warning

    index = None
    try:
        index = open_index_of(record, data_root, index_folder)
    except UserError as error:
        missing = str(error)
    try:
        networks = load_networks(record)
    except UserError as error:
        yield f'<h2>The network</h2><p class="none">Not shown: {escape(str(error))}</p>'
        return
    yield f"<h2>The network at step {networks.step:,}{', averaged weights' if networks.averaged else ''}</h2>"
    yield parameters(networks.after)
    yield from kernels(networks, save)
    yield "<h2>Predictions for validation images</h2>"
    if index is None:
        yield f'<p class="none">Not shown: {escape(missing)}</p>'
        return
    if describe(index.left_out):
        yield f"<p>Left out of the data set: {escape(describe(index.left_out))}.</p>"
    try:
        outputs = class_positions(index.synsets, networks.classes, networks.outputs, str(index.root))
    except UserError as error:
        yield f'<p class="none">Not shown: {escape(str(error))}</p>'
        return
    cuda = device_name == "cuda" or (device_name == "auto" and torch.cuda.is_available())
    device = torch.device("cuda" if cuda else "cpu")
    most = most if most is not None else (None if cuda else ON_CPU)
    data, train = record.config.data, record.config.train
    network = Normalized(networks.after, data.mean, data.std, train.channels_last).to(device).eval()
    slow = precision_warning(precision or train.precision, device.type, "--precision fp32")
    if slow:
        logger.warning("%s", slow)
    found = predict(network, index, record.config, device, most, outputs, precision)
    if not len(found.ids):
        yield '<p class="none">Not shown: no validation image can be read</p>'
        return
    known = networks.classes or []
    names = [*known, *(f"output {number}" for number in range(len(known), networks.outputs))]
    for output, name in zip(outputs.tolist(), class_names(index), strict=True):
        names[output] = name
    if precision not in (None, train.precision):
        yield f"<p>Computed in {precision}; the run's precision is {train.precision}.</p>"
    yield from accuracy(found, names, index, record.config)
    yield "<h2>Grad-CAM</h2>"
    yield from grad_cams(network, found, names, index, record.config, device, save)
