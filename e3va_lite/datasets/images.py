"""Image files: found by name, judged and read in the same way for all layouts."""

import glob
import os
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

from ..errors import InputError
from .check import SMALLEST, UNREADABLE, BadFile, Problem, bad_file

SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".tif", ".tiff", ".webp", ".ppm")  # in any case
MEGAPIXELS = 179  # Pillow's limit against files that are small on disk and fill the memory once decoded
COLUMN = re.compile(r"(.*\S)\s+(?:-1|0|1)")
EXIF_ORIENTATION = 0x0112
TURNED = (5, 6, 7, 8)  # orientations that exchange width and height


class Limits(NamedTuple):
    """What an image may be at most."""

    megapixels: float = MEGAPIXELS
    ratio: float = 1e9  # of the long side to the short one, which would vanish when the image is resized


LIMITS = Limits()


class Header(NamedTuple):
    """What an image file says of itself."""

    path: Path
    size: tuple[int, int]  # width, height of the pixels as stored
    mode: str
    orientation: int  # of EXIF: 1 for none, 2 to 8 for a rotation or reflection

    def turned(self, told: tuple[int, int] | None) -> bool:
        """Whether an annotation that gives the size ``told`` refers to the image as EXIF wants it to be shown.

        Only the orientations that exchange width and height can be told from a size: all others, and square images,
        are taken as they are stored, as VOC's and COCO's own tools do.
        """
        return self.orientation in TURNED and told != self.size and told == self.size[::-1]

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """The sizes that an annotation can give: as stored, and the other way round if EXIF says so."""
        turned = self.size[::-1]
        return [self.size, turned] if self.turned(turned) else [self.size]


def read_header(path: Path, limits: Limits = LIMITS, decode: bool = False) -> Header:
    """Size, mode and orientation of an image that training can use; ``decode`` reads it to its end.

    Raises:
        BadFile: For a file that is missing, damaged, too small, too large or has more than 8 bits per channel.
    """
    with _opened(path, limits) as image:
        if decode:
            image.load()
            image.convert("RGB")  # as training will
        return _header(path, image)


def read_image(path: Path, told: tuple[int, int] | None = None, limits: Limits = LIMITS) -> np.ndarray:
    """RGB, uint8 (H, W, 3), turned as EXIF says if ``told``, the annotation's (width, height), is the turned size.

    Raises:
        BadFile: As :func:`read_header`.
    """
    with _opened(path, limits) as image:
        turned = _header(path, image).turned(told)
        return np.array((ImageOps.exif_transpose(image) if turned else image).convert("RGB"))


def _header(path: Path, image: Image.Image) -> Header:
    orientation = image.getexif().get(EXIF_ORIENTATION)  # some cameras write 0 or 65537, which mean nothing
    return Header(path, image.size, image.mode, orientation if orientation in range(2, 9) else 1)


@contextmanager
def _opened(path: Path, limits: Limits) -> Iterator[Image.Image]:
    """An image that training can use; what goes wrong while it is read is a BadFile, too."""
    if not os.path.isfile(path):
        other = _other_format(path)
        if other is not None:
            message = f"image '{other}' is in a format that is not read: convert it to one of {', '.join(SUFFIXES)}."
            raise bad_file("images in a format that is not read", str(other), message)
        raise bad_file("missing images", str(path), f"image '{path}' is missing: add it or remove it from the split.")
    pillows, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        with Image.open(path) as image:
            size = f"{image.width}x{image.height}"
            if min(image.size) < SMALLEST:
                small = f"smaller than {SMALLEST}x{SMALLEST}"
                message = f"image '{path}' is {size}, {small}: enlarge it or remove it from the split."
                raise bad_file(f"images {small}", f"{path} ({size})", message)
            if max(image.size) >= limits.ratio * min(image.size):
                message = f"image '{path}' is {size}, and its short side vanishes when it is resized: cut it up."
                raise bad_file("images too thin to be resized", f"{path} ({size})", message)
            if image.width * image.height > limits.megapixels * 1e6:
                large = f"more than max_megapixels={limits.megapixels:g}"
                message = f"image '{path}' is {size}, {large}: make it smaller, or raise max_megapixels."
                raise bad_file(f"images of {large}", f"{path} ({size})", message)
            if image.mode[0] in "IF":  # converting these to RGB would make nearly all of it white
                message = f"image '{path}' has more than 8 bits per channel: convert it to 8 bits."
                raise bad_file("images of more than 8 bits per channel", str(path), message)
            yield image
    except BadFile:
        raise
    except UNREADABLE as error:
        message = f"image '{path}' cannot be read ({error}): replace it or remove it from the split."
        raise bad_file("images that cannot be read to their end", f"{path} ({error})", message) from None
    finally:
        Image.MAX_IMAGE_PIXELS = pillows


