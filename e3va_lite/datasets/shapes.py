"""Generated scenes on disk, in the genuine Pascal VOC, COCO and ADE20K layouts: what can be tried without a download.

The look is that of a stained slide under a microscope: translucent bodies with dark rims on a mottled ground, in uneven
light. Half of the six classes have outlines that pretraining showed, half were kept from it.

Colour, which meant nothing in pretraining, has a meaning here: each class takes up a stain, and a body of the same
outline in another stain is a decoy. There are two worlds. In the ``stained`` one each class has a stain of its own, so
that colour alone goes a long way. In the ``duotone`` one outlines count for more: there are two stains for the six
classes, and decoys of foreign outlines, too; bodies are fewer and larger. Read from ``scene`` down; each layout has one
writer.
"""

import itertools
import json
import shutil
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from contourpy import FillType, contour_generator
from PIL import Image, ImageFilter
from pycocotools import mask as coco_mask
from tqdm import tqdm

from ..errors import InputError, unknown
from ..files import replacing
from .coco import lengths
from .silhouettes import OUTLINES, TEXTURES, Rng, fill, place, texture

CLASSES = ("star", "crescent", "arrow", "house", "bolt", "fish")  # the last three are new to a pretrained backbone
BLOTCHES = tuple(name for name in OUTLINES if name not in CLASSES)  # shapes of the ground's paler and darker patches
COCO_IDS = (1, 3, 4, 7, 8, 11)  # with gaps, as COCO's own
VERSION = 3  # raise it whenever a change below changes a single byte of what is written
VOID = 255
FIRST_VAL = 1_000_000  # index of the first validation scene: the same ones however many there are for training
HARD, GONE = 0.6, 0.9  # hidden share from which an object is difficult, and from which it is no longer annotated
JPEG = {"quality": 92}
FOLDERS = (
    *("JPEGImages", "Annotations", "ImageSets", "SegmentationClass", "SegmentationObject"),  # VOC
    *("annotations", "train2017", "val2017", "images"),  # COCO, ADE20K
)


@dataclass(frozen=True)
class World:
    """A kind of scenes.

    Attributes:
        stains: How many there are; classes take them in turn.
        zoom: How large bodies are.
        objects: How many there are besides crowds, half-open.
        decoys: How many bodies have a class's outline in another stain, half-open.
        strangers: How many have the outline of no class, half-open.
    """

    stains: int
    zoom: float
    objects: tuple[int, int]
    decoys: tuple[int, int]
    strangers: tuple[int, int] | None = None


WORLDS = {
    "stained": World(stains=len(CLASSES), zoom=1.0, objects=(6, 12), decoys=(4, 9)),
    "duotone": World(stains=2, zoom=1.7, objects=(3, 7), decoys=(0, 3), strangers=(2, 5)),
}


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


