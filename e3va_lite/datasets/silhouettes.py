"""Outlines and textures: what every generated image here is made of.

An outline is a polygon in the unit square [-1, 1]^2 (y down), a texture a two-coloured pattern. Pretraining images
(``experiments/pretrain.py``) and downstream scenes (``shapes.py``) share this vocabulary and look different otherwise.
"""

import numpy as np
from PIL import Image, ImageDraw

Rng = np.random.Generator


def _around(radii: np.ndarray, turn: float = 0.0) -> np.ndarray:
    """Points at these radii, at equal angles once around; ``turn`` in whole turns."""
    angles = 2 * np.pi * (np.arange(len(radii)) / len(radii) + turn)
    return np.stack([radii * np.cos(angles), radii * np.sin(angles)], axis=1)


def _regular(corners: int, inner: float = 1.0, turn: float = -0.25) -> np.ndarray:
    """A regular polygon, or with ``inner`` < 1 a star whose every second corner lies at that radius."""
    count = corners if inner == 1.0 else 2 * corners
    return _around(np.where(np.arange(count) % 2 == 0, 1.0, inner), turn)


def _arc(start: float, stop: float, radius: float = 1.0, centre: tuple[float, float] = (0.0, 0.0)) -> np.ndarray:
    """Points on a circle, angles in whole turns."""
    angles = 2 * np.pi * np.linspace(start, stop, 24)
    return np.stack([centre[0] + radius * np.cos(angles), centre[1] + radius * np.sin(angles)], axis=1)


def _heart() -> np.ndarray:
    t = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
    return np.stack([16 * np.sin(t) ** 3, y - 2.5], axis=1) / 16


def _points(*xy: tuple[float, float]) -> np.ndarray:
    return np.array(xy, dtype=float)


OUTLINES: dict[str, np.ndarray] = {
    "circle": _arc(0, 1),
    "triangle": _regular(3),
    "square": _regular(4, turn=-0.125),
    "bar": _points((-1, -0.28), (1, -0.28), (1, 0.28), (-1, 0.28)),
    "star": _regular(5, inner=0.42),
    "spark": _regular(4, inner=0.3),
    "cross": _points(
        (-0.3, -1), (0.3, -1), (0.3, -0.3), (1, -0.3), (1, 0.3), (0.3, 0.3),
        (0.3, 1), (-0.3, 1), (-0.3, 0.3), (-1, 0.3), (-1, -0.3), (-0.3, -0.3),
    ),
    "heart": _heart(),
    "crescent": np.concatenate([_arc(0.15, 0.85), _arc(0.79, 0.21, 0.78, (0.42, 0.0))]),
    "arrow": _points((0, -1), (0.8, -0.1), (0.32, -0.1), (0.32, 1), (-0.32, 1), (-0.32, -0.1), (-0.8, -0.1)),
    "drop": np.concatenate([_arc(-0.08, 0.58, 0.62, (0.0, 0.35)), _points((0, -1))]),
    "dome": _arc(0.5, 1.0) + np.array([0.0, 0.45]),
    "hourglass": _points((-0.8, -1), (0.8, -1), (0.12, 0), (0.8, 1), (-0.8, 1), (-0.12, 0)),
    "gear": _around(np.where(np.arange(32) % 4 < 2, 1.0, 0.7)),
    "corner": _points((-0.8, -0.9), (-0.2, -0.9), (-0.2, 0.35), (0.85, 0.35), (0.85, 0.9), (-0.8, 0.9)),
    "pentagon": _regular(5),
    # Never seen in pretraining: kept for the downstream scenes.
    "house": _points((0, -1), (0.85, -0.25), (0.85, 0.9), (-0.85, 0.9), (-0.85, -0.25)),
    "bolt": _points((0.25, -1), (-0.65, 0.15), (-0.05, 0.15), (-0.3, 1), (0.65, -0.25), (0.05, -0.25)),
    "fish": np.concatenate(
        [_arc(0.07, 0.93, 0.62, (-0.3, 0.0)) * (1, 0.8), _points((0.95, -0.6), (0.7, 0), (0.95, 0.6))]
    ),
    "tee": _points(
        (-0.9, -0.9), (0.9, -0.9), (0.9, -0.35), (0.28, -0.35),
        (0.28, 0.95), (-0.28, 0.95), (-0.28, -0.35), (-0.9, -0.35),
    ),
}  # fmt: skip

TEXTURES = ("plain", "stripes", "checks", "dots", "waves", "grid", "grain", "rings")


def place(outline: np.ndarray, centre: tuple[float, float], radius: float, turn: float, squeeze: float) -> np.ndarray:
    """An outline in an image: squeezed along one axis, turned (radians), scaled and moved; (n, 2) in pixels."""
    cos, sin = np.cos(turn), np.sin(turn)
    return (outline * (1.0, squeeze)) @ np.array([[cos, sin], [-sin, cos]]) * radius + centre


def fill(polygon: np.ndarray, height: int, width: int) -> tuple[tuple[slice, slice], np.ndarray]:
    """The polygon's pixels: the smallest window of the image that holds them, and a bool mask of that window's size.

    Both are empty when the polygon lies outside.
    """
    x1, y1 = np.clip(np.floor(polygon.min(axis=0)), 0, (width, height)).astype(int)
    x2, y2 = np.clip(np.ceil(polygon.max(axis=0)) + 1, 0, (width, height)).astype(int)
    mask = Image.new("L", (max(x2 - x1, 0), max(y2 - y1, 0)))
    ImageDraw.Draw(mask).polygon([(x - x1, y - y1) for x, y in polygon], fill=1)
    return (slice(y1, y1 + mask.height), slice(x1, x1 + mask.width)), np.asarray(mask, bool)


def texture(name: str, height: int, width: int, period: float, rng: Rng) -> np.ndarray:
    """A pattern as weights of its second colour, float32 (height, width) in 0..1; ``period`` in pixels."""
    y, x = np.mgrid[:height, :width].astype(np.float32)
    turn, phase = rng.uniform(0, np.pi), rng.uniform(0, 2 * np.pi, size=2)
    k = 2 * np.pi / period
    u = k * (np.cos(turn) * x + np.sin(turn) * y) + phase[0]
    v = k * (np.cos(turn) * y - np.sin(turn) * x) + phase[1]
    match name:
        case "plain":
            return np.zeros((height, width), np.float32)
        case "stripes":
            pattern = np.sin(u) > 0
        case "checks":
            pattern = np.sin(u) * np.sin(v) > 0
        case "dots":
            pattern = np.cos(u) + np.cos(v) > 0.7
        case "waves":
            pattern = np.sin(u + 1.6 * np.sin(0.6 * v)) > 0
        case "grid":
            pattern = (np.cos(u) > 0.75) | (np.cos(v) > 0.75)
        case "grain":
            coarse = rng.random((int(height / period * 3) + 2, int(width / period * 3) + 2)) > 0.5
            pattern = np.kron(coarse, np.ones((max(1, round(period / 3)),) * 2, bool))
            pattern = np.pad(pattern, ((0, height), (0, width)), mode="wrap")[:height, :width]
        case "rings":
            pattern = np.sin(k * np.hypot(x - width * rng.random(), y - height * rng.random())) > 0
        case _:
            raise ValueError(f"no texture '{name}'")
    return pattern.astype(np.float32)
