"""Pictures of predictions: boxes, masks and label maps drawn on their image, by torchvision."""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageColor, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

SIDE = 640  # pixels that the long side of a picture has at least: names on a smaller one are hard to read
MASK, REGION = 0.45, 0.6  # opacity of an object's mask, and of a label map
LONGEST = 28  # characters of a name that are shown
FIRST = ["#ff8f1f", "#2e86f0", "#35b44a", "#f0529c", "#ffd23f", "#8d5cf6", "#1fc3d0", "#e63946", "#a8d93a", "#b9794a"]


def picture(image: Tensor, prediction: dict, classes: Sequence[str], threshold: float = 0.5) -> Image.Image:
    """An image with its prediction drawn on it; a class has the same colour in every picture.

    A small image is enlarged, to 640 pixels on the long side. Below a label map there is a legend.

    Args:
        image: (3, H, W) in 0..1.
        prediction: ``mask`` (H, W), or ``boxes`` (N, 4), ``scores`` (N,), ``labels`` (N,) and, where the model has
            them, ``masks``, bool (N, H, W); see :mod:`e3va_lite.tasks.registry`.
        classes: Names of the labels 1..K, or of a label map's values 0..K-1.
        threshold: Least score of an object that is drawn.
    """
    scale = max(1, SIDE / max(image.shape[1:]))
    size = [round(scale * side) for side in image.shape[1:]]
    canvas = F.resize((255 * image + 0.5).byte(), size, InterpolationMode.BICUBIC)
    if "mask" in prediction:
        return _label_map(canvas, prediction["mask"], classes)
    by_score = prediction["scores"].argsort(stable=True)  # a better one is drawn above a worse one
    shown = by_score[prediction["scores"][by_score] >= threshold]
    if len(shown):
        objects = {name: values[shown] for name, values in prediction.items()}
        canvas = _objects(canvas, objects, classes, scale)
    return F.to_pil_image(canvas)


def _objects(canvas: Tensor, objects: dict, classes: Sequence[str], scale: float) -> Tensor:
    """Masks, then boxes with names and scores, on a canvas, uint8 (3, H, W)."""
    size = list(canvas.shape[1:])
    colours = [tuple(colour) for colour in palette(len(classes))[objects["labels"].numpy() - 1].tolist()]
    for mask, colour in zip(objects.get("masks", ()), colours, strict=False):
        # One by one: where masks overlap, a single call would draw black.
        mask = F.resize(mask[None], size, InterpolationMode.NEAREST_EXACT)
        canvas = draw_segmentation_masks(canvas, mask, MASK, [colour])
    edge = torch.tensor(size[::-1])
    # From half-open and continuous to the first and the last pixel that belong to the box.
    starts = (scale * objects["boxes"][:, :2]).round().clamp(torch.zeros(2), edge - 1)
    ends = ((scale * objects["boxes"][:, 2:]).round() - 1).clamp(starts, edge - 1)
    labels, scores = objects["labels"].tolist(), objects["scores"].tolist()
    return draw_bounding_boxes(
        canvas,
        torch.cat([starts, ends], 1),
        [f"{_short(classes[label - 1])} {score:.2f}" for label, score in zip(labels, scores, strict=True)],
        colours,
        width=max(1, round(max(size) / 250)),
        font=_font(),
        font_size=_font_size(size),
        label_colors=[_readable_on(colour) for colour in colours],
        fill_labels=True,
    )


def _label_map(canvas: Tensor, mask: Tensor, classes: Sequence[str]) -> Image.Image:
    """A label map (H, W) over the canvas, and below both the names of its classes, the largest first."""
    colours, size = palette(len(classes)), list(canvas.shape[1:])
    mask = F.resize(mask[None].byte(), size, InterpolationMode.NEAREST_EXACT)
    areas = torch.bincount(mask.flatten(), minlength=len(classes))
    labels = sorted(areas.nonzero()[:, 0].tolist(), key=lambda label: -areas[label])
    shown = [tuple(colours[label].tolist()) for label in labels]
    drawn = F.to_pil_image(draw_segmentation_masks(canvas, torch.cat([mask == n for n in labels]), REGION, shown))

    font = ImageFont.truetype(_font(), _font_size(size))
    row, gap, left, right = round(1.6 * font.size), font.size, font.size // 2, drawn.width
    x, y, places = left, 0, []
    for label in labels:
        end = x + row + round(font.getlength(_short(classes[label])))
        if end > drawn.width and x > left:
            x, y, end = left, y + row, end - x + left
        places.append((x, drawn.height + gap // 2 + y))
        x, right = end + gap, max(right, end)
    whole = Image.new("RGB", (right, drawn.height + y + row + gap), "white")
    whole.paste(drawn)
    draw = ImageDraw.Draw(whole)
    for label, colour, (x, y) in zip(labels, shown, places, strict=True):
        draw.rectangle((x, y + row // 6, x + 2 * row // 3, y + 5 * row // 6), colour)
        draw.text((x + row, y + row / 2), _short(classes[label]), "black", font, "lm")
    return whole


def _short(name: str) -> str:
    return name if len(name) <= LONGEST else f"{name[: LONGEST - 1]}…"


def _font() -> str:
    """The one that comes with matplotlib: it knows more alphabets than Pillow's own."""
    return str(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf")


def _font_size(size: list[int]) -> int:
    return round(max(size) / 45)


def _readable_on(colour: tuple[int, int, int]) -> str:
    """Black or white, whichever reads better."""
    return "black" if np.dot(colour, (0.299, 0.587, 0.114)) > 130 else "white"


@lru_cache
def palette(number: int) -> np.ndarray:
    """Colours for that many classes, at most 255, uint8 (number, 3): ten chosen by eye, then Pascal VOC's own.

    However many classes there are, the colours begin with the same ones.
    """
    label, channel = np.arange(1, 256)[:, None], np.arange(3)
    voc = sum(((label >> (3 * k + channel)) & 1) << (7 - k) for k in range(8))  # (255, 3)
    return np.concatenate([[ImageColor.getrgb(colour) for colour in FIRST], voc]).astype(np.uint8)[:number]
