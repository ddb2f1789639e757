"""W&B's own variables, settings files and keys count: what they forbid is not sent, the rest goes where they say."""

import json
import os
import socket
import sys
from pathlib import Path

import pytest
import wandb
from test_wandb import history, inspect
from wandb_server import KEY, WandbServer

from pipeline.__main__ import main
from pipeline.config import RawConfig, TrackingConfig, to_yaml
from pipeline.insight.preflight.checks import check_wandb
from pipeline.tracking.wandb_settings import find_problem, plan_wandb
from pipeline.tracking.wandb_view import WandbView


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path):
    """A user without any W&B settings, in an empty folder."""
    for name in [name for name in os.environ if name.startswith("WANDB_")] + ["NETRC"]:
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def server(monkeypatch):
    running = WandbServer()
    wandb.teardown()  # its process keeps the address of the server before
    yield running
    running.stop()


def log_in(server: WandbServer) -> None:
    """What `wandb login --host URL` leaves behind: the address in the settings, the key by host and port."""
    settings = Path("~/.config/wandb/settings").expanduser()
    settings.parent.mkdir(parents=True, exist_ok=True)
    settings.write_text(f"[default]\nbase_url = {server.url}\n\n")
    netrc = Path("~/.netrc").expanduser()
    netrc.write_text(f"machine 127.0.0.1:{server.server_port}\n  login user\n  password {KEY}\n")
    netrc.chmod(0o600)


def log_three(folder: Path, config: TrackingConfig, said: list[str]) -> None:
    folder.mkdir()
    view = WandbView(config, folder, {"optim.lr": 0.1}, {}, said.append)
    for step in (1, 2, 3):
        view.log({"kind": "train", "step": step, "loss": 1 / step})
    view.close()


@pytest.mark.parametrize(
    ("option", "mode", "expected"),
    [
        ("auto", None, "online"),
        ("auto", "offline", "offline"),
        ("auto", "dryrun", "offline"),
        ("auto", "disabled", "disabled"),
        ("auto", "online", "online"),
        ("online", "offline", "offline"),
        ("online", "disabled", "disabled"),
        ("offline", "online", "offline"),
        ("offline", "disabled", "disabled"),
        ("disabled", "online", "disabled"),
    ],
)
@pytest.mark.parametrize("by", ["variable", "settings file", "workspace"])
def test_the_more_private_of_option_and_environment_counts(monkeypatch, tmp_path, option, mode, expected, by):
    """With a key present. Preflight says the same as the run does."""
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    place = Path("~/.config/wandb/settings").expanduser() if by == "settings file" else tmp_path / "wandb/settings"
    if mode and by == "variable":
        monkeypatch.setenv("WANDB_MODE", mode)
    elif mode:
        place.parent.mkdir(parents=True)
        place.write_text(f"[default]\nmode = {mode}\n")
    config = TrackingConfig(wandb=option)
    assert plan_wandb(config).mode == expected
    assert check_wandb(RawConfig(tracking=config).resolve()).text.startswith(expected)


@pytest.mark.parametrize("mode", ["offline", "disabled"])
def test_nothing_is_sent_where_the_environment_forbids_it(server, tmp_path, monkeypatch, mode):
    log_in(server)
    monkeypatch.setenv("WANDB_MODE", mode)
    said = []
    log_three(tmp_path / "run", TrackingConfig(wandb="online"), said)
    assert server.asked == []
    assert len(said) == 1 and mode in said[0] and "WANDB_MODE" in said[0]
    if mode == "disabled":
        assert not list((tmp_path / "run").iterdir())
    else:
        assert [row["_step"] for row in history(tmp_path / "run")] == [1, 2, 3]


def test_a_login_at_an_own_server_is_found(server, tmp_path):
    log_in(server)
    said = []
    log_three(tmp_path / "run", TrackingConfig(), said)
    assert server.steps() == [1, 2, 3] and not said


def test_a_key_for_another_port_is_none(server):
    log_in(server)
    netrc = Path("~/.netrc").expanduser()
    netrc.write_text(netrc.read_text().replace(str(server.server_port), "1"))
    assert not plan_wandb(TrackingConfig()).key


def test_names_come_from_the_options_then_from_the_environment(server, tmp_path, monkeypatch):
    log_in(server)
    variables = {"PROJECT": "theirs", "ENTITY": "team", "NAME": "label", "TAGS": "one,two", "RUN_ID": "abc12345"}
    for name, value in variables.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    (tmp_path / "files").mkdir()
    monkeypatch.setenv("WANDB_DIR", str(tmp_path / "files"))
    log_three(tmp_path / "run", TrackingConfig(), [])
    sent = next(text for text in server.asked if "upsertBucket" in text)
    for wanted in ('"theirs"', '"team"', '"label"', '"one"', '"two"', '"abc12345"'):
        assert wanted in sent
    assert list((tmp_path / "files/wandb").glob("run-*-abc12345"))
    assert not list((tmp_path / "run/wandb").glob("run-*"))
    server.asked.clear()
    log_three(tmp_path / "other", TrackingConfig(project="mine", entity="me", name="own"), [])
    sent = next(text for text in server.asked if "upsertBucket" in text)
    for wanted in ('"mine"', '"me"', '"own"'):
        assert wanted in sent


