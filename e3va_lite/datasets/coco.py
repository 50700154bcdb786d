"""COCO's layout, for any categories: the real one, people's own exports of that shape, ``shapes``.

    ROOT/annotations/instances_SPLIT.json   images, categories and objects with boxes and masks
    ROOT/SPLIT/FILE_NAME                    the images

One walk over the JSON finds everything in it that training could stumble over: a dataset raises an error for the first
fault that it cannot live with, :func:`find_problems` lists them all. Images are opened when they are loaded; until then
the JSON's word counts.
"""

import contextlib
import io
import itertools
import json
import math
import os
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset
from tqdm import tqdm

from ..errors import InputError
from .augment import mirror
from .check import (
    OUTSIDE,
    REACHING,
    RELATIVE,
    SMALLEST,
    SMALLEST_SIDE,
    SWAPPED,
    ZERO,
    BadFile,
    Contents,
    Findings,
    Problem,
    clean_box,
    counted,
    is_relative,
    repeated,
)
from .images import LIMITS, SUFFIXES, Limits, harmless_findings, read_header, read_image
from .values import number, truth, whole

EMPTY = "objects without a pixel in their mask, dropped"
SHORT = "polygons of fewer than three points, left out"
CORNERS = "boxes that fit their mask or image only as x1, y1, x2, y2, not as x, y, width, height"
EXCHANGED = "boxes that fit their mask only with x and y exchanged"
APART = "boxes far from their masks"
UNCLEAR = "annotations whose 'iscrowd' is neither true nor false, taken for single objects"
WARNED = (ZERO, RELATIVE, OUTSIDE, EMPTY, REACHING, SHORT, SWAPPED, CORNERS, EXCHANGED, APART, UNCLEAR)
FARTHEST_POINT = 1e5  # pixels: pycocotools walks along a polygon's sides, however far away they are
LARGEST_SIDE = 65535  # pixels, of a JPEG
SHORT_SIDES, LONGEST = (400, 500, 600), 4200  # to which an image is resized before it is cropped
CROP = (384, 600)  # smallest and largest side of a crop


class _Object(NamedTuple):
    """One annotation."""

    label: int  # 1..K
    crowd: bool
    bbox: list[float]  # x, y, width, height, as in the file
    area: float
    runs: bytes | None  # the mask as compressed run lengths: a tenth of the memory that polygons take as Python lists
    box: tuple[float, ...] | None  # x1, y1, x2, y2 within the image; None for what had to be dropped


class _Image(NamedTuple):
    """One image and its objects."""

    id: int
    path: Path
    size: tuple[int, int]  # width, height that the JSON says
    objects: list[_Object]


