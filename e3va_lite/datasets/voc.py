"""Pascal VOC's layout, for any list of classes: the real devkit, people's own folders of that shape, ``shapes``.

    ROOT/ImageSets/Main/SPLIT.txt   one image's name per line, without suffix
    ROOT/Annotations/NAME.xml       the objects and their boxes
    ROOT/JPEGImages/NAME.jpg        the image (other suffixes work too)

Other folders can be named instead. One walk over the files finds everything that training could stumble over: a dataset
raises the first error, :func:`find_problems` lists them all.
"""

import warnings
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from ..errors import InputError, unknown
from .augment import mirror
from .check import (
    OUTSIDE,
    REACHING,
    RELATIVE,
    SWAPPED,
    ZERO,
    BadFile,
    Contents,
    Findings,
    Problem,
    bad_file,
    clean_box,
    counted,
    is_relative,
    repeated,
)
from .images import LIMITS, Limits, files_by_name, harmless_findings, read_header, read_image, read_list
from .values import number, truth

VOC_CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
RESIZED = "images of another size than their annotation says"
UNCLEAR = "objects whose 'difficult' is neither true nor false, taken for false"
WARNED = (ZERO, RELATIVE, OUTSIDE, REACHING, SWAPPED, RESIZED, UNCLEAR)  # what a dataset warns of


class Folders(NamedTuple):
    """Where the files are below the root; ``{split}`` stands for the split.

    Attributes:
        images: Folder of the images.
        annotations: Folder of the XML files.
        listing: File that lists the names of a split. Without: the devkit's lists, or, with ``{split}`` in
            ``annotations``, all that have an XML file in that folder.
    """

    images: str = "JPEGImages"
    annotations: str = "Annotations"
    listing: str | None = None


DEVKIT = Folders()


class VOCDetection(Dataset):
    """Images and boxes of one split of a VOC-shaped folder.

    Item ``i`` is an image, float (3, H, W), RGB in 0..1, and a dict of

    - ``boxes``, float32 (N, 4): ``x1, y1, x2, y2`` in pixels, continuous and half-open. The file's ``xmin, ymin, xmax,
      ymax`` count pixels from 1 and include the last: they become ``xmin - 1, ymin - 1, xmax, ymax``;
    - ``labels``, int64 (N,): 1..K, positions in ``classes`` plus one;
    - ``difficult``, bool (N,);
    - ``image_id``, the image's name in the split, and ``file``, its path as text.

    ``target(i)`` is the dict alone, without reading the image. Exchanged corners are swapped; boxes of zero area
    (``xmax`` equal to ``xmin``, or ``ymax`` to ``ymin``) and boxes outside their image are dropped, boxes that reach
    out of it are cut; one warning counts them, and the images that have another size than their annotation says. An
    image is turned as its EXIF orientation says only if its annotation gives the size that it then has: VOC's tools
    ignore EXIF, and their boxes refer to the pixels as stored.

    Args:
        root: A folder with ``ImageSets``, or the folder around it, as VOCdevkit is.
        split: Name of a list in ``ImageSets/Main``. Several are joined by ``+``; a year in front chooses the folder of
            a devkit that holds several, as in ``2007_trainval+2012_trainval``.
        classes: Their names, in the order of the labels. Without: VOC's twenty if no object has another name, else the
            names found in this split, sorted. Give another split ``classes=train_set.classes``.
        strict: Raise an error where there would be the warning.
        train: Mirror half of the images and leave out difficult objects: the metric does not ask for them.
        drop_others: Leave out objects of classes that are not in ``classes``, instead of raising an error.
        folders: Other places of the files below the root.
        limits: Of the images' sizes.

    Raises:
        InputError: For a missing or empty split, a missing or unreadable file, an image smaller than 32 pixels, an
            incomplete annotation, a class that is not in the list, nothing to train on; for an image that ends early
            when it is loaded.
    """

    def __init__(
        self,
        root: Path | str,
        split: str,
        classes: Sequence[str] | None = None,
        strict: bool = False,
        *,
        train: bool = False,
        drop_others: bool = False,
        folders: Folders = DEVKIT,
        limits: Limits = LIMITS,
    ) -> None:
        walk = _Walk(Path(root), split, classes, drop_others, folders, limits)
        if walk.errors:
            raise walk.errors[0]
        self.classes, self.train, self.limits = walk.classes, train, limits
        # Lists and numpy arrays: tensors would travel to spawned workers as one open file each.
        self.records = [record.only(~record.difficult) if train else record for record in walk.records]
        notes = counted(walk.problems, WARNED, lambda where: Path(where.split(" (")[0]).name)
        if notes and strict:
            raise InputError(
                f"in split '{split}' of '{root}', {'; '.join(notes)}. Correct the files, or go without strict."
            )
        if dropped := sum(count for (_, reason), count in walk.contents.left_out.items() if reason == "other classes"):
            notes.append(f"objects of other classes, dropped: {dropped}")
        if train:
            notes += walk.contents.require_something_to_learn(f"split '{split}' of '{root}'")
        if notes:
            warnings.warn(f"in split '{split}' of '{root}', {'; '.join(notes)}", stacklevel=2)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> tuple[Tensor, dict]:
        record = self.records[index]
        pixels = read_image(record.image, record.size, self.limits)
        image, target = torch.from_numpy(pixels).permute(2, 0, 1).contiguous().float() / 255, self.target(index)
        return mirror(image, target) if self.train and torch.rand(()) < 0.5 else (image, target)

    def target(self, index: int) -> dict:
        record = self.records[index]
        arrays = {"boxes": record.boxes, "labels": record.labels, "difficult": record.difficult}
        about = {"image_id": record.name, "file": str(record.image)}
        return {key: torch.tensor(array) for key, array in arrays.items()} | about