def _other_format(path: Path) -> Path | None:
    """A file of that name with a suffix that is not read, such as ``.heic``."""
    try:
        others = [other for other in path.parent.glob(f"{glob.escape(path.stem)}.*") if other.suffix != ".xml"]
    except (OSError, ValueError):  # a name that no file can have
        return None
    return next((other for other in others if other.suffix.lower() not in SUFFIXES and other.is_file()), None)


def harmless_findings(header: Header) -> list[Problem]:
    """What is unusual about an image that training can use."""
    problems = []
    if header.mode != "RGB":
        problems.append(Problem(f"images of mode {header.mode}, converted to RGB", str(header.path), False))
    if header.orientation != 1:
        problems.append(Problem("images rotated by EXIF", f"{header.path} (orientation {header.orientation})", False))
    return problems


def folders_of(root: Path, split: str, **fields: str) -> list[Path]:
    """The folders below the root that fields of a recipe name, ``{split}`` standing for the split.

    Raises:
        InputError: If one of them is not there.
    """
    folders = [root / pattern.replace("{split}", split) for pattern in fields.values()]
    for folder in folders:
        if not folder.is_dir():
            there = ", ".join(sorted(path.name for path in folder.parent.glob("*/")))
            hint = f"there are {there}" if there else "check the root"
            which = f"the recipe's {', '.join(fields)} and splits say which"
            raise InputError(f"there is no folder '{folder}': {hint}; {which}.")
    return folders


def files_by_name(folder: Path, suffixes: tuple[str, ...] = SUFFIXES) -> dict[str, Path]:
    """Files with one of the suffixes in a folder, also further down, by their path below it without the suffix.

    Of several files with one name, the one whose suffix comes first in ``suffixes`` counts.
    """
    found: dict[str, Path] = {}
    for suffix in suffixes:
        for path in sorted(folder.rglob("*")):
            if path.name.lower().endswith(suffix.lower()) and not path.name.startswith(".") and path.is_file():
                found.setdefault(path.relative_to(folder).as_posix()[: -len(suffix)], path)
    return found


def read_list(path: Path, known: Collection[str]) -> tuple[list[str], bool]:
    """Names of images, one a line, each once or more; and whether the file has the devkit's column of 1, 0 and -1.

    A name may have a suffix or folders in front of it, if an image is only ``known`` by the name without them.

    Raises:
        InputError: If there is no such file.
    """
    if not path.is_file():
        raise InputError(f"there is no list '{path}': check the split and the recipe's listing.")
    lines = path.read_text(encoding="utf-8-sig", errors="replace").splitlines()
    lines = [line.strip() for line in lines if line.strip()]
    flagged = [COLUMN.fullmatch(line) for line in lines]
    column = bool(lines) and all(match and line not in known for match, line in zip(flagged, lines, strict=True))
    names = []
    for line in (match.group(1) for match in flagged) if column else lines:
        below = PurePosixPath(line.replace("\\", "/"))
        bare = below.with_suffix("") if below.suffix.lower() in SUFFIXES else below
        names.append(next((name for name in (line, str(bare), bare.name) if name in known), line))
    return names, column
