"""From a run of the suite to tests/medium.txt and tests/long.txt, the tests that the quicker lanes of scripts/test.sh
leave out, `--fast` both, and without an option the second.

scripts/test.sh --all --junitxml=FILE && python tests/list_medium.py FILE        (on a machine without other load)
"""

import sys
from collections import defaultdict
from pathlib import Path
from xml.etree import ElementTree

MEDIUM_S, LONG_S = 0.6, 8.0
#: stay in the lane without an option, however long: what users rely on first
ALWAYS = {
    "tests/test_resume.py::test_killed_twice_and_resumed_is_bit_identical[fp32-1]",
    "tests/test_slurm.py::test_story[from_submission_to_the_end]",
}


def read(report: Path) -> dict[str, float]:
    """Test -> seconds, set-up included, by pytest's JUnit report."""
    cases = ElementTree.parse(report).getroot().iter("testcase")
    return {f"{c.attrib['classname'].replace('.', '/')}.py::{c.attrib['name']}": float(c.attrib["time"]) for c in cases}


def write(name: str, limit: float, mark: str, tests: list[str]) -> None:
    head = f"# Tests of {limit} s or more, setup included, by tests/list_medium.py: the marker `{mark}`.\n"
    Path(__file__).with_name(name).write_text(head + "\n".join(sorted(tests)) + "\n")


def main(report: Path) -> None:
    seconds = read(report)
    longest: dict[str, float] = defaultdict(float)  # without parameters
    for name, spent in seconds.items():
        longest[name.partition("[")[0]] = max(longest[name.partition("[")[0]], spent)
    write("medium.txt", MEDIUM_S, "medium", [name for name, spent in longest.items() if spent >= MEDIUM_S])
    write(
        "long.txt", LONG_S, "long", [name for name, spent in seconds.items() if spent >= LONG_S and name not in ALWAYS]
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
