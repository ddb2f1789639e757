"""What torchrun gives its processes, which their own children must not inherit."""

import os

_LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_", "GROUP_", "ROLE_", "TORCHELASTIC_")


def without_launcher() -> dict[str, str]:
    """This process's environment without what torchrun put there."""
    return {key: value for key, value in os.environ.items() if not key.startswith(_LAUNCHER)}
