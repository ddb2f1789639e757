"""What an impossible command line earns."""

from pipeline.config import parse_config
from pipeline.errors import UserError


def complaint(capsys, *argv) -> str:
    """The one line on stderr, and exit code 2, that a command line earns."""
    try:
        parse_config(list(argv))
    except UserError as error:
        line = str(error)
    except SystemExit as error:
        assert error.code == 2
        line = capsys.readouterr().err.strip()
    else:
        raise AssertionError("no complaint")
    assert "\n" not in line
    return line
