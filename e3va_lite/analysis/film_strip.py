"""The memory of a training step as a film: which tensors are there at every moment, and where they were made.

Methods have steps of different lengths. The film cuts each into the same sections, and a section into equally many
frames, so that all methods enter and leave every section together. A frame shows, of the events that it stands for,
the one with the most live bytes; so the film's highest frame is the ledger's peak.
"""

import re
import warnings
from collections.abc import Iterable
from itertools import pairwise

import numpy as np
import torch
from torch import nn

from ..errors import InputError
from ..highway import E3VA
from ..recipes.schema import Recipe
from .cost import with_method
from .interactive import Interactive
from .memory import CATEGORIES, Ledger
from .plots import CATEGORY_COLOURS, colour
from .training_step import build_step

# Name, number of frames, and what is to be seen.
SECTIONS = (
    (
        "Forward pass: the backbone",
        45,
        "Every layer runs. What hangs below a layer in orange is kept until the backward pass has read it. Full tuning "
        "and adapters keep something for every layer; below the highway the frozen layers keep nothing.",
    ),
    (
        "Forward pass: neck and head",
        10,
        "Neck and head are the same for all methods: they are trained, and keep what they need.",
    ),
    ("Loss", 6, "All that is kept is there at once: about now memory is highest."),
    (
        "Backward pass: head and neck",
        12,
        "The gradient comes back. A layer that it has passed lets go of what it kept, and leaves the gradients of its "
        "trained parameters (red).",
    ),
    (
        "Backward pass: the backbone",
        45,
        "In full tuning and with adapters the gradient goes back through the layers of the backbone, down to the first "
        "one with anything to be trained. On the highway it passes adapters and reductions alone.",
    ),
    (
        "Optimiser",
        12,
        "AdamW updates what is trained, with two numbers of its own (violet) for each trained parameter; then the "
        "gradients are freed.",
    ),
)
SMALL = 32 * 2**10  # bytes; smaller tensors of a place are drawn as one block
EXTRA = r"extra\.(\d+)\.(\d+)"  # adapters inside the backbone, numbered by block of the whole network
PARTS = (
    (r"patch_embed", "embed"),
    (r"layers\.(\d+)\.downsample", "r{0}"),
    (r"layers\.(\d+)\.blocks\.(\d+)\.(?:norm1|attn)", "s{0}b{1}.1"),
    (r"layers\.(\d+)\.blocks\.(\d+)\.(?:norm2|mlp)", "s{0}b{1}.2"),
    (r"adapters\.(\d+)\.(\d+)\.(\d+)", "a{0}b{1}.{2}"),
    (EXTRA, "a{0}b{1}.{2}"),
    *((rf"norms\.{stage}", f"n{stage}") for stage in range(1, 5)),
    (r"fpn\.", "neck"),
    (r"^head\.", "head"),
    (r"^anchor_generator", "loss"),
)
UNPLACED = ("parameters", "optimizer")  # always there: drawn in the bar only


