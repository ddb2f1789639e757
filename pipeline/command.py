"""From a function's signature or a dataclass to a command line: typed options, help from its docstring, one-line
errors."""

import contextlib
import dataclasses
import difflib
import gc
import inspect
import io
import itertools
import re
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pipeline.errors import EXIT_OK, EXIT_USER, UserError, complain

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

Options = TypeVar("Options")

#: numbers that YAML 1.1 reads in another base: 0100 is 64 there (octal), and 1:30 is 90
OTHER_BASE = re.compile(r"[-+]?(0[0-7_]+|[0-9_]+:[0-9_:.]+)")
IN_DIGITS = " (octal, or in sixties); write what is meant in decimal digits"


@contextlib.contextmanager
def terminated_like_interrupted() -> Iterator[None]:
    """SIGTERM (a scheduler's) stops as Ctrl-C does."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def make_parser(prog: str, description: str | None = None, usage: str | None = None) -> "ArgumentParser":
    """A jsonargparse parser that reports every error in one line on stderr, with exit code 2.

    Attribute docstrings of dataclasses are the help of their options. usage: what follows the program's name.
    """
    from jsonargparse import ArgumentParser, set_parsing_settings

    class OneLineParser(ArgumentParser):
        def parse_args(self, args: Any = None, *further: Any, **named: Any) -> Any:
            for option, value in itertools.pairwise([part for item in args or () for part in _name_and_value(item)]):
                kind = getattr(self._option_string_actions.get(option), "_typehint", str)
                problem = "" if kind in (str, str | None) else other_base(value)
                if problem:
                    self.error(f"{option} {value}: {problem}")
            return super().parse_args(args, *further, **named)

        def error(self, message: str, ex: Exception | None = None) -> Any:
            unknown = re.match(r"[Uu]nrecognized arguments: (\S+)", message)
            hint = _meant(unknown[1], self._option_string_actions) if unknown else ""
            complain(self.prog, f"{one_line(str(message))}{hint} (see {self.prog} --help)")
            sys.exit(EXIT_USER)

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    line = f"{prog} {usage}" if usage else None
    return OneLineParser(prog=prog, description=description, usage=line, exit_on_error=True)


def _name_and_value(item: str) -> list[str]:
    """ "--name=value" as two arguments, others as they are."""
    return item.split("=", 1) if item.startswith("--") else [item]


def other_base(text: str) -> str:
    """What is said of the first number of an option's YAML text that is another one than it seems, or ""."""
    import yaml

    if text.removeprefix("-").isdigit() or not OTHER_BASE.search(text):  # jsonargparse reads 0100 alone as 100
        return ""
    try:
        events = list(yaml.parse(text, yaml.SafeLoader))
    except yaml.YAMLError:  # the parser of options reports it
        return ""
    for event in events:
        if isinstance(event, yaml.ScalarEvent) and event.implicit[0] and OTHER_BASE.fullmatch(event.value):
            value = yaml.safe_load(event.value)
            if isinstance(value, int | float) and value:
                return f"{event.value} is the number {value} in YAML{IN_DIGITS}"
    return ""


def close_to(name: str, known: Iterable[str]) -> str:
    """The known name that a misspelled one probably means, or ""."""
    return next(iter(difflib.get_close_matches(name, list(known), n=1)), "")


def _meant(argument: str, options: Iterable[str]) -> str:
    """What is added to the complaint about an argument that a parser does not know."""
    name, equals, _ = argument.partition("=")
    if name.startswith("-"):
        close = close_to(name, (option for option in options if option.startswith("--")))
        return f"; did you mean {close}?" if close else ""
    if equals and f"--{name}" in options:
        return f"; did you mean --{argument}?"
    return (
        f"; did you mean --config {argument}?" if argument.endswith((".yaml", ".yml")) and "--config" in options else ""
    )


@contextlib.contextmanager
def raising(verb: str) -> Iterator[None]:
    """Where a parser would print its complaint and exit, raise it as UserError."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            yield
    except SystemExit:
        line = said.getvalue().strip().splitlines()[-1]
        line = line.removeprefix(f"pipeline {verb}: ").removesuffix(f" (see pipeline {verb} --help)")
        raise UserError(line) from None


#: what a value of each type is called in a message, in the order in which it says them
_TYPES = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "tuple": "a list",
    "dict": "a mapping, such as {name: value}",
    "NoneType": "null",
}


def one_line(message: str) -> str:
    """jsonargparse's message in one line; for a value of the wrong type: the option, the value and what to give."""
    text = " ".join(line.strip() for line in message.splitlines() if line.strip())
    key = re.match(r'Parser key "([\w.]+)": ', text)
    value = re.search(r".*(?:Given value|Got value):(.*)$", text)  # the last: that of the option, not of a part
    if key is None or value is None:
        return text
    given = value[1] or " is empty"
    choices = re.search(r"typing\.Literal\[(.*?)\]", text)
    types = re.findall(r"Expected a <class '(\w+)'>", text)
    words = [word for name, word in _TYPES.items() if name in types]
    elements = re.search(r"Expected a tuple with (\d+) elements", text)
    words = [f"a list of {elements[1]} numbers", *words] if elements else words
    wanted = f"one of {choices[1]}" if choices else " or ".join(words)
    return f"--{key[1]}{given}: give {wanted}" if wanted else text


