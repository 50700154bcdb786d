"""Predictions on anybody's images: pictures for people, and for tools the files that they read.

    OUT/NAME.png                      the image with what was found in it
    OUT/classes.json                  the number of every class in the files below, and its name
    OUT/results.json                  objects, as COCO's tools take them
    OUT/comp4_det_test_CLASS.txt      boxes, as VOC's devkit takes them
    OUT/masks/NAME.png                label maps, as the masks of the dataset are

The files hold all that the model returned, since metrics need it; a picture shows what scores at least the threshold.
Read from ``predict`` down. What is drawn is in the second half.
"""

import io
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import matplotlib
import numpy as np
import torch
from contourpy import contour_generator
from PIL import Image, ImageColor, ImageDraw, ImageFont, ImageOps
from pycocotools import mask as coco_mask
from torch import Tensor, nn
from torchvision.ops import box_convert
from tqdm import tqdm

from ..datasets.check import SMALLEST, UNREADABLE
from ..errors import InputError, unknown
from ..tasks.registry import NAMES
from .sampling import on

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")  # of the images in a folder, in any case
FORBIDDEN = re.compile(r"[/\\]")  # in the name of a file, not in that of a class
SIDE = 640  # pixels that the long side of a picture has at least: names on a smaller one are hard to read
MASK, REGION = 0.35, 0.6  # opacity of an object's mask, and of a label map
VOID = 255  # never a class in a mask
FIRST = ["#ff8f1f", "#2e86f0", "#35b44a", "#f0529c", "#ffd23f", "#8d5cf6", "#1fc3d0", "#e63946", "#a8d93a", "#b9794a"]
TO_CONES = ((0.4122, 0.5363, 0.0514), (0.2119, 0.6807, 0.1074), (0.0883, 0.2817, 0.6300))  # Oklab, from linear RGB
TO_LAB = ((0.2105, 0.7936, -0.0041), (1.9780, -2.4286, 0.4506), (0.0259, 0.7828, -0.8087))


@torch.inference_mode()
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
) -> int:
    """Run a model on images, one by one, and write pictures and files into the folder ``out``.

    An image is called by its name without suffix; in ``results.json`` by a number where the name is one, as COCO's
    are. All coordinates refer to the upright image, see :func:`load_image`.

    Args:
        model: Takes and returns what ``e3va_lite.tasks.registry`` says; boxes are ``x1, y1, x2, y2``, half-open.
        paths: Files, or folders of images.
        out: A new or empty folder.
        task: ``voc`` (boxes), ``coco`` (boxes and masks) or ``ade20k`` (label maps).
        classes: K names: of the labels 1..K, or of a label map's values 0..K-1.
        category_ids: K numbers of the classes in ``results.json``; 1..K without.
        ignore: Value that is no class in the dataset's masks. In a mask that is written, classes from this one on are
            moved up by one, as reading moves them down: with 0 they are 1..K, with 255 they are 0..K-1.
        threshold: Least score of what a picture shows.
        overwrite: Write into a folder that is not empty. Files of the same name are replaced, all others stay.

    Returns:
        The number of images.

    Raises:
        InputError: For an unknown task, more classes than a mask of 8 bits can tell apart, a folder that cannot be
            used, or an image that cannot; files that were written before are whole.
    """
    if task not in NAMES:
        raise unknown("task", task, NAMES)
    numbers = _numbers(task, len(classes), category_ids, ignore)
    paths, out = read_images(paths), Path(out)
    for path in paths:  # better now than after an hour
        with _opened(path):
            pass
    _prepare(out, paths, overwrite)
    results, lines = [], {name: [] for name in classes}
    was_training = model.training
    model.to(device).eval()
    for path in tqdm(paths, desc="predict", unit="image"):
        image = load_image(path)
        prediction = on(model([image.to(device)])[0], "cpu")
        _save(out / f"{path.stem}.png", _png(picture(image, prediction, classes, threshold)))
        if task == "ade20k":
            _save(out / f"masks/{path.stem}.png", _png(_index_image(prediction["mask"], numbers)))
            continue
        results += _coco_results(path.stem, prediction, numbers)
        for line, label in zip(_voc_lines(path.stem, prediction), prediction["labels"].tolist(), strict=True):
            lines[classes[label - 1]].append(line)
    model.train(was_training)
    if task == "voc":
        for name, found in lines.items():
            _save(out / f"comp4_det_test_{FORBIDDEN.sub('_', name)}.txt", "".join(found).encode())
    if task != "ade20k":
        _save(out / "results.json", json.dumps(results).encode())
    names = dict(zip(numbers.tolist(), classes, strict=True))
    _save(out / "classes.json", json.dumps(names, indent=2, ensure_ascii=False).encode())
    return len(paths)


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


