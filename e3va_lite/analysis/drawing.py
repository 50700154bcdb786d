"""Boxes, sums and lines, coloured by what a gradient does with them, for :mod:`e3va_lite.analysis.diagrams`.

A box is filled by what its parameters do, trained or frozen, and outlined, as lines are drawn, by whether the gradient
passes. Where it does, arrows point in the direction of the gradient, otherwise forward.
"""

from collections.abc import Sequence
from itertools import pairwise

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch, Patch, Polygon, Rectangle
from matplotlib.path import Path as Outline

from .plots import COLOURS, HIGHWAY

GRADIENT, FORWARD = HIGHWAY, "#8b9cb8"  # lines and outlines
TRAINED, FROZEN = COLOURS["adapter"], "#e4eaf4"  # fillings
INK, NOTE = "#22303c", "#5b6877"
LEGEND = (
    Patch(facecolor=TRAINED, edgecolor=FORWARD, label="trained"),
    Patch(facecolor=FROZEN, edgecolor=FORWARD, label="frozen"),
    Line2D([], [], color=GRADIENT, linewidth=2.6, marker="<", label="the gradient's path, back from the loss"),
    Line2D([], [], color=FORWARD, linewidth=1.2, marker=">", markersize=4, label="forward only"),
)


class Picture:
    """Boxes, sums and lines in one place of the axes.

    Args:
        axes: Where to draw; a unit is the same length in both directions.
        x, y: Origin.
        reached: Whether the gradient arrives at the output of the part of that name; unknown names: no.
        trained: Whether it ends in parameters of that part.
    """

    def __init__(self, axes: Axes, x: float, y: float, reached: dict[str, bool], trained: dict[str, bool]) -> None:
        self.axes, self.x, self.y, self.reached, self.trained = axes, x, y, dict(reached), trained
        self.parts: dict[str, tuple[float, float, float, float]] = {}  # name -> centre, half width, half height

    def box(
        self, name: str, x: float, y: float, text: str, width: float = 1.8, height: float = 0.62, tensor: bool = False
    ) -> None:
        """A module, or a tensor, which has nothing to be trained."""
        x, y = self.x + x, self.y + y
        passed = self.reached.setdefault(name, False)
        self.parts[name] = (x, y, width / 2, height / 2)
        fill = "white" if tensor else self._fill(name)
        corner = (x - width / 2, y - height / 2)
        outline = {"boxstyle": "round,pad=0,rounding_size=0.1", "facecolor": fill, **_outline(passed)}
        self.axes.add_patch(FancyBboxPatch(corner, width, height, gid=name, zorder=3, **outline))
        self.axes.text(x, y, text, ha="center", va="center", fontsize=9, color=INK, zorder=5, linespacing=1.15)

    def plus(self, name: str, x: float, y: float, *sources: str) -> None:
        """A sum: the gradient arrives if it goes on to one of the sources, unless ``reached`` says something else."""
        passed = self.reached.setdefault(name, any(self.reached[source] for source in sources))
        x, y, radius = self.x + x, self.y + y, 0.22
        self.parts[name] = (x, y, radius, radius)
        self.axes.add_patch(Circle((x, y), radius, facecolor="white", gid=name, zorder=3, **_outline(passed)))
        for dx, dy in ((0.12, 0), (0, 0.12)):
            self.axes.plot([x - dx, x + dx], [y - dy, y + dy], color=INK, linewidth=1.2, zorder=4)

    def line(self, source: str, target: str, *corners: tuple[float, float]) -> None:
        """From the edge of one part to the edge of another, around corners; all pieces horizontal or vertical."""
        bends = [(self.x + x, self.y + y) for x, y in corners]
        a, b = self.parts[source], self.parts[target]
        points = [_edge(a, (bends or [b])[0]), *bends, _edge(b, (bends or [a])[-1])]
        passed = self.reached[source] and self.reached[target]
        style = {"color": GRADIENT, "linewidth": 2.6, "zorder": 2} if passed else {}
        style = {"color": FORWARD, "linewidth": 1.2, "zorder": 1, "joinstyle": "round"} | style
        head = {"arrowstyle": "-|>,head_width=0.28,head_length=0.5", "mutation_scale": 9}
        path = Outline(points[::-1] if passed else points)
        self.axes.add_patch(FancyArrowPatch(path=path, gid=f"{source}>{target}", **head, **style))

    def lines(self, *chains: str) -> None:
        """A straight line between every two parts that follow each other in ``"part part ..."``."""
        for chain in chains:
            for source, target in pairwise(chain.split()):
                self.line(source, target)

    def trapezoid(self, name: str, x: float, low: float, high: float, widths: tuple[float, float]) -> None:
        """A projection, upwards; the widths of its lower and its upper edge stand for dimensions."""
        (a, b), x, low, high = widths, self.x + x, self.y + low, self.y + high
        corners = [(x - a / 2, low), (x + a / 2, low), (x + b / 2, high), (x - b / 2, high)]
        self.axes.add_patch(
            Polygon(corners, facecolor=self._fill(name), edgecolor=FORWARD, linewidth=1.0, gid=name, zorder=3)
        )

    def bar(self, x: float, y: float, length: float) -> None:
        """A length."""
        place = (self.x + x, self.y + y)
        self.axes.add_patch(Rectangle(place, length, 0.18, facecolor=GRADIENT, linewidth=0, gid="length"))

    def text(self, x: float, y: float, text: str, **style: object) -> None:
        """A note."""
        style = {"fontsize": 9, "color": NOTE, "ha": "center", "va": "top", "linespacing": 1.35} | style
        self.axes.text(self.x + x, self.y + y, text, **style)

    def _fill(self, name: str) -> str:
        return TRAINED if self.trained.get(name) else FROZEN


def _outline(passed: bool) -> dict[str, object]:
    return {"edgecolor": GRADIENT, "linewidth": 2.4} if passed else {"edgecolor": FORWARD, "linewidth": 1.0}


def _edge(part: tuple[float, float, float, float], towards: tuple[float, ...]) -> tuple[float, float]:
    x, y, half_width, half_height = part
    dx, dy = towards[0] - x, towards[1] - y
    if abs(dx) > abs(dy):
        return x + (half_width if dx > 0 else -half_width), y
    return x, y + (half_height if dy > 0 else -half_height)


def canvas(
    title: str, note: str, width: float, height: float, scale: float = 0.5, legend: Sequence[Artist] = LEGEND
) -> tuple[Figure, Axes]:
    """One axes of that many units, ``scale`` inches each; title, note and legend have room of their own."""
    inches = (width * scale, height * scale + 1.35)
    figure = Figure(figsize=inches, dpi=150, facecolor="white")
    axes = figure.add_axes((0, 0.5 / inches[1], 1, height * scale / inches[1]))
    axes.set(xlim=(0, width), ylim=(0, height), aspect="equal")
    axes.axis("off")
    for text, top, size, colour in ((title, 0.34, 13, INK), (note, 0.65, 9, NOTE)):
        figure.text(0.3 / inches[0], 1 - top / inches[1], text, fontsize=size, color=colour, va="center")
    figure.legend(handles=legend, loc="lower center", ncols=4, frameon=False, fontsize=9, labelcolor=INK)
    return figure, axes