def find_problems(recipe, root: Path | str, split: str) -> Findings:
    """Everything that is wrong with the files of a split, every image read to its end; and what the split holds.

    Without ``recipe.classes``, the classes have to be those of the training split.
    """
    classes, source = recipe.classes, "of the recipe"
    folders = Folders(recipe.images, recipe.annotations, recipe.listing)
    limits = Limits(recipe.max_megapixels, recipe.max_size)
    try:
        if classes is None and split != recipe.train_split:
            try:
                classes = class_names(root, recipe.train_split, folders)
                source = f"of split '{recipe.train_split}'"
            except InputError:  # the training split's own check says what is wrong there
                classes = None
        walk = _Walk(Path(root), split, classes, recipe.classes is not None, folders, limits, source, decode=True)
    except InputError as error:
        return Findings([Problem("splits that cannot be used", str(error), True)])
    if not any(len(record.names) for record in walk.records):
        walk.problems.append(Problem("splits without objects", f"'{split}'", False))
    return Findings(walk.problems, walk.contents)


def class_names(root: Path | str, split: str, folders: Folders = DEVKIT) -> list[str]:
    """The classes of a split's objects, as :class:`VOCDetection` finds them; what cannot be read has none.

    Raises:
        InputError: For a split that is missing or has no objects.
    """
    walk = _Walk(Path(root), split, None, False, folders, None)
    if not walk.classes:
        raise walk.errors[-1]
    return walk.classes


# Reading -------------------------------------------------------------------------------------------------------------


class _Record(NamedTuple):
    """One image of a split and its N objects."""

    name: str
    image: Path
    annotation: Path
    size: tuple[int, int] | None  # width, height of the image, upright where its annotation means that
    names: np.ndarray  # str (N,)
    labels: np.ndarray  # int64 (N,), 1..K
    boxes: np.ndarray  # float32 (N, 4), x1, y1, x2, y2, half-open
    difficult: np.ndarray  # bool (N,)

    def only(self, keep: np.ndarray) -> "_Record":
        arrays = {key: getattr(self, key)[keep] for key in ("names", "labels", "boxes", "difficult")}
        return self._replace(**arrays)


