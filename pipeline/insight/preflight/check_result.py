"""What a check of `preflight` gives."""

from dataclasses import dataclass

PASS, WARN, FAIL = "pass", "WARN", "FAIL"


@dataclass(frozen=True)
class CheckResult:
    """level: pass, WARN or FAIL; name: what was checked; text: what was seen, and the remedy."""

    level: str
    name: str
    text: str
