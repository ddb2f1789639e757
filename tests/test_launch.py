"""`pipeline launch`: options as torchrun's, exit codes as this project's, one line for each thing that goes wrong."""

import contextlib
import functools
import inspect
import os
import queue
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import nvidia_smi
import pytest
import runs
from launching import Job, descendants, free_port, kill, rank_pids, training, wait_for
from torch.numa import binding

from pipeline.__main__ import main
from pipeline.config import parse_config
from pipeline.errors import EXIT_GPU_FAULT, EXIT_INTERRUPTED, EXIT_STORE_LOST, UserError, exit_code_of
from pipeline.launch import forked, store, workers
from pipeline.launch import launcher as launcher_module
from pipeline.launch.coordinator import Coordinator
from pipeline.launch.launcher import GRACE_S, Launcher
from pipeline.launch.link import Link
from pipeline.launch.node import Limits
from pipeline.launch.options import parse
from pipeline.launch.program import binding_problem, program_of
from pipeline.launch.workers import Workers
from pipeline.training.ranks.translate_error import is_gpu_fault

#: a program whose ranks say that they started, and end as they are told: `SECONDS:CODE` of each rank
WORKER = """
import os, sys, time
folder, *plan = sys.argv[1:]
rank, start = os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]
open(f"{folder}/started-{start}-{rank}", "w").write(os.environ["MASTER_PORT"])
seconds, code = plan[min(int(rank), len(plan) - 1)].split(":")
time.sleep(float(seconds))
print(f"rank {rank} ends with {code}", file=sys.stderr)
os._exit(int(code))
"""


@pytest.fixture
def worker(tmp_path):
    (tmp_path / "worker.py").write_text(WORKER)
    return tmp_path / "worker.py"


def launch(*arguments: str | Path, timeout: float = 120) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "pipeline", "launch", *map(str, arguments)],
        env=runs.environment(),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def starts(folder: Path) -> list[str]:
    return sorted(path.name.removeprefix("started-") for path in folder.glob("started-*"))


def own(done: subprocess.CompletedProcess) -> list[str]:
    """The launcher's own lines."""
    return [line for line in done.stderr.splitlines() if line.startswith("pipeline launch: ")]


def test_what_the_user_must_mend_ends_all_at_once(worker, tmp_path):
    begun = time.monotonic()
    done = launch("--nproc-per-node=2", "--max-restarts=3", worker, tmp_path, "0:2", "600:0")
    assert done.returncode == 2 and time.monotonic() - begun < 60
    assert starts(tmp_path) == ["0-0", "0-1"]
    assert done.stderr.splitlines() == ["rank 0 ends with 2"]  # not a word of the launcher's


def test_a_store_that_is_gone_from_its_machine_is_not_waited_for(worker, tmp_path):
    with Job(tmp_path, [str(worker), str(tmp_path), "600:0"], "1") as job:
        store = job.serve()
        job.start("n1")
        wait_for(lambda: starts(tmp_path) == ["0-0"], say=job.all_output)
        store.kill()
        wait_for(lambda: not descendants(job.processes["n1"].pid), say=job.all_output)
        begun = time.monotonic()  # the ranks have ended
        assert job.wait("n1", 60) == EXIT_STORE_LOST
        assert time.monotonic() - begun < 8  # 10 s where it may come back


def test_what_the_user_must_mend_ends_all_nodes_at_once(worker, tmp_path):
    with Job(tmp_path, [str(worker), str(tmp_path), "600:0", "0:2"], "2", "--max-restarts=3") as job:
        job.start("n1")
        job.start("n2")
        assert job.wait("n1", 60) == job.wait("n2", 60) == 2
        assert starts(tmp_path) == ["0-0", "0-1"] and not job.said("restart")


@pytest.fixture
def coordinator():
    """One that serves in a thread of this process, for a job that never has all its nodes."""
    about = {"--rdzv-id": "none", "--run_dir": "a"}
    made = Coordinator(Limits(9, 9), 0, lambda: (None, 0), about)
    made.start()
    yield made
    made.join()


HELLO = {"name": "n (pid 1)", "ranks": 1, "node_rank": None, "stop": "", "job": {"--rdzv-id": "none"}}


