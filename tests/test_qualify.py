"""`pipeline qualify`: on a CPU its parts run and are judged; a crash or a hang of a part is a row."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import nvidia_smi
import pytest
from launching import kill, rank_pids, wait_for

from pipeline.__main__ import main
from pipeline.errors import EXIT_INTERRUPTED, UserError
from pipeline.insight.chaos import cli as chaos
from pipeline.insight.preflight import qualified
from pipeline.insight.qualify import cli, network, speed
from pipeline.insight.qualify import node as node_part
from pipeline.insight.qualify.page import render
from pipeline.insight.qualify.parts import PARTS, Part
from pipeline.insight.qualify.rows import Settings


@pytest.fixture(autouse=True)
def outside_a_job(monkeypatch):
    for name in ("SLURMD_NODENAME", "CUDA_VISIBLE_DEVICES", "SLURM_GPUS_ON_NODE"):
        monkeypatch.delenv(name, raising=False)


def qualify(tmp_path: Path, *options: str) -> tuple[int, dict]:
    code = main(["qualify", "--device", "cpu", "--out", str(tmp_path / "q"), *options])
    return code, json.loads((tmp_path / "q/qualify.json").read_text())


def verdicts(found: dict, part: str) -> dict[str, str]:
    return {row["what"]: row["verdict"] for row in found["parts"][part]}


def test_a_node_without_a_gpu(tmp_path, capsys):
    minutes = "30"  # numerics get 18 % of it, and take two minutes on a busy CPU without instructions for bf16
    code, found = qualify(tmp_path, "--minutes", minutes, "--parts", "node,numerics,pixels")
    assert code == 0 and found["failed"] == 0 and found["device"] == "cpu"
    assert verdicts(found, "numerics") == {
        "float64 on the CPU": "info",
        **{f"{precision}, {way}": "pass" for precision in ("fp32", "bf16") for way in ("eager", "DDP of one")},
    }
    assert verdicts(found, "node")["open files"] in ("pass", "FAIL")
    assert verdicts(found, "pixels")["augmentation on the GPU"] == "skipped"
    page = (tmp_path / "q/index.html").read_text()
    assert "bf16, DDP of one" in page and "<script" not in page
    assert "pass    fp32, eager" in capsys.readouterr().out  # said as it goes


def test_a_node_whose_gpus_are_broken_does_not_qualify_as_one_without(tmp_path, monkeypatch):
    says = "Failed to initialize NVML: Driver/library version mismatch"
    nvidia_smi.install_broken(tmp_path / "bin", monkeypatch, says, 18)
    monkeypatch.setattr("pipeline.gpu_facts.cuda_builds", lambda: {"torch": "13.2"})
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "8")
    with pytest.raises(UserError, match=r"Slurm granted 8.*version mismatch"):
        cli.main(["--out", str(tmp_path / "q")])
    assert not (tmp_path / "q").exists()


def test_a_node_that_has_lost_a_gpu_fails(tmp_path, monkeypatch):
    nvidia_smi.install(tmp_path / "bin", monkeypatch, 7)
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "8")
    rows = {row.what: row for row in node_part.node(Settings("cuda", 7, "", tmp_path, 60))}
    assert rows["GPUs by Slurm"].verdict == "FAIL" and rows["GPUs by Slurm"].value == "7 of 8 granted"
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "7")
    rows = {row.what: row for row in node_part.node(Settings("cuda", 7, "", tmp_path, 60))}
    assert rows["GPUs by Slurm"].verdict == "pass"


@pytest.mark.long
def test_runs_that_are_repeated_killed_and_resumed(tmp_path):
    code, found = qualify(tmp_path, "--minutes", "10", "--parts", "repeat and resume,checkpoints")
    rows = found["parts"]["repeat and resume"]
    assert code == 0 and [row["verdict"] for row in rows] == ["pass"] * 3, rows
    assert len(found["parts"]["checkpoints"]) == 2


CRASHING = """
import os, signal, time
from pipeline.insight.qualify.rows import Row
def crash(settings):
    yield Row("before", "1")
    os.kill(os.getpid(), signal.SIGSEGV)
def hang(settings):
    yield Row("before", "1")
    time.sleep(600)
def broken(settings):
    yield Row("before", "1")
    raise ValueError("no such kernel <image>")
