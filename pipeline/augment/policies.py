"""The policies: ops and their amounts for each image, sampled from a hash of the sample.

NumPy only. An amount means, by op: shear_x, shear_y: the tangent; translate_x, translate_y: pixels; rotate: degrees
counter-clockwise; brightness, color, contrast, sharpness: the factor; posterize: bits kept; solarize: the threshold
from which on values are inverted; solarize_add: what is added to values below 128; hue: share of the color circle;
others: nothing (0).
"""

import math
from dataclasses import dataclass

import numpy as np

from pipeline.config import AugmentConfig
from pipeline.config.augment import MAGNITUDES
from pipeline.rng import normal, uniforms

OPS = (
    "identity",
    "shear_x",
    "shear_y",
    "translate_x",
    "translate_y",
    "rotate",
    "brightness",
    "color",
    "contrast",
    "sharpness",
    "posterize",
    "solarize",
    "autocontrast",
    "equalize",
    "invert",
    "solarize_add",
    "hue",
)
CODE = {name: code for code, name in enumerate(OPS)}
_GEOMETRIC = ("shear_x", "shear_y", "translate_x", "translate_y", "rotate")
_ENHANCING = ("brightness", "color", "contrast", "sharpness")


@dataclass(frozen=True)
class Space:
    """The ops that a policy chooses from, and their amounts at full strength.

    shear: tangent; shift: share of the side, or pixels where above 1; rotate: degrees; enhance: the factor's distance
    from 1; bits: taken from the image's 8 by posterize. levels: number of strengths that torchvision has,
    which shifts are cut to whole pixels by (timm does not cut them).
    """

    ops: tuple[str, ...]
    shear: float
    shift: float
    rotate: float
    enhance: float
    bits: int
    levels: int = 31
    timm: bool = False

    def amounts(self, ops: np.ndarray, strength: np.ndarray, sign: np.ndarray, size: int) -> np.ndarray:
        """The amounts, float32, of ops (codes) at a strength from 0 to 1; sign: +1 or -1; size: pixels of the side."""
        found = np.zeros(ops.shape)
        shift = self.shift if self.shift > 1 else self.shift * size
        signed = dict.fromkeys(("shear_x", "shear_y"), self.shear) | {"rotate": self.rotate}
        signed |= dict.fromkeys(("translate_x", "translate_y"), shift) | dict.fromkeys(_ENHANCING, self.enhance)
        for name in self.ops:
            here = ops == CODE[name]
            level = strength[here]
            if name in signed:
                amount = signed[name] * level * sign[here]
                if name.startswith("translate") and not self.timm:
                    amount = np.trunc(_linspace(shift, level, self.levels)) * sign[here]
                if name in _ENHANCING:
                    amount = np.maximum(1 + amount, 0.1 if self.timm else 0.0)
            elif name == "posterize":
                amount = 4 - np.floor(self.bits * level) if self.timm else np.rint(8 - self.bits * level)
            elif name == "solarize":
                amount = 256 - np.floor(256 * level) if self.timm else 255 * (1 - level)
            elif name == "solarize_add":
                amount = np.floor(110 * level)
            else:
                continue
            found[here] = amount
        return found.astype(np.float32)


