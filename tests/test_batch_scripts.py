"""What the batch scripts make of Slurm's answers, of the environment, and of what they find in the run folder."""

import os
import re
import signal
import socket
import subprocess
import time

import pytest
from launching import HEARD
from stand_in_slurm import ROOT, BatchShell

NODE_FACTS = '[[ $* != *--node_facts* ]] || echo \'{"node": "n1"}\'\n'
SAVED = "phase=training stop_reason='USR1 from Slurm'; leave 75"


@pytest.fixture
def job(tmp_path):
    return BatchShell(tmp_path)


def wait_until(condition, what):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)  # polls a condition


# --- the requeue


@pytest.mark.parametrize("times", [1, 4])
def test_a_controller_that_is_away_is_asked_again(job, times):
    (job.state / "away").write_text(str(times))
    ended = job.source(f"echo {times} >$STATE/away; {SAVED}")
    assert ended.code == 0 and job.file("requeued") == "7\n"
    assert ended.log.count("no answer from Slurm's controller, asking again") == 2  # at the start, at the requeue
    assert "requeued: USR1 from Slurm" in ended.log


def test_no_answer_until_the_allocation_ends_is_no_success(job):
    ended = job.source(f"echo 1000000 >$STATE/away; job_end_s=$(($(date +%s) + 1)); {SAVED}")
    assert ended.code == 75 and not job.file("requeued")
    assert "Slurm was not reached" in ended.log and "submit the same again to resume" in ended.log


def test_a_requeue_by_slurm_itself_is_not_repeated(job):
    again = "sed -i s/Restarts=0/Restarts=1/ $STATE/record"
    ended = job.source(f"{again}; {SAVED}")
    assert ended.code == 0 and not job.file("requeued") and "Slurm has requeued the job" in ended.log


def test_a_cancelled_job_is_not_revived(job):
    ended = job.source(f"sed -i s/=RUNNING/=CANCELLED/ $STATE/record; {SAVED}")
    assert ended.code == 75 and not job.file("requeued") and "cancelled: submit the same again" in ended.log


AT_3, LATER = "2026-12-01T03:00:00", "2026-12-01T03:00:07"


@pytest.mark.parametrize(
    ("preempted", "ended", "requeued"), [("None", AT_3, False), (AT_3, AT_3, True), (AT_3, LATER, False)]
)
def test_a_preemption_that_cancels_requeues_the_job(job, preempted, ended, requeued):
    """PreemptMode=CANCEL without a GraceTime ends the job at once; a scancel in a preemption's grace time, later."""
    job.record(state="COMPLETING", end=ended, text=f"PreemptEligibleTime={ended} PreemptTime={preempted} ")
    shell = job.source(SAVED)
    assert (shell.code, job.file("requeued")) == ((0, "7\n") if requeued else (75, "")), shell.log
    assert ("requeued: preempted by Slurm" if requeued else "cancelled: submit the same again") in shell.log


def test_requeued_is_said_when_slurm_has_agreed(job):
    (job.state / "refuses").touch()
    ended = job.source(SAVED)
    assert ended.code == 75 and "requeued: " not in ended.log
    assert "Slurm refuses to requeue it (Requested operation is presently disabled)" in ended.log


@pytest.mark.parametrize(
    ("code", "phase", "requeued"),
    [(75, "evaluating", True), (68, "training", True), (69, "evaluating", True), (69, "preparing", False)]
    + [(code, "training", False) for code in (1, 2, 71)],
)
def test_the_launchers_exit_codes(job, code, phase, requeued):
    ended = job.source(f"phase={phase}; leave {code}")
    assert (ended.code, job.file("requeued")) == ((0, "7\n") if requeued else (code, "")), ended.log


@pytest.mark.parametrize("code", [75, 138, 143])
def test_a_signal_to_the_step_before_the_training_requeues_the_job(job, code):
    """A preemption with a grace time sends TERM to the steps alone, here to `pack` or to a copy."""
    ended = job.source(f"leave {code}", name="pack.sh")
    assert ended.code == 0 and job.file("requeued") == "7\n", ended.log
    assert "requeued: a signal to the step" in ended.log


@pytest.mark.parametrize("lost", [True, False])
def test_a_node_lost_before_the_training_requeues_the_job(job, lost):
    """With --no-kill the job goes on, and the step was killed on the other nodes."""
    fewer = "sed -i 's/ NodeList=n1/ NodeList=n2/' $STATE/record" if lost else ":"
    ended = job.source(f"{fewer}; leave 137")
    assert (ended.code, job.file("requeued")) == ((0, "7\n") if lost else (137, "")), ended.log
    assert ("requeued: a node was lost" in ended.log) == lost


@pytest.mark.parametrize("when", ["before this start", "since"])
def test_a_stop_file_made_while_the_data_are_copied(job, when):
    """It ends the job before the training; one of an earlier start does not."""
    if when == "since":
        stop = "count_requeues; /bin/sleep 0.05; touch $RUN_DIR/stop"
    else:
        stop = "touch $RUN_DIR/stop; /bin/sleep 0.05; count_requeues"
    ended = job.source(f"{stop}; ranks_on_every_node() {{ echo trains; }}; train_on_every_node; end_background")
    assert ("trains" in ended.log) == (when != "since")
    assert (ended.code, "stopped by" in ended.log) == ((75, True) if when == "since" else (0, False)), ended.log