def scene(seed: int, index: int, size: int = 224, world: str = "stained") -> Scene:
    """Scene ``index`` of the endless series ``seed`` in a world, a key of ``WORLDS``; ``size`` pixels square.

    Of the scenes 0 to 24 one holds no object and two hold a crowd; so it is in the next 25, and so on.
    """
    rng = np.random.default_rng((seed, index))
    special = np.random.default_rng((seed, index // 25)).permutation(25)[index % 25]
    kind = WORLDS[world]
    look = _Look(rng, size, kind.stains)
    canvas = look.ground()
    instances = np.zeros((size, size), np.uint8)
    things = [] if special == 0 else _things(rng, size, kind, with_crowd=special in (1, 2))
    bodies = [(k, *thing[:2]) for k, thing in enumerate(things, start=1)] + _decoys(rng, size, kind)
    rng.shuffle(bodies)
    for k, stain, polygon in bodies:
        box, mask = fill(polygon, size, size)
        look.body(canvas, box, mask, stain)
        instances[box][mask] = k
    look.wires(canvas)  # thin enough for an annotator to look past: they hide nothing
    return Scene(look.photograph(canvas), *_annotate(instances, things))


def _things(rng: Rng, size: int, world: World, with_crowd: bool) -> list[tuple[int, np.ndarray, bool]]:
    """The objects of a scene: class, polygon and whether it is one of a crowd."""
    labels = rng.integers(len(CLASSES), size=rng.integers(*world.objects)).tolist()
    things = [(label, _body(rng, size, world, CLASSES[label]), False) for label in labels]
    if with_crowd:
        label, centre = int(rng.integers(len(CLASSES))), rng.uniform(0.25 * size, 0.75 * size, 2)
        for _ in range(rng.integers(5, 10)):
            radii = (9 * world.zoom, 14 * world.zoom)
            member = _somewhere(rng, size, CLASSES[label], *radii, tuple(rng.normal(centre, 0.09 * size)))
            things.append((label, member, True))
    return things


def _decoys(rng: Rng, size: int, world: World) -> list[tuple[int, int, np.ndarray]]:
    """Bodies that are nothing: 0, stain and polygon."""
    outlines = rng.integers(len(CLASSES), size=rng.integers(*world.decoys))
    stains = (outlines + rng.integers(1, world.stains, size=len(outlines))) % world.stains
    decoys = [
        (0, int(stain), _body(rng, size, world, CLASSES[outline]))
        for outline, stain in zip(outlines, stains, strict=True)
    ]
    if world.strangers is not None:
        for outline in rng.integers(len(BLOTCHES), size=rng.integers(*world.strangers)):
            stain = int(rng.integers(world.stains))
            decoys.append((0, stain, _body(rng, size, world, BLOTCHES[outline])))
    return decoys


def _body(rng: Rng, size: int, world: World, name: str) -> np.ndarray:
    return _somewhere(rng, size, name, 14 * world.zoom, 28 * world.zoom)


def _somewhere(
    rng: Rng, size: int, name: str, smallest: float, largest: float, centre: tuple[float, float] | None = None
) -> np.ndarray:
    """An outline at a random place, unless told the centre; radii in pixels of an image of 224."""
    return place(
        OUTLINES[name],
        centre=centre or tuple(rng.uniform(0.06 * size, 0.94 * size, 2)),
        radius=rng.uniform(smallest, largest) * size / 224,
        turn=rng.uniform(-np.pi / 4.5, np.pi / 4.5),
        squeeze=rng.uniform(0.75, 1.0),
    )


def _annotate(instances: np.ndarray, things: list) -> tuple[np.ndarray, ...]:
    """What an annotator would write down of the things painted: the fields of :class:`Scene` but the first."""
    size, known = len(instances), np.where(instances == 0, 0, VOID).astype(np.uint8)
    rows = []
    for k, (label, polygon, crowd) in enumerate(things, start=1):
        visible, (x, y) = instances == k, polygon.T
        hidden = 1 - visible.sum() / (0.5 * abs(x @ np.roll(y, 1) - y @ np.roll(x, 1)))  # of the whole outline's area
        if hidden > GONE or min(visible.any(axis=0).sum(), visible.any(axis=1).sum()) < 3:
            continue
        rows.append((label, _extent(visible), hidden > HARD, polygon.min() < 0 or polygon.max() > size, crowd))
        known[visible] = len(rows)
    labels, boxes, *flags = zip(*rows, strict=True) if rows else [()] * 5
    return known, np.array(labels, int), np.array(boxes, int).reshape(-1, 4), *(np.array(flag, bool) for flag in flags)


def _extent(mask: np.ndarray) -> tuple[int, int, int, int]:
    """The smallest box around a mask's pixels, half-open x1, y1, x2, y2."""
    x, y = (np.flatnonzero(mask.any(axis=axis)) for axis in (0, 1))
    return int(x[0]), int(y[0]), int(x[-1]) + 1, int(y[-1]) + 1


class _Look:
    """The light and the colours of one scene; every method draws on from the scene's random numbers."""

    def __init__(self, rng: Rng, size: int, stains: int) -> None:
        self.rng, self.size, self.stains = rng, size, stains
        self.level = rng.uniform(0.36, 0.6)  # brightness of the ground
        tint = rng.normal(size=3)
        self.tint = 0.08 * (tint - tint.mean())  # one cast over everything: the palette is narrow
        angle = rng.uniform(-np.pi, np.pi)
        self.fall = np.array([np.cos(angle), np.sin(angle)])  # direction of the light

    def colour(self, level: float) -> np.ndarray:
        return np.clip(level * (1 + self.tint + self.rng.normal(0, 0.07, 3)), 0.03, 0.97).astype(np.float32)

    def clouds(self, *cells: int) -> np.ndarray:
        """Smooth noise of several grain sizes, float32 (H, W), about -1..1."""
        layers = [Image.fromarray(self.rng.uniform(-1, 1, (n, n)).astype(np.float32)) for n in cells]
        layers = [layer.resize((self.size, self.size), Image.Resampling.BICUBIC) for layer in layers]
        return np.sum(layers, axis=0) / len(cells) ** 0.5

    def pattern(self, height: int, width: int, finest: float, coarsest: float) -> np.ndarray:
        period = self.rng.uniform(finest, coarsest) * self.size / 224
        return texture(str(self.rng.choice(TEXTURES)), height, width, period, self.rng)

    def ground(self) -> np.ndarray:
        """Background, float32 (H, W, 3): a mottled surface with a faint pattern, stains and lines."""
        rng, size = self.rng, self.size
        first, second = self.colour(self.level), self.colour(self.level * rng.uniform(0.7, 1.35))
        blend = 0.5 + 0.35 * self.clouds(3, 9, 30, 90) + rng.uniform(0.1, 0.4) * self.pattern(size, size, 5, 30)
        canvas = first + np.clip(blend, 0, 1.4)[..., None] * (second - first)
        for _ in range(rng.integers(4, 10)):
            box, mask = fill(_somewhere(rng, size, str(rng.choice(BLOTCHES)), 10, 60), size, size)
            canvas[box] *= np.where(mask, np.float32(1 + rng.uniform(0.04, 0.13) * rng.choice((-1, 1))), 1)[..., None]
        self.wires(canvas)
        return canvas

    def body(self, canvas: np.ndarray, box: tuple[slice, slice], mask: np.ndarray, stain: int) -> None:
        """A translucent body: it takes away light, most of the colour opposite to its stain, and more at its rim."""
        hue = 2 * np.pi * (stain % self.stains) / self.stains + self.rng.normal(0, 0.15)
        absorbed = 1 + 0.84 * np.cos(hue - 2 * np.pi / 3 * np.arange(3))  # of red, green and blue
        reach = self.size // 16 + 2  # further out nothing of the blurred mask is left
        window = tuple(slice(max(side.start - reach, 0), side.stop + reach) for side in box)
        light = canvas[window]
        framed = np.zeros(light.shape[:2], np.uint8)
        framed[tuple(slice(a.start - b.start, a.stop - b.start) for a, b in zip(box, window, strict=True))] = 255 * mask
        soft, wide = (self.blurred(framed, radius) for radius in (1.2, 3.5))
        rim = 2.2 * np.clip(soft - wide, 0, 1)
        light *= 1 - soft * (self.rng.uniform(0.1, 0.3) * absorbed).astype(np.float32)
        light *= 1 - rim * np.float32(self.rng.uniform(0.4, 0.8))

    def blurred(self, mask: np.ndarray, radius: float) -> np.ndarray:
        """A uint8 mask (H, W) out of focus, float32 (H, W, 1) in 0..1; radius in pixels of an image of 224."""
        image = Image.fromarray(mask).filter(ImageFilter.GaussianBlur(radius * self.size / 224))
        return np.asarray(image, np.float32)[..., None] / 255

    def wires(self, canvas: np.ndarray) -> None:
        """Thin lines from side to side."""
        rng, size = self.rng, self.size
        for _ in range(rng.integers(1, 4)):
            middle, angle, thickness = tuple(rng.uniform(0, size, 2)), rng.uniform(0, np.pi), rng.uniform(0.005, 0.012)
            box, mask = fill(place(OUTLINES["bar"], middle, 1.5 * size, angle, thickness), size, size)
            np.copyto(canvas[box], self.colour(self.level * rng.uniform(0.7, 1.35)), where=mask[..., None])

    def photograph(self, canvas: np.ndarray) -> np.ndarray:
        """Light falling off to one side and in patches, focus, and a sensor's noise; uint8 (H, W, 3)."""
        rng, size = self.rng, self.size
        yx = np.mgrid[:size, :size].astype(np.float32) / size - 0.5
        light = 1 - np.tensordot((rng.uniform(0.2, 0.7) * self.fall[::-1]).astype(np.float32), yx, 1)
        canvas = canvas * (light + 0.16 * self.clouds(2, 4))[..., None]
        image = Image.fromarray((255 * np.clip(canvas, 0, 1) + 0.5).astype(np.uint8))
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.4, 1.1) * size / 224))
        noise = rng.standard_normal((size, size, 1), dtype=np.float32) * rng.uniform(2, 6)
        return np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8)


