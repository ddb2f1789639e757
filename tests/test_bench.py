"""Benches: candidates take turns and are compared, a run's bottleneck is named, results are written as JSON."""

import fcntl
import json
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import runs
import torch

from pipeline.__main__ import main
from pipeline.config import load_config
from pipeline.dataset.index.scan import build_index
from pipeline.errors import TransientError
from pipeline.insight.bench import train as bench_train
from pipeline.insight.bench.interleaved import Candidate, Spread, Unavailable, ratios, run_interleaved
from pipeline.insight.preflight.cli import read_bench
from pipeline.training.profile import Profiler


def burn(millions: int, log: str):
    def one_round() -> int:
        with open(log, "a") as file:  # noqa: PTH123
            file.write(f"{millions}\n")
        sum(range(millions * 1_000_000))
        return 10

    return one_round


def not_here():
    raise Unavailable("no such thing on this machine")


def crash():
    return lambda: os._exit(9)


def test_candidates_take_turns_and_are_compared(tmp_path):
    log = tmp_path / "turns"
    candidates = [
        Candidate("one", burn, {"millions": 2, "log": str(log)}),
        Candidate("four", burn, {"millions": 8, "log": str(log)}),
        Candidate("absent", not_here),
        Candidate("crashing", crash, may_crash=True),
    ]
    measured = run_interleaved(candidates, rounds=3, warm_up=1)
    assert log.read_text().split() == ["2", "8"] * 4
    assert measured["absent"].unavailable == "no such thing on this machine" and "9" in measured["crashing"].unavailable
    assert len(measured["one"].cpu_ms) == len(measured["one"].wall_ms) == 3
    assert 2.5 < ratios(measured, "one", "four").median < 6.5
    assert ratios(measured, "one", "absent") is None


def be_alone(marker: str):
    file = open(marker, "a")  # noqa: PTH123, SIM115 # locked until the process ends
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return lambda: 1 + file.fileno()


def test_candidates_that_fill_a_gpu_are_never_there_together(tmp_path):
    marker = {"marker": str(tmp_path / "here")}
    candidates = [Candidate(name, be_alone, marker) for name in ("one", "other")]
    assert list(run_interleaved(candidates, rounds=2, alone=True)) == ["one", "other"]
    with pytest.raises(TransientError, match="BlockingIOError"):
        run_interleaved(candidates, rounds=2)


def test_a_candidate_that_must_not_crash_ends_the_bench():
    with pytest.raises(TransientError, match="crashing failed"):
        run_interleaved([Candidate("crashing", crash)], rounds=1)


@pytest.mark.parametrize(
    ("seconds", "data_wait_fraction", "verdict"),
    [
        ({"run": 1.0, "compute": 0.99, "compute, exchange": 0.99}, 0.0, "compute is the bottleneck"),
        ({"run": 1.0, "compute": 0.7, "compute, exchange": 0.98}, 0.0, "communication is the bottleneck"),
        ({"run": 1.0, "compute": 0.6, "compute, exchange": 0.62}, 0.37, "data is the bottleneck"),
        ({"run": 1.0, "compute": 0.8, "compute, exchange": 0.82}, 0.01, "records is the bottleneck"),
        ({"run": 1.0, "compute": 0.98, "save": 30.0}, 0.01, "checkpointing is the bottleneck"),
    ],
)
def test_the_verdict_names_the_bottleneck(seconds, data_wait_fraction, verdict):
    spreads = {name: Spread.of([value]) for name, value in ({"loader": 0.5, "save": 0.0} | seconds).items()}
    world = SimpleNamespace(size=2, device=SimpleNamespace(type="cpu"))
    result = bench_train.find_bottleneck(
        load_config(runs.TINY), world, spreads, data_wait_fraction, save_every_minutes=5
    )
    assert result["verdict"].startswith(verdict)
    assert result["images_per_s"] == 20 and result["loader_images_per_s"] == 40


def test_a_run_is_measured_and_preflight_reads_the_result(synthetic_root, tmp_path, capsys):
    build_index(synthetic_root)
    path = tmp_path / "train.json"
    own = ["--steps", "1", "--rounds", "1", "--json", str(path), "--train.device", "cpu"]
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert main(["bench", "train", "--config", str(runs.TINY), "--data.root", str(synthetic_root), *own]) == 0
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]  # Ctrl-C ends a bench
    page = json.loads(path.read_text())
    assert set(page["result"]["seconds"]) == {"loader", "compute", "run", "save", "background write"}
    assert page["result"]["verdict"] in capsys.readouterr().out
    assert "bench train" in page["command"] and page["machine"]["versions"]["torch"]
    assert read_bench(path) == (page["result"]["images_per_s"], 1)


def test_two_ranks_are_measured_under_torchrun(synthetic_root, tmp_path):
    build_index(synthetic_root)
    path = tmp_path / "train.json"
    bench = ["bench", "train", "--config", str(runs.TINY), "--data.root", str(synthetic_root), "--steps", "1"]
    launch = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    command = [sys.executable, *launch, "-m", "pipeline", *bench, "--rounds", "1", "--json", str(path)]
    subprocess.run(command, env=runs.environment(), check=True, timeout=200)
    result = json.loads(path.read_text())["result"]
    assert result["world_size"] == 2 and result["seconds"]["compute, exchange"]["median"] > 0
    assert result["shares"].keys() == {"compute", "communication", "data", "records", "checkpointing"}


