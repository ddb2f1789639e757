"""From pytest's durations to tests/medium.txt, the tests that scripts/test.sh --fast leaves out.

scripts/test.sh --durations=0 | tee LOG; python tests/list_medium.py LOG
"""

import re
import sys
from collections import defaultdict
from pathlib import Path

LIMIT_S = 1.5
HEADER = f"# Tests of {LIMIT_S} s or more, setup included, by tests/list_medium.py: the marker `medium`.\n"


def slower(log: str) -> list[str]:
    """The tests (without their parameters) of LIMIT_S or more, by what `pytest --durations=0` printed."""
    seconds: dict[str, float] = defaultdict(float)
    for line in log.splitlines():
        found = re.match(r"\s*([\d.]+)s (?:call|setup|teardown)\s+(\S+)", line)
        if found:
            seconds[found[2]] += float(found[1])
    return sorted({test.partition("[")[0] for test, spent in seconds.items() if spent >= LIMIT_S})


if __name__ == "__main__":
    Path(__file__).with_name("medium.txt").write_text(HEADER + "\n".join(slower(Path(sys.argv[1]).read_text())) + "\n")