"""


@pytest.fixture
def run_bad(tmp_path, monkeypatch):
    """Run a part of `CRASHING`, whose module is put into the package's path of the child."""
    package = tmp_path / "site/pipeline_qualify_bad"
    package.mkdir(parents=True)
    (package / "sitecustomize.py").write_text(
        "import pipeline.insight.qualify as package, pipeline.insight.qualify.parts as parts\n"
        f"package.__path__.append({str(package)!r})\n"
        "parts.PARTS += tuple(parts.Part(name, 'bad.' + name, 0.1) for name in ('crash', 'hang', 'broken'))\n"
    )
    (package / "bad.py").write_text(CRASHING)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(package), os.environ.get("PYTHONPATH", ""), str(Path.cwd())]))

    def run(name: str, seconds: float = 60.0, cut: bool = False):
        scratch = tmp_path / name
        scratch.mkdir()
        return cli.run_part(Part(name, f"bad.{name}", 0.1), Settings("cpu", 0, "", scratch, seconds), cut)

    return run


def test_a_crash_a_hang_and_an_error_are_rows(run_bad):
    before, crash = run_bad("crash")
    assert before.what == "before" and crash.verdict == "FAIL" and f"signal {signal.SIGSEGV.value}" in crash.value
    before, error = run_bad("broken")
    assert before.what == "before" and error.verdict == "FAIL" and "no such kernel" in error.value
    before, hang = run_bad("hang", 6.0)
    assert before.what == "before" and hang.verdict == "FAIL" and "not done within 6 s" in hang.value


@pytest.mark.parametrize(
    ("module", "function", "command"), [(cli, "run_parts", ["qualify"]), (chaos, "run_trial", ["chaos", "{}/new"])]
)
def test_sigterm_ends_what_was_started_too(tmp_path, monkeypatch, module, function, command):
    """As `timeout` and schedulers send it: a part of qualify, or the job of chaos, went on alone, on the GPUs."""
    ended = []

    def run(*_):
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            ended.append(True)

    monkeypatch.setattr(module, function, run)
    options = [option.format(tmp_path) for option in command]
    assert main([*options, "--device", "cpu"]) == EXIT_INTERRUPTED and ended


