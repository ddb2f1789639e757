"""Every change of a policy, for many images at once, is pixel for pixel what torchvision makes of each image alone."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import interpolate
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from pipeline.augment import ops
from pipeline.augment.apply import PixelOps
from pipeline.augment.ops import apply_ops
from pipeline.augment.params import AugmentParams
from pipeline.augment.policies import CODE, OPS, inverse_affine
from pipeline.training.evaluate import score

COUNT, SIZE = 24, 96
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def images():
    """uint8 [24, 96, 96, 3]: soft and hard edges, one image of a single color, one with a constant channel."""
    generator = torch.Generator().manual_seed(5)
    small = torch.randint(0, 256, (COUNT, 3, 12, 12), generator=generator, dtype=torch.uint8)
    large = interpolate(small.float(), size=(SIZE, SIZE), mode="bicubic").clamp(0, 255).to(torch.uint8)
    large[::3] = interpolate(small[::3].float(), size=(SIZE, SIZE), mode="nearest").to(torch.uint8)
    large[0], large[1, 0] = 77, 3
    return large.permute(0, 2, 3, 1).contiguous()


def changed(images, ops, amounts, mode="nearest", fill=None):
    """Change all images by ops [B, S] (names) and amounts [B, S]."""
    codes = np.vectorize(CODE.get)(np.asarray(ops)).astype(np.uint8)
    drawn = AugmentParams(codes, np.asarray(amounts, np.float32))
    return apply_ops(images, PixelOps.of(drawn, images.shape[1], CPU), mode, fill)


def expected(image, op, amount, mode="nearest", fill=None):
    """torchvision's, of one image uint8 [H, W, 3], as its AutoAugment classes and ColorJitter call it."""
    image, where = image.permute(2, 0, 1), {"interpolation": InterpolationMode(mode), "fill": fill}
    if op in ("shear_x", "shear_y"):
        shear = [math.degrees(math.atan(amount)), 0.0]
        shear = shear if op == "shear_x" else shear[::-1]
        made = tv.affine(image, angle=0.0, translate=[0, 0], scale=1.0, shear=shear, center=[0, 0], **where)
    elif op in ("translate_x", "translate_y"):
        shift = [int(amount), 0] if op == "translate_x" else [0, int(amount)]
        made = tv.affine(image, angle=0.0, translate=shift, scale=1.0, shear=[0.0, 0.0], **where)
    elif op == "rotate":
        made = tv.rotate(image, amount, **where)
    elif op == "posterize":
        made = tv.posterize(image, int(amount))
    elif op in ("autocontrast", "equalize", "invert"):
        made = getattr(tv, op)(image)
    else:
        names = {"color": "adjust_saturation", "solarize": "solarize"}
        made = getattr(tv, names.get(op, f"adjust_{op}"))(image, amount)
    return made.permute(1, 2, 0)


RANGES = {
    "brightness": (0, 2),
    "color": (0, 2),
    "contrast": (0, 2),
    "sharpness": (0, 2),
    "solarize": (0, 255),
    "hue": (-0.5, 0.5),
    "posterize": (0, 9),
    "autocontrast": (0, 1),
    "equalize": (0, 1),
    "invert": (0, 1),
    "shear_x": (-0.99, 0.99),
    "shear_y": (-0.99, 0.99),
    "translate_x": (-44, 44),
    "translate_y": (-44, 44),
    "rotate": (-135, 135),
}
GEOMETRIC = ("shear_x", "shear_y", "translate_x", "translate_y", "rotate")


def amounts_of(op):
    amounts = np.random.default_rng(len(op)).uniform(*RANGES[op], COUNT).astype(np.float32)
    if op in ("posterize", "translate_x", "translate_y"):
        amounts = np.trunc(amounts)
    if op == "rotate":
        amounts[:4] = 90, -90, 0, 30
    return amounts


@pytest.mark.parametrize("op", [op for op in RANGES if op not in GEOMETRIC])
def test_colours_are_torchvisions(images, op):
    amounts = amounts_of(op)
    ours = changed(images, [[op]] * COUNT, amounts[:, None])
    theirs = torch.stack([expected(*one) for one in zip(images, [op] * COUNT, amounts.tolist(), strict=True)])
    assert torch.equal(ours, theirs)
    assert op in ("posterize", "brightness", "solarize") or (ours != images).any()


