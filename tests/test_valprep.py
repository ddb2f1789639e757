"""Sorting the validation images: the layout of valprep.sh, from either list, after any kill, any number of times."""

import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.__main__ import main
from pipeline.dataset.index.scan import build_index
from pipeline.dataset.valprep import sort_val
from pipeline.errors import UserError

CSV = "LOC_val_solution.csv"


@pytest.fixture
def root(synthetic_root, tmp_path) -> Path:
    shutil.copytree(synthetic_root, tmp_path / "set")
    return tmp_path / "set"


def val(root: Path) -> Path:
    return root / "ILSVRC/Data/CLS-LOC/val"


def truth(root: Path) -> dict[str, bytes]:
    """Where every image belongs (by the CSV's own text) and its bytes."""
    rows = re.findall(r"^(ILSVRC2012_val_\d{8}),(n\d{8})", (root / CSV).read_text(), re.M)
    bytes_of = {path.name: path.read_bytes() for path in val(root).rglob("*.JPEG")}
    return {f"{synset}/{name}.JPEG": bytes_of[f"{name}.JPEG"] for name, synset in rows}


def layout(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(val(root))): path.read_bytes() for path in val(root).rglob("*") if path.is_file()}


def test_layout_is_a_folder_a_class_with_its_images(root, capsys):
    expected = truth(root)
    assert main(["valprep", str(root)]) == 0
    assert layout(root) == expected
    assert sorted(len(list(folder.iterdir())) for folder in val(root).iterdir()) == [6] * 4
    assert f"24 images in 4 class folders (24 moved now, labels from {CSV})" in capsys.readouterr().out


def test_second_run_moves_nothing(root):
    sort_val(root)
    times = {path: path.stat().st_mtime_ns for path in val(root).rglob("*")}
    again = sort_val(root)
    assert (again.moved, again.already) == (0, 24)
    assert times == {path: path.stat().st_mtime_ns for path in val(root).rglob("*")}


def test_annotations_serve_where_the_csv_is_missing(root, capsys):
    expected = truth(root)
    (root / CSV).unlink()
    assert main(["valprep", str(root)]) == 0
    assert layout(root) == expected
    assert "labels from val" in capsys.readouterr().out


def test_index_is_the_same_before_and_after(root):
    before = build_index(root).fingerprint
    sort_val(root)
    assert build_index(root).fingerprint == before


@pytest.mark.parametrize("renames", [0, 1, 13, 23])
def test_a_kill_at_any_rename_is_mended_by_the_same_command(root, renames):
    expected = truth(root)
    code = f"""
import os, signal, sys
from pathlib import Path
from pipeline.dataset.valprep import sort_val
real, left = Path.replace, [{renames}]
def replace(self, target):
    if left[0] == 0: os.kill(os.getpid(), signal.SIGKILL)
    left[0] -= 1
    return real(self, target)
Path.replace = replace
sort_val(Path(sys.argv[1]))
"""
    done = subprocess.run([sys.executable, "-c", code, str(root)], check=False)
    assert done.returncode == -signal.SIGKILL
    result = sort_val(root)
    assert (result.moved, result.already) == (24 - renames, renames)
    assert layout(root) == expected


def test_misplaced_images_are_put_right_and_a_flat_one_is_the_newer(root):
    expected = truth(root)
    sort_val(root)
    folders = sorted(val(root).iterdir())
    stray = next(folders[0].iterdir())
    stray.rename(folders[1] / stray.name)
    shutil.copy(next(folders[2].iterdir()), val(root))
    damaged = next(folders[2].iterdir())
    damaged.write_bytes(b"damaged, then fetched again")
    assert sort_val(root).moved == 2
    assert layout(root) == expected


def test_a_copy_that_differs_from_what_lies_right_is_kept(root, capsys):
    """The one that lies right may be the damaged one."""
    sort_val(root)
    folders = sorted(val(root).iterdir())
    whole = next(folders[0].iterdir())
    stray = Path(shutil.copy(whole, folders[1]))
    whole.write_bytes(b"cut")
    assert main(["valprep", str(root)]) == 2
    assert f"{stray} and {whole} differ" in capsys.readouterr().err
    assert stray.stat().st_size > 3


def test_image_without_a_label_stops_before_anything_moves(root, capsys):
    shutil.copy(next(val(root).iterdir()), val(root) / "holiday.jpeg")
    before = layout(root)
    assert main(["valprep", str(root)]) == 2
    assert re.search(r"image .*holiday\.jpeg has no label in .*LOC_val_solution\.csv", capsys.readouterr().err)
    assert layout(root) == before


def test_missing_lists_and_folders_are_one_line(root, tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        sort_val(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no validation images"):
        sort_val(tmp_path / "empty")
    (root / CSV).unlink()
    shutil.rmtree(root / "ILSVRC/Annotations")
    with pytest.raises(UserError, match=r"neither LOC_val_solution\.csv nor ILSVRC/Annotations"):
        sort_val(root)


def test_an_image_of_two_classes_is_refused(root):
    """The last row counted in silence."""
    (root / CSV).write_text("ImageId,PredictionString\nx,n01440764 1\nx,n01440764 2\nx,n02102040 1\n")
    with pytest.raises(UserError, match=r"LOC_val_solution\.csv, line 4: x is of n02102040, and of n01440764 above it"):
        sort_val(root)


@pytest.mark.parametrize(
    "row", ["ILSVRC2012_val_00000001,tench 1 2 3 4", "ILSVRC2012_val_00000001", "../x,n01440764 1"]
)
def test_a_damaged_csv_is_one_line_with_the_line_number(root, row):
    (root / CSV).write_text(f"ImageId,PredictionString\n{row}\n")
    with pytest.raises(UserError, match=r"LOC_val_solution\.csv, line 2: expected"):
        sort_val(root)
