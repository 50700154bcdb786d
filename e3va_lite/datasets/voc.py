"""Pascal VOC's layout, for any list of classes: the real devkit, people's own folders of that shape, ``shapes``.

    ROOT/ImageSets/Main/SPLIT.txt   one image's name per line, without suffix
    ROOT/Annotations/NAME.xml       the objects and their boxes
    ROOT/JPEGImages/NAME.jpg        the image (other suffixes work too)

Everything that can be known before training is checked once, when a dataset is made.
"""

import copy
import math
import os
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from ..errors import InputError, unknown
from .check import SMALLEST, THINNEST, UNREADABLE, Problem, image_problems, repeated

VOC_CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
SUFFIXES = (".jpg", ".JPG", ".jpeg", ".JPEG", ".png", ".PNG", ".bmp", ".tif", ".tiff")
RESIZED = "images of another size than their annotation says"


class _Record(NamedTuple):
    """One image of a split, as its files have it."""

    image: Path
    annotation: Path
    size: tuple[int, int]  # width, height of the image
    resized: bool  # the annotation has another size
    names: list[str]  # (N,)
    boxes: np.ndarray  # float64 (N, 4), x1, y1, x2, y2, half-open
    difficult: list[bool]  # (N,)


class VOCDetection(Dataset):
    """Images and boxes of one split of a VOC-shaped folder.

    Item ``i`` is an image, float (3, H, W), RGB in 0..1, and a dict of

    - ``boxes``, float32 (N, 4): ``x1, y1, x2, y2`` in pixels, continuous and half-open. The file's ``xmin, ymin, xmax,
      ymax`` count pixels from 1 and include the last: they become ``xmin - 1, ymin - 1, xmax, ymax``;
    - ``labels``, int64 (N,): 1..K, positions in ``classes`` plus one;
    - ``difficult``, bool (N,);
    - ``image_id``, the image's name in the split, and ``file``, its path as text.

    ``target(i)`` is the dict alone, without reading the image. Boxes of zero area (``xmax`` not above ``xmin``, or
    ``ymax`` not above ``ymin``) and boxes outside their image are dropped, boxes that reach out of it are cut; one
    warning counts them, and the images that have another size than their annotation says. EXIF's orientation is not
    applied: VOC's tools ignore it, and its boxes refer to the pixels as stored.

    Args:
        root: A folder with ``ImageSets``, or the folder around it, as VOCdevkit is.
        split: Name of a list in ``ImageSets/Main``. Several are joined by ``+``; a year in front chooses the folder of
            a devkit that holds several, as in ``2007_trainval+2012_trainval``.
        classes: Their names, in the order of the labels. Without: VOC's twenty if no object has another name, else the
            names found in this split, sorted. Give another split ``classes=train_set.classes``.
        strict: Raise an error where there would be the warning.

    Raises:
        InputError: For a missing or empty split, a missing or unreadable file, an image smaller than 32 pixels, an
            incomplete annotation, a class that is not in the list; for an image that ends early when it is loaded.
    """

    def __init__(
        self, root: Path | str, split: str, classes: Sequence[str] | None = None, strict: bool = False
    ) -> None:
        bar = tqdm(dict.fromkeys(_listed(root, split)), desc=f"check {split}", unit="image", delay=3)
        records = [_read(folder, name) for folder, name in bar]
        self.classes = _class_list(classes, records, split, root)
        for record in records:
            for name in record.names:
                if name not in self.classes:
                    raise InputError(f"'{record.annotation}': {unknown('class', name, self.classes)}")
        self.images = [record.image for record in records]
        self._targets, problems = [], {}
        for record in records:
            boxes, keep, found = _mend(record)
            labels = torch.tensor([self.classes.index(name) + 1 for name in record.names], dtype=torch.int64)
            target = {
                "boxes": torch.from_numpy(boxes[keep].astype(np.float32)),
                "labels": labels[torch.from_numpy(keep)],
                "difficult": torch.from_numpy(np.array(record.difficult, bool)[keep]),
                "image_id": record.annotation.stem,
                "file": str(record.image),
            }
            self._targets.append(target)
            for problem, _ in found:
                problems.setdefault(problem, []).append(record.annotation.name)
        if problems:
            counts = "; ".join(f"{what}: {len(files)} ({_first(files)})" for what, files in problems.items())
            message = f"in split '{split}' of '{root}', {counts}"
            if strict:
                raise InputError(f"{message}. Correct the files, or go without strict.")
            warnings.warn(message, stacklevel=2)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, dict]:
        try:
            with Image.open(self.images[index]) as image:
                pixels = np.array(image.convert("RGB"))
        except UNREADABLE as error:
            raise InputError(f"image '{self.images[index]}' cannot be read ({error}): replace it.") from None
        return torch.from_numpy(pixels).permute(2, 0, 1).contiguous().float() / 255, self.target(index)

    def target(self, index: int) -> dict:
        return copy.deepcopy(self._targets[index])


