"""YAML as the parser of recipes reads it: there 1e3 is a number, which PyYAML takes for text."""

import re
from typing import Any

import yaml

_EXPONENT = re.compile(r"[-+]?[0-9][0-9_]*(?:\.[0-9_]*)?[eE][-+]?[0-9]+$")


class Loader(yaml.SafeLoader):
    """Reads 1e3 as a number."""


class _Dumper(yaml.SafeDumper):
    """Puts the text 1e3 into quotes."""


for _kind in (Loader, _Dumper):
    _kind.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+0123456789"))


def dump_yaml(settings: dict[str, Any]) -> str:
    """Settings as YAML, in their order. A text that reads like a number, such as a folder called 1e3, stays a text."""
    return yaml.dump(settings, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
