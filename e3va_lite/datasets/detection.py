"""Images with objects in boxes: what the readers of VOC's and of COCO's layout share."""

import copy
import os
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
import torch
from pycocotools import mask as coco_mask
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from ..errors import InputError
from .augment import SMALLEST_SIDE, augment
from .check import Contents, Findings, Problem, Walk, counted
from .images import Limits, harmless_findings, read_header, read_image

ZERO = "boxes of zero area, dropped"
RELATIVE = "boxes with coordinates in 0..1 instead of pixels, dropped"
EMPTY = "objects without a pixel in their mask, dropped"
SWAPPED = "boxes with exchanged corners, swapped"
RESIZED = "images of another size than their annotation says"


class Thing(NamedTuple):
    """One object."""

    name: str  # of its class
    hard: bool  # VOC's difficult objects and COCO's crowds: nothing to learn from
    box: tuple[float, ...] | None  # x1, y1, x2, y2 within the image, half-open; None for what had to be dropped
    bbox: Sequence[float]  # as in the file
    area: float = 0.0
    runs: bytes | None = None  # the mask as compressed run lengths: a tenth of the memory of polygons as Python lists


class AnnotatedImage(NamedTuple):
    """One image and its objects."""

    id: int | str
    path: Path
    size: tuple[int, int] | None  # width, height, upright where the annotation means that; None if it is not known
    things: list[Thing]


class ObjectWalk(Walk):
    """The images and objects of a split; each layout has a walk of its own.

    Args:
        root: The folder.
        split: Its name.
        layout: Where the files are below the root.
        limits: Of the images' sizes; None to find out the classes alone.
        classes: As asked for; None for those that the files have.
        drop_others: Leave out objects of other classes; else they are errors.
        source: Where the classes come from, in words.

    Raises:
        InputError: For a split that is missing or empty, or classes that are not given once each.
    """

    def __init__(
        self,
        root: Path | str,
        split: str,
        layout: NamedTuple,
        limits: Limits | None,
        classes: Sequence[str] | None = None,
        drop_others: bool = False,
        source: str = "as given",
    ) -> None:
        super().__init__()
        self.root, self.split, self.layout, self.limits = Path(root), split, layout, limits
        self.images: list[AnnotatedImage] = []
        self.left_out: Counter = Counter()  # objects by (class, reason)
        self.warned: dict[str, None] = {}  # kinds of problems that a dataset warns of
        self.groups: set[str] = set()
        self.hint = ""
        if classes is not None and (len(set(classes)) < len(classes) or not classes):
            raise InputError(f"classes {', '.join(classes) or '(none)'}: give every class once, for {self}.")
        self.classes, self.source, self.drop_others = list(classes or ()), source, drop_others
        self.read(find_classes=classes is None)

    def __str__(self) -> str:
        return f"split '{self.split}' of '{self.root}'"

    def read(self, find_classes: bool) -> None:
        """Fill the attributes from the files; with ``find_classes``, those of the classes, too."""
        raise NotImplementedError

    def warn(self, kind: str, where: str) -> None:
        """Add a harmless problem that a dataset warns of."""
        self.note(kind, where)
        self.warned[kind] = None

    def contents(self) -> Contents:
        """What the split holds, after the walk."""
        things = (thing for image in self.images for thing in image.things)
        taught = Counter(thing.name for thing in things if thing.box is not None and not thing.hard)
        paths, groups = [image.path for image in self.images], self.groups & {*self.classes}
        return Contents(paths, self.classes, self.source, taught, self.left_out, groups, hint=self.hint)

    def clean(
        self, name: str, sides: Sequence[float], size: tuple[int, int], where: str, wrong: str = "", empty: bool = False
    ) -> tuple[float, ...] | None:
        """A box cut to its image; None, and an object left out, if it is to be dropped.

        Args:
            name: The object's class.
            sides: x1, y1, x2, y2 in pixels.
            size: Width and height of the image.
            where: The object's place.
            wrong: Says that the box cannot be used, by a reason; else empty.
            empty: The mask has no pixel.
        """
        box = tuple(float(min(max(side, 0), end)) for side, end in zip(sides, (*size, *size), strict=True))
        outside = min(box[2] - box[0], box[3] - box[1]) < SMALLEST_SIDE
        wrong = wrong or ("boxes outside their image, dropped" if outside else EMPTY if empty else "")
        if wrong:
            self.warn(wrong, where)
            self.left_out[name, wrong] += 1
            return None
        if max(abs(cut - side) for cut, side in zip(box, sides, strict=True)) >= 1:
            self.warn("boxes reaching out of their image, cut", where)
        return box

    def short(self, where: str) -> str:
        """A place as a dataset's warning names it."""
        return where

    def unnamed(self) -> list[Path]:
        """Image files that no annotation names."""
        raise NotImplementedError

    def count(self, image: AnnotatedImage) -> int:
        """The objects that a detector should be able to return for an image."""
        return len(image.things)