def film_strip(
    recipe: Recipe, size: tuple[int, int], methods: Iterable[str] = ("full", "adapter", "e3va")
) -> Interactive:
    """One training step of a detector on a Swin in several methods, as a figure with a slider, by dry runs.

    Args:
        recipe: Of the tasks ``voc`` and ``coco-boxes``, whose network is a backbone, a neck and a head.
        size: Height and width of the images in pixels.
        methods: ``METHOD[:option=value,...]`` each.

    Raises:
        InputError: For a method, option or size that cannot work.
    """
    if recipe.task not in ("voc", "coco-boxes"):
        raise InputError(
            f"the film shows a backbone, a neck and a head: take the task voc or coco-boxes, not {recipe.task}."
        )
    cpu = torch.device("cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, about its own fake tensors
        steps = {spec: build_step(with_method(recipe, spec), size, cpu, dry_run=True) for spec in methods}
        ledgers = {spec: step.ledger() for spec, step in steps.items()}
    data = film(ledgers, {spec: step.model for spec, step in steps.items()})
    images = f"{recipe.batch} images of {size[0]} × {size[1]} pixels"
    data["setting"] = f"{recipe.backbone} with RetinaNet, {images}, {recipe.precision}"
    peaks = ", ".join(f"{name} {found.peak / 2**20:.1f} MiB" for name, found in ledgers.items())
    return Interactive("film_strip", data, f"One training step as a film. Peaks: {peaks}.")


def film(ledgers: dict[str, Ledger], models: dict[str, nn.Module]) -> dict:
    """The film as plain data.

    Args:
        ledgers: By method, each of a step of its model.
        models: By method, detectors that differ in nothing else.

    Returns:
        ``methods``: per method ``name``, ``colour``, ``layout`` (where its adapters are: ``inside`` the backbone, on a
        ``highway``, or ``plain`` without any), ``peak`` (bytes), ``trained`` (the parts with anything to be trained),
        ``events`` (the ledger's event that a frame shows), ``running`` (the part that runs, per frame) and ``tensors``:
        rows of bytes, how many tensors, the category's place in ``categories``, the part that made them, their first
        and their last frame. Parts are places in ``parts``, and named as by :func:`part_of`.
    """
    tuned = next(iter(models.values())).backbone.body
    blocks = [len(stage.blocks) for stage in tuned.backbone.layers]
    parts: dict[str, int] = {}
    methods = []
    for name, ledger in ledgers.items():
        places = running_parts(ledger, blocks)
        events = frames(ledger, places)
        trained = {part_of(of, blocks) for of, p in models[name].named_parameters() if p.requires_grad}
        tuned = models[name].backbone.body
        methods.append(
            {
                "name": name,
                "colour": colour(name),
                "layout": "highway" if isinstance(tuned, E3VA) else "inside" if len(tuned.extra) else "plain",
                "trained": sorted(trained),
                "peak": ledger.peak,
                "events": events.tolist(),
                "running": [parts.setdefault(places[event], len(parts)) for event in events],
                "tensors": _tensors(ledger, places, events, parts),
            }
        )
    return {
        "blocks": blocks,
        "norms": list(tuned.norms.stages),
        "sections": [{"name": name, "frames": count, "caption": caption} for name, count, caption in SECTIONS],
        "categories": [{"name": name, "colour": CATEGORY_COLOURS[name]} for name in CATEGORIES],
        "parts": list(parts),
        "methods": methods,
    }


def running_parts(ledger: Ledger, blocks: list[int]) -> list[str]:
    """Per event of a ledger the part that is running, see :func:`part_of`; "optimizer" in the optimizer's phase.

    Sums between modules belong to the part that ran last, and what comes after the head to the loss.
    """
    places, last = [], "image"
    for event, module in enumerate(ledger.running):
        found = part_of(module, blocks)
        if not found and module == "" and last == "head":
            found = "loss"
        last = found or last
        places.append("optimizer" if event >= ledger.ends["backward"] else last)
    return places


def frames(ledger: Ledger, places: list[str]) -> np.ndarray:
    """The events that the film shows, one per frame: of each frame's the first one with the most live bytes.

    Within a section frames are equally long; in the forward pass through the backbone they are within a block.
    """
    total = ledger.total

    forward, backward = ledger.ends["forward"], ledger.ends["backward"]
    halves = dict.fromkeys(place for place in places if re.fullmatch(r"s.+\.1", place))
    starts = [0, *(places.index(half) for half in halves), places.index("neck")]  # all run the same blocks, in order
    loss = places.index("loss")
    backbone = next(event for event in range(forward, backward) if places[event] not in ("loss", "head", "neck"))
    shown = []
    bounds = (starts, [starts[-1], loss], [loss, forward], [forward, backbone], [backbone, backward])
    for (_, count, _), bound in zip(SECTIONS, (*bounds, [backward, len(total)]), strict=True):
        edges = np.interp(np.linspace(0, len(bound) - 1, count + 1), range(len(bound)), bound).round().astype(int)
        shown += [low + int(total[low : max(high, low + 1)].argmax()) for low, high in pairwise(edges)]
    return np.array(shown)


def _tensors(ledger: Ledger, places: list[str], events: np.ndarray, parts: dict[str, int]) -> list[list[int]]:
    """The rows ``tensors`` of :func:`film`: what is alive in some frame; small tensors as one where they can be."""
    rows, pooled = [], {}
    for size, category, born, freed in ledger.tensors.tolist():
        alive = np.flatnonzero((events >= born) & (events < freed))
        if not size or not len(alive):
            continue
        place = "" if CATEGORIES[category] in UNPLACED else places[born]
        place = parts.setdefault(place, len(parts))
        key = (category, place, int(alive[0]), int(alive[-1]))
        if size >= SMALL and CATEGORIES[category] not in UNPLACED:
            rows.append([size, 1, *key])
        else:
            bytes_, count = pooled.get(key, (0, 0))
            pooled[key] = (bytes_ + size, count + 1)
    return sorted([*rows, *([*some, *key] for key, some in pooled.items())], key=lambda row: row[4])


def part_of(module: str, blocks: list[int]) -> str:
    """The part of the picture that a detector's module, or a parameter of it, belongs to; "" for none.

    ``embed``; ``s1b2.1`` and ``s1b2.2``, the halves of the second block of stage 1; ``a1b2.1`` and ``a1b2.2``, the
    adapters behind them; ``r2``, the reduction before stage 2; ``n2``, the norm behind it; ``neck``, ``head`` and
    ``loss``.

    Args:
        module: Its name in the model.
        blocks: The number of blocks per stage.
    """
    for pattern, name in PARTS:
        if found := re.search(pattern, module):
            numbers = [int(number) + 1 for number in found.groups()]
            if pattern == EXTRA:
                numbers[:1] = [(s, b) for s, of in enumerate(blocks, start=1) for b in range(1, of + 1)][numbers[0] - 1]
            return name.format(*numbers)
    return ""