class COCOInstances(Dataset):
    """Images, boxes and masks of one split of a COCO-shaped folder.

    Item ``i`` is an image, float (3, H, W), RGB in 0..1, and a dict of

    - ``boxes``, float32 (N, 4): ``x1, y1, x2, y2`` in pixels, from the JSON's ``bbox``;
    - ``labels``, int64 (N,): 1..K, positions in ``classes`` plus one;
    - ``masks``, uint8 (N, H, W): 1 on the object, else 0;
    - ``image_id``, the JSON's integer, and ``file``, the image's path as text.

    Crowds are no targets, as is usual in training; the metric knows of them. Boxes of zero area, boxes outside their
    image and objects with an empty mask are dropped, boxes that reach out are cut, exchanged corners are swapped; one
    warning counts them, and the boxes that do not fit their masks. The metric asks for all that the file has, as COCO's
    own tool does. If the JSON gives the size that an image has after EXIF's rotation, the rotation is applied, and if
    it gives the size of the pixels as stored, it is not.

    With ``boxes_only`` the file needs no masks. Items are then those of
    :class:`e3va_lite.datasets.voc.VOCDetection`: no ``masks``, and ``difficult``, bool (N,), which is true for crowds;
    these are left out with ``train``. ``target(i)`` is the target without the image.

    Attributes:
        classes: Names, in the order of the labels.
        category_ids: The JSON's ids in the same order: a category's way back from its label.

    Args:
        root: The folder.
        split: ``train2017``, for example; it stands for ``{split}`` in the next two.
        images: Folder of the images below ``root``; ``file_name`` is looked for in it.
        annotations: The JSON file below ``root``.
        classes: Names of the categories in the order of the labels. Without: all of the file, by their ids. Give
            another split ``classes=train_set.classes``.
        train: Mirror half of the images.
        strict: Raise an error where there would be the warning.
        crop: With ``train``, crop half of the images too.
        boxes_only: Do without masks.
        drop_others: Leave out objects of classes that are not in ``classes``, instead of raising an error.
        limits: Of the images' sizes.

    Raises:
        InputError: For a file or entry that is missing or cannot be used, or nothing to train on; for an image that is
            damaged, has more than 8 bits per channel or another size than the JSON says when it is loaded.
    """

    def __init__(
        self,
        root: Path | str,
        split: str,
        *,
        images: str = "{split}",
        annotations: str = "annotations/instances_{split}.json",
        classes: Sequence[str] | None = None,
        train: bool = False,
        strict: bool = False,
        crop: bool = False,
        boxes_only: bool = False,
        drop_others: bool = False,
        limits: Limits = LIMITS,
    ) -> None:
        file = _File(Path(root), split, annotations, classes, boxes_only, drop_others, limits)
        file.walk(Path(root) / images.replace("{split}", split))
        for problem in file.problems:
            if problem.fatal:
                raise InputError(f"{problem.kind}, first {problem.where}: 'e3va data check' lists all to be corrected.")
        self.classes, self.category_ids = file.classes, file.category_ids()
        self.train, self.crop, self.boxes_only, self.limits = train, crop, boxes_only, limits
        self._images = list(file.images.values())
        notes = counted(file.problems, WARNED)
        if notes and strict:
            raise InputError(f"in '{file.path}', {'; '.join(notes)}. Correct the file, or go without strict.")
        if dropped := sum(count for (_, reason), count in file.left_out.items() if reason == "other classes"):
            notes.append(f"objects of other classes, dropped: {dropped}")
        if train:
            notes += file.contents().require_something_to_learn(f"'{file.path}'")
        if notes:
            warnings.warn(f"in '{file.path}', {'; '.join(notes)}", stacklevel=2)

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> tuple[Tensor, dict]:
        image = self._images[index]
        pixels = torch.from_numpy(_pixels(image, self.limits)).permute(2, 0, 1).contiguous().float() / 255
        target = self.target(index)
        if not self.boxes_only:
            target["masks"] = torch.from_numpy(_masks(self._targets(image), *image.size))
        return augment(pixels, target, self.crop) if self.train else (pixels, target)

    def target(self, index: int) -> dict:
        image = self._images[index]
        objects = self._targets(image)
        difficult = {"difficult": torch.tensor([thing.crowd for thing in objects], dtype=torch.bool)}
        return {
            "boxes": torch.tensor([thing.box for thing in objects], dtype=torch.float32).reshape(-1, 4),
            "labels": torch.tensor([thing.label for thing in objects], dtype=torch.int64),
            **(difficult if self.boxes_only else {}),
            "image_id": image.id,
            "file": str(image.path),
        }

    def _targets(self, image: _Image) -> list[_Object]:
        crowds = self.boxes_only and not self.train
        return [thing for thing in image.objects if thing.box is not None and (crowds or not thing.crowd)]

    def ground_truth(self) -> dict:
        """The split as COCO's own JSON has it, with crowds, for COCO's own tool.

        Objects are numbered from 1, since the tool takes an object with the id 0 for "nothing found".
        """
        numbers = itertools.count(1)
        return {
            "info": {},
            "images": [{"id": image.id, "width": image.size[0], "height": image.size[1]} for image in self._images],
            "categories": [{"id": i, "name": name} for i, name in zip(self.category_ids, self.classes, strict=True)],
            "annotations": [
                {
                    "id": next(numbers),
                    "image_id": image.id,
                    "category_id": self.category_ids[thing.label - 1],
                    "bbox": thing.bbox,
                    "area": thing.area,
                    "iscrowd": int(thing.crowd),
                    "segmentation": None if thing.runs is None else _rle(thing.runs, *image.size),
                }
                for image in self._images
                for thing in image.objects
            ],
        }


