"""Nothing is executed or unpickled that comes from outside, and no credential gets into what is printed or kept."""

import ast
import json
import logging
import os
import subprocess
import sys
from dataclasses import replace
from html import escape
from pathlib import Path

import pytest
import torch
import wandb
from runs import call

import pipeline
from pipeline.__main__ import main
from pipeline.config import RawConfig
from pipeline.errors import UserError
from pipeline.logs import logger
from pipeline.model.weights import read_state
from pipeline.redact import MASK, redact
from pipeline.training.ranks.watchdog import Watchdog
from pipeline.training.run_folder.folder import RunFolder

HOME = Path(pipeline.__file__).parents[1]
SECRETS = {
    "WANDB_API_KEY": "5f1d7c0a9be24d3388f1c6aa0e7b42d95c3e8f01",
    "KAGGLE_KEY": "9d0e1f2a3b4c5d6e7f8091a2b3c4d5e6",
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY",
}
FORBIDDEN = {"eval", "exec", "os.system", "os.popen", "pickle.load", "pickle.loads", "yaml.load", "yaml.unsafe_load"}


def calls():
    """(file:line, name, keywords) of every call in the project's own programs."""
    for path in [*HOME.glob("pipeline/**/*.py"), *HOME.glob("benchmarks/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                keywords = {item.arg: ast.unparse(item.value) for item in node.keywords}
                yield f"{path.relative_to(HOME)}:{node.lineno}", ast.unparse(node.func), keywords


def dangerous(name: str, keywords: dict[str, str]) -> bool:
    return (
        name in FORBIDDEN
        or keywords.get("shell", "False") != "False"
        or keywords.get("allow_pickle", "False") != "False"
        or (name == "torch.load" and keywords.get("weights_only") != "True")
    )


def test_no_call_that_executes_data():
    found = list(calls())
    assert len(found) > 1000
    assert [f"{where} {name}" for where, name, keywords in found if dangerous(name, keywords)] == []


@pytest.mark.parametrize(
    "text", ["eval(x)", "torch.load(f)", "subprocess.run(c, shell=True)", "np.load(f, allow_pickle=1)"]
)
def test_a_dangerous_call_would_be_found(text):
    node = ast.parse(text).body[0].value
    assert dangerous(ast.unparse(node.func), {item.arg: ast.unparse(item.value) for item in node.keywords})


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("pwned",)


def test_a_malicious_pickle_given_as_weights_executes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": {"w": Malicious()}}, tmp_path / "weights.pth")
    with pytest.raises(UserError, match="can be read safely"):
        read_state(tmp_path / "weights.pth")
    assert not (tmp_path / "pwned").exists()


def test_credentials_are_hidden(monkeypatch):
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    text = (
        f"could not reach https://me:hunter2hunter@host/x with {SECRETS['KAGGLE_KEY']}; AKIAIOSFODNN7EXAMPLE; epoch 3"
    )
    assert redact(text) == f"could not reach https://{MASK}@host/x with {MASK}; {MASK}; epoch 3"


@pytest.mark.parametrize(
    "secret",
    ["ASIAIOSFODNN7EXAMPLE", "wandb_v1_" + "aB3" * 20, "github_pat_" + "11ABCDEFG0" * 5, "hf_" + "aBcDeFgHiJ" * 4],
)
def test_well_known_keys_are_hidden_wherever_they_come_from(secret):
    assert redact(f"refused: {secret}, step 3") == f"refused: {MASK}, step 3"


def test_no_handler_of_the_logger_gets_a_credential(secrets, caplog):
    for words, *values in ((secrets,), ("%s, step %d", secrets, 3)):
        logger.warning(words, *values)
    logger.warning("%d steps by " + secrets, "many")  # a mistake of ours is no reason to end a run
    try:
        raise ValueError(secrets)
    except ValueError:
        logger.exception("failed")
    text = "".join(logging.Formatter().format(record) for record in caplog.records)
    assert text.count("could not reach") == 4 and "step 3" in text and "Traceback" in text and leaks(text) == []


def test_a_signed_address_is_hidden():
    text = "GET https://host/a.zip?GoogleAccessId=web&X-Goog-Signature=3fa9c0&part=2 said 403"
    assert redact(text) == f"GET https://host/a.zip?GoogleAccessId=web&X-Goog-Signature={MASK}&part=2 said 403"


@pytest.fixture
def secrets(monkeypatch):
    """Real-looking keys in the environment, and a text that quotes them as exceptions do."""
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    return "could not reach https://me:hunter2hunter@host/x?token=abcdef12 with " + " & ".join(SECRETS.values())


def leaks(data: bytes | str) -> list[str]:
    """What of `secrets` is in a text, or in a page."""
    text = data if isinstance(data, str) else data.decode(errors="replace")
    values = [*SECRETS.values(), "hunter2hunter", "abcdef12"]
    return [value for value in values if value in text or escape(value) in text]


def test_the_watch_shows_and_leaves_no_credential(secrets, capsys, tmp_path):
    store = torch.distributed.HashStore()
    watch = Watchdog(0, 2, store=store)
    watch.folder, watch.detail = tmp_path / "debug", lambda: secrets
    watch.phase("waiting for images", 3, limit_s=1000)
    watch._say_if_long(replace(watch._here(), age_s=99.0))
    watch._report(f"{secrets}; it counts as hung", own=True)  # leaves the stacks of all threads, this one's too
    told = capsys.readouterr().err
    assert told.count("could not reach") == 2 and told.count(MASK) >= 8 and leaks(told) == []
    assert b"has ended: could not reach" in store.get("gone") and leaks(store.get("gone")) == []
    kept = [path.read_bytes() for path in watch.folder.iterdir()]
    assert any(b"test_security.py" in data for data in kept) and [leaks(data) for data in kept if leaks(data)] == []


def test_the_report_page_shows_no_credential(secrets, tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.checkpoints.mkdir(parents=True)
    folder.save_config(RawConfig(run_dir=str(folder.path), about={"source": secrets}).resolve())
    rows = [{"kind": "event", "event": "interrupted", "step": 0, "time": 0, "reason": secrets}]
    rows += [{"kind": "train", "step": 1, "epoch": 0.1, "loss": 1.0, "lr": 0.1, "images_per_s": 9.0}]
    folder.ledger.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["report", str(folder.path)]) == 0
    html = (folder.path / "report/index.html").read_text()
    assert "could not reach" in html and MASK in html and leaks(html) == []
    assert "could not reach" in folder.config.read_text() and leaks(folder.config.read_text()) == []


def test_a_program_that_breaks_shows_no_credential(secrets, tmp_path):
    """What nobody foresaw is a traceback: of the verb, and of a thread."""
    (tmp_path / "breaks.py").write_text(
        "import os, threading\n"
        "def fail():\n    raise ZeroDivisionError(os.environ['TEXT'])\n"
        "def main(argv):\n    thread = threading.Thread(target=fail)\n    thread.start()\n"
        "    thread.join()\n    fail()\n"
    )
    program = "from pipeline import __main__ as m; m.VERBS['x'] = ('breaks', 'main', ''); m.run()"
    places = os.pathsep.join([str(HOME), str(tmp_path)])
    done = subprocess.run(
        [sys.executable, "-c", program, "x"],
        env=os.environ | {"TEXT": secrets, "PYTHONPATH": places},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and done.stderr.count("ZeroDivisionError: could not reach") == 2, done.stderr
    assert leaks(done.stdout + done.stderr) == []


def test_a_run_keeps_no_credential_and_minds_the_umask(synthetic_root, tmp_path, monkeypatch):
    """Every file of a run with its report and W&B's files."""
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    before = os.umask(0o027)
    try:
        options = ["--train.max_steps", "2", "--tracking.report", "true", "--tracking.wandb", "offline"]
        printed = call(synthetic_root, tmp_path / "run", *options)
    finally:
        os.umask(before)
        wandb.teardown()
    paths = [path for path in (tmp_path / "run").rglob("*") if not path.is_symlink()]
    names = {path.name for path in paths}
    assert {"metrics.jsonl", "config.yaml", "finished", "model.pt", "index.html"} <= names
    assert [str(path) for path in paths if path.stat().st_mode & 0o027] == []
    kept = {str(path): path.read_bytes() for path in paths if path.is_file()} | {"printed": printed.encode()}
    assert [where for where, data in kept.items() for value in SECRETS.values() if value.encode() in data] == []
