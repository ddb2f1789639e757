"""Archives that mean harm, zip and tar.gz: refused by the member's name, and nothing is written outside DEST."""

import io
import stat
import struct
import tarfile
import zipfile
from pathlib import Path

import pytest
from fetching import BASE, fetch, read_images

IMAGE = f"{BASE}/train/n01440764/n01440764_1.JPEG"
BOMB = f"{BASE}/train/n01440764/n01440764_2.JPEG"
LINK = f"{BASE}/train/n01440764/link.JPEG"


def entry(name: str, mode: int = stat.S_IFREG | 0o644) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.external_attr, info.create_system = mode << 16, 3
    return info


def write_zip(path: Path, extra: list[tuple[zipfile.ZipInfo, bytes]], method: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr(entry(IMAGE), b"image")
        for info, data in extra:
            info.compress_type = method
            archive.writestr(info, data)


def patch(path: Path, name: str, offset: int, form: str, value: int) -> None:
    """Change a field of a member's entry in the central directory (APPNOTE 4.3.12)."""
    data = bytearray(path.read_bytes())
    at = data.rfind(name.encode()) - 46
    assert data[at : at + 4] == b"PK\1\2"
    struct.pack_into(form, data, at + offset, value)
    path.write_bytes(data)


def make_zip(path: Path, kind: str) -> str:
    """Write a hostile zip; the name that must be in the refusal."""
    names = {
        "climbs out": "../../escaped.JPEG",
        "climbs out inside": f"{BASE}/train/../../../../../../escaped.JPEG",
        "absolute": "/tmp/escaped.JPEG",
        "backslashes": "..\\..\\escaped.JPEG",
        "drive": "C:/escaped.JPEG",
        "newline": f"{BASE}/train/n01440764/a\nb.JPEG",
        "differs in case": IMAGE.replace("_1", "_1").replace(".JPEG", ".jpeg"),
    }
    if kind in names:
        write_zip(path, [(entry(names[kind]), b"x")])
        return names[kind]
    if kind == "link":
        write_zip(path, [(entry(LINK, stat.S_IFLNK | 0o777), b"/etc/passwd")])
        return LINK
    if kind == "device":
        write_zip(path, [(entry(LINK, stat.S_IFCHR | 0o666), b"")])
        return LINK
    write_zip(path, [(entry(BOMB), b"\0" * 3_000_000)], zipfile.ZIP_DEFLATED)
    if kind == "says it is huge":
        patch(path, BOMB, 24, "<L", 0xFFFFFF00)
    elif kind == "longer than it says":
        patch(path, BOMB, 24, "<L", 5000)
    elif kind == "encrypted":
        patch(path, BOMB, 8, "<H", 1)
    elif kind == "overlaps":
        patch(path, BOMB, 42, "<L", 10)
    return BOMB


KINDS = ["climbs out", "climbs out inside", "absolute", "backslashes", "drive", "newline", "differs in case", "link"]
KINDS += ["device", "zip bomb", "says it is huge", "longer than it says", "encrypted", "overlaps"]


def files_around(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


@pytest.mark.parametrize("kind", KINDS)
def test_hostile_zip_is_refused_by_name(tmp_path, kind):
    name = make_zip(tmp_path / "archive.zip", kind)
    before = files_around(tmp_path)
    done = fetch(tmp_path / "a/b/c/data", {}, "--from", str(tmp_path / "archive.zip"))
    assert done.code in (1, 2)
    if kind != "overlaps":
        assert name in done.last_line or repr(name) in done.last_line
    outside = {path for path in files_around(tmp_path) - before if not path.startswith("a/b/c/data")}
    assert outside <= {"a", "a/b", "a/b/c"}
    assert not Path("/tmp/escaped.JPEG").exists()
    assert not any(path.name == Path(name).name for path in (tmp_path / "a").rglob("*"))


@pytest.mark.parametrize("kind", ["climbs out", "absolute", "link", "hard link", "device", "differs in case", "huge"])
def test_hostile_tar_is_refused_by_name(tmp_path, kind):
    info = tarfile.TarInfo(
        {"climbs out": "../../escaped.JPEG", "absolute": "/tmp/escaped.JPEG", "differs in case": IMAGE.lower()}.get(
            kind, LINK
        )
    )
    types = {"link": tarfile.SYMTYPE, "hard link": tarfile.LNKTYPE, "device": tarfile.CHRTYPE}
    if kind in types:
        info.type, info.linkname = types[kind], "/etc/passwd"
    if kind == "huge":
        info.size = 8 << 30
    with tarfile.open(tmp_path / "archive.tar.gz", "w:gz") as archive:
        good = tarfile.TarInfo(IMAGE)
        good.size = 5
        archive.addfile(good, io.BytesIO(b"image"))
        archive.addfile(info) if kind != "huge" else archive.fileobj.write(info.tobuf())
    before = files_around(tmp_path)
    done = fetch(tmp_path / "a/b/c/data", {}, "--from", str(tmp_path / "archive.tar.gz"))
    assert done.code == 2
    assert repr(info.name) in done.last_line and "refused" in done.last_line
    outside = {path for path in files_around(tmp_path) - before if not path.startswith("a/b/c/data")}
    assert outside <= {"a", "a/b", "a/b/c"}
    assert not Path("/tmp/escaped.JPEG").exists()
    assert [path.rpartition("/")[2] for path in read_images(tmp_path / "a/b/c/data")] == ["n01440764_1.JPEG"]


def test_a_zip_of_something_else_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("readme.txt", "hello")
    done = fetch(tmp_path / "data", {}, "--from", str(tmp_path / "other.zip"))
    assert done.code == 2 and "holds no image" in done.last_line