def find_problems(root: Path | str, split: str, classes: Sequence[str] | None = None) -> list[Problem]:
    """Everything that is wrong with the files of a split, every image read to its end; arguments as for the dataset."""
    try:
        listed = _listed(root, split)
    except InputError as error:
        return [Problem("splits that cannot be used", str(error), True)]
    problems = repeated("images listed twice", ((item, f"'{item[1]}' in split '{split}'") for item in listed))
    records = []
    for folder, name in tqdm(dict.fromkeys(listed), f"check {split}", unit="image", delay=3):
        path = _image_path(folder, name)
        found, record = _look(path, folder / "Annotations" / f"{name}.xml")
        records.append(record)
        problems += image_problems(path) + found
    if not any(record.names for record in records):
        problems.append(Problem("splits without objects", f"'{split}'", False))
    try:
        classes = _class_list(classes, records, split, root)
    except InputError as error:
        return [*problems, Problem("classes that cannot be used", str(error), True)]
    for record in records:
        for name in dict.fromkeys(record.names):
            if name not in classes:
                where = f"{record.annotation} ({unknown('class', name, classes)})"
                problems.append(Problem("objects of an unknown class", where, True))
    return problems


def class_names(root: Path | str, split: str) -> list[str]:
    """The classes of a split's objects, as :class:`VOCDetection` finds them; what cannot be read has none.

    Raises:
        InputError: For a split that is missing or has no objects.
    """
    records = [
        _look(None, folder / "Annotations" / f"{name}.xml")[1] for folder, name in dict.fromkeys(_listed(root, split))
    ]
    return _discover(records, split, root)


def _listed(root: Path | str, split: str) -> list[tuple[Path, str]]:
    """The images of a split, as its lists have them."""
    names = [item for part in split.split("+") for item in _image_set(Path(root), part)]
    if not names:
        raise InputError(f"split '{split}' of '{root}' lists no images: choose another split.")
    return names


def _image_set(root: Path, part: str) -> list[tuple[Path, str]]:
    """The images of one list as (folder, name)."""
    around = sorted(path.parent.parent for path in root.glob("*/ImageSets/Main"))
    folders = [root] if (root / "ImageSets/Main").is_dir() else around
    if not folders:
        raise InputError(f"'{root}' has no ImageSets/Main: give a VOC-shaped folder, or the VOCdevkit around it.")
    year, _, rest = part.partition("_")
    if of_year := [folder for folder in folders if folder.name == f"VOC{year}"]:
        folders, part = of_year, rest
    if len(folders) > 1:
        names = ", ".join(folder.name for folder in folders)
        raise InputError(f"'{root}' holds {names}: give one of them, or put the year before the split: 2007_{part}.")
    path = folders[0] / "ImageSets/Main" / f"{part}.txt"
    if not path.is_file():
        there = sorted(other.stem for other in path.parent.glob("*.txt"))
        there = [name for name in there if "_" not in name] or there  # not the devkit's lists per class
        raise InputError(f"there is no '{path}': choose a split out of {', '.join(there) or '(none there)'}.")
    lines = path.read_text(encoding="utf-8-sig", errors="replace").splitlines()
    return [(folders[0], line.strip()) for line in lines if line.strip()]


def _read(folder: Path, name: str) -> _Record:
    """One image's header and annotation; the split's name counts, whatever the XML's ``filename`` and ``size`` say."""
    image, annotation = _image_path(folder, name), folder / "Annotations" / f"{name}.xml"
    size, tree = _size(image), _tree(annotation)
    return _record(image, annotation, size, tree, [_object(item, annotation) for item in tree.findall("object")])


def _look(image: Path | None, annotation: Path) -> tuple[list[Problem], _Record]:
    """As :func:`_read`, but go on after everything that is wrong with the annotation; without an image: names only."""
    problems: list[Problem] = []
    objects = []
    try:
        tree = _tree(annotation)
    except InputError as error:
        kind = "annotations that are not valid XML" if os.path.isfile(annotation) else "missing annotations"
        return [Problem(kind, str(error), True)], _Record(image, annotation, (0, 0), False, [], np.zeros((0, 4)), [])
    for item in tree.findall("object"):
        try:
            objects.append(_object(item, annotation))
        except InputError as error:
            problems.append(Problem("objects without a name or a whole box", str(error), True))
    try:
        size = (0, 0) if image is None else _size(image)
    except InputError:  # an image's own problems are found elsewhere
        size = (0, 0)
    record = _record(image, annotation, size, tree, objects)
    if size != (0, 0):
        places = [f"{annotation} (object {number})" for number in range(1, len(objects) + 1)]
        for kind, index in _mend(record)[2]:
            problems.append(Problem(kind, str(annotation) if kind == RESIZED else places[index], False))
        things = [(name, tuple(box)) for name, box in zip(record.names, record.boxes.tolist(), strict=True)]
        problems += repeated("objects annotated twice", zip(things, places, strict=True))
    if not tree.findall("object"):
        problems.append(Problem("images without objects", str(annotation), False))
    return problems, record


