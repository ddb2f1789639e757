"""A profiler's trace of some steps, and on CUDA a snapshot of the memory, in the run's folder."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from pipeline.counts import count
from pipeline.training.ranks.world import World

_PASSED_OVER = 3  # steps at a start: they allocate, choose algorithms and compile
_EVENTS = 200_000  # of the allocator that are kept


class Profiler:
    """Watches `steps` steps, after the first three of this start (rank 0 alone).

    Writes `folder/trace-STEP.json.gz` (chrome://tracing, ui.perfetto.dev), and on CUDA `folder/memory-STEP.pickle`
    (pytorch.org/memory_viz); STEP is the run's step after the last one watched.
    """

    def __init__(self, steps: int, folder: Path, world: World, say: Callable[[str], None]):
        self.steps, self.folder, self.device, self.say = steps, folder, world.device, say
        self.left = _PASSED_OVER + steps
        activities = [ProfilerActivity.CPU]
        if self.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
            torch.cuda.memory._record_memory_history(max_entries=_EVENTS)
        plan = schedule(wait=_PASSED_OVER - 1, warmup=1, active=steps, repeat=1)
        self.profile = profile(activities=activities, schedule=plan, record_shapes=True, acc_events=True)
        self.profile.start()

    def step(self, step: int) -> bool:
        """Note the end of a step, after which `step` steps are done. False: that was the last one to watch."""
        self.left -= 1
        if self.left > 0:
            self.profile.step()
            return True
        self.profile.stop()
        self.folder.mkdir(exist_ok=True)
        trace = self.folder / f"trace-{step:09d}.json.gz"
        self.profile.export_chrome_trace(str(trace))
        self.say(f"profile of {count(self.steps, 'step')}: {trace}")
        self._dump_memory(step)
        return False

    def _dump_memory(self, step: int) -> None:
        if self.device.type == "cuda":
            path = self.folder / f"memory-{step:09d}.pickle"
            torch.cuda.memory._dump_snapshot(str(path))
            torch.cuda.memory._record_memory_history(enabled=None)
            self.say(f"memory of the GPU: {path}; look at it at pytorch.org/memory_viz")

    def close(self) -> None:
        """Give up, if steps are still to be watched."""
        if self.left > 0:
            self.say(f"no profile: this start ended {count(self.left, 'step')} too early; lower --train.profile_steps")
            self.left = 0
            self.profile.stop()
            if self.device.type == "cuda":
                torch.cuda.memory._record_memory_history(enabled=None)
