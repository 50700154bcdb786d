"""RetinaNet on Pascal VOC: the paper's Table 1, detection half."""

import contextlib
import math
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from ..datasets.check import UNREADABLE
from ..datasets.images import Limits
from ..datasets.voc import Folders, VOCDetection
from ..datasets.voc import find_problems as check  # noqa: F401  the task's contract
from ..recipes.schema import COCOBoxesRecipe, VOCRecipe
from .coco import known_images as coco_known_images
from .registry import Known
from .retinanet import build_retinanet
from .voc_metric import average_precision

METRIC = "ap50_11_point"


def dataset(
    recipe: VOCRecipe,
    root: Path,
    split: str,
    classes: Sequence[str] | None = None,
    train: bool = False,
    strict: bool = False,
) -> VOCDetection:
    """A split; with ``train`` without ``difficult`` objects, mirrored and, if the recipe says so, zoomed."""
    return VOCDetection(
        root,
        split,
        classes,
        train=train,
        strict=strict,
        drop_others=recipe.classes is not None,
        folders=Folders(recipe.images, recipe.annotations, recipe.listing),
        limits=Limits(recipe.max_megapixels, recipe.max_size),
        zoom=recipe.zoom,
    )


def model(recipe: VOCRecipe | COCOBoxesRecipe, backbone: nn.Module, num_classes: int) -> nn.Module:
    """The recipe's detector on a backbone."""
    return build_retinanet(
        backbone,
        num_classes,
        min_size=recipe.min_size,
        max_size=recipe.max_size,
        fpn_channels=recipe.fpn_channels,
        anchor_base=recipe.anchor_base,
        detections=recipe.detections,
        canvas=recipe.canvas,
    )


def record(prediction: dict, target: dict) -> tuple[dict, dict]:
    """One image's detections and ground truth, as :func:`e3va_lite.tasks.voc_metric.average_precision` takes them.

    They are copied into arrays: a tensor that a worker process of a loader sent holds a file descriptor as long as it
    lives, and a process may have only so many.
    """
    detections = {key: np.array(torch.as_tensor(prediction[key]).cpu()) for key in ("boxes", "scores", "labels")}
    return detections, {key: np.array(target[key]) for key in ("boxes", "labels", "difficult")}


def summary(records: list[tuple[dict, dict]], dataset: VOCDetection) -> dict:
    """AP at IoU .5 over eleven and over all points; None for a class without objects in the split."""
    ap = average_precision([p for p, _ in records], [t for _, t in records], len(dataset.classes))

    def by_class(values) -> dict:
        return {name: _plain(value) for name, value in zip(dataset.classes, values, strict=True)}

    return {
        "ap50_11_point": _plain(ap.mean_eleven_point),
        "ap50_all_point": _plain(ap.mean_all_point),
        "by_class_11_point": by_class(ap.eleven_point),
        "by_class_all_point": by_class(ap.all_point),
    }


def _plain(value: float) -> float | None:
    return None if math.isnan(value) else round(float(value), 4)


def known_images(
    recipe: VOCRecipe, root: Path | None, paths: Sequence[Path], annotations: Path | None = None
) -> dict[Path, Known]:
    """The images of a VOC-shaped folder, so that EXIF's orientation is applied where evaluation applies it.

    Args:
        recipe: Says in which folder the annotations are.
        root: Not needed.
        paths: Image files.
        annotations: COCO's, see :func:`e3va_lite.tasks.coco.known_images`.
    """
    if annotations is not None:
        return coco_known_images(recipe, root, paths, annotations)
    known = {}
    for path in paths:
        xml = path.parent.parent / recipe.annotations / f"{path.stem}.xml"
        if xml.is_file():
            with contextlib.suppress(*UNREADABLE, ET.ParseError), Image.open(path) as image:
                told = tuple(ET.parse(xml).getroot().findtext(f"size/{side}") for side in ("width", "height"))
                turned = told == tuple(map(str, image.size[::-1]))
                known[path] = Known(None, image.size[::-1] if turned else image.size)
    return known
