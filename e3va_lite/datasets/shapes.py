"""Generated scenes on disk, in the genuine Pascal VOC, COCO and ADE20K layouts: what can be tried without a download.

Half of the six classes have outlines that pretraining showed, half were kept from it. The look is another one on
purpose: pretraining images are crisp and colourful, scenes are muted, cluttered, shadowed and a little out of focus, so
that a frozen backbone is good here, but not enough. Read from ``scene`` down; each layout has one writer.
"""

import csv
import json
import shutil
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from contourpy import FillType, contour_generator
from PIL import Image, ImageFilter
from pycocotools import mask as coco_mask
from tqdm import tqdm

from ..errors import InputError, unknown
from .silhouettes import OUTLINES, TEXTURES, Rng, fill, place, texture

CLASSES = ("star", "heart", "arrow", "house", "bolt", "fish")  # the last three are new to a pretrained backbone
DISTRACTORS = tuple(name for name in OUTLINES if name not in CLASSES)
COCO_IDS = (1, 3, 4, 7, 8, 11)  # with gaps, as COCO's own
VERSION = 1  # raise it whenever a change below changes a single byte of what is written
VOID = 255
FIRST_VAL = 1_000_000  # index of the first validation scene: the same ones however many there are for training
HARD, GONE = 0.6, 0.9  # hidden share from which an object is difficult, and from which it is no longer annotated


@dataclass(frozen=True)
class Scene:
    """One image and what there is to know about its N objects, in the order of the values of ``instances``."""

    image: np.ndarray  # uint8 (H, W, 3)
    instances: np.ndarray  # uint8 (H, W): k where object k - 1 is visible, 0 elsewhere, 255 on remains of hidden ones
    labels: np.ndarray  # int (N,), positions in CLASSES
    boxes: np.ndarray  # int (N, 4), half-open x1, y1, x2, y2 of the visible pixels
    difficult: np.ndarray  # bool (N,), more than 60 % hidden by other things or by the image's edge
    truncated: np.ndarray  # bool (N,), reaches beyond the image's edge
    crowd: np.ndarray  # bool (N,), in a heap of one class that COCO annotates as a whole


