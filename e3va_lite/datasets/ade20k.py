"""Images and index masks in two folders: ADE20K, Pascal VOC's segmentation, CamVid, people's own, ``shapes``.

    ROOT/images/SPLIT/NAME.jpg        the image
    ROOT/annotations/SPLIT/NAME.png   a picture of the same size whose values are the numbers of classes

Folders, suffixes, an optional list of names and the value that is no class are fields of the recipe. Augmentation is
mmsegmentation's own; reading is ours, since mmsegmentation reads a mask of colours as if it were one of numbers, takes
any number for a class, and turns an image as its EXIF says without turning its mask.
"""

import csv
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

from ..errors import InputError
from ..recipes.schema import ADE20KRecipe
from .check import EXIF_ORIENTATION, SMALLEST, UNREADABLE, Problem
from .mmseg import import_mmseg

mmseg = import_mmseg()

VOID = 255  # label of pixels that are no class, whatever their value in the file
GREY = (104, 116, 124)  # ImageNet's mean colour in BGR: nothing, once an image is normalised


class MaskFolder(Dataset):
    """Images and label maps of one split.

    Item ``i`` is an image, float (3, H, W), RGB in 0..1, and a dict of

    - ``mask``, int64 (H, W): 0..K-1, positions in ``classes``, and 255 where there is none. In the file, the value
      ``recipe.ignore`` and 255 are no class, values below ``ignore`` are positions, values above it positions plus one;
    - ``image_id``, the image's name below its folder, without suffix;
    - ``file``, the image's path.

    A mask belongs to the pixels as stored; EXIF's orientation is applied only where the mask has the turned size.

    Args:
        root: The folder around the folders of images and masks.
        split: Put in place of ``{split}`` in the recipe's ``images``, ``masks`` and ``listing``.
        recipe: Says how the folder is laid out and, with ``train``, how images are augmented.
        classes: Their names. Without: those of the folder's ``objectInfo*.csv`` or ``.txt``, else ADE20K's 150.
        train: Resized, cropped, mirrored and with other colours, always (3, crop, crop); else as stored.
        strict: Raise an error where there would be a warning, for masks without an image.

    Raises:
        InputError: For a missing folder, list, image or mask, an empty split, or classes that cannot be; when an item
            is loaded, for an image or mask that cannot be used.
    """

    def __init__(
        self,
        root: Path | str,
        split: str,
        recipe: ADE20KRecipe,
        classes: Sequence[str] | None = None,
        train: bool = False,
        strict: bool = False,
    ) -> None:
        self.pairs, orphans = find_files(Path(root), split, recipe)
        for _, image, mask in self.pairs:
            if not image.is_file():
                raise InputError(f"image '{image}' is missing: add it or remove it from the list.")
            if not mask.is_file():
                raise InputError(f"image '{image}' has no mask '{mask}': add it or leave the image out.")
        if orphans:
            message = f"in split '{split}' of '{root}', masks without an image: {len(orphans)} ({orphans[0].name}, ...)"
            if strict:
                raise InputError(f"{message}. Remove them, or go without strict.")
            warnings.warn(message, stacklevel=2)
        self.classes = list(classes) if classes is not None else class_names(Path(root))
        self.table = label_table(self.classes, recipe.ignore)
        self.augment = augmentation(recipe.scale, recipe.ratio, recipe.crop) if train else []

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Tensor, dict]:
        name, image, mask = self.pairs[index]
        pixels, labels = read_pair(image, mask, self.table)
        # OpenCV has blue first.
        results = {"img": np.ascontiguousarray(pixels[..., ::-1]), "gt_seg_map": labels, "seg_fields": ["gt_seg_map"]}
        for transform in self.augment:
            results = transform(results)
        pixels = np.ascontiguousarray(results["img"][..., ::-1].transpose(2, 0, 1))
        target = {"mask": torch.from_numpy(results["gt_seg_map"]).long(), "image_id": name, "file": str(image)}
        return torch.from_numpy(pixels).float() / 255, target


