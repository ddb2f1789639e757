"""Every verb's --help: one usage, a whole first sentence, and a sentence for every option."""

import json
import os
import re
import subprocess
import sys

import pytest

from pipeline.__main__ import VERBS, main
from pipeline.insight.bench.cli import BENCHES

PAGES = [verb for verb in VERBS if verb != "bench"] + [f"bench {name}" for name in BENCHES]
MENUS = ["", "bench"]

#: prints {command: its help} of the commands in its arguments
PRINT_ALL = """
import contextlib, io, json, sys
from pipeline.__main__ import main
found = {}
for command in sys.argv[1:]:
    with contextlib.redirect_stdout(io.StringIO()) as page, contextlib.suppress(SystemExit):
        main([*command.split(), "--help"])
    found[command] = page.getvalue()
json.dump(found, sys.stdout)
"""


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    """Command -> its help page, on a terminal so wide that nothing wraps."""
    environment = os.environ | {"COLUMNS": "1000"}
    command = [sys.executable, "-c", PRINT_ALL, *PAGES, *MENUS]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def options_of(page: str) -> dict[str, str]:
    """Option or positional argument -> its help, without type and default."""
    found: dict[str, str] = {}
    name = ""
    for line in page.splitlines():
        start = re.match(r"  (-[\w.-]+|\{?[a-z][\w|,]*)(.*)", line)
        if start:
            name = start[1]
            found[name] = start[2].partition("  ")[2].strip()
        elif line.startswith("   ") and name:
            found[name] += line.strip()
    return {name: re.sub(r"\(type: .*|\(default: .*|\[default.*", "", text).strip() for name, text in found.items()}


@pytest.mark.parametrize("command", PAGES + MENUS)
def test_there_is_one_usage(pages: dict[str, str], command: str) -> None:
    usages = re.findall(r"usage: pipeline.*", pages[command], re.IGNORECASE)
    assert len(usages) == 1 and command in usages[0]


@pytest.mark.parametrize("command", PAGES)
def test_the_first_sentence_is_whole(pages: dict[str, str], command: str) -> None:
    usage, about, *_ = pages[command].split("\n\n")
    assert usage.lower().startswith("usage:")
    assert re.fullmatch(r"[A-Z][^\n]*[.?]", about), about


@pytest.mark.parametrize("command", PAGES)
def test_every_option_has_a_sentence(pages: dict[str, str], command: str) -> None:
    options = options_of(pages[command])
    assert len(options) > 1  # --help is one
    assert [name for name, text in options.items() if not text] == []


def test_launch_shows_what_it_takes_and_its_own_defaults_not_torchruns(pages: dict[str, str]) -> None:
    options = options_of(pages["launch"])
    refused = {"--run-path", "--virtual-local-rank", "--start-method", "--event-log-handler", "--logs-specs"}
    without_effect = {"--local-addr", "--signals-to-handle"}
    assert "--nnodes" in options and not (refused | without_effect) & options.keys()
    assert options["--shutdown-timeout"].endswith("[120]")


@pytest.mark.parametrize(
    ("command", "meant"),
    [
        ("evaluate RUN --checkpiont last", "--checkpoint"),
        ("status RUN --whatch", "--watch"),
        ("index ROOT --proceses=2", "--processes"),
        ("estimate --config smoke --crad h100", "--card"),
        ("preflight --config smoke --world-sise 2", "--world_size"),
        ("train --config smoke data.root=photos", "--data.root=photos"),
        ("qualify --minute 1", "--minutes"),
        ("bench loadr", "loader"),
    ],
)
def test_a_misspelled_option_gets_a_suggestion(command: str, meant: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command.split()) == 2
    assert f"did you mean {meant}?" in capsys.readouterr().err