def _image_path(folder: Path, name: str) -> Path:
    """The image of that name, with whatever suffix it has; with the first one if it is not there."""
    candidates = [folder / "JPEGImages" / f"{name}{suffix}" for suffix in SUFFIXES]
    return next((path for path in candidates if os.path.isfile(path)), candidates[0])


def _size(image: Path) -> tuple[int, int]:
    """Width and height of an image that can be used, as far as its header tells."""
    if not os.path.isfile(image):
        raise InputError(f"image '{image}' is missing: add it or remove it from the split.")
    try:
        with Image.open(image) as opened:
            size, mode = opened.size, opened.mode
    except UNREADABLE as error:
        raise InputError(f"image '{image}' cannot be read ({error}): replace it or remove it from the split.") from None
    if min(size) < SMALLEST:
        small = f"{size[0]}x{size[1]}, smaller than {SMALLEST}x{SMALLEST}"
        raise InputError(f"image '{image}' is {small}: enlarge it or remove it from the split.")
    if mode[0] in "IF":  # converting these to RGB would make nearly all of it white
        raise InputError(f"image '{image}' has more than 8 bits per channel: convert it to 8 bits.")
    return size


def _tree(annotation: Path) -> ET.Element:
    try:
        return ET.parse(annotation).getroot()
    except FileNotFoundError:
        raise InputError(f"annotation '{annotation}' is missing: add it or remove it from the split.") from None
    except (ET.ParseError, OSError, ValueError, LookupError) as error:
        raise InputError(f"annotation '{annotation}' is not valid XML ({error}): correct it.") from None


def _object(item: ET.Element, annotation: Path) -> tuple[str, list[float], bool]:
    """Name, box as in the file, and whether it is difficult."""
    # Only direct children: the parts of a person (VOC's "layout" task) have a name and a box of their own.
    box = [_number(item, f"bndbox/{side}", annotation) for side in ("xmin", "ymin", "xmax", "ymax")]
    difficult = (item.findtext("difficult") or "0").strip() not in ("0", "false", "False")
    return _text(item, "name", annotation), box, difficult


def _record(image: Path | None, annotation: Path, size: tuple[int, int], tree: ET.Element, objects: list) -> _Record:
    told = tuple((tree.findtext(f"size/{side}") or "0").strip() for side in ("width", "height"))
    return _Record(
        image,
        annotation,
        size,
        resized="0" not in told and told != (str(size[0]), str(size[1])),
        names=[name for name, _, _ in objects],
        boxes=np.array([box for _, box, _ in objects], float).reshape(-1, 4) - (1, 1, 0, 0),
        difficult=[difficult for _, _, difficult in objects],
    )


def _mend(record: _Record) -> tuple[np.ndarray, np.ndarray, list[tuple[str, int]]]:
    """Boxes cut (N, 4), which of them to keep (N,), and what had to be done: a phrase and the object's index each."""
    width, height = record.size
    cut = np.clip(record.boxes, 0, (width, height, width, height))
    # A box that is one pixel wide has x2 = x1 + 1, but nothing real is: annotators' slips are.
    empty = (record.boxes[:, 2:] - record.boxes[:, :2] <= 1).any(axis=1)
    outside = (cut[:, 2:] - cut[:, :2] < THINNEST).any(axis=1) & ~empty
    reaching = (np.abs(cut - record.boxes) >= 1).any(axis=1) & ~empty & ~outside
    found = {
        "boxes of zero area, dropped": empty,
        "boxes outside their image, dropped": outside,
        "boxes reaching out of their image, cut": reaching,
        RESIZED: [record.resized],
    }
    return cut, ~(empty | outside), [(what, i) for what, hits in found.items() for i, hit in enumerate(hits) if hit]


def _text(item: ET.Element, field: str, annotation: Path) -> str:
    text = (item.findtext(field) or "").strip()
    if not text:
        raise InputError(f"annotation '{annotation}' has an object without '{field}': add it.")
    return text


def _number(item: ET.Element, field: str, annotation: Path) -> float:
    text = _text(item, field, annotation)
    try:
        number = float(text)  # some of VOC2011's are not whole
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise InputError(f"annotation '{annotation}' has '{text}' as '{field}': put a number there.")
    return number


def _class_list(given: Sequence[str] | None, records: list[_Record], split: str, root: Path | str) -> list[str]:
    classes = list(given) if given is not None else _discover(records, split, root)
    if len(set(classes)) < len(classes) or not classes:
        raise InputError(f"classes {', '.join(classes) or '(none)'}: give every class once.")
    return classes


def _discover(records: list[_Record], split: str, root: Path | str) -> list[str]:
    found = {name for record in records for name in record.names}
    if not found:
        raise InputError(f"split '{split}' of '{root}' has no objects to learn the classes from: give classes.")
    return list(VOC_CLASSES) if found <= set(VOC_CLASSES) else sorted(found)


def _first(files: list[str]) -> str:
    names = list(dict.fromkeys(files))
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