def test_options_of_a_step_are_not_those_of_the_next(job):
    ended = job.source("srun() { echo $*; }; STEP_OPTIONS=(--no-kill); run_step 1 one; run_step 1 two; trap - EXIT")
    one, two = (line for line in ended.log.splitlines() if "--ntasks" in line)
    assert "--no-kill" in one and "--no-kill" not in two and two.endswith("two")


def test_sruns_code_is_not_taken_for_the_launchers(job):
    """With a node lost on the way srun's exit code is that of the lost task."""
    ended = job.source('echo 75 >"$RUN_DIR/.code.$ATTEMPT"; STOP_FILE=$RUN_DIR/stop phase=training; leave 137')
    assert ended.code == 0 and job.file("requeued") and not list(job.run.glob(".code*"))


def test_an_empty_code_file_is_no_success(job):
    """The disk was full when node.sh wrote the code."""
    ended = job.source('phase=evaluating; : >"$RUN_DIR/.code.$ATTEMPT"; leave 1', name="evaluate.sh")
    assert ended.code == 1 and "failed with exit code 1" in ended.log and "syntax error" not in ended.log


def test_a_node_with_a_failed_gpu_is_left_out_three_times(job):
    """The first time there is no file of such nodes yet."""
    fault = '{"attempt": "7.0", "node": "n%d"}'
    for node in range(1, 5):
        (job.run / "gpu_fault").write_text(fault % node + "\n")
        ended = job.source("phase=training; leave 71")
        assert "syntax error" not in ended.log
        assert ended.code == (0 if node < 4 else 71), ended.log
    assert job.file("requeued") == "7\n" * 3 and "GPUs failed on n1 n2 n3 n4" in ended.log


def test_a_lost_node_or_memory_that_ran_out(job):
    """What the log says is repeated in one line, not by itself."""
    log = job.folder / "job.log"
    killed = "error: Detected 1 oom_kill event in StepId=7.0"
    script = f'. "$PIPELINE_HOME/slurm/job.sh"\nphase=training\necho "{killed}"\nleave 69'
    with log.open("w") as file:
        command = ["bash", "-c", script, str(ROOT / "slurm/resnet152.sh")]
        done = subprocess.run(command, env=job.env, stdout=file, stderr=file, timeout=60, check=False)
    lines = log.read_text().splitlines()
    assert done.returncode == 2 and lines.count(killed) == 1 and "memory ran out" in lines[-1]


def test_memory_that_ran_out_with_a_log_for_errors_of_its_own(job):
    """sbatch's --error: what the nodes print is in the other file."""
    killed = "pipeline launch: killed 1 since the start because host memory ran out"
    script = f'. "$PIPELINE_HOME/slurm/job.sh"\nphase=training\necho "{killed}"\nleave 69'
    logs = [job.folder / name for name in ("out", "err")]
    with logs[0].open("w") as out, logs[1].open("w") as err:
        command = ["bash", "-c", script, str(ROOT / "slurm/resnet152.sh")]
        done = subprocess.run(command, env=job.env, stdout=out, stderr=err, timeout=60, check=False)
    assert done.returncode == 2 and "memory ran out" in logs[1].read_text() and not job.file("requeued")


def test_a_site_that_allows_no_comments_is_not_asked_all_the_time(job):
    job.trained()
    scontrol = job.folder / "bin/scontrol"
    scontrol.write_text(scontrol.read_text().replace('update*) echo "$*"', "update*) echo denied"))
    scontrol.write_text(scontrol.read_text().replace('>>"$STATE/updates"', '>>"$STATE/updates"; exit 1'))
    pauses = job.folder / "bin/sleep"
    pauses.write_text('#!/bin/bash\necho "$1" >>"$STATE/pauses"\nexec /bin/sleep 0.05\n')
    job.source("remember_steps_soon & until [[ -s $STATE/pauses ]]; do /bin/sleep 0.05; done; kill $!; wait $!")
    assert job.file("updates") and min(map(int, job.file("pauses").split())) >= 60


def test_a_stop_file_of_somebodys_own_ends_the_job(job):
    (job.run / "stop").write_text("enough")
    ended = job.source("export STOP_FILE=$RUN_DIR/stop; phase=training; leave 75")
    assert ended.code == 75 and not job.file("requeued") and "stopped by" in ended.log


def test_a_time_limit_that_is_shorter_than_the_signals_lead(job):
    job.record(limit="00:02:00")
    ended = job.source(SAVED)
    assert ended.code == 2 and not job.file("requeued")
    assert "the time limit of 00:02:00 is not longer than the 300 s" in ended.log and "SBATCH_SIGNAL" in ended.log


