"""The learning rate as a function of the step: each shape against values worked out by hand, and time with a unit."""

import dataclasses
import math

import numpy as np
import pytest
from test_config import complaint

from pipeline.config import OptimConfig, RawConfig, ScheduleConfig, parse_config, to_yaml
from pipeline.loader.plan import TrainPlan
from pipeline.training.milestones import Milestones
from pipeline.training.optim.lr_schedule import Schedule, peak_lr


def rates(steps_per_epoch=10, peak=1.0, **settings) -> Schedule:
    return Schedule(ScheduleConfig(**settings), peak, steps_per_epoch)


def assert_rates(schedule: Schedule, expected: dict[int, float]) -> None:
    assert {step: schedule.lr(step) for step in expected} == pytest.approx(expected)


def test_linear_rises_and_falls_as_ffcv_does():
    schedule = rates(100, 1.7, name="linear", epochs=16, warmup_epochs=2, warmup_start=1e-4)
    assert_rates(schedule, {0: 1.7e-4, 100: 1.7 * (1 + 1e-4) / 2, 200: 1.7, 900: 1.7 / 2, 1599: 1.7 / 1400})


def test_polynomial_falls_by_its_power():
    schedule = rates(name="polynomial", epochs=10, power=2, min_lr=0.1)
    assert_rates(schedule, {0: 1.0, 50: 0.1 + 0.9 * 0.25, 90: 0.1 + 0.9 * 0.01})


def test_one_cycle_is_cosine_both_ways():
    schedule = rates(name="one_cycle", epochs=10, warmup_start=0.04, min_lr=1e-4)
    half = (1 + math.cos(math.pi / 2)) / 2
    assert_rates(schedule, {0: 0.04, 15: 0.04 + 0.96 * half, 30: 1.0, 65: 1e-4 + (1 - 1e-4) * half})
    assert schedule.lr(99) < 2e-3


def test_step_goes_down_every_so_often_and_multistep_at_its_milestones():
    assert_rates(rates(name="step", epochs=9, step_every=3), {29: 1, 30: 0.1, 59: 0.1, 60: 0.01, 89: 0.01})
    assert_rates(rates(name="multistep", epochs=9, milestones=(2, "50ba"), gamma=0.5), {19: 1, 20: 0.5, 50: 0.25})


def test_milestones_of_a_longer_run_are_named():
    line = rates(name="multistep", epochs=3, milestones=(30, "600ba")).milestone_warning
    assert line.startswith("--schedule.milestones 30, 600ba: none is before the end of the run")
    assert rates(name="multistep", epochs=3, milestones=(2, 30)).milestone_warning is None
    assert rates(name="multistep", epochs=3, milestones=(30,), reference_epochs=90).milestone_warning is None
    assert rates(name="cosine", epochs=3, milestones=(30,)).milestone_warning is None


def test_an_exponential_warm_up_multiplies_by_the_same_factor():
    schedule = rates(name="constant", epochs=10, warmup_epochs=1, warmup="exponential", warmup_start=1e-2)
    assert_rates(schedule, {0: 1e-2, 5: 1e-1, 10: 1.0, 99: 1.0})


def test_the_decay_may_begin_under_the_warm_up_as_timms_does():
    schedule = rates(name="cosine", epochs=10, warmup_epochs=5, warmup_start=0.0, decay_from_start=True)
    assert_rates(schedule, {49: 0.98, 50: 0.5, 75: (1 + math.cos(0.75 * math.pi)) / 2})


def test_time_in_batches():
    schedule = rates(7, name="step", epochs="600ba", milestones=("300ba", 60), warmup_epochs="10ba", warmup_start=0.0)
    assert (schedule.total_steps, schedule.warmup_steps, schedule.milestones) == (600, 10, [300, 420])


def test_the_rate_follows_the_batch():
    assert peak_lr(OptimConfig(lr=0.1, lr_batch_size=256), 8192) == pytest.approx(3.2)
    assert peak_lr(OptimConfig(lr=0.01, lr_batch_size=512, lr_scaling="sqrt"), 2048) == pytest.approx(0.02)
    assert peak_lr(OptimConfig(lr=0.01, lr_batch_size=None), 2048) == 0.01


def config_of(tmp_path, *argv: str) -> ScheduleConfig:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("schedule: {name: step, epochs: 90, milestones: [30, 60], warmup_epochs: 5}\n")
    return parse_config(["--config", str(recipe), *argv]).schedule


@pytest.mark.parametrize(
    ("epochs", "warmup", "milestones"), [("18", 10, [60, 120]), ("180ep", 50, [600, 1200]), ("450ba", 25, [150, 300])]
)
def test_other_epochs_rescale_the_recipe(tmp_path, epochs, warmup, milestones):
    schedule = Schedule(config_of(tmp_path, "--schedule.epochs", epochs), 1.0, 10)
    assert (schedule.warmup_steps, schedule.milestones) == (warmup, milestones)
    assert schedule.lr(schedule.total_steps - 1) == pytest.approx(0.01)


