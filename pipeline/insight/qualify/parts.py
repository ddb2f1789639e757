"""The parts of `qualify`, in their order."""

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from pipeline.insight.qualify.rows import Row, Settings


@dataclass(frozen=True)
class Part:
    """name: of the part. function: "module.function" in this package. share: of the time that there is for all."""

    name: str
    function: str
    share: float

    def rows(self, settings: Settings) -> Iterator[Row]:
        """Run it here. Its module is imported now: a part that can't be imported is that part's fault."""
        module, _, function = self.function.partition(".")
        found: Callable[[Settings], Iterator[Row]] = getattr(
            importlib.import_module(f"pipeline.insight.qualify.{module}"), function
        )
        return found(settings)


PARTS = (
    Part("node", "node.node", 0.02),
    Part("numerics", "numerics.numerics", 0.18),
    Part("pixels", "pixels.pixels", 0.05),
    Part("ceilings", "speed.ceilings", 0.05),
    Part("network", "network.network", 0.05),
    Part("repeat and resume", "whole_runs.repeat_and_resume", 0.16),
    Part("elastic", "whole_runs.elastic", 0.08),
    Part("overlap", "whole_runs.overlap", 0.05),
    Part("steps", "speed.step_table", 0.13),
    Part("peers", "peers.plain_loops", 0.05),
    Part("lecture", "peers.lecture_table", 0.05),
    Part("checkpoints", "speed.checkpoint_stall", 0.03),
    Part("training", "speed.training", 0.10),
)


def part_named(name: str) -> Part:
    return next(part for part in PARTS if part.name == name)
