"""The verb `evaluate`: averaged and raw weights, sizes, crops, other folders, published weights, and what it writes."""

import csv
import json
import os
import re
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import runs
import torch
import torchvision
from PIL import Image
from torchvision.transforms.functional import five_crop, resize

from pipeline.__main__ import main
from pipeline.dataset.index.index import open_index
from pipeline.errors import UserError
from pipeline.evaluation import partial_sums
from pipeline.evaluation.class_map import class_positions
from pipeline.loader.decode.reference import ReferenceDecoder
from pipeline.loader.eval_plan import EvalPlan, FiveCropPlan
from pipeline.loader.stream import EncodedBatch
from pipeline.tracking.eval_rows import best_step
from pipeline.tracking.ledger_rows import read_rows
from pipeline.training.evaluate import Tally


@pytest.fixture(scope="module")
def run(root, tmp_path_factory):
    """A run of 4 steps with averaged weights."""
    folder = tmp_path_factory.mktemp("scored") / "run"
    options = ["--ema.decay", "0.9", "--ema.batch_size", "20", "--schedule.warmup_epochs", "0"]
    runs.call(root, folder, *options, "--train.max_steps", "4")
    return folder


@pytest.fixture(scope="module")
def numbered(root, tmp_path_factory):
    """The validation images in folders 0, 1, 2, 3, and nothing else, as ImageNet-V2 comes."""
    place = tmp_path_factory.mktemp("v2") / "matched-frequency"
    index = open_index(root / "index")
    val = index.splits["val"]
    for sample in range(len(val)):
        folder = place / str(int(val.records["label"][sample]))
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(val.path(sample), folder / f"{sample}.JPEG")
    return place


@pytest.fixture
def evaluate(tmp_path, capsys):
    """Run the verb; returns what its JSON says, or with `expect` the one line on stderr."""

    def call(*options, expect: int = 0):
        target = tmp_path / "scores.json"
        code = main(["evaluate", *map(str, options), "--json", str(target)])
        printed = capsys.readouterr()
        assert code == expect, printed.err
        return json.loads(target.read_text()) if not expect else printed.err.strip()

    return call


def test_raw_and_averaged_weights_at_several_sizes(run, evaluate, tmp_path):
    table = tmp_path / "classes.csv"
    found = evaluate(run, "--sizes", "32,48/64", "--per_class", table)
    places = [(row["weights"], row["size"], row["resize"]) for row in found["results"]]
    assert places == [("raw", 32, 36), ("raw", 48, 64), ("ema", 32, 36), ("ema", 48, 64)]
    recorded = runs.rows(run, "eval")[-1]
    for row, infix in ((found["results"][0], ""), (found["results"][2], "ema_")):
        for key in ("loss", "top1", "top5", "ece"):
            assert row[f"val_{key}"] == pytest.approx(recorded[f"val_{infix}{key}"], rel=1e-5), key
    assert len({row["val_loss"] for row in found["results"]}) == 4
    rows = list(csv.DictReader(table.open()))
    assert len(rows) == 4 * 4 and {row["images"] for row in rows} == {"6"}
    mean = sum(float(row["top1"]) for row in rows[:4]) / 4
    assert mean == pytest.approx(found["results"][0]["val_top1"], abs=1e-3)


def test_one_of_both_is_chosen(run, evaluate):
    recorded = runs.rows(run, "eval")[-1]
    assert evaluate(run, "--weights", "ema")["val_loss"] == pytest.approx(recorded["val_ema_loss"], rel=1e-5)
    assert "torchvision:IMAGENET1K_V2" in evaluate(run, "--weights", "mean", expect=2)
    assert "--sizes 32,x" in evaluate(run, "--sizes", "32,x", expect=2)


def test_folders_of_numbers_are_the_outputs_own(run, numbered, evaluate):
    own, other = evaluate(run, "--weights", "raw"), evaluate(run, "--weights", "raw", "--data_root", numbered)
    assert [other[key] for key in ("val_top1", "images")] == [own[key] for key in ("val_top1", "images")]
    assert other["val_loss"] == pytest.approx(own["val_loss"], rel=1e-5)
    assert not (numbered / "index").exists() and (numbered.parent / "matched-frequency.index").exists()