def command_of(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def test_ranks_of_the_network_part_end_with_their_launcher(tmp_path):
    """Those that hang in NCCL kept their GPUs, and the parts after it found them taken."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    launcher = subprocess.Popen([*command, "-m", "pipeline.insight.qualify.network", "cpu", str(tmp_path / "found")])
    try:
        wait_for(lambda: len(rank_pids(launcher.pid)) == 2 or launcher.poll() is not None)
        ranks = list(rank_pids(launcher.pid).values())
        for pid in ranks:
            kill(pid, signal.SIGSTOP)
    finally:
        launcher.kill()
        launcher.wait()
    assert len(ranks) == 2
    wait_for(lambda: not any(command_of(pid) for pid in ranks), 30)


def test_shared_memory_is_asked_for_where_nccl_needs_it(tmp_path, monkeypatch):
    """A container has 64 MB by default."""
    monkeypatch.setattr(node_part.shutil, "disk_usage", lambda _: SimpleNamespace(free=64 << 20))
    found = {}
    for gpus in (0, 1, 2):
        rows = {row.what: row for row in node_part.node(Settings("cpu", gpus, "", tmp_path, 60))}
        found[gpus] = rows["/dev/shm"].verdict
    assert found == {0: "info", 1: "info", 2: "FAIL"}


def test_a_failure_is_the_exit_code_and_stands_on_the_page(tmp_path, monkeypatch):
    nvidia_smi.install(tmp_path / "bin", monkeypatch, 2, driver_version="470.82.01")
    code, found = qualify(tmp_path, "--parts", "node")
    assert code == 2 and verdicts(found, "node")["driver"] == "FAIL" and found["gpus"] == 2
    assert "not qualified" in (tmp_path / "q/index.html").read_text()


def test_each_node_of_a_job_has_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURMD_NODENAME", "n17")
    assert main(["qualify", "--device", "cpu", "--out", str(tmp_path), "--parts", "node"]) in (0, 2)
    assert json.loads((tmp_path / "n17/qualify.json").read_text())["node"] == "n17"


def test_what_is_found_is_escaped():
    content = {"node": "<b>", "device": "cpu", "gpus": 0, "failed": 1, "seconds": 1.0, "time": "now"}
    content["parts"] = {"a": [{"what": "<i>", "value": "<script>", "bound": "", "verdict": "FAIL"}]}
    page = render(content)
    assert "<script>" not in page and "&lt;script&gt;" in page and "<b>:" not in page


def test_the_loader_and_idle_time_of_a_gpu_are_judged():
    result = {"images_per_s": 900.0, "verdict": "", "loader_images_per_s": 1250.0, "step_images_per_s": 1000.0}
    rows = list(speed.judge_training({**result, "shares": {"data": 0.02}}, on_gpu=True))
    assert [row.verdict for row in rows] == ["info", "FAIL", "pass"]
    rows = list(speed.judge_training({**result, "loader_images_per_s": 1310.0, "shares": {"data": 0.04}}, on_gpu=True))
    assert [row.verdict for row in rows] == ["info", "pass", "FAIL"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--minutes", "0"], ["--minutes 0"]),
        (["--data.root", "/nowhere/at/all"], ["/nowhere/at/all", "no such folder"]),
        (["--parts", "numeric"], ["--parts numeric", "numerics"]),
        (["--device", "tpu"], ["--device tpu"]),
        (["--whatever"], ["--whatever"]),
    ],
)
def test_bad_options_are_one_line(capsys, options, words):
    assert main(["qualify", *options]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and all(word in said for word in words), said


def test_the_time_is_shared_out():
    assert sum(part.share for part in PARTS) == pytest.approx(1.0)


def test_the_link_the_peers_and_the_overlap_on_a_cpu(tmp_path):
    code, found = qualify(tmp_path, "--minutes", "6", "--parts", "network,overlap,peers,lecture")
    assert code == 0, found["parts"]
    small, large, step = found["parts"]["network"]
    assert "1 MiB" in small["what"] and small["rate"] > 0 and large["rate"] > 0
    assert step["what"] == "step with 2 processes on the CPU"
    (overlap,) = found["parts"]["overlap"]
    assert "beside computing" in overlap["value"]
    rows = found["parts"]["peers"]
    assert rows[-1]["verdict"] == "info" and any("torchvision" in row["what"] for row in rows)
    assert [row["verdict"] for row in found["parts"]["lecture"]] == ["skipped"]


def test_bus_bandwidth_is_counted_as_nccls_tests_count_it():
    assert network.bus_gb_s(10**9, 0.01, 8) == pytest.approx(175.0)
    assert network.bus_gb_s(10**9, 0.01, 2) == pytest.approx(100.0)


def node(folder: Path, name: str, speed: float, verdict: str = "pass") -> None:
    """What qualify writes for a node."""
    (folder / name).mkdir()
    row = {"what": "GPU 3: bf16 product", "value": f"{speed} TFLOP/s", "bound": "", "verdict": verdict, "rate": speed}
    content = {"node": name, "parts": {"ceilings": [row, {**row, "what": "other", "rate": None}]}}
    (folder / name / "qualify.json").write_text(json.dumps(content))


def test_preflight_names_the_node_that_is_slow_or_failed(tmp_path):
    for name, rate in (("n1", 700.0), ("n2", 560.0), ("n3", 690.0)):
        node(tmp_path, name, rate)
    found = qualified.read_qualified(tmp_path)
    result = qualified.check_qualified(found, ["n1", "n2", "n3"])
    assert result.level == "WARN" and "n2 is slow: ceilings, GPU 3: bf16 product 560.0, the median 690.0" in result.text
    result = qualified.check_qualified([found[0], found[2]], ["n1", "n3"])
    assert result.level == "pass" and "2 nodes" in result.text
    assert "n4 not qualified yet" in qualified.check_qualified([found[0], found[2]], ["n1", "n3", "n4"]).text
    node(tmp_path, "n5", 700.0, "FAIL")
    found = qualified.read_qualified(tmp_path)
    assert qualified.check_qualified(found, ["n1", "n3"]).level == "pass"  # others are not the job's
    alone = qualified.check_qualified(found, ["n3"])
    assert alone.level == "pass" and alone.text == "n3; there is no other to compare it with"
    result = qualified.check_qualified(found, [])
    assert result.level == "FAIL" and "n5 failed: GPU 3: bf16 product: 700.0 TFLOP/s" in result.text
    (tmp_path / "n1/qualify.json").write_text("[1]")
    with pytest.raises(UserError, match=r"n1/qualify.json is not a result of pipeline qualify"):
        qualified.read_qualified(tmp_path)
    with pytest.raises(UserError, match=r"holds no qualify.json; on all nodes run: srun pipeline qualify"):
        qualified.read_qualified(tmp_path / "none")


def test_preflight_reads_what_qualify_writes(tmp_path, capsys):
    assert main(["qualify", "--device", "cpu", "--parts", "ceilings", "--out", str(tmp_path / "q")]) == 0
    main(["preflight", "--qualified", str(tmp_path / "q"), "--model.name", "resnet18", "--train.device", "cpu"])
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.split()[1:2] == ["qualified"])
    assert line.startswith("pass")
