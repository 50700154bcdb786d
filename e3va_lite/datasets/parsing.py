"""Flags and numbers of other people's files: the one place that says what a value means."""

import math

TRUE = {"1", "true", "yes", "y", "t", "on"}
FALSE = {"0", "false", "no", "n", "f", "off"}


def truth(value: object) -> bool | None:
    """What a flag says, be it JSON's ``true``, 1, 1.0, or text such as "1", "yes" and "FALSE"; None for all else."""
    if isinstance(value, bool):
        return value
    text = str(value).strip().lower()
    exact = number(value)
    text = str(int(exact)) if exact in (0, 1) else text
    return True if text in TRUE else False if text in FALSE else None


def number(value: object) -> float | None:
    """A finite number, also one written as text; None for all else, flags among it. Numbers keep their type."""
    if isinstance(value, str) and "_" not in value:  # Python would read 1_0 as 10
        try:
            value = float(value)
        except ValueError:
            return None
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    return value if plain and abs(value) < 1e15 and not math.isnan(value) else None


def whole(value: object) -> int | None:
    """A whole number, also as 3.0 or "3"; None for all else."""
    exact = number(value)
    return int(exact) if exact is not None and exact == int(exact) else None
