"""Mirroring, which boxes and masks follow; the numbers are torchvision's."""

from torch import Tensor
from torchvision.transforms.v2 import functional as F
from torchvision.tv_tensors import BoundingBoxFormat


def mirror(image: Tensor, target: dict) -> tuple[Tensor, dict]:
    """Left and right exchanged: the image (3, H, W), and in its target ``boxes`` (N, 4) and ``masks`` (N, H, W)."""
    boxes = F.horizontal_flip_bounding_boxes(target["boxes"], BoundingBoxFormat.XYXY, tuple(image.shape[-2:]))
    masks = {"masks": F.horizontal_flip(target["masks"])} if "masks" in target else {}
    return F.horizontal_flip(image), {**target, "boxes": boxes, **masks}
