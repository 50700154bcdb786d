"""Mirroring, zooming, resizing and cropping, which boxes and masks follow; the numbers are torchvision's."""

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F
from torchvision.tv_tensors import BoundingBoxFormat

SMALLEST_SIDE = 0.01  # pixels: a thinner box could lose its width to rounding when its image is resized
SHORT_SIDES, LONGEST = (400, 500, 600), 4200  # to which an image is resized before it is cropped
CROP = (384, 600)  # smallest and largest side of a crop
CORNERS = BoundingBoxFormat.XYXY
#: As SSD does, but less: its images are zoomed out up to four times, on half of them, and cropped to less.
ZOOM = v2.Compose(
    [
        v2.RandomZoomOut(fill=0.45, side_range=(1.0, 2.0), p=0.3),
        v2.RandomIoUCrop(min_scale=0.4),
        v2.SanitizeBoundingBoxes(labels_getter=lambda inputs: [inputs[1][key] for key in ("labels", "difficult")]),
    ]
)


def augment(image: Tensor, target: dict, crop: bool = False, zoom: bool = False) -> tuple[Tensor, dict]:
    """Mirror half of the images.

    Args:
        image: (3, H, W).
        target: With ``boxes`` (N, 4); for ``crop`` ``masks`` (N, H, W), for ``zoom`` ``difficult`` (N,).
        crop: Also resize and crop half of them, as DETR does.
        zoom: Also zoom out of some of them, and crop most of them to a part that has objects: see ``ZOOM``.
    """
    if mirrors_now():
        image, target = mirrored(image, target)
    if crop and torch.rand(()) < 0.5:
        short = SHORT_SIDES[int(torch.randint(len(SHORT_SIDES), ()))]
        image, target = _cropped(*_resized(image, target, short))
    return _zoomed(image, target) if zoom else (image, target)


def mirrors_now() -> bool:
    """Whether the next image is to be mirrored: a random number."""
    return bool(torch.rand(()) < 0.5)


def mirrored(image: Tensor, target: dict) -> tuple[Tensor, dict]:
    """An image and what :func:`augment` takes as its target, left and right exchanged."""
    boxes = F.horizontal_flip_bounding_boxes(target["boxes"], CORNERS, tuple(image.shape[-2:]))
    masks = {"masks": F.horizontal_flip(target["masks"])} if "masks" in target else {}
    return F.horizontal_flip(image), {**target, "boxes": boxes, **masks}


def _zoomed(image: Tensor, target: dict) -> tuple[Tensor, dict]:
    boxes = tv_tensors.BoundingBoxes(target["boxes"], format=CORNERS, canvas_size=tuple(image.shape[-2:]))
    image, target = ZOOM(tv_tensors.Image(image), {**target, "boxes": boxes})
    return image.as_subclass(Tensor).contiguous(), {**target, "boxes": target["boxes"].as_subclass(Tensor)}


def _resized(image: Tensor, target: dict, short: int) -> tuple[Tensor, dict]:
    """To a short side of ``short`` pixels, unless the long one then exceeds the limit; the ratio stays."""
    height, width = image.shape[-2:]
    factor = min(short / min(height, width), LONGEST / max(height, width))
    size = [max(1, round(height * factor)), max(1, round(width * factor))]
    boxes, _ = F.resize_bounding_boxes(target["boxes"], (height, width), size)
    masks = F.resize_image(target["masks"], size, InterpolationMode.NEAREST_EXACT)
    return F.resize_image(image, size, antialias=False), {**target, "boxes": boxes, "masks": masks}


def _cropped(image: Tensor, target: dict) -> tuple[Tensor, dict]:
    """A random part of the image, its sides drawn one by one; objects without a pixel in it are gone."""
    sides, places = [], []
    for length in image.shape[-2:]:
        least, most = (min(length, limit) for limit in CROP)
        sides.append(int(torch.randint(least, most + 1, ())))
        places.append(int(torch.randint(length - sides[-1] + 1, ())))
    window = (*places, *sides)  # top, left, height, width
    boxes, _ = F.crop_bounding_boxes(target["boxes"], CORNERS, *window)
    masks = F.crop_mask(target["masks"], *window)
    kept = masks.flatten(1).any(1).bool() & (boxes[:, 2:] - boxes[:, :2] >= SMALLEST_SIDE).all(1)
    new = {"boxes": boxes[kept], "labels": target["labels"][kept], "masks": masks[kept].contiguous()}
    return F.crop_image(image, *window).contiguous(), {**target, **new}
