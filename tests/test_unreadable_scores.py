"""Validation images that can't be read are missing from a score: it says so wherever it is shown."""

import json
import os
import shutil

import pytest
import runs
from test_index import make_folder

from pipeline.__main__ import main
from pipeline.dataset.index.scan import build_index
from pipeline.tracking.ledger_rows import VALIDATION_UNREADABLE

TRAIN = ("--schedule.epochs", "1", "--train.eval_every_epochs", "1")


def cut(path):
    os.truncate(path, path.stat().st_size // 2)


@pytest.fixture(scope="module")
def indexed(tmp_path_factory):
    """A set of 16 + 12 images, indexed while all was well but one validation image."""
    names = [f"{i}.png" for i in range(8)]
    tree = {f"train/{kind}": names for kind in "ab"} | {f"val/{kind}": names[:6] for kind in "ab"}
    root = make_folder(tmp_path_factory.mktemp("scores") / "set", tree)
    cut(root / "val/b/5.png")
    build_index(root)
    return root


@pytest.fixture
def root(indexed, tmp_path):
    """The same, in which four more validation images are cut since."""
    shutil.copytree(indexed, tmp_path / "set", copy_function=shutil.copy2)
    for name in ("a/0", "a/1", "a/2", "b/0"):
        cut(tmp_path / "set/val" / f"{name}.png")
    return tmp_path / "set"


@pytest.mark.parametrize("processes", [1, 2])
def test_a_score_over_fewer_images_says_so_everywhere(root, tmp_path, capsys, processes):
    run = tmp_path / "run"
    how = {} if processes == 1 else {"processes": 2}
    said = (runs.call if processes == 1 else runs.train)(root, run, *TRAIN, "--tracking.report", "true", **how)
    assert "of 7 images, 5 of 12 left out" in said
    assert "(5 of 12 images left out)" in next(line for line in said.splitlines() if line.startswith("finished: "))
    for name in ("a/0", "a/1", "a/2", "b/0"):
        assert said.count(f"val/{name}.png can't be read (") == 1
    assert "left out of val: 1 unreadable (val/b/5.png)" in said
    (row,) = runs.rows(run, "eval")[-1:]
    assert (row["images"], row["left_out"]) == (7, 5)
    (event,) = [row for row in runs.rows(run, "event") if row["event"] == VALIDATION_UNREADABLE]
    assert sorted(event["files"]) == [f"val/{name}.png" for name in ("a/0", "a/1", "a/2", "b/0")]
    assert main(["status", str(run)]) == 0
    assert "(5 of 12 images left out)" in capsys.readouterr().out
    page = (run / "report/index.html").read_text()
    assert "5 of 12 images left out" in page and "val: 1 unreadable (val/b/5.png)" in page
    if processes == 1:
        assert main(["evaluate", str(run), "--json", str(tmp_path / "scores.json")]) == 0
        printed = capsys.readouterr().out
        assert "7 images, 5 of 12 left out" in printed and "(1 of them when the data set was indexed)" in printed
        assert "val/a/0.png can't be read" in printed
        scores = json.loads((tmp_path / "scores.json").read_text())
        assert (scores["images"], scores["left_out"], len(scores["unreadable"])) == (7, 5, 4)


def test_the_limit_of_unreadable_images_holds_for_validation(root, tmp_path, capsys):
    said = runs.call(root, tmp_path / "run", *TRAIN, "--data.max_unreadable", "3", expect=1)
    assert "unreadable" in said and "pipeline verify" in said
    said = runs.train(root, tmp_path / "two", *TRAIN, "--data.max_unreadable", "3", processes=2, expect=1)
    assert "validation images can't be read" in said  # each rank met fewer
    assert not runs.rows(tmp_path / "two", "eval")
    runs.call(root, tmp_path / "enough", *TRAIN, "--data.max_unreadable", "4")


def test_a_score_over_no_image_is_none(root, tmp_path):
    for path in (root / "val").rglob("*.png"):
        cut(path)
    said = runs.call(root, tmp_path / "run", *TRAIN, expect=1)
    assert "validation images can't be read" in said
    assert not runs.rows(tmp_path / "run", "eval")


def test_a_file_that_is_mended_meanwhile_is_scored_again(root, indexed, tmp_path):
    """Each evaluation looks again: a short outage does not leave images out for the rest of a run."""
    runs.call(root, tmp_path / "run", *TRAIN, "--train.max_steps", "1")
    for name in ("a/0", "a/1", "a/2", "b/0"):
        shutil.copy2(indexed / "val" / f"{name}.png", root / "val" / f"{name}.png")
    assert main(["evaluate", str(tmp_path / "run"), "--json", str(tmp_path / "scores.json")]) == 0
    assert json.loads((tmp_path / "scores.json").read_text())["left_out"] == 1


def test_all_images_are_scored_without_a_word(synthetic_root, tmp_path):
    said = runs.call(synthetic_root, tmp_path / "run", *TRAIN, "--train.max_steps", "1")
    assert "of 24 images\n" in said and "can't be read" not in said
    assert runs.rows(tmp_path / "run", "eval")[-1]["left_out"] == 0
