"""What `preflight` finds out before a job is queued: each fault in one row, with the remedy, and exit code 2."""

import json
import re
import shutil
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from launching import free_port

from pipeline.__main__ import main
from pipeline.config import parse_config, to_yaml
from pipeline.dataset.index.index import index_folder
from pipeline.dataset.index.scan import build_index
from pipeline.errors import UserError
from pipeline.insight.estimate.memory import estimate_step
from pipeline.insight.preflight import between_nodes
from pipeline.insight.preflight.checks import check_nodes
from pipeline.insight.preflight.cli import Options, parse_time_limit, read_bench, read_nodes, run_checks
from pipeline.insight.preflight.node_facts import gather_facts
from pipeline.insight.qualify.peers import LECTURE_MIB

GIB = 1 << 10  # in MiB


@pytest.fixture(scope="module")
def data(synthetic_root, tmp_path_factory) -> Path:
    """A copy of the synthetic tree, with an index."""
    root = tmp_path_factory.mktemp("preflight") / "data"
    shutil.copytree(synthetic_root, root)
    build_index(root)
    return root


@pytest.fixture(autouse=True)
def no_slurm(monkeypatch):
    for name in ("SLURM_JOB_ID", "SLURM_JOB_NUM_NODES", "SLURM_RESTART_COUNT", "SLURM_GPUS_ON_NODE", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def preflight(data, tmp_path, capsys):
    """Run it on the smoke recipe; returns (exit code, {about: (level, text)})."""
    names = (
        "recipe",
        "versions",
        "GPUs",
        "nodes",
        "data",
        "schedule",
        "run folder",
        "disk space",
        "W&B",
        "memory",
        "time",
    )

    def call(*options: str, run_dir: Path = tmp_path / "run", root: Path = data):
        base = ["--config", "smoke", "--model.name", "resnet18", "--tracking.wandb", "disabled"]
        code = main(["preflight", *base, "--data.root", str(root), "--run_dir", str(run_dir), *options])
        rows = {}
        for line in capsys.readouterr().out.splitlines():
            about = next((name for name in names if line[6:].startswith(name)), None)
            if about is not None:
                rows[about] = (line[:5].strip(), line[6 + len(about) :].strip())
        return code, rows

    return call


def start_run(run_dir: Path, root: Path, *options: str) -> None:
    """What a run leaves in its folder: 20 steps of 0.5 s, by 2 processes."""
    run_dir.mkdir(parents=True)
    base = ["--config", "smoke", "--model.name", "resnet18", "--tracking.wandb", "disabled", "--run_dir", str(run_dir)]
    config = parse_config([*base, "--data.root", str(root), *options])
    (run_dir / "config.yaml").write_text(to_yaml(config))
    rows = [{"kind": "event", "event": "started", "step": 0, "world_size": 2}]
    for step in range(1, 21):
        rows.append({"kind": "train", "step": step, "epoch": step / 3, "images_per_s": 64.0, "data_wait_fraction": 0.0})
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_everything_odd_about_a_data_set_is_named(preflight, data, tmp_path):
    """`train` prints a line for each. The first one hid the others, and folders inside class folders were not named."""
    root = tmp_path / "nested"
    tree = data / "ILSVRC" / "Data" / "CLS-LOC"
    shutil.copytree(tree / "train", root / "train")
    shutil.copytree(tree / "train", root / "val")
    folder = min((root / "train").iterdir())
    for i, image in enumerate(sorted(folder.iterdir())):
        part = folder / f"part{i % 2}"
        part.mkdir(exist_ok=True)
        image.rename(part / image.name)
    (folder / "part0" / "broken.jpg").write_bytes(b"no image")
    build_index(root)
    code, rows = preflight("--train.global_batch_size", "128", root=root)
    level, said = rows["data"]
    assert code == 0 and level == "WARN"
    assert "1 unreadable" in said and "1 class folder with folders inside" in said and "fewer than" in said


def test_all_is_well(preflight):
    code, rows = preflight("--world_size", "4")
    assert code == 0
    assert {level for about, (level, _) in rows.items() if about != "GPUs"} == {"pass"}
    assert "96 train + 24 val images, 4 classes" in rows["data"][1]
    assert "8 each" in rows["recipe"][1]
    assert "starts at step 0" in rows["run folder"][1]


def test_it_leaves_nothing_behind(preflight, tmp_path):
    preflight()
    assert not (tmp_path / "run").exists()


def test_batch_not_divisible(preflight):
    code, rows = preflight("--world_size", "5")
    assert code == 2
    line = (
        "--train.global_batch_size 32 is not divisible by the 5 ranks; give a multiple, e.g. 35, or fewer ranks, e.g. 4"
    )
    assert rows["recipe"] == ("FAIL", line)


def test_of_several_numbers_of_processes_the_largest_that_fits_counts(preflight):
    code, rows = preflight("--world_size", "3", "--world_sizes", "1,2,3")
    assert rows["recipe"][0] == "pass" and "over 2 processes" in rows["recipe"][1]
    code, rows = preflight("--world_size", "7", "--world_sizes", "3,6,7")
    assert code == 2 and "7 ranks" in rows["recipe"][1]


def test_a_schedule_that_is_not_meant(preflight):
    """The line that `train` gives; nothing where all is well."""
    options = ("--schedule.name", "multistep", "--schedule.milestones")
    code, results = preflight(*options, "[300]")
    assert code == 0 and "none is before the end of the run" in results["schedule"][1]
    assert "schedule" not in preflight(*options, "[1]")[1]
    code, results = preflight("--schedule.begin", "90000ba")
    assert code == 2 and "--schedule.epochs" in results["schedule"][1]


def test_images_that_the_network_cannot_take(preflight):
    code, rows = preflight("--model.name", "alexnet", "--data.val_size", "32", "--data.val_resize", "32")
    assert code == 2 and rows["recipe"][0] == "FAIL" and "give at least 63" in rows["recipe"][1]
    assert "memory" not in rows and rows["data"][0] == "pass"
    code, rows = preflight("--model.name", "vgg11")  # the recipe's zero_init_residual is for ResNets
    assert code == 2 and "--model.zero_init_residual false" in rows["recipe"][1] and rows["data"][0] == "pass"


def test_typo_in_the_recipe(capsys, tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("train:\n  global_bach_size: 32\n")
    assert main(["preflight", "--config", str(recipe)]) == 2
    assert "global_bach_size" in capsys.readouterr().err


def test_no_data(preflight, tmp_path):
    code, rows = preflight(root=tmp_path / "nowhere")
    assert code == 2 and rows["data"][0] == "FAIL" and "nowhere" in rows["data"][1]


def test_no_index_is_a_warning(preflight, synthetic_root, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(synthetic_root, bare, ignore=shutil.ignore_patterns("index"))
    code, rows = preflight(root=bare)
    assert code == 0 and rows["data"][0] == "WARN" and "pipeline index" in rows["data"][1]


def test_data_that_changed_since_the_index(preflight, data, tmp_path):
    other = tmp_path / "changed"
    shutil.copytree(data, other)
    for image in (other / "ILSVRC/Data/CLS-LOC/train").rglob("*.JPEG"):
        image.write_bytes(b"x")
    code, rows = preflight(root=other)
    assert code == 2 and rows["data"][0] == "FAIL" and "other bytes" in rows["data"][1]


def test_another_recipe_in_the_run_folder(preflight, data, tmp_path):
    start_run(tmp_path / "run", data)
    code, rows = preflight("--optim.lr", "0.7")
    assert code == 2
    assert "optim.lr is 0.05 in the run folder, and 0.7 is asked for" in rows["run folder"][1]


def test_run_folder_that_cannot_be_written(preflight, tmp_path):
    (tmp_path / "file").write_text("")
    code, rows = preflight(run_dir=tmp_path / "file/run")
    assert code == 2 and rows["run folder"][0] == "FAIL"


def test_time_from_the_ledger_against_the_limit(preflight, data, tmp_path):
    start_run(tmp_path / "run", data, "--schedule.epochs", "2400")
    _, rows = preflight("--schedule.epochs", "2400", "--world_size", "2", "--time_limit", "30:00")
    assert rows["time"] == (
        "pass",
        "7,200 steps of 0.5 s: 1 h 00 min, a time limit of 30 min 00 s: 2 starts, with requeues in between",
    )
    _, rows = preflight("--schedule.epochs", "2400", "--world_size", "4", "--time_limit", "2:00:00")
    assert rows["time"][1].startswith("7,200 steps of 0.25 s: 30 min 00 s (at the speed of 2 processes)")


def test_time_from_a_bench_until_there_is_a_ledger(preflight, data, tmp_path):
    bench = tmp_path / "bench.json"
    bench.write_text(json.dumps({"images_per_s": 320.0, "world_size": 8}))
    options = ["--schedule.epochs", "2400", "--world_size", "4", "--time_limit", "30:00"]
    assert "is known once some are done" in preflight(*options)[1]["time"][1]
    _, rows = preflight(*options, "--bench", str(bench))
    assert rows["time"][1].startswith(
        "7,200 steps of 0.2 s (from --bench): 24 min 00 s (at the speed of 8 processes), a time"
    )
    start_run(tmp_path / "run", data, "--schedule.epochs", "2400")
    _, rows = preflight(*options, "--bench", str(bench))
    assert rows["time"][1].startswith("7,200 steps of 0.25 s: 30 min")
    bench.write_text("[]")
    with pytest.raises(UserError, match="not a JSON object with images_per_s"):
        read_bench(bench)


def test_memory_against_the_card(preflight):
    big = ["--model.name", "resnet152", "--data.image_size", "224", "--train.global_batch_size", "512"]
    code, rows = preflight(*big, "--gpu_memory", "24", "--world_size", "1")
    assert code == 2 and rows["memory"][0] == "FAIL"
    micro = rows["memory"][1].split("--train.micro_batch_size ")[1]
    code, rows = preflight(*big, "--gpu_memory", "24", "--world_size", "1", "--train.micro_batch_size", micro)
    assert code == 0 and rows["memory"][0] == "pass"
    step, beside = map(float, re.search(r"about ([\d.]+) GiB .*, and ([\d.]+) beside it", rows["memory"][1]).groups())
    tight = ["--gpu_memory", str(step + beside / 2), "--world_size", "1", "--train.micro_batch_size", micro]
    code, rows = preflight(*big, *tight)
    assert code == 0 and rows["memory"][0] == "WARN"  # what is beside the step is assumed


def test_memory_of_resnet152_as_published():
    """Measured on an RTX A6000 in fp32; predicted: 689.71 MiB fixed, 173.47 MiB an image."""
    config = parse_config(["--config", "resnet152-torchvision-v1", "--train.precision", "fp32"])
    step = estimate_step(config, 1000, 128)
    assert step.fixed_mib == pytest.approx(689.71, rel=0.01)
    assert step.image_mib == pytest.approx(173.47, rel=0.05)
    assert step.total_mib == pytest.approx(LECTURE_MIB[128], rel=0.05)


def test_wandb_online_without_a_key(preflight, monkeypatch, tmp_path):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    code, rows = preflight("--tracking.wandb", "online")
    assert code == 2 and rows["W&B"][0] == "FAIL"
    _, rows = preflight("--tracking.wandb", "auto")
    assert rows["W&B"][0] == "pass" and rows["W&B"][1].startswith("offline")
    (tmp_path / "netrc").write_text(f"machine api.wandb.ai login user password {'x' * 40}\n")
    _, rows = preflight("--tracking.wandb", "auto")
    assert rows["W&B"][1].startswith("online")


def test_a_cpu_that_is_slow_in_bf16(preflight, monkeypatch):
    monkeypatch.setattr("torch.ops.mkldnn._is_mkldnn_bf16_supported", lambda: False)
    code, rows = preflight("--train.device", "cpu", "--train.precision", "bf16")
    assert code == 0 and rows["GPUs"][0] == "WARN" and "--train.precision fp32" in rows["GPUs"][1]


def test_fewer_gpus_than_granted(preflight, monkeypatch):
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "99")
    code, rows = preflight()
    assert code == 2 and "Slurm granted 99" in rows["GPUs"][1]
    code, rows = preflight("--train.device", "cpu")
    assert rows["GPUs"][0] == "pass"


def test_a_time_limit_that_the_signal_swallows():
    config = parse_config(["--config", "smoke", "--model.name", "resnet18"])
    rows = run_checks(config, [], Options(time_limit="00:02:00", signal_lead=300))
    (row,) = (row for row in rows if row.name == "signal")
    assert row.level == "WARN" and "not longer than the 300 s" in row.text


def test_nodes_that_do_not_share_the_run_folder_or_do_not_reach_the_first(tmp_path, monkeypatch):
    monkeypatch.setattr(between_nodes, "TOKEN_TIMEOUT_S", 0.2)
    monkeypatch.setattr(between_nodes, "CONNECT_TIMEOUT_S", 0.2)
    assert "is not the folder that the first node (n1) sees" in between_nodes.probe_token(tmp_path, "7.0", "n1")
    (tmp_path / ".token").write_text("7.0\n")
    assert between_nodes.probe_token(tmp_path, "7.0", "n1") is None
    problem = between_nodes.probe_rendezvous("no-such-node.invalid", 29400, False, 1)
    assert "no-such-node.invalid does not resolve here" in problem and "HEAD_ADDRESS" in problem
    port = free_port()
    assert "can't connect to the head node 127.0.0.1" in between_nodes.probe_rendezvous("127.0.0.1", port, False, 1)
    with socket.create_server(("", port)):
        assert "can't be opened" in between_nodes.probe_rendezvous("n1", port, True, 1)
    with ThreadPoolExecutor() as pool:
        monkeypatch.setattr(between_nodes, "CONNECT_TIMEOUT_S", 20)
        head = pool.submit(between_nodes.probe_rendezvous, "127.0.0.1", port, True, 1)
        assert between_nodes.probe_rendezvous("127.0.0.1", port, False, 1) is None and head.result() is None


def test_what_one_node_sees_otherwise(data, tmp_path):
    config = parse_config(["--config", "smoke", "--data.root", str(data), "--run_dir", str(tmp_path)])
    first = gather_facts(config) | {"node": "n1"}
    assert check_nodes([first, first | {"node": "n2"}], 2).level == "pass"
    assert "1 of 2 nodes answered" in check_nodes([first], 2).text
    for change, text in [
        ({"data": first["data"] | {"problem": "shard /x: No such file or directory"}}, "n2: shard /x"),
        ({"data": first["data"] | {"fingerprint": "f00"}}, "n2 sees another data set"),
        ({"versions": first["versions"] | {"torch": "1.0"}}, "n2 has torch 1.0"),
        ({"run_folder": "/runs can't be written (Read-only file system)"}, "n2: /runs can't be written"),
    ]:
        finding = check_nodes([first, first | {"node": "n2"} | change], 2)
        assert finding.level == "FAIL" and text in finding.text


def test_facts_travel_as_a_line(preflight, data, tmp_path, capsys):
    main(["preflight", "--config", "smoke", "--data.root", str(data), "--node_facts"])
    line = capsys.readouterr().out
    facts = tmp_path / "facts"
    facts.write_text(f"a banner\n{line}{line}")
    code, rows = preflight("--nodes_file", str(facts))
    assert code == 0 and "2 nodes agree" in rows["nodes"][1]
    (node,) = read_nodes(facts)[:1]
    node["data"]["read_s"] = 0.25
    assert check_nodes([node], 1).text == "1 node; a few samples were read (0.25 s)"


@pytest.mark.parametrize(
    "text, seconds",
    [("30", 1800), ("30:00", 1800), ("2:00:00", 7200), ("1-00:00:00", 86400), ("1-12", 129600), ("UNLIMITED", None)],
)
def test_time_limits_as_slurm_writes_them(text, seconds):
    assert parse_time_limit(text) == seconds


def test_no_time_limit():
    with pytest.raises(UserError, match="soon"):
        parse_time_limit("soon")


def test_help_names_both_kinds_of_options(capsys):
    assert main(["preflight", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "--time_limit" in shown and "--train.global_batch_size" in shown


def test_index_elsewhere(preflight, data, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(data, tmp_path / "tree")
    shutil.move(index_folder(tmp_path / "tree"), moved)
    build_index(tmp_path / "tree", moved)
    code, rows = preflight("--data.index", str(moved), root=tmp_path / "tree")
    assert code == 0 and "96 train" in rows["data"][1]
