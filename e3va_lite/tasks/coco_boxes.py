"""RetinaNet on the boxes of COCO's layout, with or without masks in the file."""

from collections.abc import Sequence
from pathlib import Path

from ..datasets.check import Findings
from ..datasets.coco import COCOInstances
from ..datasets.images import Limits
from ..recipes.schema import COCOBoxesRecipe
from . import coco
from .coco import known_images, record  # noqa: F401  the same as with masks
from .voc import model  # noqa: F401  the same detector

METRIC = "box_ap"


def dataset(
    recipe: COCOBoxesRecipe,
    root: Path,
    split: str,
    classes: Sequence[str] | None = None,
    train: bool = False,
    strict: bool = False,
) -> COCOInstances:
    """A split; with ``train``, half of the images are mirrored and crowds are left out."""
    return COCOInstances(
        root,
        split,
        images=recipe.images,
        annotations=recipe.annotations,
        classes=classes,
        train=train,
        strict=strict,
        boxes_only=True,
        drop_others=recipe.classes is not None,
        limits=Limits(recipe.max_megapixels, recipe.max_size),
    )


def summary(records: list[list[dict]], dataset: COCOInstances) -> dict:
    """COCO's AP of boxes: over all overlaps, at .5 and .75, by size, and by class."""
    return coco.summary(records, dataset, ("bbox",))


def check(recipe: COCOBoxesRecipe, root: Path, split: str) -> Findings:
    """See :func:`e3va_lite.tasks.coco.check`."""
    return coco.check(recipe, root, split, boxes_only=True)
