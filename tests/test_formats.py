"""One truth for what can be decoded: index, verify, pack and both loaders agree on every format that PIL can write."""

import warnings
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, features

from pipeline.__main__ import main
from pipeline.config import DataConfig
from pipeline.dataset.index.index import Index
from pipeline.dataset.index.notes import read_unreadable
from pipeline.dataset.index.pixels import as_ppm, dali_agrees
from pipeline.dataset.index.scan import build_index
from pipeline.dataset.shards.pack import pack_tree
from pipeline.dataset.shards.plan import Options
from pipeline.loader import build
from pipeline.loader.plan import make_train_plan

needs_dali = pytest.mark.skipif(build.dali_problem() is not None, reason="needs DALI")
HERE = SimpleNamespace(rank=0, size=1, local_size=1, device=torch.device("cpu"))
WIDTH, HEIGHT = 72, 56


def scene() -> Image.Image:
    """A picture with slopes, edges and noise."""
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    pixels = np.stack([x * 3, y * 4, (x + y) * 1.9], -1).clip(0, 255).astype(np.uint8)
    pixels[8:30, 8:30] = np.random.default_rng(0).integers(0, 255, (22, 22, 3))
    return Image.fromarray(pixels)


def variants() -> dict[str, tuple[Image.Image, str, dict]]:
    """Name -> (picture, PIL's format, options of `save`): every format PIL can write, in every mode it takes there."""
    Image.init()
    picture = scene()
    clear = picture.copy()
    clear.putalpha(Image.fromarray((np.mgrid[0:HEIGHT, 0:WIDTH][1] * 3).astype(np.uint8)))
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    deep = Image.fromarray(((x + y) * 380 + 300).astype(np.uint16))
    modes = {mode: picture.convert(mode) for mode in ("1", "L", "P", "RGB", "CMYK", "YCbCr", "LAB", "HSV", "I", "F")}
    modes |= {"RGBA": clear, "LA": clear.convert("LA"), "PA": clear.convert("RGBA").quantize(16), "I;16": deep}
    turned = Image.Exif()
    turned[274] = 6
    made = {f"{form} {mode}": (image, form, {}) for form in sorted(Image.SAVE) for mode, image in modes.items()}
    rgb = [
        *(("JPEG", {"quality": 60, "subsampling": n}) for n in (0, 1, 2)),
        *(("JPEG", options) for options in ({"progressive": True}, {"exif": turned}, {"restart_marker_blocks": 2})),
        ("JPEG", {"keep_rgb": True}),
        *((form, {"exif": turned}) for form in ("PNG", "WEBP")),
        *(("PNG", options) for options in ({"bits": 8, "optimize": True}, {"transparency": (1, 2, 3)})),
        *(("WEBP", options) for options in ({"lossless": True}, {"quality": 100})),
        *(("TIFF", {"tiffinfo": {274: turn}}) for turn in range(2, 9)),
        *(("TIFF", {"compression": name}) for name in ("tiff_lzw", "jpeg", "packbits", "tiff_adobe_deflate")),
        *(("JPEG2000", options) for options in ({"irreversible": True}, {"num_resolutions": 3})),
    ]
    made |= {f"{form} {options}": (picture, form, options) for form, options in rgb}
    frames = {"save_all": True, "append_images": [picture.transpose(Image.Transpose.ROTATE_180)]}
    made |= {f"{form} animated": (picture, form, frames) for form in ("GIF", "PNG", "WEBP", "TIFF", "AVIF", "MPO")}
    made["JPEG CMYK progressive"] = (modes["CMYK"], "JPEG", {"progressive": True})
    made["PNG palette of 2 bits"] = (picture.quantize(4), "PNG", {"bits": 2})
    made["PNG palette with transparency"] = (picture.quantize(64), "PNG", {"transparency": 3})
    return made


def encode_all() -> dict[str, bytes]:
    """Name -> file, for all that PIL can write here, and what it can't: 16-bit color, a chunk gAMA."""
    files = {}
    for name, (image, form, options) in variants().items():
        stream = BytesIO()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                image.save(stream, form, **options)
            except (OSError, ValueError, KeyError, SystemError):
                continue
        files[name] = stream.getvalue()
    files["PNG RGB of 16 bits"] = png16(np.asarray(scene()).astype(np.uint16) * 257)
    head, rest = files["PNG RGB"][:33], files["PNG RGB"][33:]
    files["PNG with gamma"] = head + chunk(b"gAMA", (100000).to_bytes(4, "big")) + rest
    return files


def chunk(kind: bytes, data: bytes) -> bytes:
    import zlib

    return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")


def png16(pixels: np.ndarray) -> bytes:
    """A PNG of 16-bit color, uint16 [H, W, 3]."""
    import zlib

    height, width, _ = pixels.shape
    lines = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    head = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([16, 2, 0, 0, 0])
    parts = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


@pytest.fixture(scope="module")
def every_format(tmp_path_factory) -> tuple[Path, dict[str, str]]:
    """(data root with every file behind the suffix .jpg, file stem -> variant)."""
    root = tmp_path_factory.mktemp("formats") / "set"
    names = {}
    for number, (name, data) in enumerate(encode_all().items()):
        names[f"{number:03}"] = name
        for split in ("train", "val"):
            (root / split / "all").mkdir(parents=True, exist_ok=True)
            (root / split / "all" / f"{number:03}.jpg").write_bytes(data)
    return root, names


