"""UPerNet on ADE20K: the paper's Table 1, segmentation half; and on any folder of images and index masks."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ..datasets.ade20k import VOID, MaskFolder
from ..datasets.ade20k import find_problems as check  # noqa: F401  the task's contract
from ..datasets.mmseg_import import import_mmseg
from ..recipes.schema import ADE20KRecipe
from .upernet import build_upernet

METRIC = "miou"
metric = import_mmseg().evaluation.IoUMetric


def dataset(
    recipe: ADE20KRecipe,
    root: Path,
    split: str,
    classes: Sequence[str] | None = None,
    train: bool = False,
    strict: bool = False,
) -> MaskFolder:
    """Images and label maps, see :class:`e3va_lite.datasets.ade20k.MaskFolder`."""
    return MaskFolder(root, split, recipe, recipe.classes if classes is None else classes, train, strict)


def model(recipe: ADE20KRecipe, backbone: nn.Module, num_classes: int) -> nn.Module:
    """See :func:`e3va_lite.tasks.upernet.build_upernet`."""
    return build_upernet(
        backbone,
        num_classes,
        head_channels=recipe.head_channels,
        scale=tuple(recipe.scale),
        class_weights=recipe.class_weights,
    )


def record(prediction: dict, target: dict) -> Tensor:
    """Pixels per label: in both, in one or the other, predicted, annotated; (4, 256), where nothing is void.

    Labels have eight bits, so the number of classes need not be known here. mmsegmentation counts in float32, which is
    exact up to 16 million pixels of a class in an image; sums over all images need float64.
    """
    areas = metric.intersect_and_union(prediction["mask"], target["mask"], 256, VOID)
    return torch.stack(areas).double()


def summary(records: list[Tensor], dataset: MaskFolder) -> dict:
    """mmsegmentation's metrics as fractions, not percent.

    Returns:
        ``miou``: the mean of the classes' intersection over union; ``accuracy``: the share of correct pixels;
        ``mean_accuracy``: the mean of the classes' accuracies; ``by_class``: the classes' intersection over union. A
        class that is neither annotated nor predicted has None and counts in no mean. A mean over no class is 0.
    """
    areas = torch.stack(records).sum(0)[:, : len(dataset.classes)]
    values = metric.total_area_to_metrics(*areas)

    def mean(numbers: np.ndarray) -> float:
        known = np.atleast_1d(numbers)[~np.isnan(np.atleast_1d(numbers))]
        return round(float(known.mean()), 4) if len(known) else 0.0

    return {
        "miou": mean(values["IoU"]),
        "accuracy": mean(values["aAcc"]),
        "mean_accuracy": mean(values["Acc"]),
        "by_class": {
            name: None if np.isnan(iou) else round(float(iou), 4)
            for name, iou in zip(dataset.classes, values["IoU"], strict=True)
        },
    }