def augmentation(scale: Sequence[int], ratio: Sequence[float], crop: int) -> list[Callable[[dict], dict]]:
    """mmsegmentation's training pipeline for ADE20K, from loaded to padded; it draws from numpy's global state only.

    Args:
        scale: Long and short side in pixels that images are fitted into, ...
        ratio: ... times a number between these two.
        crop: Side in pixels of the square that is cut out, at most three quarters of it one class if that can be had
            in ten tries. Smaller images are padded, their masks with void.
    """
    from mmcv.transforms import Pad, RandomFlip, RandomResize
    from mmseg.datasets.transforms import PhotoMetricDistortion, RandomCrop

    if len(scale) != 2 or len(ratio) != 2 or ratio[0] > ratio[1]:
        raise InputError(f"scale={scale}, ratio={ratio} cannot work: give two numbers each, ratio ascending.")
    if crop < SMALLEST:
        raise InputError(f"crop={crop} is too small: choose {SMALLEST} or more.")
    return [
        RandomResize(scale=tuple(scale), ratio_range=tuple(ratio), keep_ratio=True),
        RandomCrop(crop_size=(crop, crop), cat_max_ratio=0.75, ignore_index=VOID),
        RandomFlip(prob=0.5),
        PhotoMetricDistortion(),
        Pad(size=(crop, crop), pad_val={"img": GREY, "seg": VOID}),
    ]


# Files ---------------------------------------------------------------------------------------------------------------


class Pair(NamedTuple):
    """An image, its mask, and the name that they share. Either may be missing."""

    name: str
    image: Path
    mask: Path


def find_files(root: Path, split: str, recipe: ADE20KRecipe) -> tuple[list[Pair], list[Path]]:
    """The images of a split with their masks, and the masks without an image.

    Raises:
        InputError: If there is no such split, or nothing in it.
    """
    folders = [_below(root, pattern, split) for pattern in (recipe.images, recipe.masks)]
    for folder in folders:
        if not folder.is_dir():
            there = sorted(path.name for path in folder.parent.glob("*/"))
            hint = f"there are {', '.join(there)}" if there else "check the root"
            raise InputError(f"there is no folder '{folder}': {hint}; the recipe's images, masks and splits say which.")
    suffixes = recipe.image_suffix, recipe.mask_suffix
    images, masks = (_named(folder, suffix) for folder, suffix in zip(folders, suffixes, strict=True))
    if recipe.listing is None:
        names, source = list(images), folders[0]
    else:
        source = _below(root, recipe.listing, split)
        if not source.is_file():
            raise InputError(f"there is no list '{source}': check the split and the recipe's listing.")
        lines = source.read_text(encoding="utf-8-sig", errors="replace").splitlines()
        names = list(dict.fromkeys(line.strip().removesuffix(suffixes[0]) for line in lines if line.strip()))
    if not names:
        raise InputError(f"'{source}' has no images: add some, or check the recipe's image_suffix={suffixes[0]}.")
    pairs = [
        Pair(
            name,
            images.get(name, folders[0] / f"{name}{suffixes[0]}"),
            masks.get(name, folders[1] / f"{name}{suffixes[1]}"),
        )
        for name in names
    ]
    orphans = [path for name, path in masks.items() if name not in images] if recipe.listing is None else []
    return pairs, orphans


def _below(root: Path, pattern: str, split: str) -> Path:
    return root / pattern.replace("{split}", split)


def _named(folder: Path, suffix: str) -> dict[str, Path]:
    """The files with that suffix, also in folders further down, by their path below without it."""
    files = (path for path in sorted(folder.rglob("*")) if path.name.lower().endswith(suffix.lower()))
    return {
        path.relative_to(folder).as_posix()[: -len(suffix)]: path
        for path in files
        if path.is_file() and not path.name.startswith(".")
    }


def class_names(root: Path) -> list[str]:
    """What ``objectInfo*.csv`` or ``.txt`` says, of a class's synonyms the first if it is unique; else ADE20K's 150."""
    for path in (*sorted(root.glob("objectInfo*.csv")), *sorted(root.glob("objectInfo*.txt"))):
        lines = path.read_text(encoding="utf-8-sig", errors="replace").splitlines()
        rows = list(csv.DictReader(lines, delimiter="\t" if lines and "\t" in lines[0] else ","))
        names = [(row.get("Name") or "").strip() for row in rows]
        if names and all(names):
            first = [name.replace(";", ",").split(",")[0].strip() for name in names]
            counts = Counter(first)
            return [short if counts[short] == 1 else name for short, name in zip(first, names, strict=True)]
    return list(mmseg.datasets.ADE20KDataset.METAINFO["classes"])


