"""From a function's signature to a command line: typed options, help from its docstring, one-line errors."""

import itertools
import re
import sys
from collections.abc import Callable

from pipeline.errors import EXIT_OK, EXIT_USER, complain


def make_parser(prog: str, description: str | None = None):
    """A jsonargparse parser whose every complaint is one line on stderr and exit code 2."""
    from jsonargparse import ArgumentParser

    class OneLineParser(ArgumentParser):
        def error(self, message, ex=None):
            lines = [line.strip() for line in str(message).splitlines() if line.strip()]
            text = re.sub(r"Expected a typing\.Literal\[(.*?)\]\.", r"give one of \1.", " ".join(lines))
            complain(self.prog, f"{text} (see {self.prog} --help)")
            sys.exit(EXIT_USER)

    return OneLineParser(prog=prog, description=description, exit_on_error=True)


def normalize(argv: list[str], flags: set[str]) -> list[str]:
    """What users write in more than one way: `--run-dir` is `--run_dir`, and `--flag` alone means `--flag true` for
    the boolean options named in `flags`."""
    out = []
    for here, following in itertools.zip_longest(argv, argv[1:], fillvalue=""):
        if here.startswith("--"):
            name, equals, value = here.partition("=")
            here = "--" + name[2:].replace("-", "_") + equals + value
        out.append(here)
        if here in flags and following.lower() not in ("true", "false", "yes", "no"):
            out.append("true")
    return out


def run_command(function: Callable[..., int | None], verb: str, argv: list[str]) -> int:
    """Parse `argv` by the signature of `function` (no default: positional) and call it.

    Returns the function's exit code, 0 where it returns None.
    """
    parser = make_parser(f"pipeline {verb}", (function.__doc__ or "").strip().split("\n\n")[0])
    parser.add_function_arguments(function, as_positional=True, fail_untyped=True)
    flags = {f"--{name}" for name, kind in function.__annotations__.items() if kind in (bool, bool | None)}
    arguments = parser.instantiate_classes(parser.parse_args(normalize(argv, flags)))
    code = function(**arguments.as_dict())
    return EXIT_OK if code is None else code
