"""Slurm's commands as small scripts that answer from files, for what the batch scripts do with the answers.

Whatever needs a real job, node or signal of Slurm's is told in test_slurm.py on a real cluster.
"""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from launching import HEARD

ROOT = Path(__file__).resolve().parent.parent

RECORD = (
    "JobId=7 JobName=train UserId=root(0) Restarts={restarts} JobState={state} Reason=None TimeLimit={limit} "
    "EndTime={end} NodeList=n1 MinMemoryNode={memory} TRES=cpu=8,gres/gpu=1 Comment=x "
)

SCRIPTS = {
    "scontrol": """#!/bin/bash
away=$(cat "$STATE/away" 2>/dev/null)
if [[ $1 != show || $2 == job ]] && ((${away:-0} > 0)); then
    echo $((away - 1)) >"$STATE/away"
    echo "slurm_load_jobs error: Unable to contact slurm controller (connect failure)" >&2
    exit 1
fi
case "$1 $2" in
    "show job") cat "$STATE/record" ;;
    "show hostnames") echo n1 ;;
    "show node") echo "NodeName=$4 State=$(cat "$STATE/node" 2>/dev/null || echo ALLOCATED) NodeAddr=127.0.0.1 " ;;
    requeue*)
        echo "$2" >>"$STATE/requeued"
        [[ ! -e $STATE/refuses ]] || { echo "Requested operation is presently disabled" >&2; exit 1; }
        ;;
    update*) echo "$*" >>"$STATE/updates" ;;
esac
""",
    "squeue": """#!/bin/bash
case "$*" in
    *%k*) cat "$STATE/comment" 2>/dev/null || echo "(null)" ;;
    *%T*) head -n 1 "$STATE/states" && sed -i '2,$!d;1d' "$STATE/states" ;;
    *%i*) cat "$STATE/steps" 2>/dev/null ;;
esac
""",
    "scancel": """#!/bin/bash
echo "$*" >>"$STATE/cancelled"
""",
    "srun": """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
export SLURM_NODEID=0 SLURMD_NODENAME=n1
exec "$@"
""",
    "sleep": """#!/bin/bash
exec /bin/sleep 0.05
""",
}

AS_SLURMD_DOES = {
    "SLURM_JOB_ID": "7",
    "SLURM_JOB_NAME": "train",
    "SLURM_JOB_NODELIST": "n1",
    "SLURM_NNODES": "1",
    "SLURM_CPUS_ON_NODE": "2",
    "SLURM_GPUS_ON_NODE": "1",
}


@dataclass
class Ended:
    code: int
    log: str


class BatchShell:
    """A batch script's shell, with Slurm's commands from `SCRIPTS`. `state`: the folder that they answer from; `run`:
    the run folder."""

    def __init__(self, folder: Path):
        self.folder, self.state, self.run = folder, folder / "state", folder / "run"
        self.state.mkdir()
        self.run.mkdir()
        (folder / "bin").mkdir()
        for name, text in SCRIPTS.items():
            (folder / "bin" / name).write_text(text)
            (folder / "bin" / name).chmod(0o755)
        self.env = AS_SLURMD_DOES | {
            "PATH": f"{folder}/bin:{os.environ['PATH']}",
            "HOME": str(folder),
            "STATE": str(self.state),
            "PIPELINE_HOME": str(ROOT),
            "SITE_ENV": "/dev/null",
            "RUN_DIR": str(self.run),
            "PYTHON": sys.executable,
        }
        self.record()

    def record(
        self, restarts: int = 0, state: str = "RUNNING", limit: str = "1-00:00:00", memory: str = "350M", **more
    ):
        """What `scontrol show job` says from now on."""
        end = more.get("end", "2099-01-01T00:00:00")
        text = RECORD.format(restarts=restarts, state=state, limit=limit, end=end, memory=memory)
        (self.state / "record").write_text(text + more.get("text", "") + "\n")

    def start(self, script: str, name: str = "resnet152.sh", **env: str) -> subprocess.Popen:
        """Bash that has sourced job.sh, and then runs `script`. name: the batch script that it claims to be."""
        return subprocess.Popen(
            [*HEARD, "bash", "-c", f'. "$PIPELINE_HOME/slurm/job.sh"\n{script}', str(ROOT / "slurm" / name)],
            env=self.env | env,
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def source(self, script: str, name: str = "resnet152.sh", **env: str) -> Ended:
        """Its exit code and output."""
        process = self.start(script, name, **env)
        log, _ = process.communicate(timeout=60)
        return Ended(process.returncode, log)

    def submit(self, *arguments: str, **env: str) -> Ended:
        """A batch script as Slurm runs it."""
        done = subprocess.run(
            ["bash", *arguments],
            env=self.env | env,
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        return Ended(done.returncode, done.stdout + done.stderr)

    def file(self, name: str) -> str:
        """What the commands noted, "" where nothing."""
        path = self.state / name
        return path.read_text() if path.exists() else ""

    def trained(self) -> None:
        """The run has written steps, and a checkpoint."""
        (self.run / "metrics.jsonl").write_text('{"kind": "train", "step": 1}\n')
        (self.run / "checkpoints/step-000000010").mkdir(parents=True, exist_ok=True)
        (self.run / "checkpoints/step-000000010/meta.json").write_text("{}")
