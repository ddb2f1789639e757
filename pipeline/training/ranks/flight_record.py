"""torch's flight recorder: the last collectives of this process, for those who look for the cause of a hang."""

import contextlib
from pathlib import Path


def flight_record() -> bytes:
    """The last collectives of this process as torch's flight recorder has them, JSON; empty where there is none."""
    from torch._C import _distributed_c10d as c10d

    found = b""
    for backend in ("nccl", "gloo"):
        for name, options in (("_dump_fr_trace_json", {"backend": backend}), ("_dump_nccl_trace_json", {})):
            dump = getattr(c10d, name, None)
            with contextlib.suppress(RuntimeError, TypeError, ValueError):
                found = max(found, dump(**options) if dump else b"", key=len)
    return found


def flight_settings(folder: Path) -> dict[str, str]:
    """Environment variables by which torch keeps the last collectives, and NCCL leaves them in `folder` at a time-out.
    To be set before torch is used."""
    return {
        "TORCH_FR_BUFFER_SIZE": "2000",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        "TORCH_FR_DUMP_TEMP_FILE": str(folder / "nccl-rank-"),
    }
