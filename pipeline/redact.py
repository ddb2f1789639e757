"""Removes credentials from what is printed, logged or sent: values of environment variables with secret-looking names,
well-known kinds of keys, and passwords and signatures in URLs."""

import os
import re
from html import escape

MASK = "[hidden]"
_SECRET_NAME = re.compile(r"KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL", re.IGNORECASE)
_SHORTEST = 8  # a shorter value would hide harmless words
_URL = re.compile(r"(?<=://)[^/\s:@]*:[^/\s@]+(?=@)")
_KEY = re.compile(
    r"\b(?:A[KS]IA[0-9A-Z]{16}|gh[pousr]_\w{36,}|github_pat_\w{36,}|hf_\w{30,}|sk-[\w-]{20,}|KGAT_\w{20,}|wandb_v1_\w{30,})\b"
)
_QUERY = re.compile(
    r"(?<=[?&;])([\w-]*(?:key|token|secret|password|signature|credential)[\w-]*)=[^&\s\"'<>]+", re.IGNORECASE
)


def is_secret(name: str) -> bool:
    """Does an environment variable's name say that its value is a credential?"""
    return _SECRET_NAME.search(name) is not None


def redact(text: str) -> str:
    """`text` without credentials."""
    values = {value for name, value in os.environ.items() if is_secret(name) and len(value) >= _SHORTEST}
    values |= {escape(value) for value in values}  # as in an HTML page
    for value in sorted(values, key=len, reverse=True):
        text = text.replace(value, MASK)
    return _QUERY.sub(rf"\1={MASK}", _KEY.sub(MASK, _URL.sub(MASK, text)))
