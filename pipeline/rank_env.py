"""Which rank of a job this process is, by its environment: torchrun's variables, or those that srun gives its tasks."""

import os

NAMES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_SRUN = ("SLURM_PROCID", "SLURM_STEP_ID")


def has_launcher() -> bool:
    """Are all variables there by which ranks find each other? Some of them alone are leftovers."""
    return all(os.environ.get(name) for name in NAMES)


def own_rank() -> int:
    """This process's rank; 0 where no launcher started it."""
    text = os.environ.get("RANK", "0")
    return int(text) if has_launcher() and text.isdecimal() else 0


def is_beyond_world_size() -> bool:
    """Is this rank's number beyond those of its job? Then no rank 0 speaks for it."""
    size = os.environ.get("WORLD_SIZE", "")
    return has_launcher() and size.isdecimal() and own_rank() >= int(size)


def adopt_srun_tasks() -> str | None:
    """Under srun with several tasks and no torchrun: give each task the variables of a rank, from its Slurm task id.

    Returns what was done, in words; None where nothing was to do. The ranks meet on the first node of the step, at a
    port that follows from the job's id. Raises ValueError, in one line, where Slurm does not say which node that is.
    """
    if any(os.environ.get(name) for name in NAMES) or not all(os.environ.get(name) for name in _SRUN):
        return None
    tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS") or os.environ.get("SLURM_NTASKS") or 1)
    if tasks < 2 or not os.environ["SLURM_STEP_ID"].isdecimal():
        return None
    rank, nodes = int(os.environ["SLURM_PROCID"]), int(os.environ.get("SLURM_STEP_NUM_NODES") or 1)
    host = "127.0.0.1" if nodes == 1 else _first_node(os.environ.get("SLURM_STEP_NODELIST", ""))
    if not host:
        raise ValueError(
            f"srun started {tasks} tasks on {nodes} nodes, and SLURM_STEP_NODELIST does not name the first; start one "
            "task a node with torchrun, as slurm/resnet152.sh does, or set MASTER_ADDR and MASTER_PORT"
        )
    job, step = int(os.environ.get("SLURM_JOB_ID") or 0), int(os.environ["SLURM_STEP_ID"])
    here = os.environ.get("SLURM_STEP_TASKS_PER_NODE", "").partition("(")[0].partition(",")[0]
    local = int(here) if here.isdecimal() else -(-tasks // nodes)
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(tasks),
        "LOCAL_RANK": os.environ.get("SLURM_LOCALID") or str(rank % local),
        "LOCAL_WORLD_SIZE": str(local),
        "MASTER_ADDR": host,
        "MASTER_PORT": str(20000 + (7 * job + step) % 10000),
    }
    return (
        f"srun started {tasks} tasks without torchrun: they are the ranks of one run, by SLURM_PROCID; "
        f"meeting at {host}:{os.environ['MASTER_PORT']}"
    )


def _first_node(names: str) -> str:
    """The first host of Slurm's list: "node[03-07,9],other" -> "node03"."""
    head, bracket, rest = names.partition("[")
    if not bracket or "," in head:
        return head.partition(",")[0]
    return head + rest.partition("]")[0].partition(",")[0].partition("-")[0]


def not_a_number(name: str) -> str | None:
    """ "NAME=VALUE in the environment is not a whole number"; None where it is one, or empty, which is as not set."""
    value = os.environ.get(name)
    return f"{name}={value} in the environment is not a whole number" if value and not value.isdecimal() else None


def find_leftovers() -> str | None:
    """What is wrong with variables of a launcher that is not there, and the remedy, in one line; None: nothing."""
    given = {name: os.environ[name] for name in NAMES if os.environ.get(name)}
    local = ("LOCAL_RANK", "LOCAL_WORLD_SIZE") if has_launcher() else ()  # otherwise not read
    for name in ("RANK", "WORLD_SIZE", "MASTER_PORT", *local):
        wrong = not_a_number(name)
        if wrong is not None:
            return f"{wrong}; unset it, or start with torchrun"
    rank, size = int(given.get("RANK", 0)), int(given.get("WORLD_SIZE", 1))
    unset = " ".join(f"-u {name}" for name in given)
    remedy = f"for a run of one process unset them (env {unset} pipeline ...), for several ranks start with torchrun"
    found = ", ".join(f"{name}={value}" for name, value in given.items())
    if has_launcher():
        return f"{found} in the environment: there is no such rank; {remedy}" if rank >= size else None
    if rank or size > 1:
        missing = " and ".join(name for name in NAMES if name not in given)
        return f"{found} in the environment, but not {missing}; {remedy}"
    return None
