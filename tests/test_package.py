"""The package as it is published: what the wheel holds, and what the repository says of itself."""

import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pipeline

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