# Scenes on disk ------------------------------------------------------------------------------------------------------

Numbered = Iterator[tuple[str, int, Scene]]  # split, number within it from 1 on, scene


def write_scenes(
    root: Path,
    layout: str,
    train: int,
    val: int,
    seed: int,
    size: int = 224,
    world: str = "stained",
    overwrite: bool = False,
) -> None:
    """Write ``train`` + ``val`` scenes under ``root``, laid out as Pascal VOC, COCO or ADE20K is.

    The same request gives the same bytes. It is kept in ``root/shapes.json``: a folder that holds the very same scenes
    is left as it is, and one whose writing was cut off is written again.

    Args:
        root: A new or empty folder, or one that this function wrote.
        layout: ``voc``, ``coco`` or ``ade20k``.
        train: Number of training scenes, at most a million.
        val: Number of validation scenes; which they are does not depend on ``train``.
        seed: Of the whole series, from 0 on.
        size: Side of an image in pixels, at least 64; objects grow with it.
        world: A key of ``WORLDS``.
        overwrite: Replace other scenes that this function wrote there. Files of other origin are never replaced.

    Raises:
        InputError: For an unknown layout, a number out of range, or a folder that holds something else.
    """
    root = Path(root)
    if layout not in WRITERS:
        raise unknown("layout", layout, WRITERS)
    if world not in WORLDS:
        raise unknown("world", world, WORLDS)
    for name, value, least in (("train", train, 1), ("val", val, 1), ("seed", seed, 0), ("size", size, 64)):
        if value < least:
            raise InputError(f"{name} is {value}: choose {least} or more.")
    if train > FIRST_VAL:
        raise InputError(f"train is {train}: choose {FIRST_VAL} or fewer.")
    request = {"version": VERSION, "layout": layout, "train": train, "val": val, "seed": seed, "size": size}
    request |= {} if world == "stained" else {"world": world}  # folders from when there was one world stay good
    if not _prepare(root, request, overwrite):
        return
    _stamp(root, request, complete=False)
    plan = [("train", n, n) for n in range(train)] + [("val", n, FIRST_VAL + n) for n in range(val)]
    bar = tqdm(plan, desc=f"scenes for {root.name}", unit="scene", delay=3)
    WRITERS[layout](root, ((split, n + 1, scene(seed, index, size, world)) for split, n, index in bar))
    _stamp(root, request, complete=True)