def average_precision(dataset: COCOInstances, results: list[dict], kind: str) -> dict:
    """COCO's metric by COCO's own tool, over exactly the images of the dataset.

    Args:
        dataset: With the truth.
        results: In COCO's result format, all images in one list: dicts of ``image_id``, ``category_id`` (the JSON's),
            ``bbox`` (x, y, width, height), ``score`` and ``segmentation`` (compressed run lengths).
        kind: ``bbox`` or ``segm``.

    Returns:
        ``ap``, ``ap50``, ``ap75``, ``ap_small``, ``ap_medium``, ``ap_large``, and ``by_class``, the ap by name; None
        where there is no object to be found.
    """
    if kind == "segm":  # else the tool would take the area of an object, small or large, from its box
        results = [{key: value for key, value in result.items() if key != "bbox"} for result in results]
    truth, found = COCO(), COCO()
    with contextlib.redirect_stdout(io.StringIO()):
        truth.dataset = dataset.ground_truth()
        truth.createIndex()
        if results:  # an empty list is more than loadRes can bear
            found = truth.loadRes([dict(result) for result in results])
        run = COCOeval(truth, found, kind)
        # COCO's metric looks at the best hundred of an image, unless a detector was asked for more.
        run.params.maxDets[-1] = max(100, *Counter(result["image_id"] for result in results).values(), 0)
        run.evaluate()
        run.accumulate()
        run.summarize()
    names = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
    precision = run.eval["precision"][:, :, :, 0, -1]  # (IoU, recall, class) for all areas and 100 detections
    by_id = dict(zip(run.params.catIds, precision.mean(axis=(0, 1)), strict=True))
    by_class = {name: _plain(by_id[i]) for name, i in zip(dataset.classes, dataset.category_ids, strict=True)}
    run.stats[0] = precision[precision > -1].mean() if (precision > -1).any() else -1  # pycocotools has it of 100 only
    return {**{name: _plain(value) for name, value in zip(names, run.stats, strict=False)}, "by_class": by_class}


def _plain(value: float) -> float | None:
    return None if value < 0 else round(float(value), 4)  # -1 is COCO's "undefined"


# Augmentation --------------------------------------------------------------------------------------------------------


def augment(image: Tensor, target: dict, crop: bool) -> tuple[Tensor, dict]:
    """Mirror half of the images; with ``crop``, resize and crop half of them, as DETR does.

    Args:
        image: (3, H, W).
        target: With ``boxes`` (N, 4) and ``masks`` (N, H, W).
    """
    if torch.rand(()) < 0.5:
        image, target = mirror(image, target)
    if crop and torch.rand(()) < 0.5:
        short = SHORT_SIDES[int(torch.randint(len(SHORT_SIDES), ()))]
        image, target = _cropped(*_resized(image, target, short))
    return image, target


def _resized(image: Tensor, target: dict, short: int) -> tuple[Tensor, dict]:
    """To a short side of ``short`` pixels, unless the long one then exceeds the limit; the ratio stays."""
    height, width = image.shape[-2:]
    factor = min(short / min(height, width), LONGEST / max(height, width))
    size = [max(1, round(height * factor)), max(1, round(width * factor))]
    scale = torch.tensor([size[1] / width, size[0] / height] * 2)
    return F.interpolate(image[None], size, mode="bilinear", align_corners=False)[0], {
        **target,
        "boxes": target["boxes"] * scale,
        "masks": F.interpolate(target["masks"][:, None], size, mode="nearest-exact")[:, 0],
    }


