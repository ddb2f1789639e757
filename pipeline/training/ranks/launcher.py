"""What torchrun or `pipeline launch` gives its processes, and what their own children must not inherit."""

import os
from dataclasses import dataclass
from pathlib import Path

_LAUNCHER = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_",
    "GROUP_",
    "ROLE_",
    "TORCHELASTIC_",
    "PIPELINE_LAUNCH_",
)


@dataclass(frozen=True)
class Launch:
    """How `pipeline launch` started this process.

    Attributes:
        job: rounds are counted within it.
        round: from 1; a later round of a job begins only when the members of the one before are gone, or cut off.
        reason: why the members have changed since the last round, in words.
        local: this node's folder in memory, which outlives the process; None: there is none.
    """

    job: str
    round: int
    reason: str
    local: Path | None


def current_launch() -> Launch | None:
    """None: this process was started in another way."""
    job = os.environ.get("PIPELINE_LAUNCH_JOB")
    if not job:
        return None
    local = os.environ.get("PIPELINE_LAUNCH_LOCAL")
    return Launch(
        job,
        int(os.environ["PIPELINE_LAUNCH_ROUND"]),
        os.environ.get("PIPELINE_LAUNCH_REASON", ""),
        Path(local) if local else None,
    )


def without_launcher() -> dict[str, str]:
    """This process's environment without what the launcher put there."""
    return {key: value for key, value in os.environ.items() if not key.startswith(_LAUNCHER)}
