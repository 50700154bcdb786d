"""COCO's layout, for any categories: the real one, people's own exports of that shape, ``shapes``.

    ROOT/annotations/instances_SPLIT.json   images, categories and objects with boxes and masks
    ROOT/SPLIT/FILE_NAME                    the images

Images are opened when they are loaded; until then the JSON's word counts. What a dataset gives, and what it puts up
with: see :mod:`.detection`.
"""

import contextlib
import itertools
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from pycocotools import mask as coco_mask
from tqdm import tqdm

from ..errors import InputError
from ..recipes.schema import COCOBoxesRecipe, COCORecipe
from .augment import SMALLEST_SIDE
from .check import SMALLEST, Findings, repeated
from .detection import (
    EMPTY,
    RELATIVE,
    SWAPPED,
    ZERO,
    AnnotatedImage,
    ObjectDataset,
    ObjectWalk,
    Thing,
    is_relative,
    run_lengths,
)
from .detection import find_problems as find_problems_of
from .images import LIMITS, SUFFIXES, Limits
from .parsing import number, truth, whole

FARTHEST_POINT = 1e5  # pixels: pycocotools walks along a polygon's sides, however far away they are
LARGEST_SIDE = 65535  # pixels, of a JPEG
CORNERS = "boxes that fit their mask or image only as x1, y1, x2, y2, not as x, y, width, height"


class Layout(NamedTuple):
    """Where the files are below the root, ``{split}`` standing for the split; and whether masks are read."""

    images: str = "{split}"
    annotations: str = "annotations/instances_{split}.json"
    boxes_only: bool = False


class COCOInstances(ObjectDataset):
    """Images, boxes and masks of one split of a COCO-shaped folder: an :class:`.detection.ObjectDataset`.

    Boxes are the JSON's ``bbox``, and ``image_id`` is its integer. Crowds are no targets, as is usual in training; the
    metric knows of them, and asks for all that the file has, as COCO's own tool does. The one warning also counts boxes
    that do not fit their masks.

    Attributes:
        classes: Names, in the order of the labels.
        category_ids: The JSON's ids in the same order: a category's way back from its label.

    Args:
        root: The folder.
        split: ``train2017``, for example; it stands for ``{split}`` in the next two.
        images: Folder of the images below ``root``; ``file_name`` is looked for in it.
        annotations: The JSON file below ``root``.
        classes: Without: all categories of the file, by their ids.
        crop: With ``train``, crop half of the images too.
        boxes_only: Do without masks.
        zoom: With ``train`` and ``boxes_only``, zoom out of images and crop them, too: see :func:`.augment.augment`.
    """

    def __init__(
        self,
        root: Path | str,
        split: str,
        *,
        images: str = Layout().images,
        annotations: str = Layout().annotations,
        classes: Sequence[str] | None = None,
        train: bool = False,
        strict: bool = False,
        crop: bool = False,
        boxes_only: bool = False,
        drop_others: bool = False,
        limits: Limits = LIMITS,
        zoom: bool = False,
    ) -> None:
        file = _File(root, split, Layout(images, annotations, boxes_only), limits, classes, drop_others)
        super().__init__(file, train, strict, masks=not boxes_only, crop=crop, zoom=zoom)
        self.category_ids = ids_of(self.classes, file.ids)

    def ground_truth(self) -> dict:
        """The split as COCO's own JSON has it, with crowds, for COCO's own tool.

        Objects are numbered from 1, since the tool takes an object with the id 0 for "nothing found".
        """
        categories = dict(zip(self.classes, self.category_ids, strict=True))
        count = itertools.count(1)
        return {
            "info": {},
            "images": [{"id": image.id, "width": image.size[0], "height": image.size[1]} for image in self.images],
            "categories": [{"id": i, "name": name} for name, i in categories.items()],
            "annotations": [
                {
                    "id": next(count),
                    "image_id": image.id,
                    "category_id": categories[thing.name],
                    "bbox": thing.bbox,
                    "area": thing.area,
                    "iscrowd": int(thing.hard),
                    "segmentation": None if thing.runs is None else run_lengths(thing.runs, *image.size),
                }
                for image in self.images
                for thing in image.things
            ],
        }


def ids_of(classes: Sequence[str], ids: Mapping[str, int]) -> list[int]:
    """The ids of classes; one that a file does not have gets a new id, so that it can be detected in vain."""
    new = itertools.count(max(ids.values(), default=0) + 1)
    return [ids[name] if name in ids else next(new) for name in classes]


