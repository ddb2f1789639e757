"""Numbers of things in messages."""


def count(number: int, what: str) -> str:
    """ "1 step", "2,000 steps", "2 classes"."""
    ending = "" if number == 1 else "es" if what.endswith(("s", "ch")) else "s"
    return f"{number:,} {what}{ending}"