def _cropped(image: Tensor, target: dict) -> tuple[Tensor, dict]:
    """A random part of the image, its sides drawn one by one; objects without a pixel in it are gone."""
    sides, places = [], []
    for length in image.shape[-2:]:
        least, most = (min(length, limit) for limit in CROP)
        sides.append(int(torch.randint(least, most + 1, ())))
        places.append(int(torch.randint(length - sides[-1] + 1, ())))
    (height, width), (top, left) = sides, places
    window = (..., slice(top, top + height), slice(left, left + width))
    low, high = torch.zeros(4), torch.tensor([width, height] * 2)
    boxes = (target["boxes"] - torch.tensor([left, top] * 2)).clamp(low, high)
    masks = target["masks"][window]
    kept = masks.flatten(1).any(1).bool() & (boxes[:, 2:] - boxes[:, :2] >= SMALLEST_SIDE).all(1)
    new = {"boxes": boxes[kept], "labels": target["labels"][kept], "masks": masks[kept].contiguous()}
    return image[window].contiguous(), {**target, **new}


# Reading -------------------------------------------------------------------------------------------------------------


def find_problems(recipe, root: Path | str, split: str, boxes_only: bool = False) -> Findings:
    """Everything that is wrong with the files of a split, every image read to its end; and what the split holds.

    Without ``recipe.classes``, the classes have to be those of the training split.
    """
    classes, source = recipe.classes, "of the recipe"
    if classes is None and split != recipe.train_split:
        with contextlib.suppress(InputError):  # the training split's own check says what is wrong there
            classes = category_names(root, recipe.train_split, recipe.annotations)
            source = f"of split '{recipe.train_split}'"
    limits = Limits(recipe.max_megapixels, recipe.max_size)
    folder = Path(root) / recipe.images.replace("{split}", split)
    try:
        drop_others = recipe.classes is not None
        file = _File(Path(root), split, recipe.annotations, classes, boxes_only, drop_others, limits)
        file.walk(folder)
    except InputError as error:
        return Findings([Problem("splits that cannot be used", str(error), True)])
    problems = list(file.problems)
    for image in tqdm(file.images.values(), f"check {split}", unit="image", delay=3):
        if os.path.isfile(image.path):  # else it is among the problems already
            problems += _image_problems(image, limits)
        if not image.objects:
            problems.append(Problem("images without objects", str(image.path), False))
        things = ((tuple(thing.bbox), thing.label) for thing in image.objects)
        problems += repeated("objects annotated twice", ((thing, f"{image.path}, box {thing[0]}") for thing in things))
    problems += repeated("images listed twice", ((image.path, str(image.path)) for image in file.images.values()))
    if not any(image.objects for image in file.images.values()):
        problems.append(Problem("annotation files without objects", str(file.path), False))
    contents = file.contents(source if classes is not None else "categories of the file, by their ids")
    contents.without_annotation = _unnamed(Path(root), folder, recipe.annotations, {*contents.images})
    return Findings(problems, contents)


def _image_problems(image: "_Image", limits: Limits) -> list[Problem]:
    try:
        header = read_header(image.path, limits, decode=True)
    except BadFile as error:
        return [error.problem]
    problems = harmless_findings(header)
    if header.size != image.size and not header.turned(image.size):
        sizes = "{}x{}, not {}x{}".format(*header.size, *image.size)
        problems.append(Problem("images of another size than their annotation says", f"{image.path} ({sizes})", True))
    return problems


def _unnamed(root: Path, folder: Path, annotations: str, named: set[Path]) -> list[Path]:
    """Image files in a folder that none of the annotation files names."""
    left = {p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p not in named}
    for path in sorted(root.glob(annotations.replace("{split}", "*"))) if left else ():
        with contextlib.suppress(InputError):
            entries = read_content(path)["images"]
            left -= {folder / str(entry.get("file_name")) for entry in entries if isinstance(entry, dict)}
    return sorted(left)


def category_names(root: Path | str, split: str, annotations: str) -> list[str]:
    """The classes of a split, without a look at its images and objects.

    Raises:
        InputError: If there is no such file, or nothing usable in it.
    """
    return _File(Path(root), split, annotations, None).classes