# Reading -------------------------------------------------------------------------------------------------------------


def find_problems(recipe: COCORecipe | COCOBoxesRecipe, root: Path | str, split: str) -> Findings:
    """See :func:`.detection.find_problems`."""
    layout = Layout(recipe.images, recipe.annotations, isinstance(recipe, COCOBoxesRecipe))
    return find_problems_of(_File, recipe, root, split, layout)


class _File(ObjectWalk):
    """One annotation file, from the categories to the objects."""

    def __str__(self) -> str:
        return f"'{self.path}'"

    @property
    def path(self) -> Path:
        return self.root / self.layout.annotations.replace("{split}", self.split)

    @property
    def folder(self) -> Path:
        return self.root / self.layout.images.replace("{split}", self.split)

    def read(self, find_classes: bool) -> None:
        if not self.path.is_file():
            raise self._missing()
        content = read_content(self.path)
        self.names = self._categories(content["categories"])
        self.ids = {name: number for number, name in self.names.items()}
        if find_classes:
            self.classes, self.source = list(self.ids), "categories of the file, by their ids"
        if self.limits is None:
            return
        images, seen, known = self._images(content["images"]), set(), set(self.classes)
        bar = tqdm(content["annotations"], f"check {self.path.name}", unit="object", delay=3)
        for place, entry in enumerate(bar):
            self._object(place, entry, images, seen, known)
        self.images = list(images.values())
        for image in self.images:
            if not image.things:
                self.note("images without objects", str(image.path))
            boxes = (((*thing.bbox, thing.name), f"{image.path}, box {tuple(thing.bbox)}") for thing in image.things)
            self.problems += repeated("objects annotated twice", boxes)
        self.problems += repeated("images listed twice", ((image.path, str(image.path)) for image in self.images))
        if not any(image.things for image in self.images):
            self.note("annotation files without objects", str(self.path))
        if not self.layout.boxes_only and any(reason == EMPTY for _, reason in self.left_out):
            self.hint = ": boxes without masks can train a RetinaNet, with 'e3va train coco-boxes'"

    def _missing(self) -> InputError:
        before, _, after = self.layout.annotations.partition("{split}")
        near = sorted(self.root.glob(f"{before}*{after}")) if after and self.root.is_dir() else []
        there = ", ".join(other.relative_to(self.root).as_posix()[len(before) : -len(after)] for other in near)
        hint = f"choose a split out of {there}" if there else "give a COCO-shaped folder, or its 'annotations'"
        return InputError(f"there is no '{self.path}': {hint}.")

    def unnamed(self) -> list[Path]:
        named = {image.path for image in self.images}
        left = {p for p in self.folder.rglob("*") if p.suffix.lower() in SUFFIXES and p not in named}
        for path in sorted(self.root.glob(self.layout.annotations.replace("{split}", "*"))) if left else ():
            with contextlib.suppress(InputError):
                entries = read_content(path)["images"]
                left -= {self.folder / str(entry.get("file_name")) for entry in entries if isinstance(entry, dict)}
        return sorted(left)

    def count(self, image: AnnotatedImage) -> int:
        return sum(not thing.hard for thing in image.things)  # a crowd is no single object

    def _fields(self, what: str, place: int, entry: object, **kinds: Callable) -> tuple | None:
        """The values of an entry, each as its kind reads it; None, and a problem, if one cannot be read."""
        values = [kind(entry.get(name)) if isinstance(entry, dict) else None for name, kind in kinds.items()]
        if None not in values:
            return tuple(values)
        name = list(kinds)[values.index(None)]
        number = entry.get("id") if isinstance(entry, dict) else None
        which = f"number {place + 1} of the list" if number is None else f"id {number}"
        self.refuse(f"{what} whose '{name}' is missing or unusable", f"{which} in '{self.path}'")
        return None

    def _categories(self, entries: list) -> dict[int, str]:
        """Names by id, in the order of the ids."""
        names: dict[int, str] = {}
        for place, entry in enumerate(entries):
            if values := self._fields("categories", place, entry, id=whole, name=_text):
                number, name = values
                where = f"id {number}, '{name}', in '{self.path}'"
                if number in names:
                    self.refuse("categories with an id that another one has", where)
                elif name in names.values():
                    self.refuse("categories with a name that another one has", where)
                names.setdefault(number, name)
                self.groups.add(str(entry.get("supercategory")))
        if not names:
            raise InputError(f"'{self.path}' has no categories: add them.")
        return dict(sorted(names.items()))

    def _images(self, entries: list) -> dict[int, AnnotatedImage]:
        """Images by id, as the file lists them."""
        images: dict[int, AnnotatedImage] = {}
        for place, entry in enumerate(entries):
            kinds = {"id": whole, "file_name": _text, "width": _length, "height": _length}
            if values := self._fields("images", place, entry, **kinds):
                number, name, *size = values
                path = self.folder / name
                if number in images:
                    self.refuse("images with an id that another one has", f"id {number}, '{path}'")
                    continue
                images[number] = AnnotatedImage(number, path, tuple(size), [])
                if not os.path.isfile(path):
                    self.refuse("missing images", str(path))
                if min(size) < SMALLEST:
                    where = f"{path} ({size[0]}x{size[1]} in '{self.path}')"
                    self.refuse(f"images smaller than {SMALLEST}x{SMALLEST}", where)
                elif max(size) >= self.limits.ratio * min(size):
                    self.refuse("images too thin to be resized", f"{path} ({size[0]}x{size[1]})")
        if not entries:
            raise InputError(f"'{self.path}' lists no images: choose another split.")
        return images

    def _object(
        self, place: int, entry: object, images: dict[int, AnnotatedImage], seen: set[int], known: set[str]
    ) -> None:
        """Add an object to its image; ``seen`` holds the ids of the objects before, ``known`` the classes."""
        kinds = {"id": whole, "image_id": whole, "category_id": whole, "bbox": _box}
        if not self.layout.boxes_only:
            kinds["segmentation"] = _shape
        values = self._fields("annotations", place, entry, **kinds)
        if values is None:
            return
        identity, image_id, category_id, bbox, *shape = values
        where = f"annotation {identity} in '{self.path}'"
        if identity in seen:
            self.refuse("annotations with an id that another one has", where)
        seen.add(identity)
        image, name = images.get(image_id), self.names.get(category_id)
        if image is None:
            self.refuse("annotations of an unknown image", f"{where} (image {image_id})")
        if name is None:
            self.refuse("annotations of an unknown category", f"{where} (category {category_id})")
        elif name not in known and self.drop_others:
            self.left_out[name, "other classes"] += 1
        elif name not in known:
            first = ", ".join(self.classes[:5]) + (", ..." if len(self.classes) > 5 else "")
            self.refuse("annotations of an unknown class", f"{where} ('{name}'; known are {first})")
        if image is None or name not in known:
            return
        where = f"annotation {identity} of {image.path.name}"
        runs = self._runs(*shape, image, where) if shape else None
        if shape and runs is None:
            return
        crowd = self._crowd(entry.get("iscrowd"), where)
        bbox = self._swapped(bbox, where)
        pixels = None if runs is None else int(coco_mask.area(run_lengths(runs, *image.size)))
        area = number(entry.get("area"))
        if area is None:
            area = float(bbox[2] * bbox[3] if pixels is None else pixels)
            self.note("annotations without 'area', counted from the mask", where)
        x, y, w, h = bbox
        box, sides = None, (x, y, x + w, y + h)
        if not crowd or self.layout.boxes_only:
            wrong = RELATIVE if is_relative(*bbox, *sides) else ZERO if min(w, h) < SMALLEST_SIDE else ""
            box = self.clean(name, sides, image.size, where, wrong, empty=pixels == 0)
        if crowd:
            self.left_out[name, "crowds"] += 1
        elif box is not None:
            self._compare(bbox, runs, image.size, where)
        image.things.append(Thing(name, crowd, box, bbox, area, runs))

    def _crowd(self, flag: object, where: str) -> bool:
        if flag is None:
            self.note("annotations without 'iscrowd', taken for single objects", where)
        elif truth(flag) is None:
            kind = "annotations whose 'iscrowd' is neither true nor false, taken for single objects"
            self.warn(kind, f"{where} ({flag!r})")
        return truth(flag) is True

    def _swapped(self, bbox: list[float], where: str) -> list[float]:
        """The box with a width and height that are not negative."""
        x, y, w, h = bbox
        if min(w, h) >= 0:
            return bbox
        self.warn(SWAPPED, where)
        return [min(x, x + w), min(y, y + h), abs(w), abs(h)]

    def _compare(self, bbox: list[float], runs: bytes | None, size: tuple[int, int], where: str) -> None:
        """Note a box that overlaps little with its mask's or reaches out of its image, and what would make it fit."""
        x, y, w, h = bbox
        if runs is None:
            width, height = size
            if (x + w > width + 1 or y + h > height + 1) and x < w <= width + 1 and y < h <= height + 1:
                self.warn(CORNERS, where)
            return
        mask = coco_mask.toBbox(run_lengths(runs, *size)).tolist()

        def overlap(*box: float) -> float:
            return float(coco_mask.iou([list(box)], [mask], [0])[0, 0])

        if overlap(x, y, w, h) >= 0.5:
            return
        if w > x and h > y and overlap(x, y, w - x, h - y) >= 0.8:
            self.warn(CORNERS, where)
        elif overlap(y, x, h, w) >= 0.8:
            self.warn("boxes that fit their mask only with x and y exchanged", where)
        elif overlap(x, y, w, h) < 0.1:
            self.warn("boxes far from their masks", where)

    def _runs(self, shape: list | dict, image: AnnotatedImage, where: str) -> bytes | None:
        """A mask as compressed run lengths; None, and a problem, if the segmentation makes no sense."""
        width, height = image.size
        if isinstance(shape, list):
            polygons = [points for points in shape if len(points) >= 6]
            if len(polygons) < len(shape):
                self.warn("polygons of fewer than three points, left out", where)
            if polygons:
                return coco_mask.merge(coco_mask.frPyObjects(polygons, height, width))["counts"]
            shape = {"size": [height, width], "counts": [width * height]}  # nothing but background
        if not isinstance(shape["size"], list) or [whole(side) for side in shape["size"]] != [height, width]:
            self.refuse("masks of another size than their image", f"{where} {shape['size']}")
            return None
        counts = shape["counts"]
        runs = lengths(counts) if isinstance(counts, str) else [whole(count) for count in counts]
        # pycocotools would fill what run lengths leave open with whatever lies in memory.
        if not all(n is not None and n >= 0 for n in runs) or sum(runs) != width * height:
            self.refuse("masks whose run lengths do not fill their image", where)
            return None
        return coco_mask.frPyObjects({"size": [height, width], "counts": runs}, height, width)["counts"]


