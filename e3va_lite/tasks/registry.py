"""The tasks that join a network, a dataset and a metric. Each is a module with the same members, for one engine.

    METRIC                                            name of the number that decides which checkpoint is the best
    dataset(recipe, root, split, classes, train, strict)   a torch dataset with ``classes``, a list of names
    model(recipe, backbone, num_classes)              a detector or segmenter on a backbone
    record(prediction, target)                        what the metric needs of one image: small, on the CPU
    summary(records, dataset)                         the metric over all images, a dict of plain numbers with METRIC
    check(recipe, root, split)                        everything that is wrong with the files of a split
    known_images(recipe, root, paths, annotations)    what the dataset says of images; detection only

An item of a dataset is an image, float (3, H, W), RGB in 0..1, and a target, a dict with at least ``image_id`` and
``file``, the path as text. With ``train`` an item is augmented, with random numbers from the global states of torch,
numpy and Python, which the engine seeds for every item; without, it is the image as stored.

A model in train mode turns lists of images and targets into a dict of losses; in eval mode a list of images of any
sizes into a list of predictions, dicts in the pixels of the images as given.

The networks are :mod:`.retinanet` (``voc`` and ``coco-boxes``), :mod:`.cascade_mask_rcnn` (``coco``) and
:mod:`.upernet` (``ade20k``); what the two detectors share is in :mod:`.detection`.
"""

from importlib import import_module
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..errors import unknown
from ..transfer import send

NAMES = ("voc", "coco", "coco-boxes", "ade20k")


class Known(NamedTuple):
    """What a dataset says of an image: its number, and its size."""

    id: int | None  # None: it is called by its name
    size: tuple[int, int]  # width, height; of the pixels as stored, or as EXIF turns them


def task_module(name: str) -> ModuleType:
    """The module of a task; imported when it is wanted, since not everybody has mmsegmentation."""
    if name not in NAMES:
        raise unknown("task", name, NAMES)
    return import_module(f"{__package__}.{name.replace('-', '_')}")


@torch.inference_mode()
def predict_image(model: nn.Module, image: Tensor, device: torch.device, precision: str = "float32") -> dict:
    """The prediction for one image (3, H, W), on the CPU.

    Evaluation and ``e3va predict`` both call this. Images are never put into a batch: a detector pads the images of a
    batch to the largest one, and so what it finds in one would depend on the others.
    """
    with torch.autocast(device.type, getattr(torch, precision), enabled=precision != "float32"):
        prediction = model([send(image, device)])[0]
    return {key: value.cpu() if isinstance(value, Tensor) else value for key, value in prediction.items()}