def test_the_launchers_of_another_job_are_refused(coordinator):
    """They waited as spares of the first one without a word, and ended with its exit code; or their ranks ended it."""
    place = f"--rdzv-endpoint=127.0.0.1:{coordinator.port}"
    for other, named in (("--run_dir=runs/b", "have --run_dir a;"), ("--run_dir=runs/a", "have --rdzv-id none;")):
        ids = ["--rdzv-id=mine"] if "rdzv" in named else []
        call = ["--nnodes=2", "--rdzv-backend=c10d", "--rdzv-conf=is_host=0", place, *ids, "train", "--config", "smoke"]
        with pytest.raises(UserError, match=named):
            Launcher(parse([*call, other]), []).run()
    assert parse([*call, "--run_dir=/elsewhere/runs/a"]).about["--run_dir"] == "a"  # the same, by another path
    Link("127.0.0.1", coordinator.port, HELLO, 5).close()  # of a program whose run folder is not known
    assert not coordinator.membership.asked_to_stop


def listens(answer: bytes) -> tuple[socket.socket, int]:
    """A server that answers so, and hangs up."""

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = server.accept()
                with connection:
                    connection.recv(1 << 16)
                    connection.sendall(answer)

    server = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=serve, daemon=True).start()
    return server, server.getsockname()[1]


@pytest.mark.parametrize("answer", [b"", b"SSH-2.0-OpenSSH_9.6\r\n", b"\0\1\n", b"[]\n"])
def test_another_program_at_the_place_of_the_rendezvous_is_named(answer, capfd, monkeypatch):
    """As torchrun's store: launchers joined again and again, ten times a second and without an end, or never."""
    monkeypatch.setattr("pipeline.launch.launcher._SAY_WAITING_S", 0.0)
    server, port = listens(answer)
    with server:
        call = ["--nnodes=2", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}"]
        launcher = Launcher(parse([*call, "--rdzv-conf=join_timeout=1", "--no-python", "true"]), [])
        assert launcher.run() == EXIT_STORE_LOST
    assert capfd.readouterr().err.count("what listens there does not answer as a rendezvous of pipeline launch") == 1


def test_a_coordinator_that_breaks_leaves_nobody_waiting():
    def open_store():
        raise RuntimeError("too many open files")

    def serve() -> None:
        with pytest.raises(RuntimeError, match="open files"):
            made.serve()

    made = Coordinator(Limits(1, 1), 0, open_store)
    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    link = Link("127.0.0.1", made.port, HELLO, 5)
    assert link.orders.get(timeout=10) == {"do": "cut"}
    thread.join(10)
    with pytest.raises(ConnectionRefusedError):
        Link("127.0.0.1", made.port, HELLO, 5)


def test_a_signal_to_the_process_that_hosts_the_rendezvous_stops_the_job(tmp_path):
    """It had no effect."""
    (tmp_path / "saves.py").write_text(
        "import os, signal\nsignal.signal(signal.SIGTERM, lambda *_: os._exit(75))\n" + WORKER
    )
    with Job(tmp_path, [str(tmp_path / "saves.py"), str(tmp_path), "600:0"], "1") as job:
        store = job.serve()
        job.start("n1")
        wait_for(lambda: starts(tmp_path) == ["0-0"], say=job.all_output)
        store.send_signal(signal.SIGTERM)
        assert job.wait("n1", 60) == job.wait("store", 60) == EXIT_INTERRUPTED, job.all_output()


def test_a_temporary_folder_too_deep_for_a_socket(tmp_path, monkeypatch):
    """A socket's path has 107 bytes at most; a job's own folder for temporary files may be as long."""
    folder = tmp_path / ("deep" * 25)
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    done = launch("-m", "pipeline", "recipes")
    assert done.returncode == 0 and "resnet152" in done.stdout and not done.stderr, done.stderr


@pytest.mark.parametrize(
    ("addresses", "loopback"),
    [
        (["127.0.1.1"], True),
        (["10.0.0.1"], False),
        (["2001:db8::1"], False),
        (["::1", "127.0.0.1"], True),
        (["::1", "10.0.0.1"], True),
    ],
)
def test_which_address_gloo_takes_of_a_machine_that_has_ipv6(addresses, loopback, monkeypatch):
    """The first one. Where a name has IPv6 addresses alone, gloo was sent to the interface of docker's bridge."""

    def found(name, port, family=socket.AF_UNSPEC, *_, **__):
        kinds = [(socket.AF_INET6 if ":" in text else socket.AF_INET, text) for text in addresses]
        same = [(kind, 1, 6, "", (text, 0)) for kind, text in kinds if family in (socket.AF_UNSPEC, kind)]
        if not same:
            raise socket.gaierror
        return same

    monkeypatch.setattr(socket, "getaddrinfo", found)
    assert store._is_loopback("n1") is loopback


