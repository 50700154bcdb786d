"""RetinaNet on Pascal VOC: the paper's Table 1, detection half."""

import math
from collections.abc import Sequence
from pathlib import Path

from torch import nn
from torch.utils.data import Dataset

from ..datasets import coco, voc
from ..datasets.check import Findings
from ..datasets.images import Limits
from ..recipes.schema import VOCRecipe
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
) -> Dataset:
    """A split; with ``train``, half of the images are mirrored and ``difficult`` objects are left out.

    Annotations that end in ``.json`` are COCO's: of these, boxes are read, and crowds are difficult objects.
    """
    common = {"train": train, "strict": strict, "drop_others": recipe.classes is not None}
    limits = Limits(recipe.max_megapixels, recipe.max_size)
    if recipe.annotations.endswith(".json"):
        places = {"images": recipe.images, "annotations": recipe.annotations}
        return coco.COCOInstances(root, split, classes=classes, **places, **common, boxes_only=True, limits=limits)
    folders = voc.Folders(recipe.images, recipe.annotations, recipe.listing)
    return voc.VOCDetection(root, split, classes, **common, folders=folders, limits=limits)


def model(recipe: VOCRecipe, backbone: nn.Module, num_classes: int) -> nn.Module:
    """The recipe's detector on a backbone."""
    return build_retinanet(
        backbone,
        num_classes,
        min_size=recipe.min_size,
        max_size=recipe.max_size,
        fpn_channels=recipe.fpn_channels,
        anchor_base=recipe.anchor_base,
    )


def record(prediction: dict, target: dict) -> tuple[dict, dict]:
    """One image's detections and truth, as :func:`e3va_lite.tasks.voc_metric.average_precision` wants them."""
    detections = {key: prediction[key].cpu() for key in ("boxes", "scores", "labels")}
    return detections, {key: target[key] for key in ("boxes", "labels", "difficult")}


def summary(records: list[tuple[dict, dict]], dataset: Dataset) -> dict:
    """AP at IoU .5 over eleven and over all points; None for a class that the split does not show."""
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


def check(recipe: VOCRecipe, root: Path, split: str) -> Findings:
    """Everything that is wrong with the files of a split, see the data sets' ``find_problems``."""
    if recipe.annotations.endswith(".json"):
        return coco.find_problems(recipe, root, split, boxes_only=True)
    return voc.find_problems(recipe, root, split)