def test_recalibration_sees_what_the_run_saw(root, evaluate, tmp_path):
    """Of the run's augmentation the number of copies decides which images its last batches held."""
    options = ["--augment.repeats", "2", "--evaluation.recalibrate_batches", "2", "--train.micro_batch_size", "7"]
    runs.call(root, tmp_path / "run", *options, "--train.max_steps", "3")
    found = evaluate(tmp_path / "run", "--checkpoint", "last", "--weights", "raw")
    assert found["val_loss"] == pytest.approx(runs.rows(tmp_path / "run", "eval")[-1]["val_loss"], rel=1e-5)
    assert "--recalibrate -1: give" in evaluate(tmp_path / "run", "--recalibrate", "-1", expect=2)


def test_recalibration_needs_the_runs_own_images(run, numbered, evaluate):
    own, again = evaluate(run, "--weights", "raw"), evaluate(run, "--weights", "raw", "--recalibrate", 2)
    assert again["val_loss"] != own["val_loss"]
    assert "--recalibrate 2" in evaluate(run, "--recalibrate", 2, "--data_root", numbered, expect=2)


def test_mirrored_and_ten_crops_are_other_scores(run, evaluate):
    plain = evaluate(run, "--weights", "raw", "--sizes", "32/48")
    losses = [
        evaluate(run, "--weights", "raw", "--sizes", "32/48", how)["val_loss"] for how in ("--flip", "--ten_crop")
    ]
    assert len({plain["val_loss"], *losses}) == 3 and plain["images"] == 24


def test_classes_are_matched_by_name_or_number_or_not_at_all():
    known = ["n03", "n01", "n02"]
    np.testing.assert_array_equal(class_positions(["n01", "n03"], known, 3, "root"), [1, 0])
    np.testing.assert_array_equal(class_positions(["10", "2"], known, 1000, "root"), [10, 2])
    np.testing.assert_array_equal(class_positions(["10", "2"], ["2", "10"], 2, "root"), [1, 0])
    np.testing.assert_array_equal(class_positions(["a", "b"], None, 2, "root"), [0, 1])
    with pytest.raises(UserError, match=r"root has the class 'n04'"):
        class_positions(["n01", "n04"], known, 3, "root")
    with pytest.raises(UserError, match=r"root has 2 classes.*LOC_synset_mapping"):
        class_positions(["a", "b"], None, 1000, "root")
    # a number is a name where the network's classes are numbers
    with pytest.raises(UserError, match="root has the class '0'"):
        class_positions(["0", "1", "2"], ["1", "10", "2"], 3, "root")


def test_equal_logits_are_one_guess_in_all_scores():
    """bf16 makes many logits equal; top-1, calibration and the classes' scores take the same one of them."""
    tally = Tally(10, torch.device("cpu"))
    tally.add(torch.zeros(100, 10), torch.arange(100) % 10)
    assert tally.sums[1] == tally.bins[:, 2].sum() == tally.classes[:, 1].sum() == 10
    assert torch.all(tally.classes[:, 2] >= tally.classes[:, 1])


def test_five_crops_are_torchvisions(root):
    """The reference decoder's pixels of the planned crops, against five_crop of the resized image."""
    split = open_index(root / "index").splits["val"]
    widths, heights = (split.records[key].astype(np.int64) for key in ("width", "height"))
    plan = FiveCropPlan(widths, heights, 10, 48, 32)
    decoder = ReferenceDecoder(1, resize=48)
    planned = plan.local(1)
    data = [np.frombuffer(split.read(int(sample)), np.uint8) for sample in planned.ids]
    (images,) = decoder.decode([EncodedBatch(1, planned, data)])
    decoder.close()
    for position, sample in enumerate(planned.ids[::5]):
        with Image.open(split.path(int(sample))) as opened:
            whole = resize(opened.convert("RGB"), [48])
        left_top, right_top, left_bottom, right_bottom, middle = map(np.asarray, five_crop(whole, [32, 32]))
        expected = np.stack([middle, left_top, right_top, left_bottom, right_bottom])
        np.testing.assert_array_equal(images[5 * position : 5 * position + 5], expected)
    assert sum(len(plan.local(step, rank, 2)) for rank in (0, 1) for step in range(plan.steps(2))) == 5 * len(split)
    np.testing.assert_array_equal(planned.windows[::5], EvalPlan(widths, heights, 2, 48, 32).local(1).windows)