def load_image(path: Path) -> Tensor:
    """An image as float (3, H, W), RGB in 0..1, turned as its EXIF orientation says: a photo is upright.

    The readers of datasets do not turn it, because annotations refer to the pixels as stored.

    Raises:
        InputError: For a file that cannot be read, an image smaller than 32 pixels or of more than 8 bits per channel.
    """
    with _opened(path) as image:
        pixels = np.array(ImageOps.exif_transpose(image).convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous().float() / 255


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


# Files out -----------------------------------------------------------------------------------------------------------


def _prepare(out: Path, paths: list[Path], overwrite: bool) -> None:
    """Make the folder ``out``, unless something there could be lost."""
    if {folder.resolve() for folder in (out, out / "masks")} & {path.parent.resolve() for path in paths}:
        raise InputError(f"'{out}' holds the images themselves: choose another --out.")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"'{out}' cannot be a folder ({error}): choose another --out.") from None
    if not overwrite and any(out.iterdir()):
        raise InputError(f"'{out}' is not empty: choose another --out, or pass --overwrite.")


def _save(path: Path, content: bytes) -> None:
    """Write a file under another name and rename it, so that under its own name there is always a whole one."""
    unfinished = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(exist_ok=True)
        unfinished.write_bytes(content)
        unfinished.replace(path)
    except OSError as error:
        raise InputError(f"'{path}' cannot be written ({error}): make room, or choose another --out.") from error
    finally:
        unfinished.unlink(missing_ok=True)


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def _numbers(task: str, count: int, category_ids: Sequence[int] | None, ignore: int) -> np.ndarray:
    """What the files call the classes, (K,)."""
    if task != "ade20k":
        return np.arange(count) + 1 if category_ids is None else np.array(category_ids)
    numbers = np.arange(count)
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


def _coco_results(stem: str, prediction: dict, numbers: np.ndarray) -> list[dict]:
    """One image's objects in COCO's results format: boxes as ``x, y, width, height``, masks as run lengths."""
    columns = {
        "category_id": numbers[prediction["labels"].numpy() - 1].tolist(),
        "bbox": box_convert(prediction["boxes"].double(), "xyxy", "xywh").tolist(),
        "score": prediction["scores"].tolist(),
    }
    if "masks" in prediction:
        encoded = coco_mask.encode(np.asfortranarray(prediction["masks"].permute(1, 2, 0).numpy().astype(np.uint8)))
        columns["segmentation"] = [{**region, "counts": region["counts"].decode()} for region in encoded]
    rows = zip(*columns.values(), strict=True)
    return [{"image_id": _image_id(stem), **dict(zip(columns, row, strict=True))} for row in rows]


def _voc_lines(stem: str, prediction: dict) -> list[str]:
    """One image's boxes as the devkit reads them: pixels count from 1, and the last one belongs to the box."""
    rows = zip(prediction["scores"].tolist(), prediction["boxes"].tolist(), strict=True)
    return [f"{stem} {score:.9g} {x1 + 1:.9g} {y1 + 1:.9g} {x2:.9g} {y2:.9g}\n" for score, (x1, y1, x2, y2) in rows]