def test_requeues_without_progress_end(job):
    for restarts in range(4):
        job.record(restarts=restarts)
        ended = job.source(f"progress() {{ echo same; }}; count_requeues; {SAVED}", name="evaluate.sh")
    assert ended.code == 2 and "requeued 3 times without a new step" in ended.log


def test_a_time_limit_spent_twice_in_vain_ends(job):
    for restarts in range(2):
        job.record(restarts=restarts)
        spent = "progress() { echo same; }; count_requeues; phase=evaluating; job_end_s=$(($(date +%s) + 30))"
        ended = job.source(f"{spent}; read_end() {{ :; }}; stop_reason=x; requeue", name="evaluate.sh")
    assert ended.code == 2 and "was spent twice without progress" in ended.log and job.file("requeued") == "7\n"


def test_what_is_not_a_training_gets_on_without_checkpoints(job):
    """Partial sums, shards and fetched files are progress; a training's is its checkpoints."""
    (job.folder / "python").write_text("#!/bin/bash\nexit 75\n")
    (job.folder / "python").chmod(0o755)
    env = {"PYTHON": str(job.folder / "python"), "DATA_ROOT": str(job.folder / "data")}
    done = [
        ("evaluate", job.run / "evaluation/key/rank-00000.npz"),
        ("pack", job.folder / "data-shards/train-000000.tar"),
        ("fetch", job.folder / "data/.fetch/journal"),
        ("fetch", job.folder / "data/.fetch/download/imagenet.zip"),
    ]
    for script, path in done:
        path.parent.mkdir(parents=True, exist_ok=True)
        for restarts in range(5):
            job.record(restarts=restarts)
            name = path.with_stem(f"{path.stem}-{restarts}") if script == "pack" else path
            name.write_text(str(restarts) * (restarts + 1))
            ended = job.submit(str(ROOT / f"slurm/{script}.sh"), **env)
            assert ended.code == 0 and "requeued: " in ended.log, (script, ended.log)


# --- whose job it is


def test_variables_of_another_job_count_for_nothing(job):
    """Submitted from a task of an array, from a shell of salloc, from a step of another job."""
    other = {"SLURM_ARRAY_JOB_ID": "3", "SLURM_ARRAY_TASK_ID": "9", "SLURM_MEM_PER_CPU": "20", "SLURM_NTASKS": "64"}
    other |= {"SLURM_RESTART_COUNT": "5", "SLURM_STEP_ID": "0", "SLURM_PROCID": "4", "SLURM_EXPORT_ENV": "NONE"}
    other |= {
        "SLURM_KILL_BAD_EXIT": "0",
        "SRUN_CPUS_PER_TASK": "4",
        "RANK": "3",
        "WORLD_SIZE": "64",
        "MASTER_ADDR": "x",
    }
    ended = job.source(f'env | grep -E "^(SLURM|SRUN|RANK|WORLD|MASTER)"; echo "$JOB.$RESTARTS"; {SAVED}', **other)
    assert not [name for name in other if f"\n{name}=" in f"\n{ended.log}"]
    assert "7.0" in ended.log.splitlines() and job.file("requeued") == "7\n"


@pytest.mark.parametrize("task", [0, 1])
def test_one_copy_is_enough_where_srun_starts_the_script(job, task):
    as_srun_does = f"export SLURM_TASK_PID=$$ SLURM_PROCID={task}"
    ended = job.submit("-c", f'{as_srun_does}; . "$PIPELINE_HOME/slurm/job.sh"; echo "goes on"', "slurm/resnet152.sh")
    assert ended.code == 0
    assert ("goes on" in ended.log) == (task == 0)
    assert ("task 1 of srun ends here: one copy" in ended.log) == (task == 1)


def test_a_task_of_an_array_has_a_run_folder_of_its_own(job):
    record = (job.state / "record").read_text()
    (job.state / "record").write_text(record.replace("JobId=7 ", "JobId=7 ArrayJobId=6 ArrayTaskId=2 "))
    ended = job.source('echo "$JOB $RUN_DIR"', RUN_DIR="")
    assert ended.log.splitlines()[-1] == f"6_2 {job.folder}/runs/train-2"


def test_a_second_job_in_the_run_folder_is_told_once_and_touches_nothing(job):
    (job.run / ".job").symlink_to("3")
    (job.run / "stop").write_text("for the first one")
    (job.state / "states").write_text("RUNNING\n")
    ended = job.submit(str(ROOT / "slurm/resnet152.sh"))
    assert ended.code == 2 and ended.log.count("job 3 is at work in") == 1 and len(ended.log.splitlines()) == 1
    assert (job.run / "stop").exists() and (job.run / ".job").readlink().name == "3"


@pytest.mark.parametrize(
    ("squeue", "env"),
    [
        ("echo 'ERROR: ld.so: object x from LD_PRELOAD cannot be preloaded: ignored.' >&2", {}),
        ("[[ -z ${SQUEUE_PARTITION:-} ]] || exit 0 # it shows no other one", {"SQUEUE_PARTITION": "cpu"}),
    ],
)
def test_a_running_jobs_folder_is_not_taken_whatever_squeue_adds_or_hides(job, squeue, env):
    program = job.folder / "bin/squeue"
    program.write_text(program.read_text().replace("#!/bin/bash", f"#!/bin/bash\n{squeue}"))
    (job.run / ".job").symlink_to("3")
    (job.state / "states").write_text("RUNNING\n")
    ended = job.source("claim_run_dir; echo taken", **env)
    assert ended.code == 2 and "job 3 is at work in" in ended.log, ended.log


