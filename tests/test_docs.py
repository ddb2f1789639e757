"""What README and docs say of the code is true, and their links lead somewhere."""

import ast
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.config import RawConfig, parse_config, semantic_config
from pipeline.run_paths import RunPaths
from pipeline.training.run_folder import gpu_fault

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


def without_code(text: str) -> str:
    return re.sub(r"```.*?```", "", text, flags=re.S)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and mkdocs make them."""
    heads = re.findall(r"^#+ (.*)$", without_code(page.read_text()), re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).strip().replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text())):
        if re.match(r"https?://", target):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), target
        if anchor:
            assert anchor in anchors(file), target


def test_site_builds_offline_and_strictly(tmp_path: Path) -> None:
    """mkdocs, with every warning an error: a page that no menu shows, a broken link, a missing heading."""
    pytest.importorskip("material")
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1", "http_proxy": "http://127.0.0.1:9"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "site/options/index.html").exists()


def test_options_page_is_current() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import make_options_page as made; print(made.page(), end='')"],
        env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'scripts'}"},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert (ROOT / "docs/options.md").read_text() == done.stdout, "run: python scripts/make_options_page.py"


def test_table_of_options_that_may_change_is_current() -> None:
    """And complete: every option that is no part of a run's identity, and no other."""
    done = subprocess.run(
        [sys.executable, "-c", "import sys, make_options_page as m; print(m.resume_page(sys.stdin.read()), end='')"],
        env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'scripts'}"},
        input=(ROOT / "docs/resume.md").read_text(),
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert (ROOT / "docs/resume.md").read_text() == done.stdout, "run: python scripts/make_options_page.py"
    section = done.stdout.partition("## Options that may change")[2]
    config = RawConfig().resolve()
    free = semantic_config(config, everything=True).keys() - semantic_config(config).keys() - {"about"}
    assert set(re.findall(r"^\| `--([\w.]+)`", section, re.M)) == free


def test_recipes_page_and_picture_are_current() -> None:
    """The list of differences and the picture of learning rates are what the recipes and the sources' formulas give."""
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import make_recipes_page as m; print(m.page(m.PAGE.read_text()) + m.picture(), end='')",
        ],
        env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'scripts'}"},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    written = (ROOT / "docs/recipes.md").read_text() + (ROOT / "docs/images/learning_rates.svg").read_text()
    assert written == done.stdout, "run: python scripts/make_recipes_page.py"


@pytest.mark.parametrize("page", ["docs/clusters.md", "docs/performance.md"])
def test_the_time_that_a_copy_of_the_state_takes_is_the_measured_one(page: str) -> None:
    """And with 1 % of the time for them, a copy comes every hundred times as long."""
    measured = json.loads((ROOT / "benchmarks/checkpoint.json").read_text())["result"]["stall_ms"]["median"]
    text = " ".join((ROOT / page).read_text().split())
    assert f"up for {measured:.0f} ms" in text or f"waits {measured:.0f} ms" in text
    assert all(float(seconds) == round(measured / 10, 1) for seconds in re.findall(r"one every ([\d.]+) s", text))


def test_figures_of_losing_nodes_are_those_of_the_committed_files() -> None:
    import runpy

    made = runpy.run_path(str(ROOT / "scripts/make_elastic_table.py"))
    page = made["PAGE"].read_text()
    assert page == made["section"](page), "run: python scripts/make_elastic_table.py"


def test_what_the_figures_of_losing_nodes_do_not_show_is_said() -> None:
    import runpy

    made = runpy.run_path(str(ROOT / "scripts/make_elastic_table.py"))
    trial = {"case": "2 -> 1", "launcher": "torchrun", "problem": "none", "load": 1.0, "same_batches_and_rates": True}
    facts = {"command": "c", "time": "2026-01-01", "machine": {"processor": "p", "cores": 2, "load": [1.0, 1.0, 1.0]}}

    def table(*loads: float) -> str:
        result = {"trials": [{**trial, "load": load} for load in loads], "cores": 2}
        return made["trials_table"]({**facts, "result": result})

    assert "At a single load" in table(1.0, 1.0) and "load 1.0, 2026" in table(1.0)
    assert "At a single load" not in table(1.0, 2.0) and "load 1.0 to 2.0, 2026" in table(1.0, 2.0)
    result = {"tries": 2, "problems": ["a"], "seconds": {"node killed": [3.41], "node frozen": []}}
    assert "in 1 of them" in made["tries_text"]({**facts, "result": result})
    assert "at most 3.5." in made["tries_text"]({**facts, "result": result})
    with pytest.raises(SystemExit, match="no try went well"):
        made["tries_text"]({**facts, "result": {**result, "seconds": {"node killed": []}}})


def test_code_layout_names_what_is_there() -> None:
    """The README's layout lists every folder of the package, and nothing that is not there."""
    layout = (ROOT / "README.md").read_text().split("## Code layout")[1].split("```")[1]
    named = re.findall(r"^  ([\w./]+)", layout, re.M)
    assert all((ROOT / "pipeline" / name).exists() for name in named)
    folders = {f"{path.name}/" for path in (ROOT / "pipeline").iterdir() if path.is_dir() and path.name[0] != "_"}
    assert {name for name in named if name.endswith("/")} == folders


