"""Cascade Mask R-CNN on COCO: the paper's Table 2."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from pycocotools import mask as coco_mask
from torch import nn
from torchvision.ops import box_convert

from ..datasets.coco import COCOInstances, ids_of
from ..datasets.coco import find_problems as check  # noqa: F401  the task's contract
from ..datasets.images import Limits
from ..errors import InputError
from ..recipes.schema import COCOBoxesRecipe, COCORecipe
from .coco_metric import average_precision
from .registry import Known

METRIC = "box_ap"


def dataset(
    recipe: COCORecipe | COCOBoxesRecipe,
    root: Path,
    split: str,
    classes: Sequence[str] | None = None,
    train: bool = False,
    strict: bool = False,
) -> COCOInstances:
    """A split, without masks for a recipe of boxes; with ``train``, mirrored and, if the recipe says so, cropped."""
    boxes_only = isinstance(recipe, COCOBoxesRecipe)
    return COCOInstances(
        root,
        split,
        images=recipe.images,
        annotations=recipe.annotations,
        classes=classes,
        train=train,
        strict=strict,
        crop=not boxes_only and recipe.crop,
        boxes_only=boxes_only,
        drop_others=recipe.classes is not None,
        limits=Limits(recipe.max_megapixels, recipe.max_size),
        zoom=boxes_only and recipe.zoom,
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
        detections=recipe.detections,
    )


def record(prediction: dict, target: dict) -> list[dict]:
    """One image's detections as :func:`results` gives them; ``category_id`` is still the label, 1..K."""
    return results(prediction, target["image_id"])


def results(prediction: dict, image_id: int | str, category_ids: Sequence[int] | None = None) -> list[dict]:
    """One image's detections in COCO's results format.

    Args:
        prediction: ``boxes`` (N, 4), ``scores`` (N,), ``labels`` (N,) and, where the model has them, ``masks``, bool
            (N, H, W), on the CPU. Boxes become ``x, y, width, height`` and masks run lengths.
        image_id: What the dataset calls the image.
        category_ids: The dataset's numbers of the labels 1..K; 1..K without.
    """
    labels = prediction["labels"].tolist()
    columns = {
        "category_id": labels if category_ids is None else [int(category_ids[label - 1]) for label in labels],
        "bbox": box_convert(prediction["boxes"].double(), "xyxy", "xywh").tolist(),
        "score": prediction["scores"].tolist(),
    }
    if "masks" in prediction:
        masks = prediction["masks"].permute(1, 2, 0).numpy().astype(np.uint8)
        masks = np.asfortranarray(masks)  # pycocotools reads down the columns first
        columns["segmentation"] = [{**rle, "counts": rle["counts"].decode()} for rle in coco_mask.encode(masks)]
    rows = zip(*columns.values(), strict=True)
    return [{"image_id": image_id, **dict(zip(columns, row, strict=True))} for row in rows]


def summary(records: list[list[dict]], dataset: COCOInstances) -> dict:
    """COCO's AP of boxes and, if there are any, masks: over all overlaps, at .5, at .75, by size; of boxes by class."""
    found = [
        {**result, "category_id": dataset.category_ids[result["category_id"] - 1]}
        for image in records
        for result in image
    ]
    numbers = {}
    for kind, name in (("bbox", "box"), ("segm", "mask")) if dataset.masks else (("bbox", "box"),):
        ap = average_precision(dataset, found, kind)
        by_class = ap.pop("by_class")
        numbers |= {f"{name}_{key}": value for key, value in ap.items()}
        numbers.setdefault("by_class", by_class)
    return numbers


def known_images(
    recipe: COCORecipe | COCOBoxesRecipe, root: Path | None, paths: Sequence[Path], annotations: Path | None = None
) -> dict[Path, Known]:
    """What annotation files say of images.

    Args:
        recipe: Says where the run's own annotation files are.
        root: The run's dataset; None if nobody knows.
        paths: Image files.
        annotations: A file that has to know all of them, by their names. Without: those of the run's evaluation and
            training split, for images that lie where these splits have them.

    Raises:
        InputError: If ``annotations`` cannot be used, or does not know an image.
    """
    if annotations is not None:
        entries = _image_entries(annotations)
        by_name = {Path(name).name: known for name, known in entries.items()}
        known = {path: _by_end(entries, path) or by_name.get(path.name) for path in paths}
        if missing := [path for path, found in known.items() if found is None]:
            raise InputError(
                f"'{annotations}' has no entry for {len(missing)} of {len(paths)} images, first '{missing[0]}': leave "
                "them out, or go without --annotations."
            )
        return known
    known = {}
    for split in (recipe.eval_split, recipe.train_split) if root else ():
        folder = (root / recipe.images.replace("{split}", split)).resolve()
        file = root / recipe.annotations.replace("{split}", split)
        places = {path: path.parent.resolve() / path.name for path in paths if path not in known}
        inside = {path: place for path, place in places.items() if place.is_relative_to(folder)}
        if inside and file.is_file():
            entries = _image_entries(file)
            names = {path: place.relative_to(folder).as_posix() for path, place in inside.items()}
            known |= {path: entries[name] for path, name in names.items() if name in entries}
    return known


def category_ids(annotations: Path, classes: Sequence[str]) -> list[int]:
    """The numbers that an annotation file gives classes; one that it does not have gets a new number."""
    return ids_of(classes, {category["name"]: category["id"] for category in _content(annotations)["categories"]})


def _by_end(entries: dict[str, Known], path: Path) -> Known | None:
    """The entry whose name, folders included, the path ends in; the longest one."""
    parts = path.absolute().parts
    return next((entries[end] for n in range(len(parts)) if (end := "/".join(parts[n:])) in entries), None)


def _image_entries(path: Path) -> dict[str, Known]:
    """The images of an annotation file by their ``file_name``."""
    try:
        return {
            image["file_name"]: Known(image["id"], (int(image["width"]), int(image["height"])))
            for image in _content(path)["images"]
        }
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"'{path}' has an image without id, file_name, width or height ({error}): add it.") from None


def _content(path: Path) -> dict:
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, OSError) as error:
        raise InputError(f"'{path}' cannot be read as JSON ({error}): give a COCO annotation file.") from None
    if not isinstance(content, dict) or not all(isinstance(content.get(key), list) for key in ("images", "categories")):
        raise InputError(f"'{path}' has no lists of images and categories: give a COCO annotation file.")
    return content