def test_the_job_is_asked_for_on_its_own_cluster_and_in_slurms_form(job):
    """Not on the one that the submitting shell had chosen, nor with times as its user likes them."""
    program = job.folder / "bin/scontrol"
    refuse = "[[ -z ${SLURM_CLUSTERS:-}${SLURM_TIME_FORMAT:-} ]] || exit 0"
    program.write_text(program.read_text().replace("#!/bin/bash", f"#!/bin/bash\n{refuse}"))
    ended = job.source('echo "ends $job_end_s"', SLURM_CLUSTERS="other", SLURM_TIME_FORMAT="relative")
    assert ended.code == 0 and re.search(r"ends [1-9]", ended.log), ended.log


def test_the_end_of_the_job_before_is_waited_for(job):
    (job.run / ".job").symlink_to("3")
    (job.state / "states").write_text("COMPLETING\nCOMPLETING\nCOMPLETED\n")
    ended = job.source("claim_run_dir")
    assert ended.code == 0 and ended.log.count("waiting for the end of job 3") == 1
    assert (job.run / ".job").readlink().name == "7"


def test_a_signal_while_the_end_of_another_job_is_waited_for_requeues_this_one(job):
    """A node may stay COMPLETING for hours; beyond the time limit nobody would requeue the job."""
    (job.run / ".job").symlink_to("3")
    (job.state / "states").write_text("COMPLETING\n" * 1000)
    process = job.start("claim_run_dir", GRACE_S="1")
    wait_until(lambda: "COMPLETING" in job.file("states") and len(job.file("states").split()) < 999, "it waits")
    process.send_signal(signal.SIGUSR1)
    log, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and job.file("requeued") == "7\n", log
    assert (job.run / ".job").readlink().name == "3"


def test_a_run_folder_that_is_gone_is_no_new_run(job):
    job.trained()
    assert job.source("remember_steps").code == 0
    assert "Comment=steps written by the pipeline" in job.file("updates")
    (job.state / "comment").write_text("steps written by the pipeline")
    job.record(restarts=1)
    (job.run / "metrics.jsonl").unlink()
    ended = job.submit(str(ROOT / "slurm/resnet152.sh"))
    assert ended.code == 2 and "the run is gone" in ended.log and "is it on a disk that" in ended.log
    (job.state / "comment").write_text("(null)")  # nothing had begun before
    assert job.source("claim_run_dir").code == 0


# --- the environment


@pytest.mark.parametrize(
    "text",
    [
        "set -e\nfalse || true\n",
        "set -euo pipefail\n",
        "export LD_LIBRARY_PATH=/opt/nccl/lib:$LD_LIBRARY_PATH\n",
        "cd /tmp\n",
        "trap 'echo mine' USR1\n",
    ],
)
def test_a_site_file_may_set_what_it_likes(job, text):
    (job.folder / "site.env").write_text(f"{text}SEEN=yes\n")
    ended = job.source(f'[[ $SEEN == yes && $PWD == "{job.folder}" ]] || exit 9; false; {SAVED}', SITE_ENV="site.env")
    assert ended.code == 0 and job.file("requeued") == "7\n", ended.log


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("SEEN=yes\nset -e\nmodule load cuda\n", "site.env ended the job, line 3: module load cuda (exit code 127)"),
        ("exit 4\n", "site.env ended the job"),
        ("if true\n", "site.env is no bash"),
        ("SEEN=yes\r\n", "site.env has Windows line endings"),
    ],
)
def test_a_site_file_that_fails_is_named(job, text, said):
    (job.folder / "site.env").write_bytes(text.encode())
    ended = job.source("echo never", SITE_ENV="site.env")
    assert ended.code == 2 and said in ended.log and "never" not in ended.log.splitlines()


def test_a_site_file_that_was_named_is_there(job):
    ended = job.source("echo never", SITE_ENV="cluster/site.env")
    assert ended.code == 2 and "SITE_ENV is cluster/site.env, which is not there" in ended.log
    assert job.source("echo on", SITE_ENV="").log.splitlines()[-1] == "on"


def test_a_container_of_the_example_sees_the_places(job):
    """Its lines in their order, and nothing in sbatch's environment: what is mounted must be known by then."""
    lines = [line[1:] for line in (ROOT / "slurm/site.env.example").read_text().splitlines() if line.startswith("#")]
    taken = [line for line in lines if line.startswith((": ", "CONTAINER=", "SRUN_OPTIONS="))]
    (job.folder / "site.env").write_text("\n".join(taken) + "\n")
    show = r'printf "%s\n" "${CONTAINER[4]}" "${SRUN_OPTIONS[1]#*=}" "$PIPELINE_HOME,$DATA_ROOT,$RUN_DIR"'
    ended = job.source(show, RUN_DIR="", DATA_ROOT="", SITE_ENV="site.env")
    bound, mounted, places = ended.log.splitlines()[-3:]
    assert bound == mounted == places and all(place.startswith("/") for place in places.split(","))


