"""Predictions on images: pictures of them, and files in the formats that COCO's and VOC's tools read.

    OUT/NAME.png                      the image with what was found in it
    OUT/classes.json                  the number of every class in the files below, and its name
    OUT/results.json                  objects, as COCO's tools take them
    OUT/comp4_det_test_CLASS.txt      boxes, as VOC's devkit takes them
    OUT/masks/NAME.png                label maps, as the masks of the dataset are
    OUT/left_out.txt                  images that could not be used, where there are any

The files hold all that the model returned, since metrics need it; a picture shows what scores at least the threshold.
"""

import io
import json
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn
from tqdm import tqdm

from ..datasets.check import SMALLEST, UNREADABLE
from ..errors import InputError, unknown
from ..files import check_place, replacing
from ..tasks.coco import results as coco_results
from ..tasks.registry import NAMES, Known, predict_image
from .pictures import palette, picture

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")  # of the images in a folder, in any case
FORBIDDEN = re.compile(r'[<>:"/\\|?*\x00-\x1f]')  # in the names of files, on Windows
RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)  # devices there, whatever the suffix
LONGEST = 200  # bytes of a name; file systems take 255, prefix and suffix included
VOID = 255  # never a class in a mask


def predict(
    model: nn.Module,
    paths: Sequence[Path | str],
    out: Path,
    task: str,
    classes: Sequence[str],
    category_ids: Sequence[int] | None = None,
    ignore: int = 0,
    threshold: float = 0.5,
    device: torch.device | str = "cpu",
    overwrite: bool = False,
    *,
    known: Mapping[Path, Known] | None = None,
    precision: str = "float32",
    skip_bad: bool = False,
) -> int:
    """Run a model on images, one by one, and write pictures and files into the folder ``out``.

    An image is called by its name without suffix; in ``results.json`` by the id in ``known``, else by a number where
    the name is one, as COCO's are. All coordinates refer to the upright image, see :func:`load_image`.

    Every image is read to its end before the first prediction. If something fails later, or the user interrupts, the
    files are written with what was predicted until then.

    Args:
        model: Takes and returns what ``e3va_lite.tasks.registry`` says; boxes are ``x1, y1, x2, y2``, half-open.
        paths: Files, or folders of images.
        out: A new or empty folder.
        task: ``voc`` (boxes), ``coco`` (boxes and masks), ``coco-boxes`` (boxes) or ``ade20k`` (label maps).
        classes: K names: of the labels 1..K, or of a label map's values 0..K-1.
        category_ids: K numbers of the classes in ``results.json``; 1..K without.
        ignore: Value that is no class in the dataset's masks. In a mask that is written, classes from this one on are
            moved up by one, as reading moves them down: with 0 they are 1..K, with 255 they are 0..K-1.
        threshold: Least score of what a picture shows.
        overwrite: Write into a folder that is not empty. Files of the same name are replaced, all others stay.
        known: What a dataset says of some of the images: their ids and sizes.
        precision: The recipe's, as in evaluation.
        skip_bad: Leave out images that cannot be used; a warning and ``left_out.txt`` list them.

    Returns:
        The number of images predicted on.

    Raises:
        InputError: For an unknown task, more classes than a mask of 8 bits can tell apart, a folder that cannot be
            used, or an image that cannot.
    """
    if task not in NAMES:
        raise unknown("task", task, NAMES)
    known, device = known or {}, torch.device(device)
    numbers = _numbers(task, len(classes), category_ids, ignore)
    paths, out = read_images(paths), Path(out)
    ids = _image_ids(paths, known)
    names = file_names(path.stem for path in paths)
    _check_out(out, paths, names.values(), overwrite)
    paths, bad = _readable(paths, known)  # better now than after an hour
    if bad and not (skip_bad and paths):
        raise InputError(f"{bad[0]} {len(bad)} of {len(ids)} images cannot be used; --skip-bad leaves such images out.")
    results, lines, done, finished = [], {name: [] for name in classes}, 0, False
    was_training = model.training
    model.to(device).eval()
    try:
        for path in tqdm(paths, desc="predict", unit="image"):
            try:
                image = load_image(path, known[path].size if path in known else None)
            except InputError as error:  # it has changed since
                if not skip_bad:
                    raise
                bad.append(error)
                continue
            prediction = predict_image(model, image, device, precision)
            name = f"{names[path.stem]}.png"
            _save(out / name, _png(picture(image, prediction, classes, threshold)))
            if task == "ade20k":
                _save(out / "masks" / name, _png(_index_image(prediction["mask"], numbers)))
            else:
                results += coco_results(prediction, ids[path], numbers)
                for label, line in _voc_lines(path.stem, prediction):
                    lines[classes[label - 1]].append(line)
            done += 1
        finished = True
    finally:
        model.train(was_training)
        by_number = dict(zip(numbers.tolist(), classes, strict=True))
        texts = {"classes.json": json.dumps(by_number, indent=2, ensure_ascii=False)}
        if task == "voc":
            texts |= {f"comp4_det_test_{safe}.txt": "".join(lines[name]) for name, safe in file_names(lines).items()}
        if task != "ade20k":
            texts["results.json"] = json.dumps(results)
        if bad:
            texts["left_out.txt"] = "".join(f"{error}\n" for error in bad)
        for name, text in texts.items():
            _save(out / name, text.encode())
        if bad:
            warnings.warn(f"{len(bad)} images were left out: {' '.join(map(str, bad))}", stacklevel=2)
        if not finished:
            warnings.warn(f"'{out}' holds the first {done} of {len(paths)} images.", stacklevel=2)
    return done


