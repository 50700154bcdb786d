"""What the notebooks ask and show: predictions beside measurements, figures with a description, measured results.

A reader writes a prediction into a cell, ``my_guess = 40  # MiB``, and :func:`reveal` says below the measurement how
far off it was, and which parts of the sum were forgotten. Without a prediction it says nothing about one. What was
measured is folded, so that a reader of the static page can make a prediction, too.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from html import escape
from itertools import combinations
from numbers import Real
from pathlib import Path

from matplotlib.figure import Figure

from ..errors import InputError
from .memory import Ledger

RIGHT = 0.02  # of the measured value: nearer is right
EXPLAINED = 0.05  # of what is missing: nearer is explained by the parts
MOST = 12  # parts, the largest ones, that are looked at for what was forgotten; and as many as three of them together


@dataclass(frozen=True)
class Revealed:
    """A measured value, its parts, and how far off a prediction of it was; in a notebook it is a box to unfold.

    Attributes:
        guess: The prediction, in ``unit``; None without one.
        value: What was measured, in ``unit``.
        unit: Behind both numbers: ``"MiB"``.
        parts: What the value consists of, by name, in ``unit``.
        beside: What else was measured, by name, as text.
        forgotten: The names of the parts that come nearest to the difference between value and prediction.
    """

    guess: float | None
    value: float
    unit: str
    parts: dict[str, float] = field(default_factory=dict)
    beside: dict[str, str] = field(default_factory=dict)

    @property
    def forgotten(self) -> tuple[str, ...]:
        gap = self._gap
        if not gap or abs(gap) <= RIGHT * abs(self.value):
            return ()
        largest = sorted((name for name in self.parts if self.parts[name] > 0), key=self.parts.get, reverse=True)[:MOST]
        some = (names for count in (1, 2, 3) for names in combinations(largest, count))
        return min(some, key=lambda names: (round(abs(abs(gap) - self._sum(names)), 6), len(names)), default=())

    @property
    def sentence(self) -> str:
        """What there is to say about the prediction; empty without one."""
        if self.guess is None:
            return ""
        gap, said = self._gap, f"You said {self._text(self.guess)}"
        if abs(gap) <= RIGHT * abs(self.value):
            return f"{said}: {'exactly right' if not gap else 'right, within two percent'}."
        share = f", {abs(gap / self.value):.0%}" if self.value else ""
        sentence = f"{said}: {self._text(abs(gap))}{share}, too {'little' if gap > 0 else 'much'}."
        if not (names := self.forgotten):
            return sentence
        total = self._sum(names)
        these = f"{' and '.join(filter(None, [', '.join(names[:-1]), names[-1]]))} ({self._text(total)})"
        if abs(abs(gap) - total) <= EXPLAINED * abs(gap):
            return f"{sentence} {f'You forgot {these}.' if gap > 0 else f'Did you count {these} twice?'}"
        nearest = "what you forgot may be" if gap > 0 else "what you counted twice may be"
        return f"{sentence} No parts add up to that; {nearest} {these}."

    @property
    def _gap(self) -> float:
        return 0 if self.guess is None else self.value - self.guess

    def _sum(self, names: tuple[str, ...]) -> float:
        return sum(self.parts[name] for name in names)

    def _text(self, number: float) -> str:
        return f"{_number(number)} {self.unit}".rstrip()

    @property
    def _rows(self) -> dict[str, str]:
        return {name: self._text(size) for name, size in self.parts.items()} | self.beside

    def __repr__(self) -> str:
        width = max(map(len, self._rows), default=0)
        lines = [f"  {name:{width}}  {text}" for name, text in self._rows.items()]
        return "\n".join([f"measured: {self._text(self.value)}", *filter(None, [self.sentence]), *lines])

    def _repr_html_(self) -> str:
        rows = "".join(
            f'<tr><td style="text-align:left">{escape(name)}</td><td>{escape(text)}</td></tr>'
            for name, text in self._rows.items()
        )
        said = f"<p>{escape(self.sentence)}</p>" if self.sentence else ""
        is_open, summary = (" open", "Your prediction and the measurement") if said else ("", "Reveal the measurement")
        table = f"<table>{rows}</table>" if rows else ""
        measured = f"<p>Measured: <b>{escape(self._text(self.value))}</b></p>"
        return f"<details{is_open}><summary>{summary}</summary>{measured}{said}{table}</details>"


def reveal(
    guess: float | None,
    value: float,
    unit: str = "",
    parts: Mapping[str, float] | None = None,
    beside: Mapping[str, object] | None = None,
) -> Revealed:
    """What was measured beside what a reader predicted; the last expression of a notebook's cell.

    Args:
        guess: The reader's number in ``unit``, or None.
        value: The measured number in the same unit.
        unit: ``"bytes"``, ``"MiB"``, ``"%"``, ``"links"``.
        parts: What the value consists of, by name: a part or a few parts that are as large as what the guess lacks are
            named as the ones that were forgotten. They are shown in this order.
        beside: What else was measured, by name.

    Raises:
        InputError: For a guess that is neither a number nor None.
    """
    if guess is not None and (isinstance(guess, bool) or not isinstance(guess, Real) or not math.isfinite(guess)):
        raise InputError(f"the guess {guess!r} is no number: write one{f' of {unit}' if unit else ''}, or None.")
    others = {name: str(what) for name, what in (beside or {}).items()}
    return Revealed(guess, value, unit, dict(parts or {}), others)


def kinds(ledger: Ledger, per: float = 2**20) -> dict[str, float]:
    """The activations of a ledger by kind of module, largest first: all ``mlp.act`` of a network together.

    Args:
        ledger: Of a model.
        per: Bytes of the unit: by default MiB.
    """
    found: dict[str, float] = {}
    for name, size in ledger.by_module.items():
        *above, last = re.split(r"\.\d+\b\.?", name)  # what stands behind the last number, or, behind none, before it
        kind = last or (above[-1] if above else "the model itself")
        found[kind] = found.get(kind, 0) + size / per
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def show(picture: object, alt: str) -> None:
    """Display a picture with a description for those who cannot see it.

    The description is the image's ``alt`` text where a page's template knows one (nbconvert's classic one does), and
    stands below the picture, folded, everywhere.

    Args:
        picture: A matplotlib figure, or an ``IPython.display.Image`` of a JPEG.
        alt: What there is to be seen, in a sentence or two.
    """
    from IPython.display import HTML, display

    kind = "image/png" if isinstance(picture, Figure) else "image/jpeg"
    display(picture, metadata={kind: {"alt": alt}})
    display(HTML(f"<details><summary>Description of the picture</summary><p>{escape(alt)}</p></details>"))


def results_folder() -> Path:
    """``data/results`` of the repository that the notebook, or else the package, lies in.

    Raises:
        InputError: Where there is none: an installed package comes without the measured results.
    """
    here = Path.cwd()
    for folder in (here, *here.parents, Path(__file__).parents[2]):
        if (folder / "data/results/README.md").is_file():
            return folder / "data/results"
    raise InputError(
        "data/results was not found: what was measured beforehand is part of the repository and not of the installed "
        "package, so clone the repository and start this notebook from its folder notebooks/."
    )


def _number(number: float) -> str:
    if float(number).is_integer():
        return f"{int(number):,}"
    digits = 2 - math.floor(math.log10(abs(number)))
    return f"{number:,.{min(max(digits, 0), 6)}f}"