@pytest.mark.parametrize(
    ("host", "own_name", "interfaces", "found"),
    [
        ("machine1", "localhost", {"10.0.0.1": "ib0"}, "ib0"),
        ("machine1", "name-of-nobody.invalid", {"10.0.0.1": "ib0"}, "ib0"),
        ("machine1", "10.0.0.1", {"10.0.0.1": "ib0"}, None),
        ("machine1", "localhost", {"10.0.0.1": "ib0", "10.1.0.1": "eth0"}, None),
        ("machine1", "localhost", {}, None),
        ("127.0.0.1", "localhost", {"10.0.0.1": "ib0"}, None),
    ],
)
def test_a_machine_whose_own_name_is_its_loopback(host, own_name, interfaces, found, monkeypatch):
    """Debian's 127.0.1.1: gloo would listen there, where no other machine can connect."""
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setattr(socket, "gethostname", lambda: own_name)
    monkeypatch.setattr(store, "_interfaces", lambda: interfaces)
    place = ("--nnodes=2", "--rdzv-backend=c10d", f"--rdzv-endpoint={host}:1")
    launcher = Launcher(parse([*place, "train"]), [])
    order = dict.fromkeys(("first_rank", "world_size", "group_rank", "group_size", "store_port", "round"), 1)
    given = launcher.environment({**order, "job": "j", "reason": ""}, 0)
    assert launcher.interface == given.get("GLOO_SOCKET_IFNAME") == found
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth9")
    assert Launcher(parse([*place, "train"]), []).interface is None


def test_the_network_interfaces_of_this_machine():
    known = store._interfaces()
    assert "lo" not in known.values() and not any(address.startswith("127.") for address in known)


RANKS_THAT_MEET = """
import os, torch, torch.distributed as dist
dist.init_process_group("gloo")
ones = torch.ones(1)
dist.all_reduce(ones)
os.write(1, f"met {int(ones)}\\n".encode())  # at once: two ranks write
"""


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="no IPv6 here")
def test_a_rendezvous_at_an_ipv6_address(tmp_path):
    """As on a cluster whose nodes have no other."""
    (tmp_path / "ranks.py").write_text(RANKS_THAT_MEET)
    places = ("--rdzv-backend=c10d", f"--rdzv-endpoint=[::1]:{free_port()}", "--rdzv-conf=join_timeout=20")
    done = launch(*places, "--nproc-per-node=2", tmp_path / "ranks.py")
    assert done.returncode == 0 and done.stdout.split("\n").count("met 2") == 2, done.stderr


def test_a_folder_named_as_a_verb_is_no_program(tmp_path, monkeypatch):
    """As in the folder of a data set, which has train/ in it."""
    (tmp_path / "train").mkdir()
    (tmp_path / "evaluate").write_text("")  # a program, as for torchrun
    monkeypatch.chdir(tmp_path)
    assert parse(["train", "--config", "smoke"]).module == "pipeline"
    assert parse(["evaluate"]).module is None


@pytest.mark.parametrize("verb", ["train", "continue", "evaluate"])
def test_every_verb_of_ranks_can_be_started_by_its_name(verb):
    options = parse(["--nproc-per-node=2", verb, "runs/first"])
    assert (options.module, options.command) == ("pipeline", [verb, "runs/first"])
    assert program_of(options).asks_for_signals


def test_the_ranks_of_a_continued_run_divide_its_batch(tmp_path):
    """Which is that of the run it goes on from."""
    (tmp_path / "config.yaml").write_text("train: {global_batch_size: 24}\nrun_dir: runs/first\n")
    for asked in ([str(tmp_path), "--epochs", "9"], ["--epochs", "9", str(tmp_path)]):
        options = parse(["--nnodes=1:2", "--rdzv-endpoint=localhost:0", "continue", *asked])
        assert options.limits.batch_size == 24
    assert parse(["continue", str(tmp_path / "nowhere"), "--epochs", "9"]).limits.batch_size is None
    assert parse(["continue"]).limits.batch_size is parse(["-m", "pipeline"]).limits.batch_size is None


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["trian"], "no file trian, and no command that runs as ranks .*; did you mean train"),
        (
            ["report", "runs/a"],
            r"no file report, and no command that runs as ranks \(train, continue, evaluate\); give a program",
        ),
        (["no_such.py", "train"], r"no file no_such\.py, .*; give a program"),
        (["--no-python", "no_such"], "no program no_such that can be run"),
    ],
)
def test_a_program_that_is_not_there_is_one_line(command, said):
    with pytest.raises(UserError, match=said):
        Launcher(parse(command), [])
    assert program_of(parse(["--no-python", "true"])).entrypoint == "true"