def test_the_ramp_of_the_images_size_moves_along():
    def ramp(*argv):
        return parse_config(["--config", "resnet50-ffcv-88", *argv]).data.ramp_epochs

    assert ramp() == (65, 76) and ramp("--schedule.epochs", "44") == (32.5, 38)
    assert ramp("--schedule.epochs", "44", "--data.ramp_epochs", "[1, 2]") == (1, 2)


def test_a_time_given_beside_the_length_stands_as_it_is(tmp_path, capsys):
    shorter = ["--schedule.epochs", "9"]
    both = config_of(tmp_path, *shorter, "--schedule.warmup_epochs", "2", "--schedule.milestones=[3,6]")
    assert (both.warmup_epochs, both.milestones, both.reference_epochs) == (2, (3, 6), None)
    one = config_of(tmp_path, *shorter, "--schedule.warmup_epochs", "2")
    assert (one.warmup_epochs, one.milestones) == (2, (3, 6))  # the recipe's 30 and 60 of 90
    longer = config_of(tmp_path, "--schedule.epochs", "180", "--schedule.milestones", "[90]")
    assert (longer.warmup_epochs, longer.milestones) == (5, (90,))
    line = complaint(
        capsys, "--config", "resnet152-goyal", "--schedule.epochs", "900ba", "--schedule.warmup_epochs", "9"
    )
    assert "--schedule.warmup_epochs" in line and "--schedule.reference_epochs" in line


def test_the_length_in_a_file_behind_the_recipe_is_as_on_the_command_line(tmp_path):
    mine = tmp_path / "behind.yaml"
    mine.write_text("schedule: {epochs: 9, warmup_epochs: 2}\n")
    behind = ["--config", str(mine)]
    assert config_of(tmp_path, *behind) == config_of(tmp_path, "--schedule.epochs=9", "--schedule.warmup_epochs=2")
    assert config_of(tmp_path, *behind).milestones == (3, 6)
    shortest = config_of(tmp_path, f"--config={mine}", "--schedule.epochs", "3")
    assert (shortest.epochs, shortest.warmup_epochs, shortest.milestones) == (3, 2, (1, 2))
    saved = tmp_path / "saved.yaml"
    saved.write_text(to_yaml(parse_config(["--config", "resnet152-goyal"])))  # a whole recipe changes nothing of itself
    assert config_of(tmp_path, "--config", str(saved)) == parse_config(["--config", "resnet152-goyal"]).schedule


def test_a_saved_recipe_follows_another_length_again(tmp_path):
    once = parse_config(["--config", "resnet50-ffcv-88", "--schedule.epochs", "44"])
    (tmp_path / "saved.yaml").write_text(to_yaml(once))
    again = parse_config(["--config", str(tmp_path / "saved.yaml"), "--schedule.epochs", "22"])
    straight = parse_config(["--config", "resnet50-ffcv-88", "--schedule.epochs", "22"])
    assert again.data.ramp_epochs == straight.data.ramp_epochs == (16.25, 19) and again.schedule == straight.schedule


def test_the_same_epochs_in_other_words_are_the_same_recipe(tmp_path):
    assert config_of(tmp_path, "--schedule.epochs=90ep") == config_of(tmp_path)
    assert config_of(tmp_path, "--schedule.epochs", "18", "--schedule.reference_epochs", "18").milestones == (
        30.0,
        60.0,
    )


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--schedule.epochs", "90eq"], ["--schedule.epochs", "90eq", '"90ep"', '"5000ba"']),
        (["--schedule.epochs", "0ba"], ["--schedule.epochs", "above 0"]),
        (["--schedule.warmup_epochs", "1.5ba"], ["--schedule.warmup_epochs", "1.5ba"]),
        (["--schedule.milestones", "[3ep, soon]"], ["--schedule.milestones", "soon"]),
        (["--schedule.name", "cosine", "--schedule.step_every", "3"], ["--schedule.step_every", "cosine"]),
        (["--schedule.warmup", "exponential", "--schedule.warmup_start", "0"], ["--schedule.warmup_start", "above 0"]),
    ],
)
def test_what_is_no_time_is_one_line(capsys, argv, words):
    line = complaint(capsys, *argv)
    assert all(word in line for word in words), line


@pytest.mark.parametrize("every", [1, 0.5, 0.1])
def test_an_evaluation_is_due_at_each_end_of_an_epoch_that_a_step_meets_exactly(every):
    """50,000 images in batches of 96: after step 3,125 six epochs are done, though 3,125 is not a multiple of the float
    520.83."""
    config = RawConfig().resolve()
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, eval_every_epochs=every))
    sizes = np.full(50000, 32)
    plan = TrainPlan(sizes, sizes, 96, seed=0)
    milestones = Milestones(config, plan, last_step=100_000)
    due = [step for step in range(1, 3126) if milestones.evaluates_at(step)]
    assert len(due) == 6 / every and due[-1] == 3125
    assert {plan.epoch_end(epoch) for epoch in range(1, 7)} <= set(due)
    assert milestones.next_pause(3124) == 3125


def test_evaluations_may_be_due_more_often_than_steps():
    config = RawConfig().resolve()
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, eval_every_epochs=1e-9))
    sizes = np.full(100, 32)
    assert all(map(Milestones(config, TrainPlan(sizes, sizes, 10, seed=0), 50).evaluates_at, range(1, 51)))
