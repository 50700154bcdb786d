"""Folders of labelled photographs, decoded once and kept at one size: what pretraining and probing read.

A class is a folder that holds images, however deep it lies, and its name is its path below the root:
``n01443537/images`` or ``b/bathroom``. That covers the usual ImageFolder layout and the nested ones around it.
"""

import hashlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from ..errors import InputError
from .check import UNREADABLE

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
MAX_SIDE = 128  # pixels; larger photographs are reduced to this
ABOUT = "SOURCE.txt"  # first line: the public name; the rest: terms of use, as the source states them


@dataclass
class Photographs:
    """The images of one root folder.

    Attributes:
        root: The folder.
        classes: Names of the classes, sorted.
        pixels: uint8 (N, 3, side, side), in the order of the classes; a file mapped into memory where there is a cache.
        labels: int64 (N,), positions in ``classes``.
    """

    root: Path
    classes: list[str]
    pixels: Tensor
    labels: Tensor

    @property
    def side(self) -> int:
        return self.pixels.shape[-1]

    def about(self) -> dict[str, str]:
        """Public name and terms of use, from ``SOURCE.txt`` in the root."""
        file = self.root / ABOUT
        lines = file.read_text(encoding="utf-8").strip().splitlines() if file.is_file() else []
        if not lines:
            return {"name": self.root.name, "terms": f"not stated: the folder has no {ABOUT}"}
        return {"name": lines[0].strip(), "terms": " ".join(line.strip() for line in lines[1:]) or "not stated"}


def read_photographs(root: str | Path, side: int | None = None, cache: Path | None = None) -> Photographs:
    """Read all photographs below a folder.

    Each image is turned as its EXIF orientation says, scaled so that its shorter side fits, and cropped to the square
    in its middle.

    Args:
        root: A folder of class folders.
        side: Pixels per side to keep. Default: the shorter side that most images have, at most ``MAX_SIDE``.
        cache: A folder for the decoded pixels, so that reading the same images again takes no time.

    Raises:
        InputError: If the folder is missing, has no images, only one class, or a class folder without images, or if an
            image cannot be read.
    """
    root = Path(root)
    files = _files_by_class(root)
    paths = [path for members in files.values() for path in members]
    labels = torch.tensor([label for label, members in enumerate(files.values()) for _ in members])
    side = side or _usual_side(paths)
    shape = (len(paths), 3, side, side)
    if cache is None:
        pixels = np.empty(shape, np.uint8)
        _decode(paths, pixels, root)
    else:
        described = "\n".join(f"{path.relative_to(root).as_posix()} {path.stat().st_size}" for path in paths)
        key = hashlib.sha256(f"{root.resolve()} {side}\n{described}".encode()).hexdigest()[:16]
        file = cache / f"photographs-{key}.npy"
        if not file.exists():
            cache.mkdir(parents=True, exist_ok=True)
            unfinished = file.with_suffix(f".{os.getpid()}.tmp")
            try:
                _decode(paths, np.lib.format.open_memmap(unfinished, "w+", np.uint8, shape), root)
                unfinished.replace(file)
            finally:
                unfinished.unlink(missing_ok=True)
        pixels = np.load(file, mmap_mode="c")  # copy on write: nothing here changes the file
    return Photographs(root, list(files), torch.from_numpy(pixels), labels)


def held_out(photographs: Photographs, every: int = 50) -> tuple[Tensor, Tensor]:
    """Positions to train on and positions held out: every ``every``-th image, from the middle of the first stretch."""
    positions = torch.arange(len(photographs.labels))
    is_held_out = positions % every == every // 2
    return positions[~is_held_out], positions[is_held_out]


def _files_by_class(root: Path) -> dict[str, list[Path]]:
    """Sorted image files of every class, by the class's name."""
    if not root.is_dir():
        raise InputError(f"there is no folder '{root}': check the path given with --images.")
    files: dict[str, list[Path]] = {}
    for folder, subfolders, names in os.walk(root, followlinks=True):
        subfolders.sort()
        here = Path(folder)
        images = sorted(here / name for name in names if name.lower().endswith(IMAGE_SUFFIXES))
        if images:
            files[here.relative_to(root).as_posix()] = images
        elif not subfolders and here != root:
            raise InputError(f"class folder '{here}' holds no images ({', '.join(IMAGE_SUFFIXES)}): fill or remove it.")
    if not files:
        raise InputError(f"'{root}' holds no images ({', '.join(IMAGE_SUFFIXES)}): point --images at a folder of them.")
    if len(files) == 1:
        raise InputError(
            f"all images of '{root}' lie in one folder ('{next(iter(files))}'): sort them into one folder per class, "
            "at least two, for the folders are the labels."
        )
    return dict(sorted(files.items()))


def _usual_side(paths: Sequence[Path]) -> int:
    """The median of the shorter sides of up to a hundred images spread over all, at most ``MAX_SIDE``."""
    some = paths[:: max(1, len(paths) // 100)]
    shorter = []
    for path in some:
        with _opened(path) as image:
            shorter.append(min(image.size))
    return min(MAX_SIDE, int(np.median(shorter)))


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """An image; what goes wrong while it is read is an InputError."""
    try:
        with Image.open(path) as image:
            yield image
    except UNREADABLE as error:
        raise InputError(f"image '{path}' cannot be read ({error}): remove it, or fetch it again.") from error


def _decode(paths: Sequence[Path], pixels: np.ndarray, root: Path) -> None:
    side = pixels.shape[-1]

    def decode(index: int) -> None:
        with _opened(paths[index]) as image:
            image.draft("RGB", (side, side))  # JPEG: decode at a fraction of the size where that is enough
            upright = ImageOps.exif_transpose(image).convert("RGB")
            square = ImageOps.fit(upright, (side, side), Image.Resampling.BICUBIC)
        pixels[index] = np.asarray(square).transpose(2, 0, 1)

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow decodes outside Python's lock
        bar = tqdm(pool.map(decode, range(len(paths))), desc=f"read {root.name}", total=len(paths), leave=False)
        for _ in bar:
            pass
