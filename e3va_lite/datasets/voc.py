"""Pascal VOC's layout, for any list of classes: the real devkit, people's own folders of that shape, ``shapes``.

    ROOT/ImageSets/Main/SPLIT.txt   one image's name per line, without suffix
    ROOT/Annotations/NAME.xml       the objects and their boxes
    ROOT/JPEGImages/NAME.jpg        the image (other suffixes work too)

Everything that can be known before training is checked once, when a dataset is made.
"""

import copy
import math
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

VOC_CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
SUFFIXES = (".jpg", ".JPG", ".jpeg", ".JPEG", ".png", ".PNG", ".bmp", ".tif", ".tiff")
SMALLEST = 32  # pixels, the coarsest stride of a Swin
UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)  # what Pillow says of broken files


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
    - ``image_id``, the image's name in the split.

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
        names = dict.fromkeys(item for part in split.split("+") for item in _image_set(Path(root), part))
        if not names:
            raise InputError(f"split '{split}' of '{root}' lists no images: choose another split.")
        bar = tqdm(names, desc=f"check {split}", unit="image", delay=3)
        records = [_read(folder, name) for folder, name in bar]
        self.classes = list(classes) if classes is not None else _discover(records, split, root)
        if len(set(self.classes)) < len(self.classes) or not self.classes:
            raise InputError(f"classes {', '.join(self.classes) or '(none)'}: give every class once.")
        for record in records:
            for name in record.names:
                if name not in self.classes:
                    raise InputError(f"'{record.annotation}': {unknown('class', name, self.classes)}")
        self.images = [record.image for record in records]
        self._targets, problems = [], {}
        for record in records:
            target, found = self._clean(record)
            self._targets.append(target)
            for problem in found:
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

    def _clean(self, record: _Record) -> tuple[dict, list[str]]:
        """The target of an image, and what had to be done to its boxes, a phrase each."""
        width, height = record.size
        cut = np.clip(record.boxes, 0, (width, height, width, height))
        # A box that is one pixel wide has x2 = x1 + 1, but nothing real is: annotators' slips are.
        empty = (record.boxes[:, 2:] - record.boxes[:, :2] <= 1).any(axis=1)
        outside = (cut[:, 2:] <= cut[:, :2]).any(axis=1) & ~empty
        reaching = (np.abs(cut - record.boxes) >= 1).any(axis=1) & ~empty & ~outside
        found = {
            "boxes of zero area, dropped": empty,
            "boxes outside their image, dropped": outside,
            "boxes reaching out of their image, cut": reaching,
            "images of another size than their annotation says": [record.resized],
        }
        keep = ~(empty | outside)
        labels = np.array([self.classes.index(name) + 1 for name in record.names], np.int64)
        target = {
            "boxes": torch.from_numpy(cut[keep].astype(np.float32)),
            "labels": torch.from_numpy(labels[keep]),
            "difficult": torch.from_numpy(np.array(record.difficult, bool)[keep]),
            "image_id": record.annotation.stem,
        }
        return target, [what for what, hits in found.items() for hit in hits if hit]


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
    candidates = [folder / "JPEGImages" / f"{name}{suffix}" for suffix in SUFFIXES]
    image = next((path for path in candidates if path.is_file()), None)
    if image is None:
        raise InputError(f"image '{candidates[0]}' is missing: add it or remove it from the split.")
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
    annotation = folder / "Annotations" / f"{name}.xml"
    try:
        tree = ET.parse(annotation).getroot()
    except FileNotFoundError:
        raise InputError(f"annotation '{annotation}' is missing: add it or remove it from the split.") from None
    except (ET.ParseError, OSError, ValueError) as error:
        raise InputError(f"annotation '{annotation}' is not valid XML ({error}): correct it.") from None
    told = tuple((tree.findtext(f"size/{side}") or "0").strip() for side in ("width", "height"))
    objects = tree.findall("object")
    # Only direct children: the parts of a person (VOC's "layout" task) have a name and a box of their own.
    sides = ("xmin", "ymin", "xmax", "ymax")
    boxes = [[_number(item, f"bndbox/{side}", annotation) for side in sides] for item in objects]
    return _Record(
        image,
        annotation,
        size,
        resized="0" not in told and told != (str(size[0]), str(size[1])),
        names=[_text(item, "name", annotation) for item in objects],
        boxes=np.array(boxes, float).reshape(-1, 4) - (1, 1, 0, 0),
        difficult=[(item.findtext("difficult") or "0").strip() not in ("0", "false", "False") for item in objects],
    )


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


def _discover(records: list[_Record], split: str, root: Path | str) -> list[str]:
    found = {name for record in records for name in record.names}
    if not found:
        raise InputError(f"split '{split}' of '{root}' has no objects to learn the classes from: give classes.")
    return list(VOC_CLASSES) if found <= set(VOC_CLASSES) else sorted(found)


def _first(files: list[str]) -> str:
    names = list(dict.fromkeys(files))
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