# Images in -----------------------------------------------------------------------------------------------------------


def read_images(paths: Sequence[Path | str]) -> list[Path]:
    """The files among ``paths``, and the images in the folders among them, sorted by name; each file once.

    Raises:
        InputError: For a path that does not exist, a folder without images, or two images of one name, or one number:
            what is written about one would replace what is written about the other.
    """
    files: dict[object, Path] = {}
    for path in map(Path, paths):
        if not path.exists():
            raise InputError(f"there is no '{path}': give images, or folders of images.")
        inside = [path] if path.is_file() else sorted(p for p in path.iterdir() if _is_image(p))
        if not inside:
            raise InputError(f"'{path}' holds no images ({', '.join(SUFFIXES)}): give another folder.")
        for file in inside:
            name = _image_id(file.stem.casefold())  # some file systems do not tell cases apart
            if not file.samefile(first := files.setdefault(name, file)):
                raise InputError(
                    f"'{first}' and '{file}' have the same name: rename one, or predict on them one by one."
                )
    if not files:
        raise InputError("there are no images: give some, or folders of images.")
    return list(files.values())


def load_image(path: Path, size: tuple[int, int] | None = None) -> Tensor:
    """An image as float (3, H, W), RGB in 0..1, turned as its EXIF orientation says: a photo is upright.

    Args:
        path: Of the image.
        size: Width and height that an annotation gives the image. If they are those of the pixels as stored, boxes
            refer to these, and the image is not turned: the readers of datasets decide likewise.

    Raises:
        InputError: For a file that cannot be read, an image smaller than 32 pixels or of more than 8 bits per channel.
    """
    with _opened(path) as image:
        upright = image if image.size == size else ImageOps.exif_transpose(image)
        pixels = np.array(upright.convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous().float() / 255


def _readable(paths: list[Path], known: Mapping[Path, Known]) -> tuple[list[Path], list[InputError]]:
    """The images that can be read to their end, and what is wrong with the others."""
    good, bad = [], []
    for path in tqdm(paths, desc="check", unit="image", delay=3):
        try:
            with _opened(path) as image:
                image.load()
                size = image.size
            if path in known and known[path].size not in (size, size[::-1]):
                told = "x".join(map(str, known[path].size))
                raise InputError(f"image '{path}' is {size[0]}x{size[1]}, its annotation says {told}: correct one.")
            good.append(path)
        except InputError as error:
            bad.append(error)
    return good, bad


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    try:
        with Image.open(path) as image:
            if min(image.size) < SMALLEST:
                small = f"{image.width}x{image.height}, smaller than {SMALLEST}x{SMALLEST}"
                raise InputError(f"image '{path}' is {small}: enlarge it or leave it out.")
            if image.mode[0] in "IF":  # converting these to RGB would make nearly all of it white
                raise InputError(f"image '{path}' has more than 8 bits per channel: convert it to 8 bits.")
            yield image
    except InputError:
        raise
    except UNREADABLE as error:
        raise InputError(f"image '{path}' cannot be read ({error}): replace it or leave it out.") from None


def _is_image(path: Path) -> bool:
    return path.is_file() and path.suffix.lower() in SUFFIXES and not path.name.startswith(".")


def _image_id(stem: str) -> int | str:
    return int(stem) if stem.isascii() and stem.isdecimal() else stem


def _image_ids(paths: list[Path], known: Mapping[Path, Known]) -> dict[Path, int | str]:
    """What ``results.json`` calls the images."""
    ids = {path: known[path].id if path in known else None for path in paths}
    ids = {path: _image_id(path.stem) if number is None else number for path, number in ids.items()}
    first: dict[int | str, Path] = {}
    for path, number in ids.items():
        if (other := first.setdefault(number, path)) != path:
            raise InputError(f"'{other}' and '{path}' would both be image {number}: rename one, or predict on one.")
    return ids


# Files out -----------------------------------------------------------------------------------------------------------


def file_names(names: Iterable[str]) -> dict[str, str]:
    """For every name one that a file can have on any system, all of them different, in any case.

    A name that is fine as it is stays; in others every forbidden character becomes ``_``, and a number tells equal ones
    apart.
    """
    result: dict[str, str] = {}
    taken: set[str] = set()
    for name in sorted(dict.fromkeys(names), key=lambda name: _allowed(name) != name):
        safe = allowed = _allowed(name)
        number = 1
        while safe.casefold() in taken:
            number += 1
            safe = f"{allowed}_{number}"
        taken.add(safe.casefold())
        result[name] = safe
    return result


def _allowed(name: str) -> str:
    name = FORBIDDEN.sub("_", name).encode(errors="surrogateescape")[:LONGEST].decode(errors="ignore")
    return f"_{name}" if RESERVED.fullmatch(name) or not name.strip(" .") else name


def _check_out(out: Path, paths: list[Path], names: Iterable[str], overwrite: bool) -> None:
    """Raise an error if the folder ``out`` cannot be made or written to, or something there could be lost."""
    if {folder.resolve() for folder in (out, out / "masks")} & {path.parent.resolve() for path in paths}:
        raise InputError(f"'{out}' holds the images themselves: choose another --out.")
    for folder in (out, out / "masks"):
        check_place(folder, overwrite=True, folder=True)
    if out.exists() and not overwrite and any(out.iterdir()):
        raise InputError(f"'{out}' is not empty: choose another --out, or pass --overwrite.")
    for file in (folder / f"{name}.png" for folder in (out, out / "masks") for name in names):
        check_place(file, overwrite=True)


def _save(path: Path, content: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as unfinished:
            unfinished.write_bytes(content)
    except OSError as error:
        raise InputError(f"'{path}' cannot be written ({error}): make room, or choose another --out.") from error


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def _numbers(task: str, count: int, category_ids: Sequence[int] | None, ignore: int) -> np.ndarray:
    """What the files call the classes, (K,)."""
    numbers = np.arange(count)
    if task != "ade20k":
        return numbers + 1 if category_ids is None else np.array(category_ids)
    numbers += numbers >= ignore
    if numbers[-1] >= VOID:
        raise InputError(f"{count} classes with ignore {ignore} do not fit into a mask of 8 bits: have fewer classes.")
    return numbers


def _index_image(mask: Tensor, numbers: np.ndarray) -> Image.Image:
    """A label map (H, W) in the dataset's numbers, with the pictures' colours as its palette."""
    image = Image.fromarray(numbers.astype(np.uint8)[mask.numpy()])
    colours = np.zeros((256, 3), np.uint8)
    colours[numbers] = palette(len(numbers))
    image.putpalette(colours.tobytes())
    return image


def _voc_lines(stem: str, prediction: dict) -> Iterator[tuple[int, str]]:
    """Label and line of each box of an image as the devkit reads them: pixels count from 1, the last one included."""
    columns = (prediction[name].tolist() for name in ("labels", "scores", "boxes"))
    for label, score, (x1, y1, x2, y2) in zip(*columns, strict=True):
        yield label, f"{stem} {score:.9g} {x1 + 1:.9g} {y1 + 1:.9g} {x2:.9g} {y2:.9g}\n"
