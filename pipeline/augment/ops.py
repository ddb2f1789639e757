"""Color and geometric ops for many images at once, each with its own amount, on the images' device.

uint8 in and out; the result equals torchvision.transforms.v2.functional's for each image alone, pixel for pixel:
kernels without an amount are called, the others are computed by the same sums in the same order.
"""

from collections.abc import Sequence

import torch
from torch.nn.functional import grid_sample
from torchvision.transforms.v2 import functional as tv

from pipeline.augment.apply import PixelOps

_ON_A_CPU = 4  # images at a time, to stay in the caches; a GPU gets all at once
#: red, green and blue: in each sixth of the color circle which of value, p, q, t it is, two bits each
_SECTORS = tuple(
    sum(level << 2 * sixth for sixth, level in enumerate(levels))
    for levels in ((0, 2, 1, 1, 3, 0), (3, 0, 0, 2, 1, 1), (1, 1, 3, 0, 0, 2))
)
_RED, _GREEN, _BLUE = 0.2989, 0.587, 0.114  # ITU-R 601-2, as in PIL and torchvision


def apply_ops(images: torch.Tensor, pixel_ops: PixelOps, mode: str, fill: tuple[int, int, int] | None) -> torch.Tensor:
    """The images uint8 [B, H, W, 3], changed. Nothing here waits for the device.

    mode: "nearest", "bilinear" or "bicubic", of geometric changes. fill: color of what they uncover, None: black.
    """
    if pixel_ops.shifts is not None:
        images = shift(images, pixel_ops.shifts, fill)
    if not pixel_ops.rounds:
        return images
    images = images.permute(0, 3, 1, 2).clone(memory_format=torch.contiguous_format)
    most = _ON_A_CPU if images.device.type == "cpu" else len(images)
    for groups in pixel_ops.rounds:
        for op, *group in groups:
            for rows, amounts in zip(*(part.split(most) for part in group), strict=True):
                some = images.index_select(0, rows)
                changed = affine(some, amounts, mode, fill) if op == "affine" else OPS[op](some, amounts)
                _put(images, rows, changed)
    return images.permute(0, 2, 3, 1).contiguous()


def shift(images: torch.Tensor, shifts: torch.Tensor, fill: tuple[int, int, int] | None) -> torch.Tensor:
    """Images uint8 [B, H, W, C], each moved by whole pixels: shifts int64 [B, 2], to the right and down. fill: color of
    what that uncovers, None: black."""
    count, height, width, _ = images.shape
    columns = torch.arange(width, device=images.device) - shifts[:, :1]
    rows = torch.arange(height, device=images.device) - shifts[:, 1:]
    inside = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[:, None, :]
    each = torch.arange(count, device=images.device)[:, None, None]
    moved = images[each, rows.clamp_(0, height - 1)[:, :, None], columns.clamp_(0, width - 1)[:, None, :]]
    color = _constant(fill or (0, 0, 0), images.device).to(torch.uint8)
    return torch.where(inside[..., None], moved, color)


def _put(images: torch.Tensor, rows: torch.Tensor, changed: torch.Tensor) -> None:
    """images[rows] = changed. (On a CPU index_copy_ takes many times as long as copies.)"""
    if images.device.type != "cpu":
        images.index_copy_(0, rows, changed)
        return
    for row, image in zip(rows.tolist(), changed, strict=True):
        images[row] = image


def _constant(values: Sequence[float], device: torch.device) -> torch.Tensor:
    """float32 [n] on the device, filled there: a copy from the host would wait for it."""
    return torch.stack([torch.full((), float(value), dtype=torch.float32, device=device) for value in values])


def _each(amounts: torch.Tensor) -> torch.Tensor:
    """float32 [n] as one number an image, [n, 1, 1, 1]."""
    return amounts.view(-1, 1, 1, 1)


def _to_bytes(values: torch.Tensor) -> torch.Tensor:
    return values.clamp_(0, 255).to(torch.uint8)


def _gray(images: torch.Tensor) -> torch.Tensor:
    """Luma of whole levels, float32 [n, 1, H, W]."""
    red, green, blue = images.unbind(1)
    return red.mul(_RED).add_(green, alpha=_GREEN).add_(blue, alpha=_BLUE).floor_().unsqueeze(1)