def test_a_failure_is_restarted_as_often_as_was_said(worker, tmp_path):
    done = launch("--max-restarts=2", "--nproc-per-node=2", worker, tmp_path, "600:0", "1:1")
    assert done.returncode == 1
    assert starts(tmp_path) == ["0-0", "0-1", "1-0", "1-1", "2-0", "2-1"]
    lines = [line for line in own(done) if "rank 1" in line]
    assert ["restart 1 of 2" in lines[0], "restart 2 of 2" in lines[1]] == [True, True] and len(lines) == 3
    assert "ended with exit code 1 after 2 restarts" in lines[2] and "Traceback" not in done.stderr
    ports = {(tmp_path / f"started-{i}-0").read_text() for i in range(3)}
    assert len(ports) == 3  # each start has a store of its own


def test_a_gpu_fault_is_not_tried_again_on_the_same_gpu(worker, tmp_path):
    done = launch("--max-restarts=3", worker, tmp_path, f"0:{EXIT_GPU_FAULT}")
    assert done.returncode == EXIT_GPU_FAULT and starts(tmp_path) == ["0-0"]
    assert "a GPU fault" in done.stderr


@pytest.mark.parametrize(
    ("message", "is_one"),
    [
        ("CUDA error: uncorrectable ECC error encountered", True),
        ("CUDA error: hardware stack error", True),
        ("CUDA error: device-side assert triggered", False),
        ("CUDA out of memory. Tried to allocate 2.00 GiB", False),
    ],
)
def test_which_errors_are_a_gpu_fault(message, is_one):
    assert is_gpu_fault(RuntimeError(message)) is is_one


def test_exit_codes_of_errors():
    from pipeline.errors import GpuFault, TransientError

    assert [exit_code_of(e) for e in (UserError("x"), TransientError("x"), GpuFault("x"))] == [2, 1, EXIT_GPU_FAULT]


