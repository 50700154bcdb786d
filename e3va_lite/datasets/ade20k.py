"""Images and index masks in two folders: ADE20K, Pascal VOC's segmentation, CamVid, people's own, ``shapes``.

    ROOT/images/SPLIT/NAME.jpg        the image
    ROOT/annotations/SPLIT/NAME.png   a picture of the same size whose values are the numbers of classes

Folders, suffixes, an optional list of names and the value that is no class are fields of the recipe. Augmentation is
mmsegmentation's own; reading is ours, since mmsegmentation reads a mask of colours as if it were one of numbers, takes
any number for a class, and turns an image as its EXIF says without turning its mask.
"""

import copy
import csv
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from ..errors import InputError
from ..recipes.schema import ADE20KRecipe
from .check import SMALLEST, UNREADABLE, BadFile, Contents, Findings, Problem, Walk, bad_file
from .images import SUFFIXES, Limits, files_by_name, folders_of, harmless_findings, read_header, read_image, read_list
from .mmseg_import import import_mmseg
from .parsing import whole

mmseg = import_mmseg()

VOID = 255  # label of pixels that are no class, whatever their value in the file
ADE20KS_OWN = "ADE20K's own, since neither the recipe nor the folder names any"
MASKS_TO_LOOK_AT = 500  # when a training set is made
BORDER = (224, 224, 192)  # the colour of VOC's unclear borders
GREY = (104, 116, 124)  # ImageNet's mean colour in BGR: nothing, once an image is normalised