def test_relative_paths_are_those_of_the_submission(job):
    (job.folder / "site.env").write_text("cd /\n")
    ended = job.source('echo "$RUN_DIR $DATA_ROOT"', RUN_DIR="runs/a", DATA_ROOT="data", SITE_ENV="site.env")
    assert ended.log.splitlines()[-1] == f"{job.folder}/runs/a {job.folder}/data"


@pytest.mark.parametrize("equals", [True, False])
def test_places_after_the_scripts_name_are_the_jobs(job, equals):
    """They are known to what the script does beside `pipeline train`, and to site.env; no other value follows them."""
    (job.folder / "python").write_text('#!/bin/bash\nprintf "<%s>" "$@"; echo; exit 2\n')
    (job.folder / "python").chmod(0o755)
    (job.folder / "site.env").write_text(': "${DATA_ROOT:=/site}" "${RUN_DIR:=/site}"\n')
    places = {"--config": "resnet50", "--data.root": "my data", "--run_dir": str(job.folder / "my run")}
    words = [f"{name}={value}" if equals else f"{name}\n{value}" for name, value in places.items()]
    arguments = ["--optim.lr", "0.1", *"\n".join(words).split("\n"), "--note=a b", "--config", "mine.yaml"]
    script = str(ROOT / "slurm/resnet152.sh")
    env = {"PYTHON": str(job.folder / "python"), "SITE_ENV": "site.env", "DATA_ROOT": "/other", "CONFIG": "other"}
    ended = job.submit(script, *arguments, **env)
    assert ended.code == 2 and (job.folder / "my run").is_dir()
    given = ["--config", "resnet50", "--config", "mine.yaml", "--run_dir", f"{job.folder}/my run"]
    given += ["--optim.lr", "0.1", "--note=a b"]
    given += ["--data.root", f"{job.folder}/my data"]
    (line,) = (job.folder / "my run/.nodes.7").read_text().splitlines()
    assert "".join(f"<{word}>" for word in given) in line and line.count("--data.root") == 1


@pytest.mark.parametrize("given", [{}, {"DATA_ROOT": "mine"}])
def test_a_recipe_file_keeps_its_data_set(job, given):
    """DATA_ROOT's default stands before it; a DATA_ROOT that is given, behind."""
    (job.folder / "python").write_text('#!/bin/bash\nprintf "%s " "$@"; echo; exit 2\n')
    (job.folder / "python").chmod(0o755)
    (job.folder / "own.yaml").write_text("data: {root: birds}\n")
    env = {"PYTHON": str(job.folder / "python"), "CONFIG": "own.yaml"} | given
    assert job.submit(str(ROOT / "slurm/resnet152.sh"), "--optim.lr", "1", **env).code == 2
    line = (job.run / ".nodes.7").read_text()
    ours = f"--config own.yaml --run_dir {job.run} --optim.lr 1"
    assert (
        f"{ours} --data.root mine --node_facts" if given else f"--data.root data/imagenet {ours} --node_facts"
    ) in line
    ended = job.submit(str(ROOT / "slurm/resnet152.sh"), **env, STAGE_DIR="local")
    assert ended.code == 2 and ("STAGE_DIR without DATA_ROOT: give DATA_ROOT" in ended.log) == (not given)


@pytest.mark.parametrize("words", [("--data.root", ""), ("--run_dir",), ("--config=", "--optim.lr", "1")])
def test_a_place_without_a_value_is_one_line(job, words):
    ended = job.submit(str(ROOT / "slurm/resnet152.sh"), *words)
    assert ended.code == 2 and ended.log == f"{words[0].rstrip('=')}: give a value\n"


@pytest.mark.parametrize("words", [("--run_dir", "x"), ("--run_dir=x",)])
def test_a_sweep_has_no_run_folder_for_all(job, words):
    ended = job.submit(str(ROOT / "slurm/sweep.sh"), "optim.lr=1,2", *words, SLURM_ARRAY_TASK_ID="0")
    assert ended.code == 2 and "give RUN_DIR=FOLDER before sbatch" in ended.log and len(ended.log.splitlines()) == 1


@pytest.mark.parametrize("script", ["resnet152", "evaluate", "fetch", "pack", "sweep"])
def test_a_wrong_project_folder_is_named(job, script):
    arguments = ["optim.lr=1,2"] if script == "sweep" else []
    env = {"PIPELINE_HOME": "/nowhere", "SLURM_ARRAY_TASK_ID": "0"}
    ended = job.submit(str(ROOT / f"slurm/{script}.sh"), *arguments, **env)
    assert ended.code == 2 and "PIPELINE_HOME=/nowhere" in ended.log and len(ended.log.splitlines()) == 1