def test_published_weights_are_scored_with_their_own_preprocessing(numbered, evaluate, tmp_path, monkeypatch):
    """A file in torch's cache under the published name; the same by torchvision's transforms in a loop."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    weights = torchvision.models.ResNet18_Weights.IMAGENET1K_V1
    torch.manual_seed(4)
    model = torchvision.models.resnet18()
    place = tmp_path / "hub" / "checkpoints" / Path(weights.url).name
    place.parent.mkdir(parents=True)
    torch.save(model.state_dict(), place)
    found = evaluate("--weights", "torchvision:IMAGENET1K_V1", "--model", "resnet18", "--data_root", numbered)
    assert (found["published_top1"], found["size"], found["resize"]) == (69.758, 224, 256)
    images, labels = [], []
    for path in sorted(numbered.glob("*/*.JPEG")):
        with Image.open(path) as opened:
            images.append(weights.transforms()(opened.convert("RGB")))
        labels.append(int(path.parent.name))
    with torch.inference_mode():
        logits = model.eval()(torch.stack(images))
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor(labels)).item()
    assert found["val_loss"] == pytest.approx(expected, rel=1e-2) and found["images"] == 24
    assert "IMAGENET1K_V1" in evaluate("--weights", "torchvision:V9", "--model", "resnet18", expect=2)


def test_the_better_weights_are_exported_and_named(run, tmp_path, capsys):
    row = runs.rows(run, "eval")[-1]
    better = "ema" if row["val_ema_top1"] >= row["val_top1"] else "raw"
    for wanted, chosen in (("auto", better), ("ema", "ema"), ("raw", "raw")):
        target = tmp_path / f"{wanted}.pth"
        assert main(["export", str(run), str(target), "--weights", wanted]) == 0
        assert ("averaged weights (EMA)" in capsys.readouterr().out) == (chosen == "ema")
        card = json.loads(target.with_name(target.name + ".json").read_text())
        infix = "ema_" if chosen == "ema" else ""
        assert card["weights"] == chosen and card["scores"]["val_loss"] == row[f"val_{infix}loss"]
        state = torch.load(target, weights_only=True)
        kept = torch.load(runs.checkpoint_at(run, 4) / f"{'ema' if infix else 'model'}.pt", weights_only=True)
        assert all(torch.equal(state[key], kept[key]) for key in kept)


@pytest.fixture
def counted(monkeypatch):
    """Counts the batches that are scored, in `seen`; sends this process SIGTERM when there are `stop_at` of them."""

    class Counted:
        seen, stop_at = 0, None

    real, counted = Tally.add, Counted()

    def add(self, *arguments):
        real(self, *arguments)
        counted.seen += 1
        if counted.seen == counted.stop_at:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Tally, "add", add)
    return counted


def without_speed(scores: dict) -> dict:
    return {key: value for key, value in scores.items() if key not in ("images_per_s", "results")}


@pytest.mark.parametrize("more", [(), ("--ten_crop", "true")], ids=["one crop", "ten crops"])
def test_an_evaluation_that_was_stopped_resumes_to_the_same_scores(run, evaluate, tmp_path, counted, more, capsys):
    options = (run, "--sizes", "32,48", "--batch_size", "10", *more)
    whole, again = tmp_path / "whole.csv", tmp_path / "again.csv"
    wanted = evaluate(*options, "--per_class", whole)
    batches = 2 * 2 * (12 if more else 3)  # networks, sizes, batches of 24 images
    assert counted.seen == batches
    for stop_at in (2, 3):  # in the first of four parts; then in the next
        counted.seen, counted.stop_at = 0, stop_at
        capsys.readouterr()
        assert main(["evaluate", *map(str, options)]) == 75
        assert "run the same command to resume" in capsys.readouterr().out
        batches -= stop_at
    counted.seen, counted.stop_at = 0, None
    capsys.readouterr()
    found = evaluate(*options, "--per_class", again)
    assert counted.seen == batches and not (run / "evaluation").exists()
    assert list(map(without_speed, found["results"])) == list(map(without_speed, wanted["results"]))
    assert again.read_text() == whole.read_text()


def test_partial_sums_of_other_settings_or_damaged_ones_are_not_taken(run, evaluate, counted, monkeypatch):
    wanted = evaluate(run, "--batch_size", "10")
    counted.seen, counted.stop_at = 0, 2
    assert main(["evaluate", str(run), "--batch_size", "10"]) == 75
    counted.seen, counted.stop_at = 0, None
    evaluate(run, "--batch_size", "10", "--flip", "true")
    assert counted.seen == 6
    (kept,) = run.glob("evaluation/*/rank-00000.npz")
    with monkeypatch.context() as other:
        other.setattr(partial_sums, "code_digest", lambda: "another version")
        counted.seen = 0
        evaluate(run, "--batch_size", "10")
        assert counted.seen == 6 and kept.exists()
    kept.write_bytes(kept.read_bytes()[:-100])
    old, new = run / "evaluation/old", run / "evaluation/new"
    for folder in (old, new):
        folder.mkdir()
        (folder / ".rank-00001.npz.7.tmp").touch()  # of a rank that was killed
    long_ago = time.time() - 8 * 86400
    strays = [run / f"evaluation/stray-{i}" for i in range(8)]
    for stray in strays:
        stray.touch()
    for left in (old, *old.iterdir(), new):
        os.utime(left, (long_ago, long_ago))
    counted.seen = 0
    assert without_speed(evaluate(run, "--batch_size", "10")) == without_speed(wanted)
    assert counted.seen == 6 and sorted((run / "evaluation").iterdir()) == [new, *strays]
    shutil.rmtree(run / "evaluation")


@pytest.mark.parametrize("verb", ["evaluate", "export", "continue", "report", "status"])
@pytest.mark.parametrize("inside", ["checkpoints/step-000000004", "config.yaml"])
def test_a_path_inside_a_run_names_the_run(run, tmp_path, capsys, verb, inside):
    more = {"export": [str(tmp_path / "out.pth")], "continue": ["--epochs", "99"]}.get(verb, [])
    assert main([verb, str(run / inside), *more]) == 2
    line = capsys.readouterr().err.strip()
    takes = verb in ("evaluate", "export") and inside != "config.yaml"
    assert line.endswith(f"lies in one: give {run}" + (" --checkpoint step-000000004" if takes else ""))


@pytest.mark.parametrize("verb", [["evaluate", "RUN"], ["export", "RUN", "OUT.pth"]])
def test_a_best_checkpoint_that_is_gone_is_named_beside_those_that_are_there(run, tmp_path, capsys, verb):
    there = shutil.copytree(run, tmp_path / "run")
    best = best_step(row for row in read_rows(there / "metrics.jsonl") if row["kind"] == "eval")
    (there / "checkpoints" / f"step-{best:09d}").rename(there / "checkpoints/step-000000777")
    argv = [item.replace("RUN", str(there)).replace("OUT", str(tmp_path / "out")) for item in verb]
    assert main(argv) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"step-{best:09d}, is not there" in line and "step-000000777" in line and "--checkpoint last" in line


KILLED = """
import os, signal, sys
from pipeline.__main__ import main
from pipeline.evaluation import partial_sums
from pipeline.training.evaluate import Tally
rank, first_start = int(os.environ["RANK"]), os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
partial_sums.KEEP_S = 0.0 if rank == 0 else 1e9  # rank 1 keeps nothing before its end
real, seen = Tally.add, []
def add(self, *arguments):
    real(self, *arguments)
    seen.append(1)
    if rank == 1 and first_start and len(seen) == 4 and sys.argv[1] == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