def pixels_of(index: Index, loader: str, split: str) -> dict[int, np.ndarray]:
    """Sample id -> pixels that a loader delivers; none may be called unreadable."""
    settings = {"crop_area": (0.3, 1.0), "image_size": 32, "val_size": 32, "val_resize": 36, "threads": 2}
    data = DataConfig(loader=loader, **settings).resolve()
    if split == "val":
        stream = build.make_eval_stream(index, data, 16, HERE)
        steps = stream.plan.steps(1)
    else:
        from pipeline.config import TrainConfig

        plan = make_train_plan(index, data, TrainConfig(global_batch_size=16))
        stream, steps = build.make_train_stream(index, plan, data, HERE), len(index.splits["train"]) // 16
    found = {}
    for batch in stream.batches(0, steps):
        found |= dict(zip(batch.ids.tolist(), batch.images.numpy().copy(), strict=True))
    assert not stream.unreadable
    stream.close()
    return found


@needs_dali
@pytest.mark.parametrize("split", ["train", "val"])
def test_both_loaders_give_the_same_pixels_of_every_format(every_format, split):
    root, names = every_format
    index = build_index(root)
    dali, reference = (pixels_of(index, loader, split) for loader in ("dali", "reference"))
    assert dali.keys() == reference.keys() and len(dali) >= 16
    levels = {i: np.abs(dali[i].astype(int) - reference[i]) for i in dali}
    # the loaders' filters round differently by some levels; another decode of these pictures differs by dozens
    off = {
        names[Path(index.splits[split].name(i)).stem]: found.mean() for i, found in levels.items() if found.mean() > 1
    }
    assert not off


@needs_dali
def test_what_dali_is_given_is_bit_for_bit_what_pil_sees(every_format):
    """The whole picture, without a resize: for all that DALI decodes itself, and for what PIL decodes for it."""
    from nvidia.dali import fn, pipeline_def, types

    root, names = every_format
    split = build_index(root).splits["train"]
    own = [split.read(i) for i in range(len(split))]
    given = [data if dali_agrees(memoryview(data)) else as_ppm(data) for data in own]
    assert sum(map(len, own)) and any(a is b for a, b in zip(own, given, strict=True))

    @pipeline_def(batch_size=len(given), num_threads=2, device_id=None, exec_dynamic=True)
    def graph():
        data = fn.external_source(source=lambda: [np.frombuffer(item, np.uint8) for item in given], batch=True)
        return fn.decoders.image(data, output_type=types.RGB, adjust_orientation=False, device="cpu")

    pipe = graph()
    pipe.build()
    (images,) = pipe.run()
    for i, data in enumerate(own):
        want = np.asarray(Image.open(BytesIO(as_ppm(data))))
        assert np.array_equal(np.array(images[i]), want), names[Path(split.name(i)).stem]


def test_index_takes_or_names_every_file_and_verify_agrees(every_format, capsys):
    root, names = every_format
    index = build_index(root)
    taken = {Path(name).stem for name in index.splits["train"].iter_names()}
    reasons = {Path(entry["file"]).stem: entry["reason"] for entry in read_unreadable(index.folder)["train"]}
    assert taken | reasons.keys() == names.keys() and not taken & reasons.keys()
    taken_names = {names[stem] for stem in taken}
    avif = ["AVIF RGB"] if features.check("avif") else []  # from Pillow 11.3 on
    for wanted in ("GIF RGB", *avif, "ICO RGBA", "TIFF {'tiffinfo': {274: 6}}", "PNG I;16", "JPEG2000 RGB"):
        assert wanted in taken_names
    refused = {names[stem]: reason for stem, reason in reasons.items()}
    assert "EPS" in refused["EPS RGB"] and "F" in refused["TIFF F"]
    assert main(["verify", str(root), "--decode"]) == 2
    assert f"damaged or unreadable  {'0':>8}  {2 * len(reasons):>8}".split() == next(
        line.split()[:5] for line in capsys.readouterr().out.splitlines() if line.startswith("damaged or")
    )


def test_packed_shards_hold_every_format_unchanged(every_format, tmp_path):
    root, _ = every_format
    index = build_index(root)
    packed = pack_tree(root, tmp_path / "shards", Options(unreadable="skip"))
    assert packed.fingerprint == index.fingerprint


def test_16_bit_gray_keeps_its_shades(tmp_path):
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    deep = ((x + y) * 380 + 300).astype(np.uint16)
    for form in ("PNG", "TIFF", "PPM", "JPEG2000"):
        stream = BytesIO()
        Image.fromarray(deep).save(stream, form)
        found = np.asarray(Image.open(BytesIO(as_ppm(stream.getvalue()))))[..., 0]
        assert np.array_equal(found, deep >> 8), form


@needs_dali
def test_what_dali_refuses_unexpectedly_goes_through_pil(tmp_path, monkeypatch):
    """A file that should be DALI's own: the first refusal turns to PIL, and no image is lost."""
    monkeypatch.setattr("pipeline.loader.decode.dali.dali_agrees", lambda data: True)
    for split, count in (("train", 16), ("val", 4)):
        (tmp_path / "set" / split / "a").mkdir(parents=True)
        for i in range(count):
            scene().rotate(10 * i).save(tmp_path / "set" / split / "a" / f"{i}.jpg", "GIF" if i in (1, 3) else "JPEG")
    index = build_index(tmp_path / "set")
    for split in ("train", "val"):
        dali, reference = (pixels_of(index, loader, split) for loader in ("dali", "reference"))
        assert dali.keys() == reference.keys() and len(dali) == {"train": 16, "val": 4}[split]
        assert max(np.abs(dali[i].astype(int) - reference[i]).mean() for i in dali) < 1