def _prepare(root: Path, request: dict, overwrite: bool) -> bool:
    """Make ``root`` ready to be written, or say that there is nothing to write."""
    if root.exists() and not root.is_dir():
        raise InputError(f"'{root}' is a file: choose a new folder for the scenes.")
    if not root.exists() or not any(root.iterdir()):
        return True
    try:
        held = json.loads((root / "shapes.json").read_text(encoding="utf-8"))
        complete = held.pop("complete")
    except (OSError, ValueError, AttributeError, TypeError, KeyError):  # absent, or not what _stamp writes
        raise InputError(f"'{root}' holds files that are not generated scenes: choose a new folder.") from None
    if held == request and not overwrite:
        return not complete  # a second writer of the same request does no harm: the bytes are the same
    if not overwrite:
        differ = ", ".join(f"{k} {held.get(k)}, not {v}" for k, v in request.items() if held.get(k) != v)
        raise InputError(f"'{root}' holds other scenes ({differ}): choose another, or remove it.")
    for folder in FOLDERS:
        shutil.rmtree(root / folder, ignore_errors=True)
    return True


def _stamp(root: Path, request: dict, complete: bool) -> None:
    with replacing(_new(root / "shapes.json")) as unfinished:
        unfinished.write_text(json.dumps({**request, "complete": complete}, indent=2) + "\n", encoding="utf-8")