# Pictures ------------------------------------------------------------------------------------------------------------


def picture(image: Tensor, prediction: dict, classes: Sequence[str], threshold: float = 0.5) -> Image.Image:
    """An image (3, H, W) with its prediction drawn on it; a class has the same colour on every picture.

    A small image is enlarged, to 640 pixels on the long side. Below a label map there is a legend.
    """
    height, width = image.shape[1:]
    scale = max(1, SIDE / max(height, width))
    canvas = Image.fromarray((255 * image + 0.5).byte().permute(1, 2, 0).numpy())
    canvas = canvas.resize((round(scale * width), round(scale * height)), Image.Resampling.BICUBIC)
    if "mask" in prediction:
        return _draw_regions(canvas, prediction["mask"].numpy(), classes)
    by_score = prediction["scores"].argsort(stable=True)
    shown = by_score[prediction["scores"][by_score] >= threshold]
    return _draw_objects(canvas, {name: values[shown].numpy() for name, values in prediction.items()}, classes, scale)


def _draw_objects(canvas: Image.Image, objects: dict, classes: Sequence[str], scale: float) -> Image.Image:
    """Objects of rising score: masks, then boxes, then names, so that a better one's lies above a worse one's."""
    draw, line = ImageDraw.Draw(canvas), round(max(canvas.size) / 250)
    colours = [tuple(colour) for colour in palette(len(classes))[objects["labels"] - 1].tolist()]
    for mask, colour in zip(objects.get("masks", ()), colours, strict=False):
        cover = Image.fromarray(mask).convert("L").resize(canvas.size, Image.Resampling.BICUBIC)
        if (box := cover.getbbox()) is None:
            continue
        soft = np.asarray(cover.crop(box))
        canvas.paste(colour, box, Image.fromarray(np.where(soft > 127, 255 * MASK, 0).astype(np.uint8)))
        for points in contour_generator(z=np.pad(soft, 1)).lines(127.5):
            draw.line((points + box[:2] - 1).ravel().tolist(), colour, line - 1, joint="curve")
    edge = np.array(canvas.size)
    # Half-open and continuous to the first and last pixel that belong to the box.
    starts = (scale * objects["boxes"][:, :2]).round().clip(0, edge - 1)
    ends = ((scale * objects["boxes"][:, 2:]).round() - 1).clip(starts, edge - 1)
    boxes = np.hstack([starts, ends]).astype(int).tolist()
    for box, colour in zip(boxes, colours, strict=True):
        draw.rectangle(box, outline=colour, width=1 if "masks" in objects else line)
    names = [_short(classes[label - 1]) for label in objects["labels"]]
    names = [f"{name} {score:.2f}" for name, score in zip(names, objects["scores"], strict=True)]
    font, tags = _font(canvas), []
    for box, name in zip(reversed(boxes), reversed(names), strict=True):  # the best one has the first choice
        tags.append(_place(box, name, font, canvas.size, tags))
    for tag, colour, name in zip(reversed(tags), colours, names, strict=True):
        draw.rectangle(tag, colour)
        draw.text(((tag[0] + tag[2] + 1) / 2, (tag[1] + tag[3] + 1) / 2), name, _ink(colour), font, "mm")
    return canvas


def _place(box: list[int], name: str, font: ImageFont.FreeTypeFont, size: tuple[int, int], taken: list) -> list[int]:
    """Where a name goes: the first place at its box, inside the picture, that hides the least of other names."""
    width, height = round(font.getlength(name)) + font.size // 2, round(1.35 * font.size)
    x1, y1, x2, y2 = box
    left, right = x1, x2 + 1 - width
    places = [(left, y1 - height), (left, y1), (left, y2 + 1), (right, y1 - height), (right, y2 + 1), (right, y1)]
    corners = np.clip(places, 0, np.maximum(0, np.array(size) - (width, height)))
    tags = [[int(x), int(y), int(x) + width - 1, int(y) + height - 1] for x, y in corners]
    return min(tags, key=lambda tag: sum(_overlap(tag, other) for other in taken))


