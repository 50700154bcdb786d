"""Pascal VOC's layout, for any list of classes: the real devkit, people's own folders of that shape, ``shapes``.

    ROOT/ImageSets/Main/SPLIT.txt   one image's name per line, without suffix
    ROOT/Annotations/NAME.xml       the objects and their boxes
    ROOT/JPEGImages/NAME.jpg        the image (other suffixes work too)

Other folders can be named instead. What a dataset gives, and what it puts up with: see :mod:`.detection`.
"""

import xml.etree.ElementTree as ET
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from ..errors import InputError, unknown
from ..recipes.schema import VOCRecipe
from .check import BadFile, Findings, bad_file, repeated
from .detection import RELATIVE, RESIZED, SWAPPED, ZERO, AnnotatedImage, ObjectDataset, ObjectWalk, Thing, is_relative
from .detection import find_problems as find_problems_of
from .images import LIMITS, Limits, files_by_name, folders_of, read_header, read_list
from .parsing import number, truth

VOC_CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)


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


class VOCDetection(ObjectDataset):
    """Images and boxes of one split of a VOC-shaped folder: an :class:`.detection.ObjectDataset` without masks.

    The file's ``xmin, ymin, xmax, ymax`` count pixels from 1 and include the last: they become
    ``xmin - 1, ymin - 1, xmax, ymax``, and a box has zero area if ``xmax`` equals ``xmin``, or ``ymax`` ``ymin``.
    ``image_id`` is the image's name in the split. The one warning also counts images that have another size than their
    annotation says.

    Args:
        root: A folder with ``ImageSets``, or the folder around it, as VOCdevkit is.
        split: Name of a list in ``ImageSets/Main``. Several are joined by ``+``; a year in front chooses the folder of
            a devkit that holds several, as in ``2007_trainval+2012_trainval``.
        classes: Without: VOC's twenty if no object has another name, else the names found in this split, sorted.
        folders: Other places of the files below the root.
        zoom: With ``train``, zoom out of images and crop them, too: see :func:`.augment.augment`.
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
        zoom: bool = False,
    ) -> None:
        super().__init__(_Walk(root, split, folders, limits, classes, drop_others), train, strict, zoom=zoom)


def find_problems(recipe: VOCRecipe, root: Path | str, split: str) -> Findings:
    """See :func:`.detection.find_problems`."""
    return find_problems_of(_Walk, recipe, root, split, Folders(recipe.images, recipe.annotations, recipe.listing))


# Reading -------------------------------------------------------------------------------------------------------------


class _Walk(ObjectWalk):
    """The XML files and the headers of the images."""

    def read(self, find_classes: bool) -> None:
        self.without_annotation: list[Path] = []
        listed = self._listed()
        entries = dict.fromkeys(listed)
        bar = tqdm(entries, f"check {self.split}", unit="image", delay=3) if self.limits else entries
        images = [self._image(*entry) for entry in bar]
        if find_classes:
            self._find_classes(images)
        self.images = [
            image._replace(things=self._known(image.things, xml))
            for image, (*_, xml) in zip(images, entries, strict=True)
        ]
        self.left_out.update((t.name, "difficult") for image in self.images for t in image.things if t.hard)
        if not any(image.things for image in self.images):
            self.note("splits without objects", f"'{self.split}'")
        places = ((entry, f"'{entry[0]}' in split '{self.split}'") for entry in listed)
        self.problems += repeated("images listed twice", places)

    def _listed(self) -> list[tuple[str, Path, Path]]:
        """Name, image and annotation of the images of the split, as its lists have them."""
        entries = []
        seen: dict[tuple[Path, ...], tuple[dict, dict]] = {}  # files by name, of folders that were read before
        for part in self.split.split("+"):
            root, source = self.root, None  # of the names
            if self.layout.listing is not None:
                source = root / self.layout.listing.replace("{split}", part)
            elif "{split}" not in self.layout.annotations:
                root, source = _devkit_list(root, part)
            folders = folders_of(root, part, images=self.layout.images, annotations=self.layout.annotations)
            places = tuple(folders)
            if places not in seen:
                seen[places] = files_by_name(places[0]), files_by_name(places[1], (".xml",))
                images, annotations = seen[places]
                self.without_annotation += [path for name, path in images.items() if name not in annotations]
            images, annotations = seen[places]
            names, column = (list(annotations), False) if source is None else read_list(source, images)
            if column:
                self.note("lists with a column of 1, 0 and -1, which is not used", str(source))
            for name in names:
                xml = annotations.get(name, places[1] / f"{name}.xml")
                entries.append((name, images.get(name, places[0] / f"{name}.jpg"), xml))
        if not entries:
            raise InputError(f"{self} lists no images: choose another split.")
        return entries

    def unnamed(self) -> list[Path]:
        return self.without_annotation

    def short(self, where: str) -> str:
        return Path(where.split(" (")[0]).name

    def _find_classes(self, images: list[AnnotatedImage]) -> None:
        found = {thing.name for image in images for thing in image.things} | {name for name, _ in self.left_out}
        self.classes, self.source = sorted(found), f"found in split '{self.split}'"
        if not found:
            text = f"{self} has no objects to learn the classes from: give classes."
            self.refuse("classes that cannot be used", text, text)
        elif found <= set(VOC_CLASSES):
            self.classes, self.source = list(VOC_CLASSES), "Pascal VOC's twenty, since no object has another name"

    def _image(self, name: str, path: Path, annotation: Path) -> AnnotatedImage:
        header, tree, size, things = None, ET.Element("annotation"), None, []
        with self.refusing():
            header = read_header(path, self.limits) if self.limits else None
        with self.refusing():
            tree = _tree(annotation)
            if tree.find("object") is None:
                self.note("images without objects", str(annotation))
        if header is not None:
            told = _told_size(tree)
            size = header.size[::-1] if header.turned(told) else header.size
            if told is not None and told != size:
                self.warn(RESIZED, str(annotation))
        for place, item in enumerate(tree.findall("object"), start=1):
            where = f"{annotation} (object {place})"
            with self.refusing():
                things.append((self._thing(item, annotation, where, size), where))
        self.problems += repeated("objects annotated twice", (((t.name, *t.bbox), where) for t, where in things))
        return AnnotatedImage(name, path, size, [thing for thing, _ in things if thing.box is not None])

    def _thing(self, item: ET.Element, annotation: Path, where: str, size: tuple[int, int] | None) -> Thing:
        """An object; its box is judged where there is an image to judge it by."""
        # Only direct children: the parts of a person (VOC's "layout" task) have a name and a box of their own.
        x1, y1, x2, y2 = (_number(item, f"bndbox/{side}", annotation) for side in ("xmin", "ymin", "xmax", "ymax"))
        name = _text(item, "name", annotation)
        if x1 > x2 or y1 > y2:
            self.warn(SWAPPED, where)
            x1, y1, x2, y2 = min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)
        flag = (item.findtext("difficult") or "0").strip() or "0"
        if truth(flag) is None:
            kind = "objects whose 'difficult' is neither true nor false, taken for false"
            self.warn(kind, f"{where} ('{flag}')")
        sides = (x1 - 1, y1 - 1, x2, y2)
        # A box that is one pixel wide has xmax equal to xmin, but nothing real is: annotators' slips are.
        wrong = RELATIVE if is_relative(x1, y1, x2, y2) else ZERO if x1 == x2 or y1 == y2 else ""
        box = sides if size is None else self.clean(name, sides, size, where, wrong)
        return Thing(name, truth(flag) is True, box, sides)

    def _known(self, things: list[Thing], annotation: Path) -> list[Thing]:
        """The objects of the classes; others are left out, or an error for each of their names."""
        others = [thing.name for thing in things if thing.name not in self.classes]
        if self.drop_others:
            self.left_out.update((name, "other classes") for name in others)
        elif self.classes:
            for name in dict.fromkeys(others):
                text = unknown("class", name, self.classes)
                where = f"{annotation} ({text})"
                self.refuse("objects of an unknown class", where, f"'{annotation}': {text}")
        return [thing for thing in things if thing.name in self.classes]


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
        raise _incomplete(f"annotation '{annotation}' has an object without '{field}': add it.")
    return text


def _number(item: ET.Element, field: str, annotation: Path) -> float:
    text = _text(item, field, annotation)
    value = number(text)  # some of VOC2011's are not whole
    if value is None:
        raise _incomplete(f"annotation '{annotation}' has '{text}' as '{field}': put a number there.")
    return value


def _incomplete(message: str) -> BadFile:
    return bad_file("objects without a name or a whole box", message, message)