def test_a_bad_bench_command_is_one_line(tmp_path, capsys):
    assert main(["bench", "speed"]) == 2
    assert main(["bench", "loader", str(tmp_path)]) == 2
    assert main(["bench", "loader", str(tmp_path), "--threads", "100000"]) == 2
    assert main(["bench", "io", str(tmp_path), "--threads", "x"]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 4 and "has no index" in lines[1] and "--threads is 100000" in lines[2]


def test_some_steps_are_profiled(synthetic_root, tmp_path):
    import gzip

    build_index(synthetic_root)
    printed = runs.call(synthetic_root, tmp_path / "run", "--train.profile_steps", "2", "--train.max_steps", "6")
    (trace,) = (tmp_path / "run" / "profile").iterdir()
    assert str(trace) in printed
    names = [event.get("name", "") for event in json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]]
    assert len({name for name in names if name.startswith("ProfilerStep")}) == 2
    assert any("convolution_backward" in name for name in names)


def test_a_start_with_too_few_steps_for_a_profile_says_so(tmp_path):
    said = []
    profiler = Profiler(2, tmp_path, SimpleNamespace(device=torch.device("cpu")), said.append)
    assert profiler.step(1)
    profiler.close()
    assert said == ["no profile: this start ended 4 steps too early; lower --train.profile_steps"]


def test_the_share_of_an_exchange_that_overlaps(tmp_path, capsys):
    def event(name, kind, start, end):
        return {"ph": "X", "name": name, "cat": kind, "ts": start, "dur": end - start}

    kernels = [("gemm", 0, 100), ("gemm", 50, 120), ("ncclDevKernel_AllReduce", 80, 160), ("gemm", 150, 155)]
    trace = tmp_path / "trace.json"
    trace.write_text(json.dumps({"traceEvents": [event(name, "kernel", *at) for name, *at in kernels]}))
    assert main(["bench", "overlap", str(trace), "--json", str(tmp_path / "o.json")]) == 0
    written = json.loads((tmp_path / "o.json").read_text())
    assert written["command"] == f"python -m pipeline bench overlap {trace}"  # not where the result went
    result = written["result"]
    assert result == {"exchange_ms": 0.08, "computing_ms": 0.125, "hidden_share": pytest.approx(45 / 80)}
    trace.write_text("{}")
    assert main(["bench", "overlap", str(trace)]) == 2


@pytest.mark.slow
def test_the_loaders_variants_are_measured(synthetic_root, tmp_path):
    build_index(synthetic_root)
    path = tmp_path / "loader.json"
    options = ["--size", "32", "--batch_size", "4", "--images", "8", "--rounds", "1", "--threads", "1"]
    assert main(["bench", "loader", str(synthetic_root), *options, "--json", str(path)]) == 0
    training, validation = (
        json.loads(path.read_text())["result"]["splits"][name] for name in ("training", "validation")
    )
    assert set(training["measured"]) == {"DALI", "DALI, crops only", "reference", "PIL decode alone"}
    assert all(
        one["cpu_ms"]["median"] > 0 for one in [*training["measured"].values(), *validation["measured"].values()]
    )
    assert validation["cpu_ratios"].keys() == {"reference / DALI"}


@pytest.mark.parametrize("script", ["loaders.py", "gpu_decoders.py", "startup.py", "restart.py"])
def test_the_scripts_beside_the_package_start(script):
    path = Path(__file__).parent.parent / "benchmarks" / script
    done = subprocess.run([sys.executable, path, "--help"], env=runs.environment(), capture_output=True, text=True)
    assert done.returncode == 0 and f"python benchmarks/{script}" in done.stdout, done.stderr


def test_goals_of_restart_markers_are_judged_by_interval_and_a_missing_loader_is_named():
    home = Path(__file__).parent.parent
    made = runpy.run_path(str(home / "benchmarks/restart.py"))
    result = json.loads((home / "benchmarks/restart.json").read_text())["result"]
    page = (home / "docs/performance.md").read_text()
    for name in ("restart", "restart-second", "restart-all"):
        one = json.loads((home / f"benchmarks/{name}.json").read_text())["result"]
        assert made["goals_table"](one) in page, name  # restart.py --table FILE
    assert made["table"](one) in page
    rows = made["table"](one).splitlines()[2:]
    assert "\n".join(rows) in (home / "README.md").read_text()
    assert result["goals"] == made["goals"](result)
    what = "validation, torchvision.io / restart"
    reached = {name: goals[what]["reached"] for name, goals in result["goals"].items()}
    assert reached == {name: goals[what]["found"] >= 1.15 for name, goals in result["goals"].items()}
    val = result["splits"]["val"]
    val["measured"]["torchvision.io"] = {"unavailable": "no libjpeg"}
    val["cpu_ratios"] = {name: one for name, one in val["cpu_ratios"].items() if "torchvision.io" not in name}
    assert made["goals"](result)["ours, restart ~8"][what] == {"goal": 1.15, "missing": "torchvision.io: no libjpeg"}
    row = next(line for line in made["table"](result).splitlines() if line.startswith("| torchvision.io"))
    assert row.endswith("| no libjpeg |")
    assert "| torchvision.io: no libjpeg |" in made["goals_table"](result)