def read_content(path: Path) -> dict[str, list]:
    """An annotation file with its three lists, otherwise unchecked.

    Raises:
        InputError: If it is none.
    """
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, OSError, RecursionError) as error:
        raise InputError(f"'{path}' is not valid JSON ({error}): correct it.") from None
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise InputError(f"'{path}' has no list of '{key}': it is not in COCO's instances format; add the list.")
    return content


def _length(value: object) -> int | None:
    """A side of an image; some tools write 640.0."""
    length = whole(value)
    return length if length is not None and 0 < length <= LARGEST_SIDE else None


def _text(value: object) -> str | None:
    return value if isinstance(value, str) and value else None


def _box(value: object) -> list[float] | None:
    numbers = [number(side) for side in value] if isinstance(value, list) and len(value) == 4 else [None]
    return numbers if None not in numbers else None


def _shape(value: object) -> list | dict | None:
    """Polygons, or run lengths in either form, if that is what the value looks like."""
    if isinstance(value, list):
        polygons = [_without_text(points) for points in value]
        return polygons if all(map(_is_polygon, polygons)) else None
    runs = isinstance(value, dict) and isinstance(value.get("counts"), list | str) and "size" in value
    return value if runs else None


def _without_text(points: object) -> object:
    return [number(point) for point in points] if isinstance(points, list) and str in set(map(type, points)) else points


def _is_polygon(points: object) -> bool:
    """Whether it is a list of pairs of numbers, not too far away; without a loop, since COCO has fifty million."""
    if not isinstance(points, list) or len(points) % 2 or not set(map(type, points)) <= {int, float}:
        return False
    near = not points or (min(points) > -FARTHEST_POINT and max(points) < FARTHEST_POINT)
    return near and not math.isnan(sum(points))  # nan can hide from min and max


def lengths(counts: str) -> list[int]:
    """The run lengths in COCO's compressed text; a list that fits no image if it is none.

    Five bits of a number per character, the lowest first; 32 says that more follow, 16 in the last one that the number
    is negative. From the fourth number on it is what to add to the last but one.
    """
    runs: list[int] = []
    value = shift = 0
    for character in counts:
        bits = ord(character) - 48
        if not 0 <= bits < 64:
            return []
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            if bits & 16:
                value -= 1 << shift
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    return runs if not shift else []
