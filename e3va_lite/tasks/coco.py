"""Cascade Mask R-CNN on COCO: the paper's Table 2."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from pycocotools import mask as coco_mask
from torch import nn

from ..datasets.check import Findings
from ..datasets.coco import COCOInstances, average_precision, find_problems
from ..datasets.images import Limits
from ..recipes.schema import COCORecipe

METRIC = "box_ap"


def dataset(
    recipe: COCORecipe,
    root: Path,
    split: str,
    classes: Sequence[str] | None = None,
    train: bool = False,
    strict: bool = False,
) -> COCOInstances:
    """A split; with ``train``, mirrored and, if the recipe says so, cropped at random."""
    return COCOInstances(
        root,
        split,
        images=recipe.images,
        annotations=recipe.annotations,
        classes=classes,
        train=train,
        strict=strict,
        crop=recipe.crop,
        drop_others=recipe.classes is not None,
        limits=Limits(recipe.max_megapixels, recipe.max_size),
    )


def model(recipe: COCORecipe, backbone: nn.Module, num_classes: int) -> nn.Module:
    """The recipe's detector on a backbone."""
    from .cascade_mask_rcnn import build_cascade_mask_rcnn

    return build_cascade_mask_rcnn(
        backbone,
        num_classes,
        min_sizes=recipe.min_sizes,
        min_size=recipe.min_size,
        max_size=recipe.max_size,
        fpn_channels=recipe.fpn_channels,
        anchor_base=recipe.anchor_base,
        head_channels=recipe.head_channels,
        samples=recipe.samples,
        proposals=recipe.proposals,
    )


def record(prediction: dict, target: dict) -> list[dict]:
    """One image's detections in COCO's result format, save that ``category_id`` is still the label, 1..K.

    Args:
        prediction: ``boxes`` (N, 4), ``scores`` (N,), ``labels`` (N,) and ``masks``, bool (N, H, W), on the CPU.
        target: With ``image_id``.
    """
    boxes, scores, labels = (np.asarray(prediction[key], float) for key in ("boxes", "scores", "labels"))
    masks = np.asarray(prediction["masks"]).astype(np.uint8)
    # pycocotools reads down the columns first.
    runs = coco_mask.encode(np.asfortranarray(masks.transpose(1, 2, 0))) if len(masks) else []
    return [
        {
            "image_id": target["image_id"],
            "category_id": int(label),
            "bbox": [x1, y1, x2 - x1, y2 - y1],
            "score": score,
            "segmentation": {"size": rle["size"], "counts": rle["counts"].decode()},
        }
        for (x1, y1, x2, y2), score, label, rle in zip(
            boxes.reshape(-1, 4).tolist(), scores.tolist(), labels.tolist(), runs, strict=True
        )
    ]


def summary(records: list[list[dict]], dataset: COCOInstances) -> dict:
    """COCO's AP of boxes and masks: over all overlaps, at .5 and .75, by size, and of boxes by class."""
    results = [
        {**result, "category_id": dataset.category_ids[result["category_id"] - 1]}
        for image in records
        for result in image
    ]
    box, mask = (average_precision(dataset, results, kind) for kind in ("bbox", "segm"))
    by_class = box.pop("by_class")
    del mask["by_class"]
    numbers = {f"{name}_{key}": value for name, ap in (("box", box), ("mask", mask)) for key, value in ap.items()}
    return {**numbers, "by_class": by_class}


def check(recipe: COCORecipe, root: Path, split: str) -> Findings:
    """See :func:`e3va_lite.datasets.coco.find_problems`."""
    return find_problems(recipe, root, split)