def _new(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _write_lines(path: Path, lines: list[str]) -> None:
    _new(path).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _borders(instances: np.ndarray) -> np.ndarray:
    """The pixels on both sides of every edge between objects, or object and ground: nobody can say whose they are."""
    image = Image.fromarray(instances)
    return np.asarray(image.filter(ImageFilter.MaxFilter(3))) != np.asarray(image.filter(ImageFilter.MinFilter(3)))


def _write_voc(root: Path, scenes: Numbered) -> None:
    """As in the real set, difficult objects are void in the masks; every member of a crowd is a difficult object."""
    palette = _voc_palette()
    lists = {"train": [], "val": []}  # (id, per class 1 present, 0 only difficult ones, -1 absent)
    for number, (split, _, s) in enumerate(scenes, start=1):
        name, difficult = f"{number:06d}", s.difficult | s.crowd
        Image.fromarray(s.image).save(_new(root / f"JPEGImages/{name}.jpg"), **JPEG)
        _write_lines(root / f"Annotations/{name}.xml", [_voc_xml(name, s, difficult)])
        unclear = _borders(s.instances) | np.isin(s.instances, [VOID, *np.flatnonzero(difficult) + 1])
        objects = np.where(unclear, 0, s.instances)
        for kind, mask in (("Object", objects), ("Class", np.append(0, s.labels + 1)[objects])):
            image = Image.fromarray(np.where(unclear, VOID, mask).astype(np.uint8))
            image.putpalette(palette)
            image.save(_new(root / f"Segmentation{kind}/{name}.png"))
        flags = [int((~difficult[s.labels == c]).any()) - (c not in s.labels) for c in range(len(CLASSES))]
        lists[split].append((name, flags))
    for split, rows in {**lists, "trainval": lists["train"] + lists["val"]}.items():
        for task in ("Main", "Segmentation"):
            _write_lines(root / f"ImageSets/{task}/{split}.txt", [name for name, _ in rows])
        for c, label in enumerate(CLASSES):
            verdicts = [f"{name} {flags[c]:2d}" for name, flags in rows]
            _write_lines(root / f"ImageSets/Main/{label}_{split}.txt", verdicts)


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


def _voc_palette() -> bytes:
    """The devkit's 256 colours: the bits of an index dealt out to red, green and blue, the lowest ones count most."""
    index = np.arange(256)[:, None]
    bits = [((index >> 3 * n + np.arange(3)) & 1) << 7 - n for n in range(3)]
    return sum(bits).astype(np.uint8).tobytes()


def _write_coco(root: Path, scenes: Numbered) -> None:
    """A crowd is one annotation of its own; scenes without objects have none, as some of COCO's images."""
    header = {
        "info": {"description": "e3va_lite shapes", "version": str(VERSION), "year": 2017},
        "licenses": [{"id": 1, "name": "generated, free of rights", "url": ""}],
        "categories": [{"supercategory": "shape", "id": COCO_IDS[c], "name": name} for c, name in enumerate(CLASSES)],
    }
    images, annotations = {"train": [], "val": []}, {"train": [], "val": []}
    ids = itertools.count(1)
    for number, (split, _, s) in enumerate(scenes, start=1):
        name, (height, width, _) = f"{number:012d}.jpg", s.image.shape
        Image.fromarray(s.image).save(_new(root / f"{split}2017/{name}"), **JPEG)
        images[split].append({"license": 1, "file_name": name, "height": height, "width": width, "id": number})
        regions = [(c, s.instances == k, 0) for k, c in enumerate(s.labels, start=1) if not s.crowd[k - 1]]
        if s.crowd.any():
            regions.append((s.labels[s.crowd][0], np.isin(s.instances, np.flatnonzero(s.crowd) + 1), 1))
        for c, visible, crowd in regions:
            about = {"iscrowd": crowd, "image_id": number, "category_id": COCO_IDS[c], "id": next(ids)}
            annotations[split].append(_coco_region(visible, crowd) | about)
    for split in images:
        content = {**header, "images": images[split], "annotations": annotations[split]}
        _write_lines(root / f"annotations/instances_{split}2017.json", [json.dumps(content)])


def _coco_region(visible: np.ndarray, crowd: int) -> dict:
    """Segmentation, area and box of a bool mask (H, W): run lengths for a crowd, else polygons (holes are lost)."""
    height, width = visible.shape
    if crowd:
        encoded = coco_mask.encode(np.asfortranarray(visible, np.uint8))
        shape = {"size": [height, width], "counts": lengths(encoded["counts"].decode())}
    else:
        contours = contour_generator(z=np.pad(visible, 1).astype(float), fill_type=FillType.OuterOffset)
        rings = [points[: holes[1] - 1] - 0.5 for points, holes in zip(*contours.filled(0.5, 2), strict=True)]
        least = min(max(map(len, rings)), 8)  # specks are not drawn, unless there is nothing else
        shape = [_corners(ring).ravel().tolist() for ring in rings if len(ring) >= least]
        encoded = coco_mask.merge(coco_mask.frPyObjects(shape, height, width))
    x1, y1, x2, y2 = _extent(visible)
    return {"segmentation": shape, "area": float(coco_mask.area(encoded)), "bbox": [x1, y1, x2 - x1, y2 - y1]}


def _corners(ring: np.ndarray) -> np.ndarray:
    """A closed ring (n, 2) without the points that lie on a straight line between their neighbours."""
    before, after = ring - np.roll(ring, 1, axis=0), np.roll(ring, -1, axis=0) - ring
    return ring[before[:, 0] * after[:, 1] != before[:, 1] * after[:, 0]]


def _write_ade20k(root: Path, scenes: Numbered) -> None:
    """Class 1 is the ground, decoys included; borders and the remains of hidden objects are 0, no class."""
    folders = {"train": "training", "val": "validation"}
    for split, number, s in scenes:
        classes = np.zeros(256, np.uint8)  # from the values of ``instances``
        classes[: len(s.labels) + 1] = [1, *s.labels + 2]
        mask = np.where(_borders(s.instances), 0, classes[s.instances]).astype(np.uint8)
        path = f"{folders[split]}/ADE_{split}_{number:08d}"
        Image.fromarray(s.image).save(_new(root / f"images/{path}.jpg"), **JPEG)
        Image.fromarray(mask).save(_new(root / f"annotations/{path}.png"))
    rows = [f"{i},{int(i == 1)},{name}" for i, name in enumerate(("ground", *CLASSES), start=1)]
    _write_lines(root / "objectInfo.csv", ["Idx,Stuff,Name", *rows])


WRITERS = {"voc": _write_voc, "coco": _write_coco, "ade20k": _write_ade20k}