def is_relative(*sides: float) -> bool:
    """Whether a box, with its sides as in the file, seems to be given in shares of its image, not in pixels."""
    return max(sides) <= 1 and not all(float(side).is_integer() for side in sides)


class ObjectDataset(Dataset):
    """Images with boxes, and masks where the layout has them, of one split.

    Item ``i`` is an image, float (3, H, W), RGB in 0..1, and a dict of

    - ``boxes``, float32 (N, 4): ``x1, y1, x2, y2`` in pixels, continuous and half-open;
    - ``labels``, int64 (N,): 1..K, positions in ``classes`` plus one;
    - with masks ``masks``, uint8 (N, H, W): 1 on the object, else 0; crowds are no targets then;
    - without masks ``difficult``, bool (N,): VOC's difficult objects and COCO's crowds, left out with ``train``;
    - ``image_id``, what the layout calls the image, and ``file``, its path as text.

    ``target(i)`` is the dict without masks, for which the image is not read.

    Exchanged corners are swapped; boxes of zero area, boxes outside their image and objects with an empty mask are
    dropped, boxes that reach out of their image are cut; one warning counts them, and what else is suspicious. EXIF's
    orientation is applied if the annotation gives the size that the image then has, and not if it gives the size of the
    pixels as stored, to which VOC's and COCO's own tools refer.

    Both layouts have these arguments:

    Args:
        classes: Their names, in the order of the labels. Give another split ``classes=train_set.classes``.
        strict: Raise an error where there would be the warning.
        train: Mirror half of the images, and leave out what cannot be learned from.
        drop_others: Leave out objects of classes that are not in ``classes``, instead of raising an error.
        limits: Of the images' sizes.

    Raises:
        InputError: For a missing or empty split, a file or entry that is missing or cannot be used, a class that is not
            in the list, nothing to train on; when an item is loaded, for an image that cannot be used.
    """

    def __init__(
        self, walk: ObjectWalk, train: bool, strict: bool, masks: bool = False, crop: bool = False, zoom: bool = False
    ) -> None:
        if walk.errors:
            raise walk.errors[0]
        # Lists of tuples: tensors would travel to spawned workers as one open file each.
        self.classes, self.images = walk.classes, walk.images
        self.train, self.limits, self.masks, self.crop, self.zoom = train, walk.limits, masks, crop, zoom
        notes = counted(walk.problems, walk.warned, walk.short)
        if notes and strict:
            raise InputError(f"in {walk}, {'; '.join(notes)}. Correct the files, or go without strict.")
        if dropped := sum(count for (_, reason), count in walk.left_out.items() if reason == "other classes"):
            notes.append(f"objects of other classes, dropped: {dropped}")
        if train:
            notes += walk.contents().require_something_to_learn(str(walk))
        if notes:
            warnings.warn(f"in {walk}, {'; '.join(notes)}", stacklevel=3)

    def __len__(self) -> int:
        return len(self.images)

    @property
    def paths(self) -> list[Path]:
        """The files of the images."""
        return [image.path for image in self.images]

    def only(self, indices: Iterable[int]) -> Self:
        """The dataset of some of these images."""
        some = copy.copy(self)
        some.images = [self.images[i] for i in indices]
        return some

    def __getitem__(self, index: int) -> tuple[Tensor, dict]:
        item = self.as_stored(index)
        return augment(*item, self.crop, self.zoom) if self.train else item

    def as_stored(self, index: int) -> tuple[Tensor, dict]:
        """An item that is not augmented."""
        image, target = self.images[index], self.target(index)
        pixels = read_image(image.path, image.size, self.limits)
        if pixels.shape[:2] != image.size[::-1]:
            sizes = "is {}x{}, its annotation says {}x{}".format(*pixels.shape[1::-1], *image.size)
            raise InputError(f"image '{image.path}' {sizes}: correct one of the two.")
        if self.masks:
            target["masks"] = torch.from_numpy(_masks(self._targets(image), *image.size))
        return torch.from_numpy(pixels).permute(2, 0, 1).contiguous().float() / 255, target

    def target(self, index: int) -> dict:
        image = self.images[index]
        things, labels = self._targets(image), {name: label for label, name in enumerate(self.classes, start=1)}
        hard = torch.tensor([thing.hard for thing in things], dtype=torch.bool)
        return {
            "boxes": torch.tensor([thing.box for thing in things], dtype=torch.float32).reshape(-1, 4),
            "labels": torch.tensor([labels[thing.name] for thing in things], dtype=torch.int64),
            **({} if self.masks else {"difficult": hard}),
            "image_id": image.id,
            "file": str(image.path),
        }

    def _targets(self, image: AnnotatedImage) -> list[Thing]:
        hard = not (self.masks or self.train)
        return [thing for thing in image.things if thing.box is not None and (hard or not thing.hard)]


