"""The package as it is published: what the wheel holds, and what the repository says of itself."""

import ast
import os
import re
import subprocess
import sys
import tomllib
import warnings
import zipfile
from pathlib import Path

import pytest
import runs

import pipeline
from pipeline.__main__ import main
from pipeline.files import keep_to_own_package

ROOT = Path(__file__).parents[1]


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_wheel_holds_code_recipes_types_and_license(tmp_path: Path) -> None:
    """The wheel has everything a user needs, and nothing that belongs to the repository alone."""
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "pipeline"):
        (source / name).symlink_to(ROOT / name)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", str(source)]
    subprocess.run([*command, "-w", str(tmp_path)], check=True, cwd=tmp_path, timeout=120)
    (wheel,) = tmp_path.glob("imagenet_pipeline-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    code = {str(p.relative_to(ROOT)) for p in (ROOT / "pipeline").rglob("*.py")}
    recipes = {str(p.relative_to(ROOT)) for p in (ROOT / "pipeline/recipes").glob("*.yaml")}
    assert code | recipes | {"pipeline/py.typed"} <= names
    rest = names - code - recipes - {"pipeline/py.typed"}
    assert all(".dist-info/" in name for name in rest), rest
    assert any(name.endswith("LICENSE") for name in rest)


@pytest.mark.parametrize("verb", ["train", "launch", "preflight", "fetch", "index"])
def test_a_python_that_it_was_not_installed_for_is_one_line(verb: str) -> None:
    """As where a batch job finds the system's, here one without site-packages."""
    command = [sys.executable, "-S", "-m", "pipeline", verb, "--config", "smoke"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60, check=False)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert f"pipeline {verb}: {sys.executable} has no module " in done.stderr and "give PYTHON" in done.stderr


def test_an_older_python_is_one_line(tmp_path: Path) -> None:
    source = (ROOT / "pipeline/__init__.py").read_text()
    ast.parse(source, feature_version=(3, 7))
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.version_info = (3, 9, 2, 'final', 0)\n")
    env = {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    command = [sys.executable, "-m", "pipeline", "preflight"]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path, timeout=60, check=False)
    assert done.returncode and len(done.stderr.splitlines()) == 1, done.stderr
    assert f"needs Python 3.11 or newer, and {sys.executable} is 3.9.2" in done.stderr


@pytest.fixture
def beside_another(tmp_path, monkeypatch):
    """A folder of the user's with a package `pipeline`, and a script there as pip makes it for the command."""
    (tmp_path / "bin").mkdir()
    command = tmp_path / "bin" / "pipeline"
    command.write_text("from pipeline.__main__ import run\n\nif __name__ == '__main__':\n    run()\n")
    (tmp_path / "pipeline").mkdir()
    for name in ("__init__.py", "__main__.py"):
        (tmp_path / "pipeline" / name).write_text("raise SystemExit('the other package')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    return command


@pytest.mark.parametrize("start", [[], ["--cold"]])
def test_ranks_are_this_package_beside_another_of_its_name(beside_another, start):
    command = [
        sys.executable,
        str(beside_another),
        "launch",
        *start,
        "--nproc-per-node=1",
        "train",
        "--train.seed",
        "x",
    ]
    done = subprocess.run(command, env=runs.environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "pipeline train: " in done.stderr and "train.seed" in done.stderr, done.stderr


def test_where_python_looks_for_this_package(beside_another, tmp_path, monkeypatch):
    keep_to_own_package()
    assert os.environ.pop("PYTHONSAFEPATH") == "1"
    for folder in (ROOT, tmp_path / "bin"):
        monkeypatch.chdir(folder)
        keep_to_own_package()
        assert "PYTHONSAFEPATH" not in os.environ


def test_no_function_of_jsonargparse_is_called_that_its_next_version_lacks(monkeypatch):
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "all")
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)
        assert main(["recipes"]) == 0


def test_one_version() -> None:
    assert project()["version"] == pipeline.__version__


def test_classifiers_name_the_versions_of_python_that_the_scripts_look_for() -> None:
    (candidates,) = re.findall(r"for candidate in (.*); do", (ROOT / "scripts/env.sh").read_text())
    named = re.findall(r"Python :: (3\.\d+)", " ".join(project()["classifiers"]))
    assert named == sorted(re.findall(r"python(3\.\d+)", candidates))
    assert project()["requires-python"] == f">={named[0]}"


def test_each_constraint_once() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    names = [line.split("==")[0].lower().replace("_", "-") for line in lines if not line.startswith("#")]
    assert len(names) == len(set(names))


def test_every_benchmark_can_be_started():
    """What it imports is there, under that name."""
    program = "import runpy, sys; [runpy.run_path(path, run_name='benchmark') for path in sys.argv[1:]]"
    scripts = sorted(str(path) for path in (ROOT / "benchmarks").glob("*.py"))
    done = subprocess.run([sys.executable, "-c", program, *scripts], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