def test_code_layout_points_downwards() -> None:
    """Folders stand in the README in an order in which no import points upwards: the one of the contract."""
    import tomllib

    layout = (ROOT / "README.md").read_text().split("## Code layout")[1].split("```")[1]
    named = re.findall(r"^  (\w+)/", layout, re.M)
    contract = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"][0]["layers"]
    level = {name.strip(): number for number, layer in enumerate(contract) for name in re.split(r"[|:]", layer)}
    levels = [level[name] for name in named if name in level]
    assert levels == sorted(levels), named


def texts() -> str:
    """All texts in the package's source, a space for each value that is filled in."""
    found: list[str] = []
    for path in (ROOT / "pipeline").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else "\0" for part in node.values)
                found.append("".join(str(part) for part in parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


def test_troubleshooting_quotes_real_messages() -> None:
    """Each message of the page is in the source, so that a reader who searches for what he saw finds it."""
    page = (ROOT / "docs/troubleshooting.md").read_text()
    quoted = re.findall(r"^\| `([^`]+)` \|", page, re.M)
    assert len(quoted) > 25
    source = texts()
    lost = [
        message
        for message in quoted
        if not re.search(r"[^\n]*".join(re.escape(part.strip()) for part in message.split("…") if part.strip()), source)
    ]
    assert not lost


def test_options_in_pages_exist() -> None:
    """Every --group.name that a page mentions is an option."""
    options = set(re.findall(r"^\| `--([\w.]+)`", (ROOT / "docs/options.md").read_text(), re.M))
    groups = {name.partition(".")[0] for name in options if "." in name}
    unknown = {
        f"{page.name}: --{name}"
        for page in PAGES
        for name in re.findall(r"--((?:\w+\.)+\w+)", page.read_text())
        if name.partition(".")[0] in groups and name not in options
    }
    assert not unknown


def test_commands_in_pages_exist() -> None:
    """Every `pipeline VERB` in a block of code or between backticks is a verb."""
    from pipeline.__main__ import VERBS

    unknown = {
        f"{page.name}: {verb}"
        for page in PAGES
        for verb in re.findall(r"(?:^|[`\n]|-m )pipeline +([a-z]\w+)", page.read_text())
        if verb not in VERBS
    }
    assert not unknown


@pytest.mark.parametrize("page", ["README.md", "docs/own-data.md"])
def test_commands_for_own_images_fit_one_gpu_and_a_small_data_set(page: str) -> None:
    """The recipes' own batches are for ImageNet on many GPUs."""
    text = (ROOT / page).read_text()
    commands = re.findall(r"^pipeline (train .*--data\.root (?:/data/birds|my-data) .*)$", text, re.M)
    assert commands
    for command in commands:
        config = parse_config(shlex.split(command, comments=True)[1:])
        assert config.train.global_batch_size <= 256, command


def test_extras_are_installed_from_the_clone_and_leave_it_editable() -> None:
    """No package index has this project, and `pip install .` would replace the link to the clone by a copy of it."""
    pages = [page for page in PAGES if page.name != "CHANGELOG.md"]
    sources = "\n".join(path.read_text() for path in [*pages, *(ROOT / "pipeline").rglob("*.py")])
    installs = re.findall(r"pip install[^`\n]*", sources)
    assert len(installs) > 10
    assert not [line for line in installs if "imagenet-pipeline" in line or ".[" in line.replace('-e ".[', "")]


def test_page_of_the_run_folder_names_all_that_lies_in_it() -> None:
    tree = (ROOT / "docs/run-folder.md").read_text().split("```")[1]
    run = RunPaths(Path("/run"))
    properties = [name for name, value in vars(RunPaths).items() if isinstance(value, property)]
    names = {getattr(run, name).relative_to(run.path).parts[0] for name in properties} | {gpu_fault.NAME}
    assert not {name for name in names if not re.search(rf"\b{re.escape(name)}\b", tree)}


def test_commands_that_name_a_test_file_run_all_of_it() -> None:
    """Without --all the tests marked `long` are left out: nearly all of tests/test_slurm.py."""
    long = (ROOT / "tests/long.txt").read_text()
    pages = "\n".join(page.read_text() for page in PAGES if page.name != "CHANGELOG.md")
    found = re.findall(r"scripts/test\.sh [^`\n]*tests/\w+\.py", pages)
    assert found
    for line in found:
        file = re.findall(r"tests/\w+\.py", line)[-1]
        assert "--all" in line or not (file in long or "mark.long" in (ROOT / file).read_text()), line


def test_tests_named_in_pages_exist() -> None:
    unknown = {
        f"{page.name}: {name}"
        for page in PAGES
        for name in re.findall(r"`(test_\w+)`", page.read_text())
        if not (ROOT / f"tests/{name}.py").exists()
    }
    assert not unknown