def _overlap(a: list[int], b: list[int]) -> int:
    """Pixels that two boxes share; their last pixels belong to them."""
    return max(0, min(a[2], b[2]) - max(a[0], b[0]) + 1) * max(0, min(a[3], b[3]) - max(a[1], b[1]) + 1)


def _draw_regions(canvas: Image.Image, mask: np.ndarray, classes: Sequence[str]) -> Image.Image:
    """A label map (H, W) over the picture, and under both the names of its classes, the largest first."""
    colours = palette(len(classes))
    mask = np.asarray(Image.fromarray(mask.astype(np.uint8)).resize(canvas.size, Image.Resampling.NEAREST))
    canvas = Image.blend(canvas, Image.fromarray(colours[mask]), REGION)
    areas = np.bincount(mask.ravel(), minlength=len(classes))
    font, names = _font(canvas), [_short(name) for name in classes]
    row, gap, left, right = round(1.6 * font.size), font.size, font.size // 2, canvas.width
    x, y, places = left, 0, []
    for label in sorted(np.flatnonzero(areas), key=lambda label: -areas[label]):
        end = x + row + round(font.getlength(names[label]))
        if end > canvas.width and x > left:
            x, y, end = left, y + row, end - x + left
        places.append((label, x, canvas.height + gap // 2 + y))
        x, right = end + gap, max(right, end)
    whole = Image.new("RGB", (right, canvas.height + y + row + gap), "white")
    whole.paste(canvas)
    draw = ImageDraw.Draw(whole)
    for label, x, y in places:
        draw.rectangle((x, y + row // 6, x + 2 * row // 3, y + 5 * row // 6), tuple(colours[label].tolist()))
        draw.text((x + row, y + row / 2), names[label], "black", font, "lm")
    return whole


def _short(name: str) -> str:
    return name if len(name) <= 28 else f"{name[:27]}…"


def _font(canvas: Image.Image) -> ImageFont.FreeTypeFont:
    """The one that comes with matplotlib: it knows more alphabets than Pillow's own."""
    file = Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf"
    return ImageFont.truetype(file, round(max(canvas.size) / 45))


def _ink(colour: tuple[int, int, int]) -> str:
    """Black or white, whichever reads better on a colour."""
    return "black" if np.dot(colour, (0.299, 0.587, 0.114)) > 130 else "white"


@lru_cache
def palette(number: int) -> np.ndarray:
    """Colours for that many classes, uint8 (number, 3), to be seen on dark and on light.

    However many they are, they begin with the same ones: ten chosen by eye, then each the one that is furthest from
    all before it, in Oklab, where distances are nearly those that people see.
    """
    colours = [ImageColor.getrgb(colour) for colour in FIRST]
    shades = np.array(list(itertools.product(range(0, 256, 17), repeat=3)))
    lightness, a, b = _oklab(shades).T
    shades = shades[(abs(lightness - 0.7) < 0.15) & (abs(np.hypot(a, b) - 0.14) < 0.07)]  # no black, white, grey, neon
    distance = np.linalg.norm(_oklab(shades)[:, None] - _oklab(np.array(colours)), axis=2).min(axis=1)
    while len(colours) < number:
        colours.append(shades[distance.argmax()])
        distance = np.minimum(distance, np.linalg.norm(_oklab(shades) - _oklab(colours[-1]), axis=1))
    return np.array(colours[:number], np.uint8)


def _oklab(rgb: np.ndarray) -> np.ndarray:
    """sRGB in 0..255 (..., 3) as lightness, a and b; rounded, or the last bit would decide between equal distances."""
    rgb = rgb / 255
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    return np.round(np.cbrt(linear @ np.array(TO_CONES).T) @ np.array(TO_LAB).T, 6)