Tally.add = add
code = main(["evaluate", *sys.argv[2:]])
print(f"rank {rank} scored {len(seen)} batches", flush=True)
sys.exit(code)
"""


@pytest.mark.long
def test_ranks_of_which_one_was_killed_resume_to_the_same_scores(run, tmp_path):
    """Each resumes with what it has kept itself."""
    (tmp_path / "killed.py").write_text(KILLED)
    launch = [sys.executable, "-m", "pipeline", "launch", "--nproc-per-node=2", "--max-restarts=1"]
    scores = {}
    for how in ("undisturbed", "kill"):
        target = tmp_path / f"{how}.json"
        options = ["--weights", "raw", "--batch_size", "2", "--device", "cpu", "--json", str(target)]
        done = runs.run([*launch, str(tmp_path / "killed.py"), how, str(run), *options])
        assert done.returncode == 0, done.stderr
        scores[how] = without_speed(json.loads(target.read_text()))
        assert ("rank 1 " in done.stderr and "was killed by SIGKILL" in done.stderr) == (how == "kill")
        counts = sorted(re.findall(r"rank (\d) scored (\d+) batches", done.stdout))
        assert counts == [("0", "6" if how == "undisturbed" else "3"), ("1", "6")]
    assert scores["kill"] == scores["undisturbed"]
