"""RetinaNet on Pascal VOC: the paper's Table 1, detection half."""

import math
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ..datasets.voc import VOCDetection
from ..metrics import average_precision
from ..recipe import VOCRecipe
from .detection import build_retinanet

METRIC = "ap50_11_point"


class _Training(Dataset):
    def __init__(self, dataset):
        self.dataset, self.classes = dataset, dataset.classes

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        image, target = self.dataset[index]
        target["file"] = str(self.dataset.images[index])
        keep = ~target["difficult"]
        target = {**target, **{key: target[key][keep] for key in ("boxes", "labels", "difficult")}}
        return mirror(image, target) if torch.rand(()) < 0.5 else (image, target)


def mirror(image: Tensor, target: dict) -> tuple[Tensor, dict]:
    """Left and right exchanged: image (3, H, W) and boxes (N, 4)."""
    width = image.shape[-1]
    boxes = target["boxes"]
    return image.flip(-1), {
        **target,
        "boxes": torch.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], 1),
    }


def dataset(recipe: VOCRecipe, root: Path, split: str, classes=None, train=False, strict=False):
    data = VOCDetection(root, split, classes, strict)
    return _Training(data) if train else data


def model(recipe, backbone, num_classes):
    return build_retinanet(backbone, num_classes, min_size=recipe.min_size, max_size=recipe.max_size,
        fpn_channels=recipe.fpn_channels, anchor_base=recipe.anchor_base)


def record(prediction, target):
    return prediction, target


def summary(records, dataset):
    predictions, targets = zip(*records, strict=True)
    ap = average_precision(predictions, targets, len(dataset.classes))
    def plain(values) -> dict:
        return {name: None if math.isnan(x) else round(float(x), 4) for name, x in zip(dataset.classes, values, strict=True)}
    return {
        "ap50_11_point": round(ap.mean_eleven_point, 4),
        "ap50_all_point": round(ap.mean_all_point, 4),
        "by_class_11_point": plain(ap.eleven_point),
        "by_class_all_point": plain(ap.all_point),
    }
