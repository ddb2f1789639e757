"""The part of a run's page that needs the weights: kernels, what they say of validation images, where they look."""

from collections.abc import Iterator
from html import escape

import numpy as np

from pipeline.errors import UserError
from pipeline.insight.report import page
from pipeline.insight.report.colormap import inferno

ON_CPU = 1000  # validation images that are looked at where there is no GPU
CLASSES, PAIRS, MISTAKES, LOOKS = 100, 20, 24, 8  # most that is shown of each


def parameters(model) -> str:
    """Every tensor's shape, and the sum."""
    rows = [[name, " x ".join(map(str, p.shape)), f"{p.numel():,}"] for name, p in model.named_parameters()]
    total = sum(p.numel() for p in model.parameters())
    return page.fold(
        f"{total:,} parameters in {len(rows)} tensors", page.table(["layer", "shape", "parameters"], rows, {2})
    )


def kernels(networks, save) -> Iterator[str]:
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


def class_names(index) -> list[str]:
    return [
        f"{words.split(',')[0]}" if words else synset for synset, words in zip(index.synsets, index.words, strict=True)
    ]


def answers(said, names: list[str], index, config) -> Iterator[str]:
    """Per-class accuracy, confusions, and the surest mistakes."""
    from pipeline.insight.report.predictions import load_image

    note = "" if len(said.ids) == said.whole else ", evenly spread"
    lost = f"; {said.unreadable} could not be read" if said.unreadable else ""
    yield f"<p>{len(said.ids):,} of {said.whole:,} validation images{note}: top-1 {said.top1:.2f} %{lost}.</p>"
    share, count = said.by_class(len(names))
    order = [i for i in np.argsort(np.where(np.isnan(share), np.inf, share), kind="stable") if count[i]]
    rows = [[names[i], f"{share[i]:.1f} %", page.Bar(share[i]), int(count[i])] for i in order]
    head = ["class", "top-1", "", "images"]
    yield "<h3>Accuracy of each class, the worst first</h3>"
    yield page.table(head, rows[: CLASSES // 5], {1, 3})
    if len(rows) > CLASSES // 5:
        yield page.fold(f"All {len(rows)} classes", page.table(head, rows, {1, 3}))
    confused = [[names[a], names[b], n] for a, b, n in said.confusions(PAIRS)]
    if confused:
        yield "<h3>Most confused</h3>"
        yield page.table(["is", "taken for", "images"], confused, {2})
    shots = []
    for place in said.mistakes(MISTAKES):
        picture = load_image(index, config, int(said.ids[place]))
        if picture is not None:
            label, guess = names[said.labels[place]], names[said.guesses[place]]
            text = f"<b>{escape(guess)}</b> {100 * said.sure[place]:.0f} %<br>is {escape(label)}"
            shots.append(f"<div>{page.image(small(picture), f'{label} taken for {guess}', 'JPEG')}{text}</div>")
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


def looks(network, said, names: list[str], index, config, device, save) -> Iterator[str]:
    """Grad-CAM of validation images: half of them right, half wrong."""
    import torch
    from PIL import Image

    from pipeline.insight.report.filters import grad_cam
    from pipeline.insight.report.predictions import load_image

    right = np.flatnonzero(said.labels == said.guesses)
    right = right[np.unique(np.linspace(0, len(right) - 1, LOOKS // 2).astype(int))] if len(right) else right
    chosen = [*right, *said.mistakes(LOOKS - len(right))]
    pictures = [load_image(index, config, int(said.ids[place])) for place in chosen]
    chosen = [place for place, picture in zip(chosen, pictures, strict=True) if picture is not None]
    pictures = [picture for picture in pictures if picture is not None]
    if not pictures:
        return
    guesses = torch.from_numpy(said.guesses[chosen]).to(device)
    heat = grad_cam(network, torch.from_numpy(np.stack(pictures)).to(device), guesses)
    if heat is None:
        yield '<p class="none">Grad-CAM is for convolutional networks with a feature map of more than one pixel.</p>'
        return
    shots = []
    for place, picture, one in zip(chosen, pictures, heat, strict=True):
        size = picture.shape[1::-1]
        wide = np.asarray(Image.fromarray((255 * one).astype(np.uint8)).resize(size, Image.Resampling.BICUBIC)) / 255
        laid = (0.45 * picture + 0.55 * inferno(wide)).astype(np.uint8)
        label, guess = names[said.labels[place]], names[said.guesses[place]]
        both = page.image(small(picture), label, "JPEG") + page.image(small(laid), f"Grad-CAM of {guess}", "JPEG")
        verdict = "right" if label == guess else f"is {escape(label)}"
        shots.append(
            f'<div><div class="pair">{both}</div><b>{escape(guess)}</b> {100 * said.sure[place]:.0f} %, {verdict}</div>'
        )
        save(f"grad-cam-{len(shots)}", np.concatenate([picture, laid], axis=1))
    yield "<p>Each image beside what speaks for the network's guess, from dark to bright (Grad-CAM).</p>"
    yield f'<div class="shots pairs">{"".join(shots)}</div>'


def network_sections(record, data_root: str | None, device_name: str, most: int | None, save) -> Iterator[str]:
    """What needs the weights; where something is missing, a sentence says what."""
    import torch

    from pipeline.dataset.index.left_out import describe
    from pipeline.evaluation.class_map import class_positions
    from pipeline.insight.report.predictions import predict
    from pipeline.insight.report.run_record import load_networks, open_index_of
    from pipeline.model.build import Normalized

    index = None
    try:
        index = open_index_of(record, data_root)
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
    yield "<h2>What it says of the validation images</h2>"
    if index is None:
        yield f'<p class="none">Not shown: {escape(missing)}</p>'
        return
    if describe(index.left_out):
        yield f"<p>Left out of the data set: {escape(describe(index.left_out))}.</p>"
    try:
        places = class_positions(index.synsets, networks.classes, networks.outputs, str(index.root))
    except UserError as error:
        yield f'<p class="none">Not shown: {escape(str(error))}</p>'
        return
    cuda = device_name == "cuda" or (device_name == "auto" and torch.cuda.is_available())
    device = torch.device("cuda" if cuda else "cpu")
    most = most if most is not None else (None if cuda else ON_CPU)
    data, train = record.config.data, record.config.train
    network = Normalized(networks.after, data.mean, data.std, train.channels_last).to(device).eval()
    said = predict(network, index, record.config, device, most, places)
    if not len(said.ids):
        yield '<p class="none">Not shown: no validation image can be read</p>'
        return
    known = networks.classes or []
    names = [*known, *(f"output {number}" for number in range(len(known), networks.outputs))]
    for place, name in zip(places.tolist(), class_names(index), strict=True):
        names[place] = name
    yield from answers(said, names, index, record.config)
    yield "<h2>Where it looks</h2>"
    yield from looks(network, said, names, index, record.config, device, save)
