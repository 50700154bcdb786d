"""RetinaNet on the boxes of COCO's layout, with or without masks in the file."""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from ..datasets.coco import COCOInstances
from ..recipes.schema import COCOBoxesRecipe
from . import coco
from .coco import check, known_images, record  # noqa: F401  the same as with masks
from .voc import model  # noqa: F401  the same detector

METRIC = "box_ap"


class _Boxes(COCOInstances):
    def __getitem__(self, index: int) -> tuple[Tensor, dict]:
        image, target = super().__getitem__(index)
        return image, {key: value for key, value in target.items() if key != "masks"}


def dataset(
    recipe: COCOBoxesRecipe,
    root: Path,
    split: str,
    classes: Sequence[str] | None = None,
    train: bool = False,
    strict: bool = False,
) -> COCOInstances:
    """A split; with ``train``, half of the images are mirrored and, if the recipe says so, cropped at random."""
    places = {"images": recipe.images, "annotations": recipe.annotations}
    return _Boxes(root, split, **places, classes=classes, train=train, strict=strict, crop=recipe.crop)


def summary(records: list[list[dict]], dataset: COCOInstances) -> dict:
    """COCO's AP of boxes: over all overlaps, at .5 and .75, by size, and by class."""
    return coco.summary(records, dataset, ("bbox",))
