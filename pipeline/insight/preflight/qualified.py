"""Preflight's look at what `pipeline qualify` has found on each node: who failed, and who is slower than the others."""

import json
import statistics
from pathlib import Path

from pipeline.errors import UserError
from pipeline.insight.preflight.check_result import FAIL, PASS, WARN, CheckResult

SLOW = 0.9  # of the nodes' median speed
FILE = "qualify.json"


def read_qualified(folder: Path) -> list[dict]:
    """What `pipeline qualify --out FOLDER` has written for each node, or for one. Raises UserError."""
    paths = sorted([*folder.glob(f"*/{FILE}"), *folder.glob(FILE)])
    if not paths:
        raise UserError(f"--qualified {folder} holds no {FILE}; on all nodes run: srun pipeline qualify --out {folder}")
    found = []
    for path in paths:
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            found.append({"node": str(content["node"]), "parts": dict(content["parts"])})
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise UserError(f"{path} is not a result of pipeline qualify ({error}); run that again") from error
    return found


def check_qualified(found: list[dict], nodes: list[str]) -> CheckResult:
    """Have all nodes qualified, and is none slower than the others? nodes: of the job, which alone count; empty: not
    known."""
    found = [node for node in found if not nodes or node["node"] in nodes]
    for node in found:
        failed = [row for rows in node["parts"].values() for row in rows if row["verdict"] == "FAIL"]
        if failed:
            what = f"{failed[0]['what']}: {failed[0]['value']}"
            more = f" and {len(failed) - 1} more" if len(failed) > 1 else ""
            return CheckResult(FAIL, "qualified", f"{node['node']} failed: {what}{more}; leave it out (--exclude)")
    missing = sorted(set(nodes) - {node["node"] for node in found})
    if missing:
        some = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        return CheckResult(WARN, "qualified", f"{some} not qualified yet: srun pipeline qualify")
    slow = find_slow(found)
    if slow is not None:
        return CheckResult(WARN, "qualified", f"{slow}; all nodes wait for it: leave it out (--exclude), or look at it")
    if len(found) == 1:
        return CheckResult(PASS, "qualified", f"{found[0]['node']}; there is no other to compare it with")
    return CheckResult(PASS, "qualified", f"{len(found)} nodes, none slower than {SLOW:.0%} of their median")


def find_slow(found: list[dict]) -> str | None:
    """The node and the speed that is furthest below the median of all nodes, in words; None: none is below `SLOW`."""
    speeds: dict[str, dict[str, float]] = {}
    for node in found:
        for part, rows in node["parts"].items():
            for row in rows:
                if row.get("rate"):
                    speeds.setdefault(f"{part}, {row['what']}", {})[node["node"]] = row["rate"]
    worst: tuple[float, str] = SLOW, ""
    for what, by_node in speeds.items():
        median = statistics.median(by_node.values())
        slowest = min(by_node, key=lambda name: by_node[name])
        share = by_node[slowest] / median
        if len(by_node) > 1 and share < worst[0]:
            worst = share, f"{slowest} is slow: {what} {by_node[slowest]:,.1f}, the median {median:,.1f}"
    return worst[1] or None
