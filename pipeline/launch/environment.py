"""What a worker finds in its environment, and what stands before its lines of output."""

import os
import socket
from string import Template
from typing import Any

from pipeline.launch.options import Options


def environment_of(options: Options, order: dict[str, Any], local_rank: int) -> dict[str, str]:
    """torchrun's names, and this package's own, but for those that differ from node to node. order: the coordinator's,
    to train in a round."""
    rank, size = order["first_rank"] + local_rank, order["world_size"]
    facts: dict[str, object] = {
        "RANK": rank,
        "LOCAL_RANK": local_rank,
        "WORLD_SIZE": size,
        "LOCAL_WORLD_SIZE": options.nproc,
        "GROUP_RANK": order["group_rank"],
        "GROUP_WORLD_SIZE": order["group_size"],
        "ROLE_RANK": rank,
        "ROLE_WORLD_SIZE": size,
        "ROLE_NAME": options.torch.role,
        "MASTER_PORT": order["store_port"],
        "TORCHELASTIC_RESTART_COUNT": order["round"] - 1,
        "TORCHELASTIC_MAX_RESTARTS": options.limits.max_restarts,
        "TORCHELASTIC_RUN_ID": options.job,
        "TORCHELASTIC_USE_AGENT_STORE": True,
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": os.environ.get("TORCH_NCCL_ASYNC_ERROR_HANDLING", 1),
        "PIPELINE_LAUNCH_JOB": order["job"],
        "PIPELINE_LAUNCH_ROUND": order["round"],
        "PIPELINE_LAUNCH_REASON": order["reason"],
    }
    return {name: str(value) for name, value in facts.items()}


def prefixes_of(options: Options, order: dict[str, Any]) -> dict[int, str] | None:
    """Local rank -> what stands before each line that is shown from a log file; None: nothing."""
    template = options.torch.log_line_prefix_template or os.getenv("TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE")
    if not template:
        return None
    facts = {"role_name": options.torch.role, "hostname": socket.gethostname()}
    return {
        rank: Template(template).safe_substitute(facts, rank=order["first_rank"] + rank, local_rank=rank)
        for rank in range(options.nproc)
    }
