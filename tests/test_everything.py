"""A recipe with everything on at once: a run that is cut and goes on is bit-identical, and so are its scores."""

import pytest
import runs

RECIPE = str(runs.TINY.with_name("everything.yaml"))
# At 16 px a convolution with stride 2 gets a 1 x 1 map, and its bf16 gradient from oneDNN on AVX512-BF16 is garbage.
SMALL = ["--data.image_size", "32", "--data.start_size", "24", "--data.val_size", "24", "--data.val_resize", "28"]
LAST = 8  # after 96 images an epoch, in batches of 20, ends inside step 5; averaged at 3 and 6, cut at 4


def assert_same_runs(cut, whole) -> None:
    assert [row["step"] for row in runs.rows(cut, "train")] == list(range(1, LAST + 1))
    assert runs.repeatable(cut) == runs.repeatable(whole)
    scores = [
        [row for row in runs.rows(run, "eval") if row["step"] != 4] for run in (cut, whole)
    ]  # 4: the cut one's end
    assert len(scores[0]) == 2 and scores[0] == scores[1]
    runs.assert_same_state(runs.checkpoint_at(cut, LAST), runs.checkpoint_at(whole, LAST))
    assert (runs.checkpoint_at(cut, LAST) / "ema.pt").exists()


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_resuming_with_everything_on_is_bit_identical(root, tmp_path, processes):
    for run, ends in (("whole", [LAST]), ("cut", [4, LAST])):
        for end in ends:
            options = ["--train.max_steps", str(end), "--checkpoint.every_steps", "4", *SMALL]
            if processes == 1:
                runs.call(root, tmp_path / run, *options, recipe=RECIPE)
            else:
                runs.train(root, tmp_path / run, *options, recipe=RECIPE, processes=processes)
    assert_same_runs(tmp_path / "cut", tmp_path / "whole")
