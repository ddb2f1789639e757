"""Images that a network can learn to classify: a class is a shape, a texture, a color and a grain of texture.

Everything else (place, size, rotation, background, light, noise) differs from image to image. An image is a pure
function of its seed.
"""

import colorsys
import io
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

SHAPES = ("triangle", "square", "disc", "ring", "cross", "star", "arrow", "crescent")
TEXTURES = ("striped", "chequered", "ringed", "dotted", "wavy")
COLORS = (*("red", "orange", "yellow", "lime", "green", "teal", "cyan", "azure", "blue", "violet", "magenta", "rose"),)
PITCHES = (("coarse", 5.0), ("fine", 11.0), ("very fine", 20.0))  #: periods of the texture per shorter side
MAX_CLASSES = len(SHAPES) * len(TEXTURES) * len(COLORS) * len(PITCHES)

#: Common sizes of ImageNet's images (width, height at full size) and their share; the rest is drawn at random.
SIZES = (((500, 375), 0.45), ((375, 500), 0.15), ((500, 333), 0.12), ((333, 500), 0.05))
TYPICAL_WIDTH = 470

Box = tuple[int, int, int, int]  #: x1, y1, x2, y2 in pixels


@dataclass(frozen=True)
class ClassStyle:
    """The common properties of the images of a class. `hue` in [0, 1), `pitch` in periods per shorter side."""

    shape: str
    texture: str
    hue: float
    pitch: float
    words: str


