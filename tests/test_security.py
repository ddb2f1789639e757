"""Nothing is executed or unpickled that comes from outside, and no credential gets into what is printed or kept."""

import ast
import os
from pathlib import Path

import pytest
import torch
import wandb
from runs import call

import pipeline
from pipeline.errors import UserError
from pipeline.model.weights import read_state
from pipeline.redact import MASK, redact

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