class _Walk:
    """One pass over the files of a split: records, what is wrong, and what the split holds.

    Args:
        limits: Of the images; None not to open them at all, for the names of the classes.
        source: Where ``classes`` come from, in words.
        decode: Read images to their end, not only their headers.
    """

    def __init__(
        self,
        root: Path,
        split: str,
        classes: Sequence[str] | None,
        drop_others: bool,
        folders: Folders,
        limits: Limits | None,
        source: str = "as given",
        decode: bool = False,
    ) -> None:
        self.problems: list[Problem] = []
        self.errors: list[BadFile] = []  # those behind the fatal problems
        self.limits, self.decode = limits, decode
        self.left_out: Counter = Counter()
        self.listed = _Listed(root, split, folders)
        if limits is None:
            bar = dict.fromkeys(self.listed.entries)
        else:
            bar = tqdm(dict.fromkeys(self.listed.entries), desc=f"check {split}", unit="image", delay=3)
        self.records = [self._record(*entry) for entry in bar]
        found = sorted({str(name) for record in self.records for name in record.names} | {n for n, _ in self.left_out})
        self.classes = list(found if classes is None else classes)
        if classes is None:
            source = f"found in split '{split}'"
            if not found:
                text = f"split '{split}' of '{root}' has no objects to learn the classes from: give classes."
                self._refuse(bad_file("classes that cannot be used", text, text))
            elif set(found) <= set(VOC_CLASSES):
                self.classes, source = list(VOC_CLASSES), "Pascal VOC's twenty, since no object has another name"
        elif len(set(classes)) < len(classes) or not classes:
            text = f"classes {', '.join(classes) or '(none)'}: give every class once."
            self._refuse(bad_file("classes that cannot be used", text, text))
        self.records = [self._labelled(record, drop_others) for record in self.records]
        easy = (record.only(~record.difficult) for record in self.records)
        taught = Counter(str(name) for record in easy for name in record.names)
        for record in self.records:
            self.left_out.update((str(name), "difficult") for name in record.names[record.difficult])
        self.contents = Contents(
            [record.image for record in self.records], self.classes, source, taught, self.left_out,
            without_annotation=self.listed.without_annotation,
        )  # fmt: skip
        self.problems += repeated(
            "images listed twice", ((entry, f"'{entry[0]}' in split '{split}'") for entry in self.listed.entries)
        )
        for path in self.listed.with_column:
            self.problems.append(Problem("lists with a column of 1, 0 and -1, which is not used", str(path), False))

    def _refuse(self, error: BadFile) -> None:
        self.errors.append(error)
        self.problems.append(error.problem)

    def _note(self, kind: str, where: str) -> None:
        self.problems.append(Problem(kind, where, False))

    def _record(self, name: str, image: Path, annotation: Path) -> _Record:
        tree, objects, size = ET.Element("annotation"), [], None
        header = None
        try:
            header = read_header(image, self.limits, self.decode) if self.limits else None
        except BadFile as error:
            self._refuse(error)
        try:
            tree = _tree(annotation)
        except BadFile as error:
            self._refuse(error)
        else:
            if tree.find("object") is None:
                self._note("images without objects", str(annotation))
        for place, item in enumerate(tree.findall("object"), start=1):
            try:
                objects.append(self._object(item, annotation, f"{annotation} (object {place})"))
            except BadFile as error:
                self._refuse(error)
        if header is not None:
            told = _told_size(tree)
            size = header.size[::-1] if header.turned(told) else header.size
            if told is not None and told != size:
                self._note(RESIZED, str(annotation))
            if self.decode:
                self.problems += harmless_findings(header)
            self.problems += repeated("objects annotated twice", [(thing[:2], thing[3]) for thing in objects])
            cut = [(name, self._inside(name, box, size, where), *rest, where) for name, box, *rest, where in objects]
            objects = [thing for thing in cut if thing[1] is not None]
        return _Record(
            name,
            image,
            annotation,
            size,
            names=np.array([thing[0] for thing in objects], str),
            labels=np.zeros(len(objects), np.int64),
            boxes=np.array([thing[1] for thing in objects], np.float32).reshape(-1, 4),
            difficult=np.array([thing[2] for thing in objects], bool),
        )

    def _object(self, item: ET.Element, annotation: Path, where: str) -> tuple[str, tuple, bool, str]:
        """Name, box with whole pixels counted from 0, whether it is difficult, and where it stands."""
        # Only direct children: the parts of a person (VOC's "layout" task) have a name and a box of their own.
        x1, y1, x2, y2 = (_number(item, f"bndbox/{side}", annotation) for side in ("xmin", "ymin", "xmax", "ymax"))
        name = _text(item, "name", annotation)
        if x1 > x2 or y1 > y2:
            self._note(SWAPPED, where)
            x1, y1, x2, y2 = min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)
        flag = (item.findtext("difficult") or "0").strip() or "0"
        if truth(flag) is None:
            self._note(UNCLEAR, f"{where} ('{flag}')")
        return name, (x1 - 1, y1 - 1, x2, y2), truth(flag) is True, where

    def _inside(self, name: str, box: tuple, size: tuple[int, int], where: str) -> tuple | None:
        """The box within its image, or None if it is to be dropped."""
        x1, y1, x2, y2 = box
        # A box that is one pixel wide has x2 = x1 + 1, but nothing real is: annotators' slips are.
        wrong = ZERO if x2 - x1 <= 1 or y2 - y1 <= 1 else ""
        cut, kind = clean_box(box, size, RELATIVE if is_relative(x1 + 1, y1 + 1, x2, y2) else wrong)
        if kind:
            self._note(kind, where)
        if cut is None:
            self.left_out[name, kind] += 1
        return cut

    def _labelled(self, record: _Record, drop_others: bool) -> _Record:
        labels = {name: label for label, name in enumerate(self.classes, start=1)}
        for name in dict.fromkeys(map(str, record.names)):
            if name not in labels and drop_others:
                self.left_out[name, "other classes"] += int((record.names == name).sum())
            elif name not in labels and self.classes:
                text = unknown("class", name, self.classes)
                where = f"{record.annotation} ({text})"
                self._refuse(bad_file("objects of an unknown class", where, f"'{record.annotation}': {text}"))
        record = record.only(np.array([name in labels for name in record.names], bool))
        return record._replace(labels=np.array([labels[str(name)] for name in record.names], np.int64))