class _File:
    """One annotation file, walked through from the categories to the objects; what is wrong lands in ``problems``."""

    def __init__(
        self,
        root: Path,
        split: str,
        annotations: str,
        classes: Sequence[str] | None,
        boxes_only: bool = False,
        drop_others: bool = False,
        limits: Limits = LIMITS,
    ) -> None:
        self.path = _annotation_file(root, split, annotations)
        self.boxes_only, self.drop_others, self.limits = boxes_only, drop_others, limits
        self.problems: list[Problem] = []
        self.left_out: Counter = Counter()
        self.groups: set[str] = set()
        self.content = read_content(self.path)
        self.names = self._categories(self.content["categories"])
        self.classes = list(classes) if classes is not None else list(dict.fromkeys(self.names.values()))
        if len(set(self.classes)) < len(self.classes) or not self.classes:
            raise InputError(f"classes {', '.join(self.classes) or '(none)'} for '{self.path}': give every class once.")
        self.labels = {name: label for label, name in enumerate(self.classes, start=1)}
        self.images: dict[int, _Image] = {}
        self.seen: set[int] = set()

    def walk(self, folder: Path) -> None:
        """Read images, which lie in ``folder``, and objects; the content itself is not needed any more then."""
        self.images = self._images(self.content["images"], folder)
        bar = tqdm(self.content["annotations"], f"check {self.path.name}", unit="object", delay=3)
        for place, entry in enumerate(bar):
            self._object(place, entry)
        del self.content

    def category_ids(self) -> list[int]:
        """The ids of ``classes``; one that the file does not have gets a new id, so that it can be detected in vain."""
        ids = {name: number for number, name in self.names.items()}
        new = itertools.count(max(ids.values(), default=0) + 1)
        return [ids[name] if name in ids else next(new) for name in self.classes]

    def contents(self, source: str = "as given") -> Contents:
        """What the split holds, after the walk."""
        taught = Counter(
            self.classes[thing.label - 1]
            for image in self.images.values()
            for thing in image.objects
            if thing.box is not None and not thing.crowd
        )
        hint = ""
        if any(reason == EMPTY for _, reason in self.left_out) and not self.boxes_only:
            hint = ": boxes without masks can train a RetinaNet, with 'e3va train coco-boxes'"
        images = [image.path for image in self.images.values()]
        return Contents(images, self.classes, source, taught, self.left_out, self.groups & {*self.classes}, hint=hint)

    def _note(self, kind: str, where: str, fatal: bool = False) -> None:
        self.problems.append(Problem(kind, where, fatal))

    def _fields(self, what: str, place: int, entry: object, **kinds: Callable) -> tuple | None:
        """The values of an entry, each as its kind reads it; None, and a problem, if one cannot be read."""
        values = [kind(entry.get(name)) if isinstance(entry, dict) else None for name, kind in kinds.items()]
        if None not in values:
            return tuple(values)
        name = list(kinds)[values.index(None)]
        number = entry.get("id") if isinstance(entry, dict) else None
        which = f"number {place + 1} of the list" if number is None else f"id {number}"
        self._note(f"{what} whose '{name}' is missing or unusable", f"{which} in '{self.path}'", True)
        return None

    def _categories(self, entries: list) -> dict[int, str]:
        """Names by id, in the order of the ids."""
        names: dict[int, str] = {}
        for place, entry in enumerate(entries):
            if values := self._fields("categories", place, entry, id=whole, name=_text):
                number, name = values
                where = f"id {number}, '{name}', in '{self.path}'"
                if number in names:
                    self._note("categories with an id that another one has", where, True)
                elif name in names.values():
                    self._note("categories with a name that another one has", where, True)
                names.setdefault(number, name)
                self.groups.add(str(entry.get("supercategory")))
        if not names:
            raise InputError(f"'{self.path}' has no categories: add them.")
        return dict(sorted(names.items()))

    def _images(self, entries: list, folder: Path) -> dict[int, _Image]:
        """Images by id, as the file lists them."""
        images: dict[int, _Image] = {}
        for place, entry in enumerate(entries):
            kinds = {"id": whole, "file_name": _text, "width": _length, "height": _length}
            if values := self._fields("images", place, entry, **kinds):
                number, name, *size = values
                path = folder / name
                if number in images:
                    self._note("images with an id that another one has", f"id {number}, '{path}'", True)
                    continue
                images[number] = _Image(number, path, tuple(size), [])
                if not os.path.isfile(path):
                    self._note("missing images", str(path), True)
                if min(size) < SMALLEST:
                    where = f"{path} ({size[0]}x{size[1]} in '{self.path}')"
                    self._note(f"images smaller than {SMALLEST}x{SMALLEST}", where, True)
                elif max(size) >= self.limits.ratio * min(size):
                    self._note("images too thin to be resized", f"{path} ({size[0]}x{size[1]})", True)
        if not entries:
            raise InputError(f"'{self.path}' lists no images: choose another split.")
        return images

    def _object(self, place: int, entry: object) -> None:
        kinds = {"id": whole, "image_id": whole, "category_id": whole, "bbox": _box}
        if not self.boxes_only:
            kinds["segmentation"] = _shape
        values = self._fields("annotations", place, entry, **kinds)
        if values is None:
            return
        identity, image_id, category_id, bbox, *shape = values
        where = f"annotation {identity} in '{self.path}'"
        if identity in self.seen:
            self._note("annotations with an id that another one has", where, True)
        self.seen.add(identity)
        image, name = self.images.get(image_id), self.names.get(category_id)
        if image is None:
            self._note("annotations of an unknown image", f"{where} (image {image_id})", True)
        if name is None:
            self._note("annotations of an unknown category", f"{where} (category {category_id})", True)
        elif name not in self.labels and self.drop_others:
            self.left_out[name, "other classes"] += 1
        elif name not in self.labels:
            known = ", ".join(self.classes[:5]) + (", ..." if len(self.classes) > 5 else "")
            self._note("annotations of an unknown class", f"{where} ('{name}'; known are {known})", True)
        if image is None or name not in self.labels:
            return
        where = f"annotation {identity} of {image.path.name}"
        runs = self._runs(*shape, image, where) if shape else None
        if shape and runs is None:
            return
        crowd = self._crowd(entry.get("iscrowd"), where)
        bbox = self._swapped(bbox, where)
        pixels = None if runs is None else int(coco_mask.area(_rle(runs, *image.size)))
        area = number(entry.get("area"))
        if area is None:
            area = float(bbox[2] * bbox[3] if pixels is None else pixels)
            self._note("annotations without 'area', counted from the mask", where)
        box = None if crowd and not self.boxes_only else self._inside(name, bbox, pixels, image, where)
        if crowd:
            self.left_out[name, "crowds"] += 1
        elif pixels and box is not None:
            self._compare(bbox, runs, image, where)
        elif self.boxes_only and box is not None:
            (x, y, w, h), (width, height) = bbox, image.size
            if (x + w > width + 1 or y + h > height + 1) and x < w <= width + 1 and y < h <= height + 1:
                self._note(CORNERS, where)
        image.objects.append(_Object(self.labels[name], crowd, bbox, area, runs, box))

    def _crowd(self, flag: object, where: str) -> bool:
        if flag is None:
            self._note("annotations without 'iscrowd', taken for single objects", where)
        elif truth(flag) is None:
            self._note(UNCLEAR, f"{where} ({flag!r})")
        return truth(flag) is True

    def _swapped(self, bbox: list[float], where: str) -> list[float]:
        """The box with a width and height that are not negative."""
        x, y, w, h = bbox
        if min(w, h) >= 0:
            return bbox
        self._note(SWAPPED, where)
        return [min(x, x + w), min(y, y + h), abs(w), abs(h)]

    def _inside(
        self, name: str, bbox: list[float], pixels: int | None, image: _Image, where: str
    ) -> tuple[float, ...] | None:
        """The box as training sees it, if it does."""
        x, y, w, h = bbox
        sides = (x, y, x + w, y + h)
        wrong = ZERO if min(w, h) < SMALLEST_SIDE else ""
        box, kind = clean_box(sides, image.size, RELATIVE if is_relative(*bbox, *sides) else wrong)
        if box is not None and pixels == 0:
            box, kind = None, EMPTY
        if kind:
            self._note(kind, where)
        if box is None:
            self.left_out[name, kind] += 1
        return box

    def _compare(self, bbox: list[float], runs: bytes, image: _Image, where: str) -> None:
        """Note a box that overlaps little with its mask's, and what would make it fit."""
        x, y, w, h = bbox
        mask = coco_mask.toBbox(_rle(runs, *image.size)).tolist()

        def overlap(*box: float) -> float:
            return float(coco_mask.iou([list(box)], [mask], [0])[0, 0])

        if overlap(x, y, w, h) >= 0.5:
            return
        if w > x and h > y and overlap(x, y, w - x, h - y) >= 0.8:
            self._note(CORNERS, where)
        elif overlap(y, x, h, w) >= 0.8:
            self._note(EXCHANGED, where)
        elif overlap(x, y, w, h) < 0.1:
            self._note(APART, where)

    def _runs(self, shape: list | dict, image: _Image, where: str) -> bytes | None:
        """A mask as compressed run lengths; None, and a problem, if the segmentation makes no sense."""
        width, height = image.size
        if isinstance(shape, list):
            polygons = [points for points in shape if len(points) >= 6]
            if len(polygons) < len(shape):
                self._note(SHORT, where)
            if not polygons:
                shape = {"size": [height, width], "counts": [width * height]}  # nothing but background
                return coco_mask.frPyObjects(shape, height, width)["counts"]
            return coco_mask.merge(coco_mask.frPyObjects(polygons, height, width))["counts"]
        if not isinstance(shape["size"], list) or [whole(side) for side in shape["size"]] != [height, width]:
            self._note("masks of another size than their image", f"{where} {shape['size']}", True)
            return None
        counts = shape["counts"]
        lengths = _lengths(counts) if isinstance(counts, str) else [whole(count) for count in counts]
        # pycocotools would fill what run lengths leave open with whatever lies in memory.
        if not all(n is not None and n >= 0 for n in lengths) or sum(lengths) != width * height:
            self._note("masks whose run lengths do not fill their image", where, True)
            return None
        return coco_mask.frPyObjects({"size": [height, width], "counts": lengths}, height, width)["counts"]