@pytest.mark.parametrize("fill", [None, (124, 116, 104)])
@pytest.mark.parametrize("mode", ["nearest", "bilinear"])
@pytest.mark.parametrize("op", GEOMETRIC)
def test_geometry_is_torchvisions(images, op, mode, fill):
    amounts = amounts_of(op)
    ours = changed(images, [[op]] * COUNT, amounts[:, None], mode, fill)
    given = None if fill is None else list(fill)
    theirs = torch.stack(
        [expected(image, op, a, mode, given) for image, a in zip(images, amounts.tolist(), strict=True)]
    )
    differing = (ours != theirs).sum().item()
    if mode == "nearest":
        assert differing == 0
    else:  # a sum of four products that is within 1e-5 of a half may be rounded the other way
        assert differing <= 2e-5 * ours.numel() and (ours.int() - theirs.int()).abs().max() <= 1
    assert (ours != images).any(-1).float().mean() > 0.3


def test_an_image_goes_through_its_own_changes_in_order(images):
    """Different ops side by side, several after another: each image is as if it were alone."""
    rng = np.random.default_rng(0)
    names = list(RANGES)
    ops = rng.choice(names, (COUNT, 3))
    ops[5] = "identity"
    amounts = np.array([[amounts_of(op)[rng.integers(COUNT)] if op in RANGES else 0 for op in row] for row in ops])
    before = images.clone()
    ours = changed(images, ops, amounts)
    assert torch.equal(images, before) and torch.equal(ours[5], images[5])
    for i, image in enumerate(images):
        for op, amount in zip(ops[i], amounts[i].tolist(), strict=True):
            image = expected(image, op, amount) if op != "identity" else image
        assert torch.equal(ours[i], image), (i, ops[i])


def test_solarize_add_is_timms(images):
    """Values below 128 get more, up to 255; all others stay."""
    ours = changed(images, [["solarize_add"]] * COUNT, np.full((COUNT, 1), 110))
    values = images.int()
    assert torch.equal(ours.int(), torch.where(values < 128, (values + 110).clamp(max=255), values))


def test_all_ops_are_tested():
    assert set(RANGES) | {"identity", "solarize_add"} == set(OPS)


@pytest.mark.parametrize("fill", [None, (124, 116, 104)])
@pytest.mark.parametrize("op", GEOMETRIC)
def test_bicubic_geometry_is_pils(images, op, fill):
    """timm's policies change PIL images: transform with BICUBIC, of the same affine matrix."""
    amounts = amounts_of(op)
    ours = changed(images, [[op]] * COUNT, amounts[:, None], "bicubic", fill)
    middle = SIZE / 2
    differing = 0
    for image, seen, (first, second) in zip(images, ours, inverse_affine(op, amounts, SIZE).tolist(), strict=True):
        rows = [(*row[:2], row[2] + middle - (row[0] + row[1]) * middle) for row in (first, second)]
        whole = Image.fromarray(image.numpy())
        theirs = whole.transform(
            whole.size, Image.Transform.AFFINE, [*rows[0], *rows[1]], Image.Resampling.BICUBIC, fillcolor=fill
        )
        apart = np.abs(np.asarray(theirs).astype(int) - seen.numpy().astype(int))
        differing += (apart > 1).sum()  # on the very edge a pixel may lie inside for one and outside for the other
    assert differing <= 2e-4 * ours.numel()


class _NoHostData(torch.overrides.TorchFunctionMode):
    """Refuses tensors made from values of the host: on a GPU each is a copy that the host waits for."""

    def __torch_function__(self, function, types, arguments=(), options=None):
        assert function not in (torch.tensor, torch.as_tensor, torch.from_numpy, torch.Tensor.tolist, torch.Tensor.item)
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize("mode", ["nearest", "bilinear", "bicubic"])
def test_nothing_is_copied_from_the_host_for_each_batch(mode):
    images = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
    matrices = torch.eye(2, 3).expand(3, 2, 3)
    logits, targets = torch.randn(5, 7), torch.arange(5)
    with _NoHostData():
        ops.hue(images, torch.full((3,), 0.1))
        ops.affine(images, matrices, mode, (1, 2, 3))
        score(logits, targets)
