"""The color map inferno: 18 of the 256 colors of matplotlib's `inferno`, by Stéfan van der Walt and Nathaniel Smith
(CC0), linearly interpolated. No channel of the 256 is more than 5.2 of 255 off."""

import numpy as np

# fmt: off
_ANCHORS = np.array([
    (0, 0, 4), (10, 7, 34), (30, 12, 69), (56, 9, 98), (81, 14, 108), (105, 22, 110), (128, 31, 108), (152, 39, 102),
    (176, 49, 91), (198, 61, 77), (217, 77, 61), (233, 97, 43), (244, 121, 24), (250, 148, 7), (252, 176, 20),
    (248, 205, 55), (242, 234, 105), (252, 255, 164),
], np.float64)
# fmt: on


def inferno(values: np.ndarray) -> np.ndarray:
    """RGB colors, float64 [..., 3] in 0 to 255, of `values` [...] in 0 to 1; values outside are clipped."""
    at = np.linspace(0, 1, len(_ANCHORS))
    return np.stack([np.interp(values, at, channel) for channel in _ANCHORS.T], axis=-1)