def _linspace(end: float, share: np.ndarray, count: int) -> np.ndarray:
    """torch.linspace(0, end, count), float32, at `share` (0 to 1) of its length: its rounding decides which whole
    number of pixels a shift is. (Half of TrivialAugment's 32 pixels are 15.)"""
    place = np.asarray(share, np.float64) * (count - 1)
    step = float(np.float32(end) / np.float32(count - 1))  # a float32, multiplied and added without rounding between
    values = np.where(place < count // 2, step * place, float(np.float32(end)) - step * (count - 1 - place))
    return values.astype(np.float32)


_COLORS = (*_ENHANCING, "posterize", "solarize", "autocontrast", "equalize")
#: torchvision's RandAugment, AutoAugment and TrivialAugmentWide, and timm's increasing RandAugment
RAND = Space(("identity", *_GEOMETRIC, *_COLORS), 0.3, 150 / 331, 30, 0.9, 4)
AUTO = Space((*_GEOMETRIC, *_COLORS, "invert"), 0.3, 150 / 331, 30, 0.9, 4, levels=10)
WIDE = Space(("identity", *_GEOMETRIC, *_COLORS), 0.99, 32, 135, 0.99, 6)
TIMM = Space((*_GEOMETRIC, *_COLORS, "invert", "solarize_add"), 0.3, 0.45, 30, 0.9, 4, timm=True)

#: Cubuk et al. 2019 (arXiv 1805.09501), table 9: op, probability, tenths of the strength (x: it has none)
_AUTO_POLICIES = """
posterize .4 8 rotate .6 9        | solarize .6 5 autocontrast .6 x | equalize .8 x equalize .6 x
posterize .6 7 posterize .6 6     | equalize .4 x solarize .2 4     | equalize .4 x rotate .8 8
solarize .6 3 equalize .6 x       | posterize .8 5 equalize 1 x     | rotate .2 3 solarize .6 8
equalize .6 x posterize .4 6      | rotate .8 8 color .4 0          | rotate .4 9 equalize .6 x
equalize 0 x equalize .8 x        | invert .6 x equalize 1 x        | color .6 4 contrast 1 8
rotate .8 8 color 1 2             | color .8 8 solarize .8 7        | sharpness .4 7 invert .6 x
shear_x .6 5 equalize 1 x         | color .4 0 equalize .6 x        | equalize .4 x solarize .2 4
solarize .6 5 autocontrast .6 x   | invert .6 x equalize 1 x        | color .6 4 contrast 1 8
equalize .8 x equalize .6 x
"""


def _auto_table() -> np.ndarray:
    """float64 [25, 2, 3]: op, probability, strength (0 to 9) of both ops of each sub-policy."""
    words = _AUTO_POLICIES.replace("|", " ").split()
    numbers = [float(CODE[w]) if w in CODE else (0.0 if w == "x" else float(w)) for w in words]
    return np.array(numbers).reshape(25, 2, 3)


_AUTO_TABLE = _auto_table()


def _sign(draws: np.ndarray) -> np.ndarray:
    return np.where(draws < 0.5, -1.0, 1.0)


def _choose(draws: np.ndarray, count: int) -> np.ndarray:
    """Whole numbers 0..count-1 from uniform draws."""
    return np.floor(draws * count).astype(np.int64)


def _random(c: AugmentConfig, keys: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """RandAugment (Cubuk et al. 2019, arXiv 1909.13719), in torchvision's or timm's ranges."""
    space = TIMM if c.policy == "randaugment-timm" else RAND
    draws = uniforms(keys, 5 * c.num_ops).reshape(len(keys), c.num_ops, 5)
    ops = np.array([CODE[name] for name in space.ops])[_choose(draws[..., 0], len(space.ops))]
    level = c.magnitude + c.magnitude_std * normal(draws[..., 2], draws[..., 3])
    strength = np.clip(level / MAGNITUDES[c.policy], 0, 1)
    if space.timm:
        ops = np.where(draws[..., 4] < 0.5, ops, CODE["identity"])
    return ops, space.amounts(ops, strength, _sign(draws[..., 1]), size)


def _trivial(c: AugmentConfig, keys: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """TrivialAugment (Mueller and Hutter 2021, arXiv 2103.10158), wide: one op, its strength one of 31."""
    draws = uniforms(keys, 3)[:, None]
    ops = np.array([CODE[name] for name in WIDE.ops])[_choose(draws[..., 0], len(WIDE.ops))]
    return ops, WIDE.amounts(ops, _choose(draws[..., 2], 31) / 30, _sign(draws[..., 1]), size)


def _auto(c: AugmentConfig, keys: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """AutoAugment's ImageNet policy: one of 25 pairs of ops, each with its probability and strength."""
    draws = uniforms(keys, 5)
    chosen = _AUTO_TABLE[_choose(draws[:, 0], 25)]
    ops = np.where(draws[:, 1:3] < chosen[..., 1], chosen[..., 0], CODE["identity"]).astype(np.int64)
    return ops, AUTO.amounts(ops, chosen[..., 2] / 9, _sign(draws[:, 3:5]), size)


def _jitter(c: AugmentConfig, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Color jitter: brightness, contrast, saturation and hue in a random order, as torchvision's ColorJitter."""
    draws = uniforms(keys, 8)
    names = ("brightness", "contrast", "color", "hue")
    reach = np.array(c.jitter)
    low, high = np.maximum(1 - reach, 0), 1 + reach
    low[3], high[3] = -reach[3], reach[3]
    ops = np.array([CODE[name] if x else CODE["identity"] for name, x in zip(names, c.jitter, strict=True)])
    amounts = np.where(reach > 0, low + draws[:, :4] * (high - low), 0).astype(np.float32)
    order = np.argsort(draws[:, 4:], 1, kind="stable")
    return ops[order], np.take_along_axis(amounts, order, 1)


_DRAW = {"randaugment": _random, "randaugment-timm": _random, "trivialaugment": _trivial, "autoaugment": _auto}


def sample_ops(
    c: AugmentConfig, keys: np.ndarray, jitter_keys: np.ndarray, size: int
) -> tuple[np.ndarray, np.ndarray] | None:
    """The ops of the policy, then those of the color jitter, for each sample: (ops uint8, amounts float32), each [B, S]
    for S ops one after another; None if there is neither.

    keys, jitter_keys: uint64 [B], independent hashes of the sample; size: pixels of the image's side.
    """
    parts = []
    if c.policy != "none":
        parts.append(_DRAW[c.policy](c, keys, size))
    if max(c.jitter) > 0:
        parts.append(_jitter(c, jitter_keys))
    if not parts:
        return None
    ops, amounts = (np.concatenate(arrays, 1) for arrays in zip(*parts, strict=True))
    return ops.astype(np.uint8), amounts.astype(np.float32)


def inverse_affine(op: str, amounts: np.ndarray, size: int) -> np.ndarray:
    """float32 [n, 2, 3]: the source of each output pixel, in pixels from the image's center.

    The conventions are torchvision's: shears leave the left or upper edge where it is.
    """
    amounts = amounts.astype(np.float64)
    one, zero, middle = np.ones_like(amounts), np.zeros_like(amounts), size / 2
    if op == "shear_x":
        rows = [one, amounts, amounts * middle, zero, one, zero]
    elif op == "shear_y":
        rows = [one, zero, zero, amounts, one, amounts * middle]
    elif op == "translate_x":
        rows = [one, zero, -amounts, zero, one, zero]
    elif op == "translate_y":
        rows = [one, zero, zero, zero, one, -amounts]
    else:
        angle = amounts * (math.pi / 180)
        rows = [np.cos(angle), -np.sin(angle), zero, np.sin(angle), np.cos(angle), zero]
    return np.stack(rows, -1).reshape(-1, 2, 3).astype(np.float32)
