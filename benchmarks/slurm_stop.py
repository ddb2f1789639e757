"""How long Slurm jobs took from a signal to their end, read from their logs. The committed figures are those of the
test jobs, which run on a real cluster of three nodes on one machine:

    pytest tests/test_slurm.py --basetemp=/tmp/slurm_stop
    python benchmarks/slurm_stop.py /tmp/slurm_stop benchmarks/slurm_stop.json

FOLDER may be any that holds logs of `slurm/resnet152.sh`.
"""

import json
import os
import re
import sys
from datetime import date
from pathlib import Path

SAID = re.compile(r"^\[\S+ \S+ job (?P<attempt>\S+)\] (?P<text>.*)$")
SAVED = re.compile(r"^interrupted \((?P<attempt>\S+) .*\): step (?P<step>\d+) is saved, (?P<seconds>[\d.]+) s after")
ENDED = re.compile(r"^(?P<seconds>[\d.]+) s from the signal to the end of the step$")
TOLD = {"USR1 from Slurm": "USR1 to the batch shell", "TERM from Slurm": "TERM to the batch shell and the steps"}


def read_log(path: Path) -> list[dict]:
    """The stops in a job's log, in order: which signal, at which step, and the seconds until all had been saved and
    until the last process was gone."""
    stops: dict[str, dict] = {}
    for line in path.read_text(errors="replace").splitlines():
        if saved := SAVED.match(line):
            stop = stops.setdefault(saved["attempt"], {"signal": "TERM to the steps"})
            stop |= {"step": int(saved["step"]), "saved_s": float(saved["seconds"])}
        elif said := SAID.match(line):
            attempt, text = said.groups()
            signal = next((name for begin, name in TOLD.items() if text.startswith(begin)), None)
            if signal:
                stops.setdefault(attempt, {"signal": signal})
            elif (ended := ENDED.match(text)) and attempt in stops:
                stops[attempt]["ended_s"] = float(ended["seconds"])
            elif attempt in stops and text.startswith(("requeued", "cancelled", "Slurm has requeued")):
                stops[attempt]["then"] = text
    return [{"log": f"{path.parent.name}/{path.name}", "attempt": attempt, **stop} for attempt, stop in stops.items()]


def main(folder: str, out: str) -> None:
    logs = [path for path in sorted(Path(folder).rglob("*.log")) if path.parent.name != "logs"]  # those are the nodes'
    stops = [stop for path in logs for stop in read_log(path)]
    saved = [stop for stop in stops if "saved_s" in stop and "ended_s" in stop]
    worst = {key: max((stop[key] for stop in saved), default=None) for key in ("saved_s", "ended_s")}
    made = {"made_by": "benchmarks/slurm_stop.py", "date": date.today().isoformat(), "cores": os.cpu_count()}
    Path(out).write_text(json.dumps({**made, "longest": worst, "stops": stops}, indent=1) + "\n")
    for stop in stops:
        times = f"{stop.get('saved_s', '-'):>5} {stop.get('ended_s', '-'):>5}"
        print(f"{stop['log']:<60} {stop['attempt']:>5} {times}  {stop['signal']}; {stop.get('then', '')}")
    print(f"{len(saved)} checkpoints, at most {worst['saved_s']} s to save and {worst['ended_s']} s to the end")


if __name__ == "__main__":
    main(*sys.argv[1:])