def run_lengths(runs: bytes, width: int, height: int) -> dict:
    """A mask as pycocotools wants it."""
    return {"size": [height, width], "counts": runs}


def _masks(things: list[Thing], width: int, height: int) -> np.ndarray:
    """uint8 (N, H, W)."""
    if not things:
        return np.zeros((0, height, width), np.uint8)
    decoded = coco_mask.decode([run_lengths(thing.runs, width, height) for thing in things])  # (H, W, N)
    return np.ascontiguousarray(decoded.transpose(2, 0, 1))


def find_problems(walk: type[ObjectWalk], recipe, root: Path | str, split: str, layout: NamedTuple) -> Findings:
    """Everything that is wrong with the files of a split, every image read to its end; and what the split holds.

    Without ``recipe.classes``, the classes have to be those of the training split.
    """
    classes, source, limits = recipe.classes, "of the recipe", Limits(recipe.max_megapixels, recipe.max_size)
    try:
        if classes is None and split != recipe.train_split:
            with suppress(InputError):  # the training split's own check says what is wrong there
                taught = walk(root, recipe.train_split, layout, None).classes
                classes, source = taught or None, f"of split '{recipe.train_split}'"
        found = walk(root, split, layout, limits, classes, recipe.classes is not None, source)
    except InputError as error:
        return Findings([Problem("splits that cannot be used", str(error), True)])
    for image in tqdm(found.images, f"check {split}", unit="image", delay=3):
        if image.size is None or not os.path.isfile(image.path):
            continue  # it is among the problems already
        with found.refusing():
            header = read_header(image.path, limits, decode=True)
            found.problems += harmless_findings(header)
            if image.size not in header.sizes:
                sizes = "{}x{}, not {}x{}".format(*header.size, *image.size)
                found.refuse(RESIZED, f"{image.path} ({sizes})")
    most = recipe.detections
    for image in found.images if not found.errors else ():
        if (count := found.count(image)) > most:
            kind = f"images with more objects than the {most} detections that the recipe allows"
            found.note(kind, f"{image.path} ({count}: set detections={count} or more)")
    contents = found.contents()
    contents.without_annotation = found.unnamed()
    return Findings(found.problems, contents)
