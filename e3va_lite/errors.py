"""The one kind of error that is meant for the user and not for the programmer."""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """The user's input cannot work: one sentence that names the file or option and the way out.

    The console command prints the sentence and exits with status 2; library callers get an ordinary ``ValueError``.
    """


def unknown(kind: str, name: str, known: Iterable[str], hint: str | None = None) -> InputError:
    """An :class:`InputError` for a misspelt name, with the known names that begin like it or are spelt like it.

    Args:
        hint: What is said where there are none. Default: the known names.
    """
    known = list(known)
    near = [other for other in known if len(name) >= 3 and other.startswith(name)]
    near = near or difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if near:
        return InputError(f"unknown {kind} '{name}': did you mean {' or '.join(near[:3])}?")
    listed = ", ".join(known[:20]) + (f" and {len(known) - 20} more" if len(known) > 20 else "")
    return InputError(f"unknown {kind} '{name}': {hint or 'known are: ' + listed}.")
