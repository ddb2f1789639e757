"""After which steps a checkpoint, an evaluation or a look at the blacklist is due: pure functions of the step."""

import math
from dataclasses import dataclass
from fractions import Fraction

from pipeline.config import Config
from pipeline.loader.plan import TrainPlan


@dataclass(frozen=True)
class Milestones:
    """The steps of a run that stand out. `last_step`: number of steps of the whole run."""

    config: Config
    plan: TrainPlan
    last_step: int

    def evaluates_at(self, step: int) -> bool:
        """Is an evaluation due after `step` steps?"""
        given = Fraction(self.config.train.eval_every_epochs)
        epochs = given.limit_denominator(10**6) or given  # 0.1 is a tenth
        every = epochs * self.plan.samples / self.plan.global_batch_size  # steps; exact, as floats miss whole numbers
        return step > 0 and (step == self.last_step or math.ceil(step // every * every) == step)

    def saves_at(self, step: int) -> bool:
        """Is a checkpoint due after `step` steps, whatever the clock says?"""
        settings = self.config.checkpoint
        at_epoch_end = settings.every_epoch and step == self.plan.epoch_end(self.plan.epochs_done(step))
        at_multiple = settings.every_steps is not None and step % settings.every_steps == 0
        return at_epoch_end or at_multiple or step == self.last_step

    def next_pause(self, step: int) -> int:
        """The first step after `step` at which an epoch ends (other samples may be avoided) or an evaluation is due."""
        epoch_end = self.plan.epoch_end(self.plan.epochs_done(step) + 1)
        pause = min(epoch_end, self.last_step)
        return next((between for between in range(step + 1, pause) if self.evaluates_at(between)), pause)