@pytest.mark.parametrize(("tasks", "said"), [("3", "--array=0-5 trains all"), ("6", "")])
def test_an_array_with_fewer_tasks_than_combinations_says_so(job, tasks, said):
    """The script's own --array is 0-2; 1-5 lacks the first combination."""
    env = {"SLURM_ARRAY_TASK_ID": "0", "SLURM_ARRAY_TASK_COUNT": tasks, "PYTHON": "/bin/false"}
    ended = job.submit(str(ROOT / "slurm/sweep.sh"), "optim.lr=0.1,0.2,0.4", "train.seed=0,1", **env)
    assert (
        ("trains all" in ended.log) == bool(said)
        and said in ended.log
        and (job.run / "optim.lr=0.1,train.seed=0").is_dir()
    )


@pytest.mark.parametrize(
    ("env", "said"),
    [
        ({"MIN_NODES": "2"}, "MIN_NODES=2: give a number from 1 to 1"),
        ({"MIN_NODES": "two"}, "MIN_NODES=two"),
        ({"SPARE_NODES": "1"}, "SPARE_NODES=1: give a number below the job's 1 nodes"),
    ],
)
def test_numbers_of_nodes_that_cannot_be(job, env, said):
    ended = job.source("echo never", **env)
    assert ended.code == 2 and said in ended.log and "never" not in ended.log.splitlines()


def test_numbers_of_nodes_in_the_site_file_are_for_trainings(job):
    """The scripts of one node, or of all nodes, read the same file."""
    (job.folder / "site.env").write_text("MIN_NODES=2 SPARE_NODES=1\n")
    (job.folder / "python").write_text('#!/bin/bash\necho "ran $3, ${MIN_NODES:-}"\n')
    (job.folder / "python").chmod(0o755)
    env = {"SITE_ENV": "site.env", "PYTHON": str(job.folder / "python"), "NPROC_PER_NODE": "1"}
    for script in ("fetch", "pack", "evaluate"):
        ended = job.submit(str(ROOT / f"slurm/{script}.sh"), **env)
        assert ended.code == 0 and ("ran" in ended.log) and "MIN_NODES" not in ended.log, ended.log
    ended = job.submit(str(ROOT / "slurm/resnet152.sh"), **env)
    assert ended.code == 2 and "SPARE_NODES=1: give a number below the job's 1 nodes" in ended.log


@pytest.mark.parametrize("env", [{"SHELLOPTS": "braceexpand:errexit:hashall"}, {"POSIXLY_CORRECT": "1"}])
def test_options_of_the_shell_in_the_environment_change_nothing(job, env):
    """Exported by the user's shell, as by `export SHELLOPTS`."""
    (job.folder / "python").write_text(f"#!/bin/bash\n{NODE_FACTS}[[ $* != *' launch '* ]] || exit 75\n:\n")
    (job.folder / "python").chmod(0o755)
    ended = job.submit(str(ROOT / "slurm/resnet152.sh"), PYTHON=str(job.folder / "python"), **env)
    assert ended.code == 0 and "requeued: a signal to the steps" in ended.log, ended.log


# --- what failed


@pytest.mark.parametrize(
    ("before", "line"),
    [
        ("", "Nothing was started."),
        ("phase=training", "No step was done."),
        ('phase=training; echo \'{"kind": "train"}\' >$RUN_DIR/metrics.jsonl', "Submit the same again to resume"),
    ],
)
def test_what_comes_next_is_what_has_been(job, before, line):
    ended = job.source(f"{before}\nleave 1")
    assert ended.code == 1 and line in ended.log


def test_memory_that_ran_out_is_said_with_what_was_asked(job):
    killed = "echo 'slurmstepd: error: StepId=7.0 exceeded memory limit (400 > 350), being killed'"
    log = job.folder / "job.log"
    with log.open("w") as file:
        process = subprocess.run(
            ["bash", "-c", f'. "$PIPELINE_HOME/slurm/job.sh"\n{killed}\nleave 1', str(ROOT / "slurm/resnet152.sh")],
            env=job.env,
            cwd=job.folder,
            stdout=file,
            stderr=file,
            timeout=60,
            check=False,
        )
    assert process.returncode == 2
    assert "memory ran out" in log.read_text() and "e.g. --mem=700M" in log.read_text()


# --- signals, and scripts that are edited


@pytest.mark.parametrize("name", ["USR1", "USR2", "INT", "HUP", "TERM"])
def test_every_signal_to_the_batch_shell_asks_for_a_save(job, name):
    wait = "export STOP_FILE=$RUN_DIR/stop; phase=training; /bin/sleep 60 & touch $RUN_DIR/up; step_pid=$!"
    process = job.start(f"{wait}\nuntil [[ -e $RUN_DIR/stop ]]; do /bin/sleep 0.1; done; kill $step_pid; leave 75")
    wait_until((job.run / "up").exists, "the shell is up")
    process.send_signal(getattr(signal, f"SIG{name}"))
    log, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and job.file("requeued") == "7\n", log
    assert name in (job.run / "stop").read_text()