def summary(item: object) -> str:
    """The first paragraph of a docstring, on one line."""
    return " ".join((item.__doc__ or "").strip().split("\n\n")[0].split())


#: what may follow a boolean option; the parser refuses numbers
_TRUTHS = ("true", "false", "yes", "no", "on", "off", "0", "1")


def normalize(argv: list[str], flags: set[str]) -> list[str]:
    """What users write in more than one way: `--run-dir` is `--run_dir`, and `--flag` alone means `--flag true` for
    the boolean options named in `flags`."""
    out = []
    for here, following in itertools.zip_longest(argv, argv[1:], fillvalue=""):
        if here.startswith("--"):
            name, equals, value = here.partition("=")
            here = "--" + name[2:].replace("-", "_") + equals + value
        out.append(here)
        if here in flags and following.lower() not in _TRUTHS:
            out.append("true")
    return out


def split_list(text: str, separator: str = ",") -> list[str]:
    """The parts of an option's list."""
    return [part.strip() for part in text.split(separator)]


def parse_numbers(option: str, text: str, example: str, smallest: int = 1, separator: str = ",") -> list[int]:
    """'36,48' -> [36, 48]. Raises UserError that names the option for what is not a list of whole numbers."""
    try:
        numbers = [int(part) for part in split_list(text, separator)]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < smallest:
        raise UserError(f"{option} {text}: give whole numbers of {smallest} or more, e.g. {example}")
    return numbers


def verb_page(command: str, word: str, verbs: dict[str, str]) -> str:
    """The help page of a command with verbs. word: what a verb is called in the usage; verbs: name -> one line."""
    width = max(map(len, verbs))
    head = f"usage: {command} {word} [options]        ({command} {word} --help for its options)"
    return "\n".join([head, "", *(f"  {verb:<{width}}  {about}" for verb, about in verbs.items())])


def at_home(value: object) -> object:
    """A path that begins with `~` as the shell would have replaced it: it leaves it in quotes, and in `--from=~/a.zip`.

    Raises RuntimeError for `~NAME` where no account has that name.
    """
    if isinstance(value, list):
        return [at_home(item) for item in value]
    return str(Path(value).expanduser()) if isinstance(value, str) and value.startswith("~") else value


def run_command(function: Callable[..., int | None], verb: str, argv: list[str]) -> int:
    """Parse `argv` by the signature of `function` (no default: positional; list[str]: one or more of them) and call it.

    Returns the function's exit code, 0 where it returns None.
    """
    kinds = function.__annotations__
    several = [name for name, kind in kinds.items() if kind == list[str]]
    parser = make_parser(f"pipeline {verb}", summary(function))
    for name in several:
        parser.add_argument(name, nargs="+", metavar=name.upper().removesuffix("S"), help=_help_of(function, name))
    parser.add_function_arguments(function, as_group=False, as_positional=True, fail_untyped=True, skip=set(several))
    flags = {f"--{name}" for name, kind in kinds.items() if kind in (bool, bool | None)}
    instantiate: Any = getattr(parser, "instantiate", None) or parser.instantiate_classes  # before jsonargparse 4.49
    given = instantiate(parser.parse_args(normalize(argv, flags))).as_dict()
    required = [name for name, item in inspect.signature(function).parameters.items() if item.default is item.empty]
    for name in required:  # "" would be the current folder
        if "" in (given[name] if name in several else [given[name]]):
            parser.error(f"{name.upper()} is empty; is a variable not set?")
    code = function(**{name: at_home(value) for name, value in given.items()})
    return EXIT_OK if code is None else code


def _help_of(function: Callable[..., object], name: str) -> str:
    """What the docstring says of an argument."""
    import docstring_parser

    found = docstring_parser.parse(function.__doc__ or "").params
    return next(" ".join((item.description or "").split()) for item in found if item.arg_name == name)


def split_options(kind: type[Options], verb: str, argv: list[str]) -> tuple[Options, list[str]]:
    """(the options that are fields of the dataclass `kind`, all other arguments in their order): for a verb that has
    options of its own beside those of `train`. Exits with code 2 and one line on an impossible value."""
    fields = {item.name: item.type for item in dataclasses.fields(kind)}  # type: ignore[arg-type]
    argv = normalize(argv, {f"--{name}" for name, of in fields.items() if of is bool})
    own: list[str] = []
    rest: list[str] = []
    into = rest
    for item in argv:
        name, equals, _ = item.partition("=")
        if into is own:  # the value of the option before
            own.append(item)
            into = rest
        elif item.startswith("--") and name[2:] in fields:
            own.append(item)
            into = rest if equals else own
        else:
            rest.append(item)
    parser = make_parser(f"pipeline {verb}")
    parser.add_class_arguments(kind, as_group=False)
    return kind(**parser.parse_args(own).as_dict()), rest


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """For imports of torch and other large packages: without the garbage collector, which would traverse all imported
    objects again and again. Saves a quarter of their time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