def class_style(label: int) -> ClassStyle:
    """The style of class `label` (0 <= label < MAX_CLASSES); all differ, neighbors in every part."""
    shape = SHAPES[label % 8]
    texture = TEXTURES[(label + label // 8) % 5]
    color = (7 * label + label // 40) % 12
    pitch, periods = PITCHES[label // 480]
    return ClassStyle(shape, texture, color / 12, periods, f"{pitch} {texture} {COLORS[color]} {shape}")


def draw_size(rng: np.random.Generator, typical_width: int) -> tuple[int, int]:
    """(width, height) in pixels, spread as ImageNet's are (mean about 470 x 400 at `typical_width` 470)."""
    scale = typical_width / TYPICAL_WIDTH
    pick = rng.random()
    size = np.clip(rng.lognormal((6.1, 5.95), (0.4, 0.35)), 120, 1600)
    for common, share in SIZES:
        if 0 <= pick < share:
            size = np.array(common, float)
        pick -= share
    return max(16, round(size[0] * scale)), max(16, round(size[1] * scale))


def _outline(shape: str) -> np.ndarray:
    """Corners [n, 2] of a shape inside the unit circle."""
    if shape == "cross":
        a, b = 0.3, 0.92
        return np.array(
            [(a, b), (a, a), (b, a), (b, -a), (a, -a), (a, -b), (-a, -b), (-a, -a), (-b, -a), (-b, a), (-a, a), (-a, b)]
        )
    if shape == "arrow":
        return np.array([(0, 1), (0.8, 0.1), (0.3, 0.1), (0.3, -0.9), (-0.3, -0.9), (-0.3, 0.1), (-0.8, 0.1)])
    if shape == "crescent":
        outer, inner = np.linspace(0.6, 2 * math.pi - 0.6, 28), np.linspace(2 * math.pi - 0.75, 0.75, 28)
        bite = np.stack([0.42 + 0.72 * np.cos(inner), 0.72 * np.sin(inner)], 1)
        return np.concatenate([np.stack([np.cos(outer), np.sin(outer)], 1), bite])
    number = {"triangle": 3, "square": 4, "star": 10}.get(shape, 40)
    angle = np.arange(number) * 2 * math.pi / number
    radius = np.where(np.arange(number) % 2, 0.42, 1.0) if shape == "star" else 1.0
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1)


def _texture(style: ClassStyle, rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """The class's texture, "L", at a random rotation and phase; computed at half size and enlarged."""
    side = min(width, height)
    frequency = 2 * math.pi * style.pitch * rng.uniform(0.85, 1.15) / side
    turn = rng.uniform(0, math.pi)
    x = np.arange(0, width, 2, dtype=np.float32)[None, :]
    y = np.arange(0, height, 2, dtype=np.float32)[:, None]
    u = frequency * (x * math.cos(turn) + y * math.sin(turn)) + rng.uniform(0, 2 * math.pi)
    v = frequency * (y * math.cos(turn) - x * math.sin(turn)) + rng.uniform(0, 2 * math.pi)
    if style.texture == "striped":
        field = np.sin(u)
    elif style.texture == "chequered":
        field = 2 * np.sin(u) * np.sin(v)
    elif style.texture == "ringed":
        cx, cy = rng.uniform(0.2, 0.8, 2) * (width, height)
        field = np.sin(frequency * np.hypot(x - np.float32(cx), y - np.float32(cy)))
    elif style.texture == "dotted":
        field = np.cos(u) + np.cos(v) - 0.7
    else:
        field = np.sin(u + 1.6 * np.sin(0.8 * v))
    levels = np.clip(127.5 + 255 * field, 0, 255).astype(np.uint8)
    return Image.fromarray(levels).resize((width, height), Image.Resampling.BILINEAR)


def _color(hue: float, saturation: float, value: float) -> tuple[int, int, int]:
    red, green, blue = colorsys.hsv_to_rgb(hue % 1, saturation, value)
    return round(255 * red), round(255 * green), round(255 * blue)


def render(style: ClassStyle, rng: np.random.Generator, width: int, height: int) -> tuple[np.ndarray, list[Box]]:
    """A picture, uint8 [height, width, 3], without noise, and the boxes of its objects."""
    coarse = rng.integers(20, 236, (5, 6, 3), dtype=np.uint8)
    gray = coarse.mean(2, keepdims=True)
    coarse = gray + rng.uniform(0.1, 0.4) * (coarse - gray)
    tint = np.array(_color(style.hue + 0.5, 1.0, 1.0))  # the background correlates with the class, as in real images
    coarse += rng.uniform(0.1, 0.35) * (tint - coarse)
    picture = Image.fromarray(coarse.astype(np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
    mask = Image.new("L", (width, height))
    draw = ImageDraw.Draw(mask)
    side, outline, boxes = min(width, height), _outline(style.shape), []
    for radius in side * np.array([rng.uniform(0.3, 0.46), *rng.uniform(0.1, 0.2, rng.integers(0, 4))]):
        center = rng.uniform(0.25, 0.75, 2) * (width, height)
        turn = rng.uniform(0, 2 * math.pi)
        rotation = np.array([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])
        corners = outline @ rotation.T * radius * (1, rng.uniform(0.8, 1.0)) + center
        draw.polygon([tuple(corner) for corner in corners.tolist()], fill=255)
        if style.shape == "ring":
            draw.polygon([tuple(corner) for corner in (center + 0.55 * (corners - center)).tolist()], fill=0)
        low = np.clip(np.floor(corners.min(0)), 0, (width - 2, height - 2)).astype(int)
        high = np.clip(np.ceil(corners.max(0)), low + 1, (width - 1, height - 1)).astype(int)
        boxes.append((int(low[0]), int(low[1]), int(high[0]), int(high[1])))
    hue = style.hue + rng.uniform(-0.025, 0.025)
    bright = Image.new("RGB", (width, height), _color(hue, rng.uniform(0.6, 0.95), rng.uniform(0.75, 1.0)))
    dark = Image.new("RGB", (width, height), _color(hue, rng.uniform(0.7, 1.0), rng.uniform(0.2, 0.4)))
    surface = Image.composite(bright, dark, _texture(style, rng, width, height))
    picture.paste(surface, mask=mask)
    light = rng.uniform(0.75, 1.1)
    return np.asarray(picture.point(lambda level: light * level)), boxes


def add_noise(pixels: np.ndarray, rng: np.random.Generator, strength: float) -> np.ndarray:
    """`pixels` (uint8 [H, W, 3]) with normal noise of `strength` levels on its brightness."""
    noise = rng.standard_normal(pixels.shape[:2], np.float32) * np.float32(strength)
    return np.clip(pixels + noise[:, :, None] + np.float32(0.5), 0, 255).astype(np.uint8)


#: The oddities of the real set, in the order in which they are given out.
ODDITIES = ("grayscale", "cmyk", "png", "exif-rotated", "grayscale", "corrupt-exif", "cmyk", "grayscale")
#: Ways in which a file can be damaged, in the order in which they are given out.
DAMAGES = ("truncated", "empty", "html", "scrambled")


def encode(pixels: np.ndarray, quality: int, kind: str | None = None) -> bytes:
    """`pixels` (uint8 [H, W, 3]) as a JPEG file's bytes, or as the oddity or damaged file named by `kind`."""
    image = Image.fromarray(pixels)
    options: dict[str, Any] = {"format": "JPEG", "quality": quality}
    if kind == "grayscale":
        image = image.convert("L")
    elif kind == "cmyk":
        image = image.convert("CMYK")
    elif kind == "png":
        options = {"format": "PNG"}
    elif kind == "exif-rotated":  # stored on its side, with the note that says so
        exif = Image.Exif()
        exif[0x0112] = 6
        image, options["exif"] = image.transpose(Image.Transpose.ROTATE_90), exif
    elif kind == "corrupt-exif":  # a directory that claims entries which are not there
        options["exif"] = b"Exif\x00\x00II*\x00\x08\x00\x00\x00\xff\x00\x12\x01\x03\x00"
    stream = io.BytesIO()
    image.save(stream, **options)
    data = stream.getvalue()
    if kind == "truncated":
        return data[: len(data) // 2]
    if kind == "empty":
        return b""
    if kind == "html":
        return b"<!doctype html><title>403 Forbidden</title>\n"
    if kind == "scrambled":
        return data[:2] + bytes(255 - byte for byte in data[2:])
    return data