class MaskFolder(Dataset):
    """Images and label maps of one split.

    Item ``i`` is an image, float (3, H, W), RGB in 0..1, and a dict of

    - ``mask``, int64 (H, W): 0..K-1, positions in ``classes``, and 255 where there is none. In the file, the value
      ``recipe.ignore`` and 255 are no class, values below ``ignore`` are positions, values above it positions plus one;
      ``recipe.values`` gives single values another meaning first. A mask in colours means what the folder's
      ``labelmap.txt`` says of each colour, see :class:`Labels`;
    - ``image_id``, the image's name below its folder, without suffix;
    - ``file``, the image's path.

    A mask belongs to the pixels as stored; EXIF's orientation is applied only where the mask has the turned size.

    Args:
        root: The folder around the folders of images and masks.
        split: Put in place of ``{split}`` in the recipe's ``images``, ``masks`` and ``listing``.
        recipe: Says how the folder is laid out and, with ``train``, how images are augmented.
        classes: Their names. Without: those of the folder, see :func:`class_source`, else ADE20K's 150.
        train: Resized, cropped, mirrored and with other colours, always (3, crop, crop); else as stored.
        strict: Raise an error where there would be a warning, for masks without an image.

    Raises:
        InputError: For a missing folder, list, image or mask, an empty split, classes that cannot be, or nothing to
            train on; when an item is loaded, for an image or mask that cannot be used.
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
        root = Path(root)
        self.pairs, orphans = find_files(root, split, recipe)
        for _, image, mask in self.pairs:
            if not image.is_file():
                raise InputError(f"image '{image}' is missing: add it or remove it from the list.")
            if not mask.is_file():
                raise InputError(f"image '{image}' has no mask '{mask}': add it or leave the image out.")
        notes = []
        if orphans:
            notes.append(f"masks without an image: {len(orphans)} ({orphans[0].name}, ...)")
            if strict:
                raise InputError(f"in split '{split}' of '{root}', {notes[0]}. Remove them, or go without strict.")
        names, source = class_source(root)
        self.classes = list(classes) if classes is not None else names
        self.labels = Labels(self.classes, recipe, root)
        self.limits = image_limits(recipe)
        self.augment = augmentation(recipe.scale, recipe.ratio, recipe.crop) if train else []
        if train:
            if classes is None and source == ADE20KS_OWN:
                notes.append(f"{source}: give classes if they are others")
            notes += self._teaching(f"split '{split}' of '{root}'")
        if notes:
            warnings.warn(f"in split '{split}' of '{root}', {'; '.join(notes)}", stacklevel=2)

    def _teaching(self, where: str) -> list[str]:
        """What to warn of, from as many masks as it takes to see every class, but no more than some hundreds.

        Raises:
            InputError: If no mask shows a class.
        """
        taught: Counter = Counter()
        for count, pair in enumerate(self.pairs):
            if len(taught) == len(self.classes) or (count >= MASKS_TO_LOOK_AT and taught):
                break
            try:
                taught.update(self.labels.names_in(read_mask(pair.mask, None, self.labels)))
            except BadFile:  # it stops training when it is loaded, and says so
                return []
        whole_split = count + 1 == len(self.pairs)
        notes = Contents([], self.classes, "", taught, unit="masks").require_something_to_learn(where)
        return notes if whole_split else []

    def __len__(self) -> int:
        return len(self.pairs)

    @property
    def paths(self) -> list[Path]:
        """The files of the images."""
        return [pair.image for pair in self.pairs]

    def only(self, indices: Iterable[int]) -> Self:
        """The dataset of some of these images."""
        some = copy.copy(self)
        some.pairs = [self.pairs[i] for i in indices]
        return some

    def __getitem__(self, index: int) -> tuple[Tensor, dict]:
        name, image, mask = self.pairs[index]
        labels = read_mask(mask, read_header(image, self.limits).sizes, self.labels)
        pixels = read_image(image, labels.shape[::-1], self.limits)
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
    folders = folders_of(root, split, images=recipe.images, masks=recipe.masks)
    suffixes = recipe.image_suffix, recipe.mask_suffix
    found = []
    for folder, suffix in zip(folders, suffixes, strict=True):
        # Pictures may be of another kind, unless the suffix is all that tells images from masks.
        others = SUFFIXES if suffix.lower() in SUFFIXES and folders[0] != folders[1] else ()
        found.append(files_by_name(folder, (suffix, *others)))
    images, masks = found
    if recipe.listing is None:
        names, source = list(images), folders[0]
    else:
        source = root / recipe.listing.replace("{split}", split)
        names = list(dict.fromkeys(name.removesuffix(suffixes[0]) for name in read_list(source, images)[0]))
    if not names:
        other = next((path.name for path in sorted(folders[0].rglob("*")) if path.is_file()), None)
        hint = f" ('{other}' has another)" if other else ""
        raise InputError(f"'{source}' has no images: add some, or check image_suffix={suffixes[0]}{hint}.")
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


def class_source(root: Path) -> tuple[list[str], str]:
    """The classes that a folder names, and where it does: ``objectInfo*.csv`` or ``.txt``, of a class's synonyms the
    first if it is unique; CVAT's ``labelmap.txt``; else ADE20K's 150."""
    for path in (*sorted(root.glob("objectInfo*.csv")), *sorted(root.glob("objectInfo*.txt"))):
        lines = path.read_text(encoding="utf-8-sig", errors="replace").splitlines()
        rows = list(csv.DictReader(lines, delimiter="\t" if lines and "\t" in lines[0] else ","))
        names = [(row.get("Name") or "").strip() for row in rows]
        if names and all(names):
            first = [name.replace(";", ",").split(",")[0].strip() for name in names]
            counts = Counter(first)
            names = [short if counts[short] == 1 else name for short, name in zip(first, names, strict=True)]
            return names, f"of '{path.name}'"
    if colours := read_labelmap(root):
        return list(dict.fromkeys(colours.values())), "of 'labelmap.txt'"
    return list(mmseg.datasets.ADE20KDataset.METAINFO["classes"]), ADE20KS_OWN


def read_labelmap(root: Path) -> dict[tuple[int, int, int], str]:
    """Class names by colour, as CVAT writes them: lines of ``name:red,green,blue:parts:actions``; empty if not there.

    Raises:
        InputError: For a line that is something else.
    """
    path, colours = root / "labelmap.txt", {}
    lines = path.read_text(encoding="utf-8-sig", errors="replace").splitlines() if path.is_file() else []
    for line in lines:
        if line.strip() and not line.startswith("#"):
            name, _, rest = line.partition(":")
            colour = tuple(whole(part) for part in rest.split(":")[0].split(","))
            if len(colour) != 3 or not all(part is not None and 0 <= part <= 255 for part in colour):
                raise InputError(f"'{path}' has the line '{line.strip()}': write name:red,green,blue::.")
            colours[colour] = name.strip()
    return colours


def label_table(classes: Sequence[str], ignore: int, values: dict | None = None) -> np.ndarray:
    """Labels by value in the file, int16 (256,): 0..K-1, 255 for void, -1 for what is neither.

    Raises:
        InputError: For classes that are not 2 to 255 different names, or ``values`` that are not within 0..255.
    """
    count = len(classes)
    if not 2 <= count <= 255 or len(set(classes)) < count:
        raise InputError(f"{count} classes ({', '.join(classes[:3])}, ...) cannot work: give 2 to 255, every one once.")
    numbers = np.arange(256)
    table = numbers - (numbers > ignore)
    table[table >= count] = -1
    table[[VOID, *[ignore] * (ignore < VOID)]] = VOID
    pairs = [(whole(value), whole(meant)) for value, meant in (values or {}).items()]
    if not all(None not in pair and 0 <= min(pair) <= max(pair) <= 255 for pair in pairs):
        raise InputError(f"values={values} cannot work: map values of 0..255 to others, e.g. {{255: 1}}.")
    old = table.copy()
    for value, meant in pairs:
        table[value] = old[meant]
    return table.astype(np.int16)


class Labels:
    """What the pixels of a mask mean.

    Attributes:
        classes: Names, in the order of the labels.
        table: Labels by value, see :func:`label_table`.
        colours: Labels by colour, where the folder has a ``labelmap.txt``: a mask in colours is read by it. Colours of
            names that are not in ``classes``, and that of VOC's borders, are void.
    """

    def __init__(self, classes: Sequence[str], recipe: ADE20KRecipe, root: Path) -> None:
        self.classes = list(classes)
        self.table = label_table(classes, recipe.ignore, recipe.values)
        named = {BORDER: "", **read_labelmap(root)}
        self.colours = {c: self.classes.index(n) if n in self.classes else VOID for c, n in named.items()}
        self.has_colours = len(named) > 1

    def names_in(self, labels: np.ndarray) -> list[str]:
        return [self.classes[label] for label in np.unique(labels) if label != VOID]


# Pixels --------------------------------------------------------------------------------------------------------------


def image_limits(recipe: ADE20KRecipe) -> Limits:
    """What an image may be at most, to be resized as the recipe says."""
    return Limits(recipe.max_megapixels, 2 * recipe.scale[0] * min(1, *recipe.ratio))


def _bad(path: Path, kind: str, detail: str, way_out: str) -> BadFile:
    return bad_file(kind, f"{path} ({detail})", f"mask '{path}' {detail}: {way_out}.")


def read_mask(path: Path, sizes: list[tuple[int, int]] | None, labels: Labels) -> np.ndarray:
    """Labels, uint8 (H, W).

    Args:
        sizes: Width and height that it may have; any if not given.

    Raises:
        BadFile: Unless it is a readable picture of one channel of 8 bits, or of known colours, of such a size, with
            known values only.
    """
    try:
        with Image.open(path) as image:
            mode, size, bands = image.mode, image.size, len(image.getbands())
            by_colour = labels.has_colours and mode in ("P", "RGB", "RGBA")
            values = np.array(image.convert("RGB") if by_colour else image)  # of a palette image: the indices
    except UNREADABLE as error:
        raise _bad(path, "masks that cannot be read to their end", f"cannot be read ({error})", "replace it") from None
    if mode not in ("L", "P") and not by_colour:
        detail = f"is a picture in colours (mode {mode})" if bands > 1 else f"has not 8 bits per pixel (mode {mode})"
        way_out = "save the classes' numbers as one channel of 8 bits" + (", or add a labelmap.txt" * (bands > 1))
        raise _bad(path, f"masks of mode {mode}", detail, way_out)
    if sizes is not None and size not in sizes:
        detail = "is {}x{} and its image {}x{}".format(*size, *sizes[0])
        raise _bad(path, "masks of another size than their image", detail, "give both the same size")
    if by_colour:
        return _from_colours(path, values, labels)
    found = labels.table[values]
    if (wrong := np.unique(values[found < 0]).tolist()) != []:
        known = np.flatnonzero((labels.table >= 0) & (labels.table != VOID))
        shown = ", ".join(map(str, wrong[:5])) + (", ..." if len(wrong) > 5 else "")
        void = " and ".join(map(str, np.flatnonzero(labels.table == VOID)))
        detail = f"has values that are no class: {shown}; classes are {known[0]} to {known[-1]}, void {void}"
        way_out = "correct it, or the recipe's classes, values or ignore"
        raise _bad(path, "masks with values that are no class", detail, way_out)
    return found.astype(np.uint8)


def _from_colours(path: Path, pixels: np.ndarray, labels: Labels) -> np.ndarray:
    packed = pixels.astype(np.int64) @ (1 << 16, 1 << 8, 1)  # (H, W), a number per colour
    found = np.full(packed.shape, -1, np.int16)
    for (red, green, blue), label in labels.colours.items():
        found[packed == (red << 16 | green << 8 | blue)] = label
    if (wrong := np.unique(packed[found < 0]).tolist()) != []:
        shown = ", ".join(f"({c >> 16}, {c >> 8 & 255}, {c & 255})" for c in wrong[:5]) + ", ..." * (len(wrong) > 5)
        detail = f"has colours that labelmap.txt does not: {shown}"
        raise _bad(path, "masks with colours that are no class", detail, "correct it, or labelmap.txt")
    return found.astype(np.uint8)


def find_problems(recipe: ADE20KRecipe, root: Path, split: str) -> Findings:
    """Everything that is wrong with the files of a split, read as training reads them; and what the split holds."""
    root = Path(root)
    try:
        pairs, orphans = find_files(root, split, recipe)
        names, source = (recipe.classes, "of the recipe") if recipe.classes else class_source(root)
        labels = Labels(names, recipe, root)
    except InputError as error:
        return Findings([Problem("splits that cannot be used", str(error), True)])
    walk, taught = Walk(), Counter()
    for path in orphans:
        walk.note("masks without an image", str(path))
    for _, image, mask in tqdm(pairs, f"check {split}", unit="image", delay=3):
        sizes = None
        with walk.refusing():
            header = read_header(image, image_limits(recipe), decode=True)
            sizes = header.sizes
            walk.problems += harmless_findings(header)
        if not mask.is_file():
            walk.refuse("images without a mask", f"{image} (no {mask})")
            continue
        with walk.refusing():
            shown = labels.names_in(read_mask(mask, sizes, labels))
            taught.update(shown)
            if not shown:
                walk.note("masks of nothing but void", str(mask))
    images = [pair.image for pair in pairs]
    return Findings(walk.problems, Contents(images, labels.classes, source, taught, unit="masks"))
