"""What can be wrong with a dataset's files, found before training: shared by the checks of all layouts."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from PIL import Image

SMALLEST = 32  # pixels, the coarsest stride of a Swin
UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)  # what Pillow says of broken files
THINNEST = 0.01  # pixels: a thinner box could lose its width to rounding when its image is resized
EXIF_ORIENTATION = 0x0112
TURNED = (5, 6, 7, 8)  # orientations that exchange width and height


class Problem(NamedTuple):
    """One finding. ``fatal``: training would stop at it; else it is harmless, or what it concerns is left out."""

    kind: str  # what is wrong, the same words for all of its kind
    where: str  # file, and object if there are several in it
    fatal: bool


def image_problems(path: Path, size: tuple[int, int] | None = None) -> list[Problem]:
    """Everything about one image, read to its end.

    Args:
        path: Of the image.
        size: Width and height that its annotation says, where training insists on them: of the pixels as stored, or
            as EXIF wants them shown.
    """
    if not os.path.isfile(path):
        return [Problem("missing images", str(path), True)]
    try:
        with Image.open(path) as image:
            image.load()
            found, mode, orientation = image.size, image.mode, image.getexif().get(EXIF_ORIENTATION, 1)
            if mode[0] not in "IF":
                image.convert("RGB")  # as training will
    except UNREADABLE as error:
        return [Problem("images that cannot be read to their end", f"{path} ({error})", True)]
    problems = []
    if min(found) < SMALLEST:
        problems.append(Problem(f"images smaller than {SMALLEST}x{SMALLEST}", f"{path} ({found[0]}x{found[1]})", True))
    if mode[0] in "IF":  # converting these to RGB would make nearly all of it white
        problems.append(Problem("images of more than 8 bits per channel", str(path), True))
    elif mode != "RGB":
        problems.append(Problem(f"images of mode {mode}, converted to RGB", str(path), False))
    if orientation != 1:
        problems.append(Problem("images rotated by EXIF", f"{path} (orientation {orientation})", False))
    if size is not None and size != found and (orientation not in TURNED or size != found[::-1]):
        sizes = f"{found[0]}x{found[1]}, not {size[0]}x{size[1]}"
        problems.append(Problem("images of another size than their annotation says", f"{path} ({sizes})", True))
    return problems


def repeated(kind: str, places: Iterable[tuple[object, str]], fatal: bool = False) -> list[Problem]:
    """A problem for everything that comes a second time: ``places`` are pairs of a thing and where it is."""
    seen, problems = set(), []
    for thing, where in places:
        if thing in seen:
            problems.append(Problem(kind, where, fatal))
        seen.add(thing)
    return problems


def report(problems: list[Problem], shown: int = 3) -> str:
    """The problems as text: what training would stop at first, a count per kind, and its first ``shown`` places."""
    places: dict[tuple[bool, str], list[str]] = {}
    for problem in problems:
        places.setdefault((not problem.fatal, problem.kind), []).append(problem.where)
    lines = []
    for (harmless, kind), wheres in sorted(places.items()):
        lines.append(f"  {'no obstacle' if harmless else 'stops training'}: {kind}: {len(wheres)}")
        lines += [f"    {where}" for where in wheres[:shown]]
        if len(wheres) > shown:
            lines.append(f"    ... and {len(wheres) - shown} more")
    return "\n".join(lines)
