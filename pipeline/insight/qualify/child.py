"""The process of one part: `python -m pipeline.insight.qualify.child PART SETTINGS ROWS`, all as JSON.

A row is written as soon as it is found, so what a crash leaves is not lost.
"""

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

from pipeline.errors import EXIT_OK, EXIT_RETRY
from pipeline.insight.qualify.parts import part_named
from pipeline.insight.qualify.rows import Settings


def main(name: str, settings: str, rows: str) -> int:
    """Write the part's rows, one JSON object a line, to the file `rows`."""
    given = json.loads(settings)
    given["scratch"] = Path(given["scratch"])
    with Path(rows).open("w", encoding="utf-8") as file:
        for row in part_named(name).rows(Settings(**given)):
            file.write(json.dumps(asdict(row)) + "\n")
            file.flush()
    return EXIT_OK


if __name__ == "__main__":
    try:
        code = main(*sys.argv[1:])
    except Exception as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        code = EXIT_RETRY
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # threads and process groups of a part are of no more use
