"""`bench overlap`: how much of the gradient exchange overlaps with computation, from a profiler's trace."""

import gzip
import json
from pathlib import Path

from pipeline.errors import UserError
from pipeline.insight.bench.interleaved import format_rows

Span = tuple[float, float]  # start and end, microseconds


def joined(spans: list[Span]) -> list[Span]:
    """The union of the spans, as spans that do not overlap, in order."""
    merged: list[Span] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((start, end))
    return merged


def length(spans: list[Span]) -> float:
    return sum(end - start for start, end in joined(spans))


def common(one: list[Span], other: list[Span]) -> float:
    """Microseconds during which both are active."""
    return length(one) + length(other) - length([*one, *other])


def read_spans(path: Path) -> tuple[list[Span], list[Span]]:
    """(exchange, computing) in a trace: NCCL's and other kernels; on a CPU gloo's all-reduces and torch's operators.

    Raises UserError.
    """
    try:
        opened = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        events = [event for event in json.loads(opened)["traceEvents"] if event.get("ph") == "X"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path} is not a trace ({error}); give a file that --train.profile_steps wrote") from error
    exchange: list[Span] = []
    computing: list[Span] = []
    on_gpu = any(event.get("cat") == "kernel" for event in events)
    for event in events:
        span, name, kind = (event["ts"], event["ts"] + event["dur"]), event["name"], event.get("cat")
        if on_gpu and kind == "kernel":
            (exchange if name.startswith("nccl") else computing).append(span)
        elif not on_gpu and name.startswith("gloo:all_reduce"):
            exchange.append(span)
        elif not on_gpu and kind == "cpu_op" and name.startswith("aten::"):
            computing.append(span)
    return exchange, computing


def measure_overlap(trace: Path) -> dict[str, float]:
    """{exchange_ms, computing_ms, hidden_share} of the trace of a run with several ranks. Raises UserError."""
    exchange, computing = read_spans(trace)
    if not exchange:
        raise UserError(f"{trace} has no gradient exchange: the run had one rank; give the trace of a run with several")
    took, hidden = length(exchange), common(exchange, computing)
    return {"exchange_ms": took / 1e3, "computing_ms": length(computing) / 1e3, "hidden_share": hidden / took}


def overlap(trace: str) -> dict:
    """How much of the gradient exchange overlaps with computation.

    Args:
        trace: the file that --train.profile_steps wrote, of a run with several ranks.
    """
    found = measure_overlap(Path(trace).expanduser())
    hidden_ms = found["hidden_share"] * found["exchange_ms"]
    print(
        format_rows(
            {
                "exchange": f"{found['exchange_ms']:10.1f} ms",
                "computation": f"{found['computing_ms']:10.1f} ms",
                "overlap": f"{hidden_ms:10.1f} ms, {100 * found['hidden_share']:.0f} % of the exchange",
            }
        )
    )
    return found