def _annotation_file(root: Path, split: str, annotations: str) -> Path:
    path = root / annotations.replace("{split}", split)
    if not path.is_file():
        before, _, after = annotations.partition("{split}")
        near = sorted(root.glob(f"{before}*{after}")) if after and root.is_dir() else []
        there = [other.relative_to(root).as_posix()[len(before) : -len(after)] for other in near]
        hint = (
            f"choose a split out of {', '.join(there)}" if there else "give a COCO-shaped folder, or its 'annotations'"
        )
        raise InputError(f"there is no '{path}': {hint}.")
    return path


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


def _lengths(counts: str) -> list[int]:
    """The run lengths in COCO's compressed text; a list that fits no image if it is none.

    Five bits of a number per character, the lowest first; 32 says that more follow, 16 in the last one that the number
    is negative. From the fourth number on it is what to add to the last but one.
    """
    lengths: list[int] = []
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
            lengths.append(value + (lengths[-2] if len(lengths) > 2 else 0))
            value = shift = 0
    return lengths if not shift else []


def _rle(runs: bytes, width: int, height: int) -> dict:
    return {"size": [height, width], "counts": runs}


def _masks(objects: list[_Object], width: int, height: int) -> np.ndarray:
    """uint8 (N, H, W)."""
    if not objects:
        return np.zeros((0, height, width), np.uint8)
    decoded = coco_mask.decode([_rle(thing.runs, width, height) for thing in objects])  # (H, W, N)
    return np.ascontiguousarray(decoded.transpose(2, 0, 1))


def _pixels(image: _Image, limits: Limits) -> np.ndarray:
    """uint8 (H, W, 3), of the size that the JSON says."""
    pixels = read_image(image.path, image.size, limits)
    if pixels.shape[:2] != image.size[::-1]:
        sizes = "is {}x{}, its annotation says {}x{}".format(*pixels.shape[1::-1], *image.size)
        raise InputError(f"image '{image.path}' {sizes}: correct one of the two.")
    return pixels