def scene(seed: int, index: int, size: int = 224) -> Scene:
    """Scene ``index`` of the endless series ``seed``; ``size`` pixels square.

    Of every 25 scenes in a row one holds no object and two hold a crowd.
    """
    rng = np.random.default_rng((seed, index))
    special = np.random.default_rng((seed, index // 25)).permutation(25)[index % 25]
    look = _Look(rng, size)
    canvas = look.ground()
    instances = np.zeros((size, size), np.uint8)
    things = [] if special == 0 else _objects(rng, size, with_crowd=special in (1, 2))  # (class, polygon, crowd)
    queue = [*range(1, len(things) + 1), *[0] * rng.integers(4, 9)]  # 0 is a distractor
    rng.shuffle(queue)
    for turn, k in enumerate(queue):
        polygon = things[k - 1][1] if k else _somewhere(rng, size, str(rng.choice(DISTRACTORS)), 9, 36)
        box, mask = fill(polygon, size, size)
        look.shadow(canvas, polygon)
        canvas[box][mask] = look.surface(*mask.shape)[mask]
        instances[box][mask] = k
        if turn == len(queue) // 3:
            canvas = _blurred(canvas, rng.uniform(0.3, 1.0) * size / 224)  # what lies further back is less sharp
    look.wires(canvas)  # thin enough for an annotator to look past: they hide nothing
    return Scene(look.photograph(canvas), *_annotate(instances, things))


def _annotate(instances: np.ndarray, things: list) -> tuple[np.ndarray, ...]:
    """What an annotator would write down of the things painted: the fields of :class:`Scene` but the first."""
    size, known = len(instances), np.full_like(instances, VOID)
    known[instances == 0] = 0
    rows = []
    for k, (label, polygon, crowd) in enumerate(things, start=1):
        visible = instances == k
        x, y = polygon.T
        hidden = 1 - visible.sum() / (0.5 * abs(x @ np.roll(y, 1) - y @ np.roll(x, 1)))  # of the whole outline's area
        columns, lines = np.flatnonzero(visible.any(axis=0)), np.flatnonzero(visible.any(axis=1))
        if hidden > GONE or min(len(columns), len(lines)) < 4:
            continue
        box = (columns[0], lines[0], columns[-1] + 1, lines[-1] + 1)
        rows.append((label, box, hidden > HARD, polygon.min() < 0 or polygon.max() > size, crowd))
        known[visible] = len(rows)
    labels, boxes, *flags = zip(*rows, strict=True) if rows else [()] * 5
    return known, np.array(labels, int), np.array(boxes, int).reshape(-1, 4), *(np.array(flag, bool) for flag in flags)


# How a scene looks ---------------------------------------------------------------------------------------------------


def _somewhere(rng: Rng, size: int, name: str, smallest: float, largest: float) -> np.ndarray:
    """An outline at a random place; radii in pixels of an image of 224."""
    return place(
        OUTLINES[name],
        centre=tuple(rng.uniform(0.06 * size, 0.94 * size, 2)),
        radius=rng.uniform(smallest, largest) * size / 224,
        turn=rng.uniform(-np.pi / 4.5, np.pi / 4.5),
        squeeze=rng.uniform(0.75, 1.0),
    )


def _objects(rng: Rng, size: int, with_crowd: bool) -> list[tuple[int, np.ndarray, bool]]:
    labels = rng.integers(len(CLASSES), size=rng.integers(2, 8))
    objects = [(int(label), _somewhere(rng, size, CLASSES[label], 16, 40), False) for label in labels]
    if with_crowd:
        label, centre = int(rng.integers(len(CLASSES))), rng.uniform(0.25 * size, 0.75 * size, 2)
        for _ in range(rng.integers(5, 10)):
            member = _somewhere(rng, size, CLASSES[label], 9, 14)
            objects.append((label, (member - member.mean(axis=0)) + rng.normal(centre, 0.09 * size), True))
    return objects


class _Look:
    """The light, the colours and the materials of one scene; every method draws on from the scene's random numbers."""

    def __init__(self, rng: Rng, size: int) -> None:
        self.rng, self.size = rng, size
        self.level = rng.uniform(0.32, 0.58)  # brightness of the ground
        tint = rng.normal(size=3)
        self.tint = 0.16 * (tint - tint.mean())  # one cast over everything: the palette is narrow
        self.fall = rng.uniform(-np.pi, np.pi)  # direction of the light, and of the shadows

    def colour(self, level: float) -> np.ndarray:
        return np.clip(level * (1 + self.tint + self.rng.normal(0, 0.09, 3)), 0.03, 0.97).astype(np.float32)

    def clouds(self, *cells: int) -> np.ndarray:
        """Smooth noise of several grain sizes, float32 (H, W), about -1..1."""
        side = (self.size, self.size)
        noise = [self.rng.uniform(-1, 1, (n, n)).astype(np.float32) for n in cells]
        return sum(np.asarray(Image.fromarray(x).resize(side, Image.Resampling.BICUBIC)) for x in noise) / len(cells) ** 0.5

    def ground(self) -> np.ndarray:
        """Background, float32 (H, W, 3): a mottled surface with a faint pattern, stains and lines."""
        rng, size = self.rng, self.size
        first, second = self.colour(self.level), self.colour(self.level * rng.uniform(0.7, 1.35))
        blend = 0.5 + 0.35 * self.clouds(3, 7, 16, 45, 100)
        blend += rng.uniform(0.1, 0.4) * texture(str(rng.choice(TEXTURES)), size, size, rng.uniform(5, 30), rng)
        canvas = first + np.clip(blend, 0, 1.4)[..., None] * (second - first)
        for _ in range(rng.integers(6, 14)):
            box, mask = fill(_somewhere(rng, size, str(rng.choice(DISTRACTORS)), 10, 60), size, size)
            canvas[box][mask] *= 1 + rng.uniform(0.04, 0.13) * rng.choice((-1, 1))
        self.wires(canvas)
        return canvas

    def surface(self, height: int, width: int) -> np.ndarray:
        """Material of one thing, float32 (height, width, 3): little contrast to the ground, less within itself."""
        rng = self.rng
        level = self.level * (1 + rng.uniform(0.24, 0.6) * rng.choice((-1, 1)))
        first, second = self.colour(level), self.colour(level * (1 + rng.uniform(0.1, 0.25) * rng.choice((-1, 1))))
        pattern = texture(str(rng.choice(TEXTURES)), height, width, rng.uniform(5, 14), rng)
        shade = np.linspace(*rng.uniform(0.82, 1.15, 2), width, dtype=np.float32)
        return (first + pattern[..., None] * (second - first)) * shade[:, None]

    def shadow(self, canvas: np.ndarray, polygon: np.ndarray) -> None:
        reach = self.rng.uniform(1.5, 4.5) * self.size / 224
        box, mask = fill(polygon + reach * np.array([np.cos(self.fall), np.sin(self.fall)]), self.size, self.size)
        canvas[box][mask] *= self.rng.uniform(0.66, 0.88)

    def wires(self, canvas: np.ndarray) -> None:
        """Thin lines from side to side."""
        rng, size = self.rng, self.size
        for _ in range(rng.integers(2, 6)):
            middle, angle, half = rng.uniform(0, size, 2), rng.uniform(0, np.pi), rng.uniform(0.5, 1.2) * size / 224
            along, across = np.array([np.cos(angle), np.sin(angle)]), np.array([-np.sin(angle), np.cos(angle)])
            ends = 2 * size * along, -2 * size * along
            line = [ends[0] - half * across, ends[0] + half * across, ends[1] + half * across, ends[1] - half * across]
            box, mask = fill(middle + line, size, size)
            canvas[box][mask] = self.colour(self.level * rng.uniform(0.6, 1.5))

    def photograph(self, canvas: np.ndarray) -> np.ndarray:
        """Light falling off to one side and in patches, focus, and a sensor's noise; uint8 (H, W, 3)."""
        rng, size = self.rng, self.size
        y, x = np.mgrid[:size, :size].astype(np.float32) / size - 0.5
        fall = rng.uniform(0.2, 0.7) * (np.cos(self.fall) * x + np.sin(self.fall) * y)
        canvas = canvas * (1 - fall + 0.16 * self.clouds(2, 4))[..., None]
        canvas = _blurred(canvas, rng.uniform(0.5, 1.2) * size / 224)
        noise = rng.standard_normal((size, size, 1), dtype=np.float32) * np.float32(rng.uniform(0.008, 0.03))
        return (255 * np.clip(canvas + noise, 0, 1) + 0.5).astype(np.uint8)


def _blurred(canvas: np.ndarray, sigma: float) -> np.ndarray:
    image = Image.fromarray((255 * np.clip(canvas, 0, 1) + 0.5).astype(np.uint8))
    return np.asarray(image.filter(ImageFilter.GaussianBlur(sigma)), np.float32) / 255


# Scenes on disk ------------------------------------------------------------------------------------------------------

Numbered = Iterator[tuple[str, int, Scene]]  # split, number within it from 1 on, scene


def write_scenes(
    root: Path, layout: str, train: int, val: int, seed: int, size: int = 224, overwrite: bool = False
) -> None:
    """Write ``train`` + ``val`` scenes under ``root``, laid out as Pascal VOC, COCO or ADE20K is; same seed, same bytes.

    The request is kept in ``root/shapes.json``. A folder that holds the very same scenes is left as it is, and one whose
    writing was cut off is written again. ``overwrite`` replaces other scenes; files of other origin are never replaced.

    Args:
        root: A new or empty folder, or one that this function wrote.
        layout: ``voc``, ``coco`` or ``ade20k``.
        train: Number of training scenes, at most a million.
        val: Number of validation scenes; which they are does not depend on ``train``.
        seed: Of the whole series, from 0 on.
        size: Side of an image in pixels, at least 64; objects grow with it.
        overwrite: Replace other scenes that this function wrote there.

    Raises:
        InputError: For an unknown layout, a number out of range, or a folder that holds something else.
    """
    root = Path(root)
    if layout not in WRITERS:
        raise unknown("layout", layout, WRITERS)
    for name, value, least in (("train", train, 1), ("val", val, 1), ("seed", seed, 0), ("size", size, 64)):
        if value < least:
            raise InputError(f"{name} is {value}: choose {least} or more.")
    if train > FIRST_VAL:
        raise InputError(f"train is {train}: choose {FIRST_VAL} or fewer.")
    request = {"version": VERSION, "layout": layout, "train": train, "val": val, "seed": seed, "size": size}
    if not _prepare(root, request, overwrite):
        return
    _stamp(root, request, complete=False)
    plan = [("train", n, n) for n in range(train)] + [("val", n, FIRST_VAL + n) for n in range(val)]
    bar = tqdm(plan, desc=f"scenes for {root.name}", unit="scene", delay=3)
    WRITERS[layout](root, ((split, n + 1, scene(seed, index, size)) for split, n, index in bar))
    _stamp(root, request, complete=True)


def _prepare(root: Path, request: dict, overwrite: bool) -> bool:
    """Make ``root`` ready to be written, or say that there is nothing to write."""
    if root.exists() and not root.is_dir():
        raise InputError(f"'{root}' is a file: choose a new folder for the scenes.")
    try:
        found = json.loads((root / "shapes.json").read_text())
        complete, held = found.pop("complete"), found
    except (OSError, ValueError, AttributeError, KeyError):
        if root.exists() and any(root.iterdir()):
            raise InputError(f"'{root}' holds files that are not generated scenes: choose a new folder.") from None
        complete, held = False, request
    if held == request and not overwrite:
        return not complete
    if not overwrite:
        differ = ", ".join(f"{k} {held.get(k)} instead of {v}" for k, v in request.items() if held.get(k) != v)
        raise InputError(f"'{root}' holds other scenes ({differ}): choose another folder or pass --overwrite.")
    for name in ("JPEGImages Annotations ImageSets SegmentationClass SegmentationObject "
                 "train2017 val2017 images annotations").split():  # fmt: skip
        shutil.rmtree(root / name, ignore_errors=True)
    return True


def _stamp(root: Path, request: dict, complete: bool) -> None:
    root.mkdir(parents=True, exist_ok=True)
    (root / "shapes.json").write_text(json.dumps({**request, "complete": complete}, indent=2) + "\n")


def _save(array: np.ndarray, path: Path, palette: np.ndarray | None = None, **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(array)
    if palette is not None:
        image.putpalette(palette.tobytes())
    image.save(path, **options)


def _write_lines(path: Path, lines: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


def _borders(instances: np.ndarray) -> np.ndarray:
    """The pixels on both sides of every edge between objects, or object and ground: nobody can say whose they are."""
    image = Image.fromarray(instances)
    return np.asarray(image.filter(ImageFilter.MaxFilter(3))) != np.asarray(image.filter(ImageFilter.MinFilter(3)))


def _write_voc(root: Path, scenes: Numbered) -> None:
    """Members of a crowd are difficult objects here, and difficult objects are void in the masks, as in the real set."""
    palette = _voc_palette()
    lists = {"train": [], "val": []}  # (id, per class 1 present, 0 only difficult ones, -1 absent)
    for number, (split, _, s) in enumerate(scenes, start=1):
        name, difficult = f"{number:06d}", s.difficult | s.crowd
        _save(s.image, root / f"JPEGImages/{name}.jpg", quality=92)
        _write_lines(root / f"Annotations/{name}.xml", [_voc_xml(name, s, difficult)])
        unclear = _borders(s.instances) | np.isin(s.instances, [VOID, *np.flatnonzero(difficult) + 1])
        classes = np.append(0, s.labels + 1)[np.where(unclear, 0, s.instances)]
        _save(np.where(unclear, VOID, classes).astype(np.uint8), root / f"SegmentationClass/{name}.png", palette)
        _save(np.where(unclear, VOID, s.instances).astype(np.uint8), root / f"SegmentationObject/{name}.png", palette)
        flags = [int((~difficult[s.labels == c]).any()) - (c not in s.labels) for c in range(len(CLASSES))]
        lists[split].append((name, flags))
    for split, rows in {**lists, "trainval": lists["train"] + lists["val"]}.items():
        for task in ("Main", "Segmentation"):
            _write_lines(root / f"ImageSets/{task}/{split}.txt", [name for name, _ in rows])
        for c, label in enumerate(CLASSES):
            _write_lines(root / f"ImageSets/Main/{label}_{split}.txt", [f"{name} {flags[c]:2d}" for name, flags in rows])


def _voc_xml(name: str, s: Scene, difficult: np.ndarray) -> str:
    def add(parent: ET.Element, **children) -> None:
        for tag, text in children.items():
            ET.SubElement(parent, tag).text = str(text)

    annotation = ET.Element("annotation")
    add(annotation, folder="shapes", filename=f"{name}.jpg")
    add(ET.SubElement(annotation, "source"), database="e3va_lite shapes")
    height, width, depth = s.image.shape
    add(ET.SubElement(annotation, "size"), width=width, height=height, depth=depth)
    add(annotation, segmented=1)
    for label, (x1, y1, x2, y2), cut, hard in zip(s.labels, s.boxes, s.truncated, difficult, strict=True):
        thing = ET.SubElement(annotation, "object")
        add(thing, name=CLASSES[label], pose="Unspecified", truncated=int(cut), difficult=int(hard))
        # Pixels count from 1, and the last one belongs to the box.
        add(ET.SubElement(thing, "bndbox"), xmin=x1 + 1, ymin=y1 + 1, xmax=x2, ymax=y2)
    ET.indent(annotation, "\t")
    return ET.tostring(annotation, encoding="unicode")


def _voc_palette() -> np.ndarray:
    """The devkit's colours, uint8 (256, 3): the bits of an index dealt out to red, green and blue."""
    index, colours = np.arange(256), np.zeros((256, 3), np.uint8)
    for bit in range(7, -1, -1):
        colours |= ((index[:, None] >> np.arange(3) & 1) << bit).astype(np.uint8)
        index >>= 3
    return colours


def _write_coco(root: Path, scenes: Numbered) -> None:
    categories = [{"supercategory": "shape", "id": i, "name": name} for i, name in zip(COCO_IDS, CLASSES, strict=True)]
    files = {
        split: {
            "info": {"description": "e3va_lite shapes", "version": str(VERSION), "year": 2017},
            "licenses": [{"id": 1, "name": "generated, free of rights", "url": ""}],
            "images": [],
            "annotations": [],
            "categories": categories,
        }
        for split in ("train", "val")
    }
    for number, (split, _, s) in enumerate(scenes, start=1):
        name, (height, width, _) = f"{number:012d}.jpg", s.image.shape
        _save(s.image, root / f"{split}2017/{name}", quality=92)
        image = {"license": 1, "file_name": name, "height": height, "width": width, "id": number}
        files[split]["images"].append(image)
        regions = [(c, s.instances == k, False) for k, c in enumerate(s.labels, 1) if not s.crowd[k - 1]]
        if s.crowd.any():
            members = np.isin(s.instances, np.flatnonzero(s.crowd) + 1)
            regions.append((s.labels[s.crowd][0], members, True))
        for c, visible, crowd in regions:
            rows = files[split]["annotations"]
            about = {"iscrowd": int(crowd), "image_id": number, "category_id": COCO_IDS[c]}
            rows.append({**_coco_region(visible, crowd), **about, "id": 1000 * number + len(rows) % 1000})
    for split, content in files.items():
        _write_lines(root / f"annotations/instances_{split}2017.json", [json.dumps(content)])


def _coco_region(visible: np.ndarray, crowd: bool) -> dict:
    """Segmentation, area and box of a bool mask: run lengths for a crowd, else polygons around it (holes are lost)."""
    height, width = visible.shape
    x, y = np.flatnonzero(visible.any(axis=0)), np.flatnonzero(visible.any(axis=1))
    box = [int(x[0]), int(y[0]), int(x[-1] - x[0] + 1), int(y[-1] - y[0] + 1)]
    if crowd:
        column_wise = np.concatenate([[False], visible.ravel(order="F")])
        starts = np.flatnonzero(np.diff(column_wise, prepend=False, append=~column_wise[-1:]))
    return {}


WRITERS = {"voc": _write_voc, "coco": _write_coco}