class _Listed:
    """The images of a split: ``entries`` of name, image and annotation, as its lists have them."""

    def __init__(self, root: Path, split: str, folders: Folders) -> None:
        self.entries: list[tuple[str, Path, Path]] = []
        self.without_annotation: list[Path] = []
        self.with_column: list[Path] = []
        self.folders = folders
        self.seen: dict[tuple[Path, Path], tuple[dict, dict]] = {}  # files by name, of folders that were read before
        for part in split.split("+"):
            self._add(root, part)
        if not self.entries:
            raise InputError(f"split '{split}' of '{root}' lists no images: choose another split.")

    def _add(self, root: Path, part: str) -> None:
        source = None  # of the names
        if self.folders.listing is not None:
            source = root / self.folders.listing.replace("{split}", part)
            if not source.is_file():
                raise InputError(f"there is no list '{source}': check the split and the recipe's listing.")
        elif "{split}" not in self.folders.annotations:
            root, source = _devkit_list(root, part)
        places = tuple(
            root / pattern.replace("{split}", part) for pattern in (self.folders.images, self.folders.annotations)
        )
        for folder, what in zip(places, ("images", "annotations"), strict=True):
            if not folder.is_dir():
                raise InputError(f"there is no folder '{folder}': check the root, the split and the recipe's {what}.")
        if places not in self.seen:
            self.seen[places] = files_by_name(places[0]), files_by_name(places[1], (".xml",))
            images, annotations = self.seen[places]
            self.without_annotation += [path for name, path in images.items() if name not in annotations]
        images, annotations = self.seen[places]
        names, column = (list(annotations), False) if source is None else read_list(source, images)
        if column:
            self.with_column.append(source)
        for name in names:
            xml = annotations.get(name, places[1] / f"{name}.xml")
            self.entries.append((name, images.get(name, places[0] / f"{name}.jpg"), xml))


def _devkit_list(root: Path, part: str) -> tuple[Path, Path]:
    """The folder of one year, and in it the list of that name."""
    around = sorted(path.parent.parent for path in root.glob("*/ImageSets/Main"))
    folders = [root] if (root / "ImageSets/Main").is_dir() else around
    if not folders:
        raise InputError(
            f"'{root}' has no ImageSets/Main: give a VOC-shaped folder, or the VOCdevkit around it, or make the lists "
            "with 'e3va data split'."
        )
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
    return folders[0], path


def _tree(annotation: Path) -> ET.Element:
    try:
        return ET.parse(annotation).getroot()
    except FileNotFoundError:
        text = f"annotation '{annotation}' is missing: add it or remove it from the split."
        raise bad_file("missing annotations", text, text) from None
    except (ET.ParseError, OSError, ValueError, LookupError) as error:
        text = f"annotation '{annotation}' is not valid XML ({error}): correct it."
        raise bad_file("annotations that are not valid XML", text, text) from None


def _told_size(tree: ET.Element) -> tuple[float, float] | None:
    """Width and height that an annotation gives; None where it does not know them, as with 0, -1 and text."""
    width, height = (number(tree.findtext(f"size/{side}") or "") for side in ("width", "height"))
    return (width, height) if width is not None and height is not None and min(width, height) > 0 else None


def _text(item: ET.Element, field: str, annotation: Path) -> str:
    text = (item.findtext(field) or "").strip()
    if not text:
        message = f"annotation '{annotation}' has an object without '{field}': add it."
        raise bad_file("objects without a name or a whole box", message, message)
    return text


def _number(item: ET.Element, field: str, annotation: Path) -> float:
    text = _text(item, field, annotation)
    value = number(text)  # some of VOC2011's are not whole
    if value is None:
        message = f"annotation '{annotation}' has '{text}' as '{field}': put a number there."
        raise bad_file("objects without a name or a whole box", message, message)
    return value