def _blend(images: torch.Tensor, others: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """factor * images + (1 - factor) * others."""
    rest = (1 - factors.double()).float()  # of a factor that was a double
    return _to_bytes(torch.addcmul(images.mul(_each(factors)), others, _each(rest)))


def brightness(images: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    return _to_bytes(images.mul(_each(factors)))


def color(images: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    return _blend(images, _gray(images), factors)


def contrast(images: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    return _blend(images, _gray(images).mean((1, 2, 3), keepdim=True), factors)


def sharpness(images: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """Away from a smoothed image, whose outermost pixels are the image's."""
    if min(images.shape[-2:]) <= 2:
        return images
    values = images.float()
    rows = values[:, :, :-2] + values[:, :, 1:-1] + values[:, :, 2:]
    middle = values[:, :, 1:-1, 1:-1]
    smooth = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:] + 4 * middle  # whole numbers: exact
    smooth = smooth.div_(13).round_()  # thirteenths are never halves: every way of dividing rounds the same
    rest = (1 - factors.double()).float()
    values[:, :, 1:-1, 1:-1] = torch.addcmul(middle, smooth - middle, _each(rest))
    return _to_bytes(values)


def posterize(images: torch.Tensor, bits: torch.Tensor) -> torch.Tensor:
    masks = (255 << (8 - bits.to(torch.int32))) & 255
    return images & _each(masks.to(torch.uint8))


def solarize(images: torch.Tensor, thresholds: torch.Tensor) -> torch.Tensor:
    return torch.where(images >= _each(thresholds), ~images, images)


def solarize_add(images: torch.Tensor, amounts: torch.Tensor) -> torch.Tensor:
    """timm's: adds to all values below 128."""
    brighter = (images + _each(amounts)).clamp_(max=255).to(torch.uint8)
    return torch.where(images < 128, brighter, images)


def autocontrast(images: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    return tv.autocontrast(images)


def equalize(images: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    return tv.equalize(images)


def invert(images: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    return ~images


def hue(images: torch.Tensor, shifts: torch.Tensor) -> torch.Tensor:
    """Turn the hue by shares of the color circle (Smith 1978: hue, saturation, value)."""
    pixels = tv.to_dtype(images, torch.float32, scale=True)
    low, value = pixels.aminmax(dim=1)
    gray, spread = value == low, value - low
    saturation = spread / torch.where(gray, 1.0, value)
    red, green, blue = ((value[:, None] - pixels) / torch.where(gray, 1.0, spread)[:, None]).unbind(1)
    by_red = value == pixels[:, 0]
    by_green = (value == pixels[:, 1]) & ~by_red
    turn = torch.where(by_red, blue - green, torch.where(by_green, red + 2 - blue, green + 4 - red))
    angle = turn.mul_(1 / 6).add_(1).fmod_(1).add_(shifts.view(-1, 1, 1)).remainder_(1)
    sixth = angle * 6
    sector = sixth.floor()
    part = saturation * (sixth - sector)
    rest = 1 - saturation
    p, q, t = rest * value, (1 - part) * value, (part + rest) * value
    levels = torch.stack([value, *(level.clamp_(0, 1) for level in (p, q, t))], 1)
    place = sector.to(torch.int64).remainder_(6).mul_(2)
    picks = torch.stack([torch.bitwise_right_shift(table, place).bitwise_and_(3) for table in _SECTORS], 1)
    return tv.to_dtype(levels.gather(1, picks), torch.uint8, scale=True)


def affine(images: torch.Tensor, matrices: torch.Tensor, mode: str, fill: tuple[int, int, int] | None) -> torch.Tensor:
    """Move pixels: matrices float32 [n, 2, 3]: the source of each output pixel, in pixels from the center."""
    count, channels, height, width = images.shape
    device = images.device
    base = torch.ones(height, width, 3, dtype=torch.float32, device=device)
    base[..., 0] = torch.linspace((1 - width) / 2, (width - 1) / 2, width, device=device)
    base[..., 1] = torch.linspace((1 - height) / 2, (height - 1) / 2, height, device=device)[:, None]
    half = _constant((width / 2, height / 2), device)
    grid = base.view(1, -1, 3).expand(count, -1, -1).bmm(matrices.transpose(1, 2) / half)
    grid = grid.view(count, height, width, 2)
    values = images.float()
    if mode == "bicubic":
        return _bicubic(values, grid, fill)
    if fill is not None:
        values = torch.cat([values, values.new_ones(count, 1, height, width)], 1)
    values = grid_sample(values, grid, mode, "zeros", align_corners=False)
    if fill is not None:
        values, covered = values.split([channels, 1], 1)
        color = _constant(fill, device).view(1, -1, 1, 1)
        if mode == "nearest":
            values = torch.where(covered < 0.5, color, values)
        else:
            values = (values - color).mul_(covered).add_(color)
    return values.round_().to(torch.uint8)


def _bicubic(values: torch.Tensor, grid: torch.Tensor, fill: tuple[int, int, int] | None) -> torch.Tensor:
    """Pixels as PIL's transform with BICUBIC gets them, which timm's policies use: cubic convolution with a = -1 (Keys
    1981), neighbors beyond the border are the border's pixels, and the value is cut to a whole level.

    values: float32 [n, C, H, W]. grid: float32 [n, H, W, 2], from -1 to 1 between the outer edges of the image.
    Returns uint8 [n, C, H, W].
    """
    count, channels, height, width = values.shape
    taps = []
    for axis, size in ((0, width), (1, height)):
        source = (grid[..., axis] + 1) * (size / 2)
        whole = (source - 0.5).floor()
        d = source - 0.5 - whole
        near, far = d * d, d * d * d
        weights = (-d + 2 * near - far, 1 - 2 * near + far, d + near - far, far - near)
        places = [(whole + offset).clamp_(0, size - 1).to(torch.int64) for offset in (-1, 0, 1, 2)]
        taps.append((places, weights, (source >= 0) & (source < size)))
    (columns, across, in_x), (rows, down, in_y) = taps
    flat, total = values.flatten(2), torch.zeros_like(values)
    for row, weight_y in zip(rows, down, strict=True):
        line = torch.zeros_like(values)
        for column, weight_x in zip(columns, across, strict=True):
            index = (row * width + column).view(count, 1, -1).expand(-1, channels, -1)
            line.addcmul_(flat.gather(2, index).view_as(values), weight_x[:, None])
        total.addcmul_(line, weight_y[:, None])
    color = _constant(fill or (0, 0, 0), values.device).view(1, -1, 1, 1)
    return torch.where((in_x & in_y)[:, None], total.clamp_(0, 255), color).to(torch.uint8)


OPS = {
    op.__name__: op
    for op in (
        brightness,
        color,
        contrast,
        sharpness,
        posterize,
        solarize,
        autocontrast,
        equalize,
        invert,
        solarize_add,
        hue,
    )
}
