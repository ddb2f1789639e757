"""Restart markers are added losslessly, an interval begins with each row, and the rest is left alone."""

import io
import shutil

import numpy as np
import pytest
from PIL import Image

from pipeline.dataset.shards import transcode as module
from pipeline.dataset.shards.jpeg import choose_interval, find_intervals, read_frame
from pipeline.dataset.shards.transcode import transcode
from pipeline.errors import UserError

needs_jpegtran = pytest.mark.skipif(shutil.which("jpegtran") is None, reason="jpegtran is not installed")


def make_image(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """Noise over a gradient: every block differs from its neighbors."""
    rng = np.random.default_rng([width, height])
    pixels = np.linspace(0, 160, width)[None, :, None] + rng.integers(0, 90, (height, width, len(mode)))
    return Image.fromarray(pixels.astype(np.uint8).squeeze(2) if mode == "L" else pixels.astype(np.uint8), mode)


def encode(image: Image.Image, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, options.pop("format", "JPEG"), **options)
    return stream.getvalue()


def decode(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image)


@needs_jpegtran
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("sampling", ["4:4:4", "4:2:2", "4:2:0", "gray"])
@pytest.mark.parametrize("size", [(1, 1), (17, 9), (250, 131), (31 * 16, 40), (1999, 23)])
def test_pixels_stay_and_an_interval_begins_with_each_row(size, sampling, progressive):
    gray = sampling == "gray"
    options = {} if gray else {"subsampling": sampling}
    data = encode(make_image(*size, "L" if gray else "RGB"), quality=90, progressive=progressive, **options)
    made = transcode(data, 8)
    assert made is not None
    assert np.array_equal(decode(made), decode(data))
    frame = read_frame(made)
    intervals = find_intervals(made, frame)
    side = 8 if gray or sampling == "4:4:4" else 16
    assert frame.coding == 0xC0 and (frame.width, frame.height) == size
    assert frame.interval == choose_interval(-(-size[0] // side), 8)
    assert intervals.shape == (frame.mcu_rows, frame.mcu_columns // frame.interval)
    ends = frame.data + intervals.ravel().cumsum()
    assert ends[-1] == len(made) and made[-2:] == b"\xff\xd9"
    markers = [made[end - 2 : end] for end in ends[:-1].tolist()]
    assert markers == [bytes([0xFF, 0xD0 + i % 8]) for i in range(len(markers))]


@pytest.mark.parametrize(("columns", "wanted", "chosen"), [(32, 8, 8), (31, 8, 1), (21, 8, 7), (1, 8, 1), (18, 4, 3)])
def test_interval_divides_the_row(columns, wanted, chosen):
    assert choose_interval(columns, wanted) == chosen


@needs_jpegtran
def test_metadata_is_dropped_and_orientation_not_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    data = encode(make_image(120, 80), exif=exif, comment=b"a comment")
    made = transcode(data, 8)
    assert b"Exif" not in made and b"a comment" not in made
    assert decode(made).shape == (80, 120, 3) and np.array_equal(decode(made), decode(data))


@needs_jpegtran
def test_what_is_no_color_or_gray_jpeg_or_is_damaged_is_left_alone():
    data = encode(make_image(200, 150), quality=90)
    assert transcode(encode(make_image(64, 64), format="PNG"), 8) is None
    assert transcode(encode(make_image(64, 64, "RGB").convert("CMYK")), 8) is None
    assert transcode(data[: len(data) // 2], 8) is None
    assert transcode(data[:100], 8) is None
    assert transcode(b"", 8) is None


@needs_jpegtran
def test_a_transcoder_that_changes_pixels_is_not_believed(monkeypatch):
    data, other = encode(make_image(200, 150)), encode(make_image(200, 151).crop((0, 1, 200, 151)))
    assert transcode(data, 8) is not None
    wrong = transcode(other, 8)
    monkeypatch.setattr(module, "_run", lambda arguments, data: wrong)
    assert transcode(data, 8) is None


@needs_jpegtran
def test_intervals_out_of_order_or_cut_off_are_not_found():
    made = transcode(encode(make_image(250, 131)), 8)
    frame = read_frame(made)
    at = made.index(b"\xff\xd1", frame.data)
    assert find_intervals(made, frame) is not None
    assert find_intervals(made[:at] + b"\xff\xd2" + made[at + 2 :], frame) is None
    assert find_intervals(made[:-2], frame) is None
    assert find_intervals(made + b"x", frame) is None


def test_missing_program_is_one_line(monkeypatch):
    module.find_program.cache_clear()
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError, match="libjpeg-turbo-progs"):
        transcode(encode(make_image(20, 20)), 8)
    module.find_program.cache_clear()