PYTHON = """#!/bin/bash
[[ $1 != -c ]] || { echo 1; exit; } # the count of cores
touch "$RUN_DIR/launched"
trap 'touch "$RUN_DIR/terminated"; exit 75' TERM
until [[ -e $RUN_DIR/stop || -e $RUN_DIR/end ]]; do /bin/sleep 0.1; done
exit 75
"""


@pytest.fixture
def node(job):
    """node.sh with a program in place of Python that ends at the stop file."""
    (job.folder / "python").write_text(PYTHON)
    (job.folder / "python").chmod(0o755)
    env = {"NPROC_PER_NODE": "1", "RENDEZVOUS": "127.0.0.1:1", "RENDEZVOUS_ID": "7.0", "JOB": "7", "MIN_NODES": ""}
    env |= {"PYTHON": str(job.folder / "python")}

    def start(script=ROOT / "slurm/node.sh", **more):
        process = subprocess.Popen(
            [*HEARD, "bash", str(script), "train"],
            env=job.env | env | more,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        wait_until((job.run / "launched").exists, "the launcher is up")
        return process

    return start


@pytest.mark.parametrize("name", ["USR1", "USR2", "INT", "HUP", "TERM"])
def test_every_signal_to_a_step_becomes_the_stop_file(job, node, name):
    process = node(STOP_FILE=str(job.run / "stop"))
    process.send_signal(getattr(signal, f"SIG{name}"))
    log, _ = process.communicate(timeout=30)
    assert (
        process.returncode == 75 and (job.run / "stop").read_text() == f"7.0 SIG{name} to the step on {os.uname()[1]}\n"
    )
    assert not (job.run / "terminated").exists(), log


@pytest.mark.parametrize("up", [True, False])
def test_a_signal_to_the_step_of_an_evaluation_goes_to_the_launcher(job, node, up):
    """Also before Python is up and has a handler."""
    if not up:
        (job.folder / "python").write_text(PYTHON.replace("trap ", "# trap "))
    process = node()
    process.send_signal(signal.SIGUSR1)
    process.communicate(timeout=30)
    assert process.returncode == 75 and (job.run / "terminated").exists() == up and not (job.run / "stop").exists()
    assert (job.run / ".code.7.0").read_text() == "75\n"


def test_a_signal_before_the_launcher_is_there_asks_for_a_requeue(job, node):
    """Here while the node looks for its network; its temporary folder goes, too."""
    (job.folder / "bin/getent").write_text('#!/bin/bash\ntouch "$RUN_DIR/launched"; exec /bin/sleep 1\n')
    (job.folder / "bin/getent").chmod(0o755)
    (job.folder / "tmp").mkdir()
    process = node(SLURM_NNODES="2", SLURM_NODEID="1", TMPDIR=str(job.folder / "tmp"))
    assert list((job.folder / "tmp").iterdir())
    process.send_signal(signal.SIGUSR1)
    process.communicate(timeout=30)
    assert process.returncode == 75 and not list((job.folder / "tmp").iterdir())


# --- the rendezvous is out of reach


@pytest.fixture
def cut_off(job, node):
    """node.sh on the second node of three, whose launcher finds nobody at the rendezvous."""
    (job.folder / "lost").write_text(
        '#!/bin/bash\n[[ $1 != -c ]] || { echo 1; exit; }\ntouch "$RUN_DIR/launched"; exit 68\n'
    )
    (job.folder / "lost").chmod(0o755)
    many = {"SLURM_NNODES": "3", "SLURM_NODEID": "1", "MIN_NODES": "1", "STOP_FILE": str(job.run / "stop")}
    return lambda **more: node(**many, PYTHON=str(job.folder / "lost"), **more)


@pytest.mark.parametrize("state", ["DOWN", "DOWN*+DRAIN", "ALLOCATED*", "MIXED+NOT_RESPONDING"])
def test_the_job_is_requeued_where_slurm_has_lost_the_first_node(job, cut_off, state):
    (job.state / "node").write_text(state)
    process = cut_off()
    log, _ = process.communicate(timeout=30)
    assert process.returncode == 68 and job.file("requeued") == "7\n" and "the first node was lost" in log


def test_a_loss_that_slurm_notices_later(job, cut_off):
    process = cut_off()
    time.sleep(0.5)
    assert process.poll() is None and not job.file("requeued")
    (job.state / "node").write_text("DOWN*")
    process.communicate(timeout=30)
    assert job.file("requeued") == "7\n"


def test_a_node_that_is_cut_off_does_not_requeue_a_healthy_job(job, cut_off):
    process = cut_off(REQUEUE_S="2")
    log, _ = process.communicate(timeout=30)
    assert process.returncode == 68 and not job.file("requeued") and not job.file("cancelled")
    assert "n1 is out of reach, and the job is not requeued yet: Slurm has it as ALLOCATED" in log
    assert "n1 answers Slurm, so the job goes on without this node" in log and len(log.splitlines()) == 2


def test_a_node_that_was_cut_off_joins_again(job, cut_off):
    """Its network was away for longer than its launcher waits."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        closed = f"127.0.0.1:{server.getsockname()[1]}"
    process = cut_off(RENDEZVOUS=closed)
    wait_until(lambda: "is out of reach" in log_of(job), "it waits")
    (job.folder / "lost").write_text((job.folder / "lost").read_text().replace("exit 68", "exit 75"))
    with socket.create_server(("127.0.0.1", int(closed.split(":")[1]))):
        log, _ = process.communicate(timeout=30)
    assert process.returncode == 75 and not job.file("requeued")
    assert "the rendezvous on n1 answers again; this node joins again" in log


def test_a_node_that_is_cut_off_again_and_again_stays_out_and_says_so(job, cut_off):
    with socket.create_server(("127.0.0.1", 0)) as server:
        process = cut_off(RENDEZVOUS=f"127.0.0.1:{server.getsockname()[1]}", REJOINS="2")
        log, _ = process.communicate(timeout=30)
    assert process.returncode == 68 and not job.file("requeued")
    assert log.count("this node joins again") == 2 and "this node stays out, it has joined again 2 times" in log


def log_of(job) -> str:
    return "".join(path.read_text() for path in job.run.glob("logs/*"))


def test_a_node_that_is_cut_off_ends_with_the_first_one(job, cut_off):
    process = cut_off()
    (job.run / ".code.7.0").write_text("0\n")
    process.communicate(timeout=30)
    assert process.returncode == 68 and not job.file("requeued") and not job.file("cancelled")


def test_a_lost_first_node_and_a_refused_requeue_cancel_the_job(job, cut_off):
    (job.state / "node").write_text("DOWN*")
    (job.state / "refuses").touch()
    log, _ = cut_off(REQUEUE_S="2").communicate(timeout=30)
    assert job.file("cancelled") == "7\n" and "it is cancelled; submit the same again to resume" in log


def test_a_script_that_is_edited_while_it_runs(job, node):
    """Written in place, as by rsync --inplace: bash would read on in the middle of it."""
    copy = job.folder / "node.sh"
    text = (ROOT / "slurm/node.sh").read_text()
    copy.write_text(text)
    process = node(copy)
    copy.write_text("# " + "x" * 700 + "\n" + text)
    (job.run / "end").touch()
    log, _ = process.communicate(timeout=30)
    assert process.returncode == 75 and log == ""


def test_changed_code_is_said_after_a_requeue(job, tmp_path):
    home = tmp_path / "home"
    for part in ("pipeline", "slurm"):
        (home / part).mkdir(parents=True)
    (home / "pipeline/a.py").write_text("1")
    script = f"PIPELINE_HOME={home}; say_if_code_changed"
    assert "has changed" not in job.source(script).log
    (home / "pipeline/a.py").write_text("2")
    ended = job.source(script)
    assert f"the code in {home} has changed since the run began: pipeline/a.py" in ended.log


# --- full disks

MOUNTED = """
mount -t tmpfs -o size=4k,nr_inodes=1 none "$FULL"
. "$PIPELINE_HOME/slurm/job.sh"
claim_run_dir
echo claimed
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="a file system of its own needs root")
@pytest.mark.parametrize("full", ["run", "tmp"])
def test_a_folder_without_room_for_a_file(job, full):
    """The run folder: one line, not a wait without an end. The one for temporary files: bash before 5.1 writes a
    here-string there, and Slurm's answer must not get lost."""
    (job.folder / "tmp").mkdir()
    process = subprocess.run(
        ["unshare", "--mount", "bash", "-c", MOUNTED, str(ROOT / "slurm/resnet152.sh")],
        env=job.env | {"FULL": str(job.folder / full), "TMPDIR": str(job.folder / "tmp"), "BASH_COMPAT": "50"},
        cwd=job.folder,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    if full == "tmp":
        assert (process.returncode, process.stdout) == (0, "claimed\n"), process.stderr
    else:
        assert process.returncode == 2 and process.stderr.count("\n") == 1
        assert "no link can be made in RUN_DIR" in process.stderr and "(No space left on device)" in process.stderr


FULL = """
mount -t tmpfs -o size=64k,nr_inodes=64 none "$RUN_DIR"
exec 2>"$RUN_DIR/job.log"
dd if=/dev/zero of="$RUN_DIR/filler" bs=4k 2>/dev/null
export STOP_FILE=$RUN_DIR/stop
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="a file system of its own needs root")
def test_a_full_disk_does_not_keep_a_job_from_stopping(job):
    """Neither the run folder nor the log can be written: the stop file is a link, and what follows the log line is
    reached."""
    script = FULL + (
        "phase=training; install_traps; kill -USR1 $$; /bin/sleep 0.3\n"
        'has_stop_file && [[ $(read_stop_file) == "7.0 USR1"* ]] && echo stopped\n'
        'log "a line that finds no room" && echo went on\n'
    )
    process = subprocess.run(
        ["unshare", "--mount", "bash", "-c", f'. "$PIPELINE_HOME/slurm/job.sh"\n{script}', "resnet152.sh"],
        env=job.env | {"GRACE_S": "1"},
        cwd=job.folder,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert process.stdout.splitlines() == ["stopped", "went on"], process