@pytest.mark.parametrize("kind", ["silent", "closed", "unknown name"])
def test_a_server_that_is_not_there_costs_seconds_and_one_line(tmp_path, monkeypatch, kind):
    with socket.create_server(("127.0.0.1", 0)) as listening:
        address = f"127.0.0.1:{listening.getsockname()[1]}"
        if kind == "closed":
            listening.close()
        monkeypatch.setenv(
            "WANDB_BASE_URL", "http://no-such-host.invalid" if kind == "unknown name" else f"http://{address}"
        )
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        monkeypatch.setattr(sys.modules[find_problem.__module__], "REACH_S", 0.5)
        assert find_problem(plan_wandb(TrackingConfig()))
        said = []
        # The client would wait for half a minute: it must not be asked to connect at all.
        real = wandb.init
        modes = []
        monkeypatch.setattr(wandb, "init", lambda **options: modes.append(options["mode"]) or real(**options))
        log_three(tmp_path / "run", TrackingConfig(), said)
    assert modes == ["offline"]
    assert len(said) == 1 and "continuing offline" in said[0] and "wandb sync" in said[0]


@pytest.mark.parametrize(
    ("name", "value"),
    [("MODE", "offlien"), ("SILENT", "maybe"), ("BASE_URL", "localhost:8080"), ("RUN_ID", "a/b"), ("PROJECT", "a/b")],
)
def test_a_variable_that_wandb_refuses_is_one_line_and_the_rows_are_kept(tmp_path, monkeypatch, name, value):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv(f"WANDB_{name}", value)
    said = []
    log_three(tmp_path / "run", TrackingConfig(), said)
    assert len(said) == 1 and f"offline (WANDB_{name}={value} can't be used: " in said[0]
    assert "pydantic" not in said[0] and list(tmp_path.glob("run/wandb/offline-*"))
    assert os.environ[f"WANDB_{name}"] == value


@pytest.mark.parametrize(("mode", "expected"), [("disabled", "disabled"), ("online", "offline")])
@pytest.mark.parametrize("broken", ["variable", "settings file"])
def test_what_wandb_refuses_makes_no_mode_less_private(monkeypatch, mode, expected, broken):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_MODE", mode)
    file = Path("~/.config/wandb/settings").expanduser()
    file.parent.mkdir(parents=True)
    if broken == "variable":
        monkeypatch.setenv("WANDB_INIT_TIMEOUT", "abc")
    else:
        file.write_text("[default]\nbase_url = localhost:9\n")
    plan = plan_wandb(TrackingConfig(wandb="online"))
    assert plan.mode == expected
    assert ("WANDB_MODE" if expected == "disabled" else "can't be used") in plan.why


@pytest.mark.parametrize("text", ["base_url = localhost:9", "mode = offlien", "no setting"])
def test_a_settings_file_that_wandb_refuses_lets_nothing_out(tmp_path, monkeypatch, text):
    """The client itself would go on without it, to W&B's own server."""
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    file = Path("~/.config/wandb/settings").expanduser()
    file.parent.mkdir(parents=True)
    file.write_text(f"[default]\n{text}\n")
    said = []
    log_three(tmp_path / "run", TrackingConfig(), said)
    assert len(said) == 1 and f"offline (W&B's settings can't be used: it refuses a value in {file})" in said[0]
    file.write_text("[default]\n")
    assert plan_wandb(TrackingConfig()).mode == "online"


def test_resend_makes_a_run_of_its_own_with_numbers_and_the_best_scores(tmp_path, monkeypatch, capsys):
    """Whatever W&B run the variables name; what the ledger has as words is numbers again."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(to_yaml(RawConfig(run_dir=str(run)).resolve()))
    rows = [{"kind": "train", "step": 1, "loss": "nan", "grad_norm": "inf"}]
    rows += [{"kind": "eval", "step": 1, "val_top1": 50.0, "val_ema_top1": 60.0}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "elsewhere").mkdir()
    for name, value in (("RUN_ID", "theirs"), ("RESUME", "must"), ("NAME", "mine"), ("DIR", tmp_path / "elsewhere")):
        monkeypatch.setenv(f"WANDB_{name}", str(value))
    assert main(["resend", str(run), "--mode", "offline"]) == 0
    (file,) = (tmp_path / "elsewhere/wandb").glob("offline-run-*/run-*.wandb")
    assert "theirs" not in file.name and not (run / "wandb").exists()
    records = inspect(file)
    (about,) = (record["run"] for record in records if record["type"] == "run")
    assert about["display_name"] == "mine-resent"
    assert {one["metric"]["name"] for one in records if one["type"] == "metric"} == {"val_top1", "val_ema_top1"}
    (sent,) = history(tmp_path / "elsewhere")
    assert (sent["loss"], sent["grad_norm"]) == ("NaN", "Infinity")  # what W&B writes for the numbers
    capsys.readouterr()
    assert main(["resend", str(run), "--mode", "offline", "--project", "a/b"]) == 2
    said = capsys.readouterr().err
    assert "Invalid project name" in said and "try again" not in said


def test_a_variable_set_to_nothing_is_none_and_a_mode_may_be_in_capitals(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_RUN_ID", "")
    said = []
    log_three(tmp_path / "run", TrackingConfig(), said)
    assert len(said) == 1 and "no key" in said[0] and list(tmp_path.glob("run/wandb/offline-*"))
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    for mode in ("Disabled", "OFFLINE"):
        monkeypatch.setenv("WANDB_MODE", mode)
        assert plan_wandb(TrackingConfig()).mode == mode.lower()
