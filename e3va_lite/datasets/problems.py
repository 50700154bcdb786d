"""What can be wrong with an image file, found before training: shared by the checks of all layouts."""

from pathlib import Path
from typing import NamedTuple

from PIL import Image

SMALLEST = 32  # pixels, the coarsest stride of a Swin
UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)  # what Pillow says of broken files
EXIF_ORIENTATION = 0x0112


class Problem(NamedTuple):
    """One finding. ``fatal``: training would stop at it; else it is harmless, or what it concerns is left out."""

    kind: str  # what is wrong, the same words for all of its kind
    where: str  # file, and object if there are several in it
    fatal: bool


def image_problems(path: Path) -> list[Problem]:
    """Everything about one image, read to its end."""
    if not path.is_file():
        return [Problem("missing images", str(path), True)]
    try:
        with Image.open(path) as image:
            image.load()
            size, mode, orientation = image.size, image.mode, image.getexif().get(EXIF_ORIENTATION, 1)
    except UNREADABLE as error:
        return [Problem("images that cannot be read to their end", f"{path} ({error})", True)]
    problems = []
    if min(size) < SMALLEST:
        problems.append(Problem(f"images smaller than {SMALLEST}x{SMALLEST}", f"{path} ({size[0]}x{size[1]})", True))
    if mode[0] in "IF":  # converting these to RGB would make nearly all of it white
        problems.append(Problem("images of more than 8 bits per channel", str(path), True))
    elif mode != "RGB":
        problems.append(Problem(f"images of mode {mode}, converted to RGB", str(path), False))
    if orientation != 1:
        problems.append(Problem("images rotated by EXIF", f"{path} (orientation {orientation})", False))
    return problems
