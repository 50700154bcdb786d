"""The one kind of error that is meant for the person at the keyboard."""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Something the user gave us cannot work: one sentence that names the file or option and the way out.

    The console command prints the sentence and exits with status 2; library callers get an ordinary ``ValueError``.
    """


def unknown(kind: str, name: str, known: Iterable[str]) -> InputError:
    """An :class:`InputError` for a misspelt name, with the nearest known ones."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known are: {', '.join(known)}."
    return InputError(f"unknown {kind} '{name}': {hint}")