@pytest.mark.parametrize(
    ("signals", "within_s", "said"),
    [(["SIGTERM"], "1", "did not save within 1 s"), (["SIGINT"] * 3, "60", "not waited for")],
)
def test_workers_that_do_not_save_in_time_are_killed(worker, tmp_path, signals, within_s, said):
    """Or at the third Ctrl-C."""
    stubborn = tmp_path / "stubborn.py"
    stubborn.write_text("import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + WORKER)
    with Job(tmp_path, [str(stubborn), str(tmp_path), "600:0"], "1", f"--shutdown-timeout={within_s}") as job:
        process = job.start("a")
        wait_for(lambda: starts(tmp_path) == ["0-0"])
        for name in signals:
            process.send_signal(signal.Signals[name])
            time.sleep(0.1)  # one that comes while its handler runs is the same one
        assert job.wait("a", 30) == 1
        assert len(job.said("the workers")) == len(job.said(said)) == 1


def test_a_signal_to_a_spare_stops_all(worker, tmp_path):
    saves = tmp_path / "saves.py"
    saves.write_text("import os, signal\nsignal.signal(signal.SIGTERM, lambda *_: os._exit(75))\n" + WORKER)
    with Job(tmp_path, [str(saves), str(tmp_path), "600:0"], "1:1") as job:
        job.start("n1")
        wait_for(lambda: starts(tmp_path) == ["0-0"], say=job.all_output)
        spare = job.start("n2")
        wait_for(lambda: job.said("waits as a spare"), say=job.all_output)
        spare.send_signal(signal.SIGTERM)
        assert job.wait("n1", 60) == job.wait("n2", 60) == EXIT_INTERRUPTED, job.all_output()


@pytest.mark.parametrize(
    ("command", "asked"), [(["train", "--config", "smoke"], signal.SIGUSR2), (["--no-python", "true"], signal.SIGTERM)]
)
@pytest.mark.parametrize("why", ["loss", "failure"])
def test_ranks_that_save_because_a_node_is_lost_are_not_interrupted(command, asked, why):
    """Where only its launcher is frozen, all ranks still train together: TERM made them all save, and the job ended."""
    launcher, sent = Launcher(parse(command), []), []
    launcher.workers = SimpleNamespace(signal=sent.append, kill_after=sent.append)
    try:
        launcher.stop(why)
    finally:
        launcher.local.remove()
    assert sent == [asked, GRACE_S[why]]


def test_a_signal_before_ranks_are_started(worker, tmp_path, monkeypatch):
    """While torch is imported, or the nodes gather: none is started."""
    monkeypatch.setenv("LOGLEVEL", "CRITICAL")
    before = signal.signal(signal.SIGTERM, lambda *_: None)

    def parse_later(argv):
        os.kill(os.getpid(), signal.SIGTERM)
        return parse(argv)

    monkeypatch.setattr("pipeline.launch.options.parse", parse_later)
    try:
        assert main(["launch", str(worker), str(tmp_path), "0:0"]) == EXIT_INTERRUPTED
    finally:
        signal.signal(signal.SIGTERM, before)
    assert starts(tmp_path) == []


@pytest.mark.parametrize(
    ("ends", "code", "named"), [("sleep", -signal.SIGKILL, ""), ("exit", 3, "rank 5 .* ended with exit code 3")]
)
def test_a_rank_that_the_launcher_kills_is_not_what_failed(ends, code, named):
    """That is one of another node, or the one that ended before."""
    command = ["sh", "-c", f'[ "$LOCAL_RANK" = 0 ] || {ends} 3; exec sleep 600']
    launcher, reports = Launcher(parse(["--no-python", "--nproc-per-node=2", *command]), []), []
    launcher.link = SimpleNamespace(say=lambda kind, **facts: reports.append(facts))
    launcher.order = {"round": 1, "first_rank": 4}
    launcher.workers = Workers(launcher.program, {n: {"LOCAL_RANK": str(n)} for n in range(2)}, launcher.logs)
    try:
        if ends == "exit":
            wait_for(lambda: not alive(launcher.workers.pids[1]))
        launcher.workers.signal(signal.SIGKILL)
        wait_for(lambda: [launcher.look(), reports][1])
    finally:
        launcher.local.remove()
    (report,) = reports
    assert report["exit_code"] == code and re.fullmatch(named, report["failure"])


def test_a_signal_to_the_whole_process_group_saves(root, tmp_path):
    """As of a terminal that is closed, or of a batch system that sends it to all processes of a job."""
    with Job(tmp_path, training(root, tmp_path / "run", "--schedule.epochs", "1000"), "1") as job:
        process = job.start("a")
        wait_for(lambda: runs.rows(tmp_path / "run", "train"), say=job.all_output)
        for number in (signal.SIGHUP, signal.SIGUSR1, signal.SIGQUIT):
            os.killpg(process.pid, number)
        assert job.wait("a") == EXIT_INTERRUPTED, job.all_output()
    (row,) = (row for row in runs.rows(tmp_path / "run", "event") if row["event"] == "interrupted")
    assert (tmp_path / f"run/checkpoints/step-{row['step']:09d}/meta.json").exists()


@pytest.mark.parametrize("order", [{"do": "stop", "round": 1, "why": "loss"}, {"do": "end", "exit_code": 69}])
def test_a_rank_that_can_not_be_killed_is_not_waited_for(order, monkeypatch, capfd):
    """It hangs in a GPU's driver: all nodes waited for its end."""
    monkeypatch.setattr(workers, "UNKILLABLE_S", 0.2)
    monkeypatch.setattr(launcher_module, "GRACE_S", {"loss": 0.0, "failure": 0.0})
    launcher = Launcher(parse(["--no-python", "--nproc-per-node=1", "sleep", "600"]), [])
    launcher.workers = Workers(launcher.program, {0: {}}, launcher.logs)
    (handler,) = launcher.workers._context.subprocess_handlers.values()
    monkeypatch.setattr(handler, "close", lambda number: None)
    launcher.link, launcher.order = SimpleNamespace(orders=queue.Queue(), say=lambda *_, **__: None), {"round": 1}
    launcher.link.orders.put(order)
    try:
        assert launcher.follow() == order.get("exit_code", 1) and launcher.workers is None
    finally:
        handler.proc.kill()
        handler.proc.wait()
        launcher.local.remove()
    assert f"SIGKILL does not end 1 rank (pid {handler.proc.pid})" in capfd.readouterr().err


def test_a_killed_launcher_leaves_no_worker(root, tmp_path):
    with Job(tmp_path, training(root, tmp_path / "run", "--schedule.epochs", "1000"), "1", nproc=2) as job:
        process = job.start("a")
        wait_for(lambda: runs.rows(tmp_path / "run", "train"), say=job.all_output)
        below = descendants(process.pid)
        assert len(below) >= 3  # two ranks, and the process that they were forked from
        process.kill()
        wait_for(lambda: not any(Path(f"/proc/{pid}/exe").exists() and alive(pid) for pid in below), 30)


def test_a_rank_has_the_threads_and_the_command_line_of_an_interpreter_of_its_own(root, tmp_path):
    """With several OpenMP threads, imports start some; a process that has threads must not be forked."""
    with Job(tmp_path, training(root, tmp_path / "run", "--schedule.epochs", "1000"), "1") as job:
        job.environment["OMP_NUM_THREADS"] = "2"
        process = job.start("a")
        wait_for(lambda: runs.rows(tmp_path / "run", "train"), say=job.all_output)
        (pid,) = rank_pids(process.pid).values()
        shown = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
        assert shown[:6] == [sys.executable, "-u", "-m", "pipeline", "train", "--config"]
        assert not job.said("ranks are not forked|Traceback")


def test_the_installed_command_starts_ranks_without_a_warning_of_pythons(root, tmp_path):
    """It is a file that imports `pipeline.__main__`, and so do ranks, each of which runs that module as its program."""
    (tmp_path / "installed").write_text("from pipeline.__main__ import run\nif __name__ == '__main__':\n    run()\n")
    command = [sys.executable, str(tmp_path / "installed"), "launch", "--nproc-per-node=1"]
    done = runs.run(command + training(root, tmp_path / "run", "--train.max_steps", "1"))
    assert done.returncode == 0 and "RuntimeWarning" not in done.stderr, done.stderr


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.mark.long
def test_term_to_the_launcher_saves_and_the_same_command_finishes(root, tmp_path):
    run, length = tmp_path / "run", ["--schedule.epochs", "8"]
    program = training(root, run, *length)
    with Job(tmp_path, program, "1", "--shutdown-timeout=60", nproc=2) as job:
        process = job.start("a")
        wait_for(lambda: len(runs.rows(run, "train")) > 2, say=job.all_output)
        process.send_signal(signal.SIGTERM)
        assert job.wait("a") == EXIT_INTERRUPTED, job.all_output()
        (row,) = (row for row in runs.rows(run, "event") if row["event"] == "interrupted")
        assert (run / "checkpoints" / f"step-{row['step']:09d}" / "meta.json").exists()
        assert not job.said("Traceback")
        job.start("b")
        assert job.wait("b") == 0
    undisturbed = tmp_path / "undisturbed"
    runs.train(root, undisturbed, *training(root, undisturbed, *length)[7:], processes=2)  # by torchrun
    assert runs.repeatable(run) == runs.repeatable(undisturbed)


def own_programs(launcher):
    """Process ids of the ranks that a launcher has started, each with its own command line; not of other programs."""
    found = []
    for pid in descendants(launcher):
        with contextlib.suppress(OSError):
            command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            found += [pid] if b"train" in command and b"launch" not in command else []
    return found


def test_a_signal_to_a_rank_that_only_starts_waits_for_it(root, tmp_path):
    """It would kill a rank that has no handler for it yet: a job that grows at that moment would wait for its ranks."""
    for attempt in range(5):  # the rank must be seen early enough
        with Job(tmp_path, training(root, tmp_path / "run", "--schedule.epochs", "1000"), "1", "--cold") as job:
            process = job.start(f"a{attempt}")
            wait_for(lambda process=process: own_programs(process.pid))
            (rank,) = own_programs(process.pid)
            kill(rank, signal.SIGSTOP)
            wait_for(lambda rank=rank: state(rank, "State").startswith("T"))
            if is_in(signal.SIGTERM, state(rank, "SigCgt")):
                continue
            process.send_signal(signal.SIGTERM)
            wait_for(lambda rank=rank: is_in(signal.SIGTERM, state(rank, "ShdPnd")))
            kill(rank, signal.SIGCONT)
            assert job.wait(f"a{attempt}") == EXIT_INTERRUPTED, job.all_output()
            return
    pytest.fail("the rank had its handlers in each attempt")


def test_ranks_are_forked_with_signals_held_back_and_take_them_when_they_train(root, tmp_path):
    with Job(tmp_path, training(root, tmp_path / "run", "--schedule.epochs", "1000"), "1") as job:
        process = job.start("a")
        wait_for(lambda: runs.rows(tmp_path / "run", "train"), say=job.all_output)
        (rank,) = rank_pids(process.pid).values()
        parent = int(state(rank, "PPid"))
        for number in (signal.SIGTERM, signal.SIGUSR2):
            assert is_in(number, state(parent, "SigBlk")) and not is_in(number, state(rank, "SigBlk"))


FORK = """
import os, signal, sys
from pipeline.launch.forked import HELD_BACK, run_forked
from pipeline.launch.program import Program
signal.pthread_sigmask(signal.SIG_BLOCK, HELD_BACK)
if os.fork():
    os.wait()
else:
    run_forked(Program("", (), "shows_mask", (), sys.argv[1] == "True"), {}, "", "", 0, None)
"""


@pytest.mark.parametrize("asks", [True, False])
def test_signals_are_held_back_from_those_alone_that_ask_for_them(tmp_path, asks):
    """Other programs, and other verbs, have no handlers to wait for."""
    (tmp_path / "shows_mask.py").write_text(
        "import signal\nprint(sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])))"
    )
    environment = runs.environment()
    environment["PYTHONPATH"] = f"{tmp_path}:{environment.get('PYTHONPATH', '')}"
    command = [sys.executable, "-c", FORK, str(asks)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True)
    assert ("SIGTERM" in done.stdout, "SIGUSR2" in done.stdout) == (asks, asks), done.stderr


FORK_AGAIN = """
import os, signal, time
from multiprocessing import forkserver
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from pipeline.launch import forked, workers
from pipeline.launch.program import Program

def run():
    program, logs = Program("", (), "shows_threads"), DefaultLogsSpecs(os.devnull)
    at_work = workers.Workers(program, {0: {}}, logs, numa=1)
    while not at_work.poll():
        time.sleep(0.01)
    at_work.close()
    assert at_work.exit_codes == {0: 0}

if __name__ == "__main__":
    forked.PRELOADED[:] = ["shows_start"]
    forked.warm_up()
    run()
    os.kill(forkserver._forkserver._forkserver_pid, signal.SIGKILL)
    os.waitid(os.P_PID, forkserver._forkserver._forkserver_pid, os.WEXITED | os.WNOWAIT)
    run()
"""


def test_ranks_are_forked_again_after_the_process_to_fork_from_has_died(tmp_path):
    """From one that is like the first: with several threads it could not be forked. A rank has as many threads as cores
    that it is bound to."""
    (tmp_path / "shows_start.py").write_text(
        "import os\nfrom torch.numa import binding\n"
        "print('begun with', os.environ.get('OMP_NUM_THREADS'), flush=True)\n"
        "binding._maybe_apply_numa_binding_to_current_process = lambda **_: os.sched_setaffinity(\n"
        "    0, list(os.sched_getaffinity(0))[:1])\n"
    )
    (tmp_path / "shows_threads.py").write_text(
        "import os, torch\nprint('rank with', torch.get_num_threads(), os.environ.get('OMP_NUM_THREADS'), flush=True)"
    )
    (tmp_path / "again.py").write_text(FORK_AGAIN)
    environment = {name: value for name, value in runs.environment().items() if not name.endswith("_NUM_THREADS")}
    environment["PYTHONPATH"] = f"{tmp_path}:{Path.cwd()}"
    done = subprocess.run([sys.executable, "again.py"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout.splitlines() == ["begun with 1", "rank with 1 None"] * 2, done.stderr


def of_torch_2_11(*, gpu_index, numa_options):
    return gpu_index, numa_options


def of_later_ones(*, device_index, numa_options):
    return device_index, numa_options


@pytest.mark.parametrize("bind", [of_torch_2_11, of_later_ones])
def test_torchs_binding_is_called_as_each_version_wants_it(monkeypatch, bind):
    """torch has renamed the argument; a forked rank ended with a TypeError."""
    found = []
    real = inspect.signature(binding._maybe_apply_numa_binding_to_current_process).parameters
    assert set(real) in [set(inspect.signature(one).parameters) for one in (of_torch_2_11, of_later_ones)]
    stand_in = functools.wraps(bind)(lambda **given: found.append(bind(**given)))
    monkeypatch.setattr(binding, "_maybe_apply_numa_binding_to_current_process", stand_in)
    forked._bind(3, "node")
    assert found == [(3, "node")]


def state(pid: int, name: str) -> str:
    """A line of /proc/PID/status; empty where the process has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(f"{name}:")), "")


def is_in(number: signal.Signals, mask: str) -> bool:
    return bool(int(mask or "0", 16) >> (number - 1) & 1)


def test_a_user_error_of_training_is_one_line(root, tmp_path):
    done = launch("--nproc-per-node=3", "--max-restarts=3", *training(root, tmp_path / "run"))
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "--train.global_batch_size 20 is not divisible by the 3 ranks" in line and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--nnodes=3:2", "train"], "--nnodes 3:2"),
        (["--rdzv-backend=etcd", "train"], "--rdzv-backend etcd"),
        (["--rdzv-endpoint=host:port", "--rdzv-backend=c10d", "train"], "HOST:PORT"),
        (["--rdzv-conf=last_call_timeout", "train"], "NAME=VALUE"),
        (["--nproc-per-node=many", "train"], "--nproc-per-node many"),
        (["--virtual-local-rank", "train"], "--virtual-local-rank is not supported"),
        (["--monitor-interval=-1", "train"], "--monitor-interval -1"),
        (["--monitor-interval=nan", "train"], "--monitor-interval nan"),
        (["--monitor-interval=1e300", "train"], "at most 3600"),
        (["--rejoin-timeout=nan", "train"], "--rejoin-timeout nan"),
        (["--rdzv-conf=last_call_timeout=soon", "train"], "last_call_timeout soon"),
    ],
)
def test_impossible_options_are_named(argv, named):
    with pytest.raises(UserError, match=named):
        parse(argv)


def test_an_impossible_time_in_the_environment_is_named(monkeypatch):
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "long")
    with pytest.raises(UserError, match="TORCH_ELASTIC_SHUTDOWN_TIMEOUT long"):
        parse(["train"])
    parse(["--shutdown-timeout=5", "train"])


def test_options_as_torchrun_has_them():
    options = parse(
        [*words("--standalone --nproc_per_node 4 --max-restarts 2"), *words("-m pipeline train --config smoke")]
    )
    assert (options.nproc, options.limits.max_restarts, options.module) == (4, 2, "pipeline")
    assert options.command == ["train", "--config", "smoke"] and options.warm
    short = parse(words("--nnodes 2:4 --rdzv-backend c10d --rdzv-endpoint h:77 train --config smoke"))
    assert (short.limits.min_nodes, short.limits.max_nodes, short.host, short.port) == (2, 4, "h", 77)
    assert short.module == "pipeline"
    assert short.limits.batch_size == parse_config(["--config", "smoke"]).train.global_batch_size
    static = parse(words("--nnodes 2 --node-rank 1 --master-addr h --master-port 9 other.py --lr 1"))
    assert (static.node_rank, static.host, static.port, static.warm) == (1, "h", 9, False)


def test_options_where_torchrun_is_that_of_the_oldest_supported_torch(monkeypatch):
    """torch 2.11's torchrun has neither of the two, and a port of its own, which a second job would find taken."""
    from torch.distributed import run

    newer = ("shutdown_timeout", "log_line_prefix_template")
    present = run.get_args_parser

    def older():
        parser = present()
        for action in [action for action in parser._actions if action.dest in newer]:
            parser._handle_conflict_resolve(None, [(option, action) for option in action.option_strings])
        parser.set_defaults(master_port=29500)
        return parser

    monkeypatch.setattr(run, "get_args_parser", older)
    options = parse(words("--shutdown-timeout=90 --nproc_per_node 2 train --config smoke"))
    assert (options.shutdown_timeout_s, options.torch.log_line_prefix_template, options.port) == (90, None, 0)
    monkeypatch.setenv("PET_SHUTDOWN_TIMEOUT", "7")
    options = parse(words("--log_line_prefix_template=${rank}: train --config smoke"))
    assert (options.shutdown_timeout_s, options.torch.log_line_prefix_template) == (7, "${rank}:")


def words(text: str) -> list[str]:
    return text.split()


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A stand-in for a machine with 2 GPUs, each beside one of two NUMA nodes of four cores; and numactl."""
    nvidia_smi.install(tmp_path / "bin", monkeypatch, 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    (tmp_path / "bin/numactl").touch(mode=0o755)
    (tmp_path / "proc/driver/nvidia/gpus").mkdir(parents=True)
    for number, cores in enumerate(("0-3", "4,5-7")):
        folder = tmp_path / f"sys/devices/system/node/node{number}"
        folder.mkdir(parents=True)
        (folder / "cpulist").write_text(cores + "\n")
        device = tmp_path / f"sys/bus/pci/devices/0000:{number}7:00.0"
        device.mkdir(parents=True)
        (device / "numa_node").write_text(f"{number}\n")
    return tmp_path


def test_ranks_are_bound_only_where_torch_can(machine, monkeypatch):
    """It would end at once without numactl, and where a GPU's NUMA node has none of this job's cores."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 6})
    assert binding_problem(2, machine) is None
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    assert binding_problem(1, machine) is None
    assert "none of the cores beside GPU 00000000:17:00.0, those of NUMA node 1" in binding_problem(2, machine)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert binding_problem(2, machine) is None
    (machine / "bin/numactl").unlink()
    assert shutil.which("numactl") or "numactl is not installed" in binding_problem(1, machine)
    shutil.rmtree(machine / "sys/devices/system/node/node1")
    assert "one NUMA node" in binding_problem(1, machine)