def label_table(classes: Sequence[str], ignore: int) -> np.ndarray:
    """Labels by value in the file, int16 (256,): 0..K-1, 255 for void, -1 for what is neither.

    Raises:
        InputError: For classes that are not 2 to 255 different names.
    """
    count = len(classes)
    if not 2 <= count <= 255 or len(set(classes)) < count:
        raise InputError(f"{count} classes ({', '.join(classes[:3])}, ...) cannot work: give 2 to 255, every one once.")
    values = np.arange(256)
    table = values - (values > ignore)
    table[table >= count] = -1
    table[[VOID, *[ignore] * (ignore < VOID)]] = VOID
    return table.astype(np.int16)


# Pixels --------------------------------------------------------------------------------------------------------------


class BadMask(InputError):
    """A mask that cannot be used; ``problem`` is what a check of the files calls it."""

    problem: Problem


def _bad(path: Path, kind: str, detail: str, way_out: str) -> BadMask:
    error = BadMask(f"mask '{path}' {detail}: {way_out}.")  # one argument: worker processes send errors by pickle
    error.problem = Problem(kind, f"{path} ({detail})", True)
    return error


def read_pair(image: Path, mask: Path, table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """RGB, uint8 (H, W, 3), and labels, uint8 (H, W).

    Raises:
        InputError: If one of the two cannot be used.
    """
    mode, sizes = _from(image, lambda opened: (opened.mode, possible_sizes(opened)))
    if mode[0] in "IF":  # converting these to RGB would make nearly all of it white
        raise InputError(f"image '{image}' has more than 8 bits per channel: convert it to 8 bits.")
    if min(sizes[0]) < SMALLEST:
        small = f"{sizes[0][0]}x{sizes[0][1]}, smaller than {SMALLEST}x{SMALLEST}"
        raise InputError(f"image '{image}' is {small}: enlarge it or leave it out.")
    labels = read_mask(mask, sizes, table)
    as_stored = labels.shape == sizes[0][::-1]
    pixels = _from(image, lambda opened: (opened if as_stored else ImageOps.exif_transpose(opened)).convert("RGB"))
    return np.array(pixels), labels


def _from(path: Path, use: Callable) -> object:
    try:
        with Image.open(path) as image:
            return use(image)
    except UNREADABLE as error:
        raise InputError(f"image '{path}' cannot be read ({error}): replace it or leave it out.") from None


def possible_sizes(image: Image.Image) -> list[tuple[int, int]]:
    """Width and height that a mask of the image can have: as stored, and the other way round if EXIF says so."""
    lying = image.getexif().get(EXIF_ORIENTATION) in (5, 6, 7, 8)
    return [image.size, image.size[::-1]] if lying else [image.size]


def read_mask(path: Path, sizes: list[tuple[int, int]] | None, table: np.ndarray) -> np.ndarray:
    """Labels, uint8 (H, W).

    Args:
        sizes: Width and height that it may have; any if not given.
        table: See :func:`label_table`.

    Raises:
        BadMask: Unless it is a readable picture of one channel of 8 bits, of such a size, with known values only.
    """
    try:
        with Image.open(path) as image:
            mode, size, bands = image.mode, image.size, len(image.getbands())
            values = np.array(image)  # of a palette image: the indices, not the colours
    except UNREADABLE as error:
        raise _bad(path, "masks that cannot be read to their end", f"cannot be read ({error})", "replace it") from None
    if mode not in ("L", "P"):
        detail = f"is a picture in colours (mode {mode})" if bands > 1 else f"has not 8 bits per pixel (mode {mode})"
        raise _bad(path, f"masks of mode {mode}", detail, "save the classes' numbers as one channel of 8 bits")
    if sizes is not None and size not in sizes:
        detail = "is {}x{} and its image {}x{}".format(*size, *sizes[0])
        raise _bad(path, "masks of another size than their image", detail, "give both the same size")
    labels = table[values]
    if (wrong := np.unique(values[labels < 0]).tolist()) != []:
        known = np.flatnonzero((table >= 0) & (table != VOID))
        shown = ", ".join(map(str, wrong[:5])) + (", ..." if len(wrong) > 5 else "")
        void = " and ".join(map(str, np.flatnonzero(table == VOID)))
        detail = f"has values that are no class: {shown}; classes are {known[0]} to {known[-1]}, void {void}"
        raise _bad(path, "masks with values that are no class", detail, "correct it, or the recipe's classes or ignore")
    return labels.astype(np.uint8)
