"""RetinaNet ("Focal Loss for Dense Object Detection", Lin et al. 2017) on any backbone, out of torchvision's parts.

The settings are those of the public stand-in for the paper's missing appendix: a feature pyramid with two extra levels
made from the backbone's last map, nine anchors per place, focal loss (.25, 2) and L1. Torchvision's defaults that agree
are not repeated here: both losses, the matching at IoU .5 and .4 in which each box keeps its best anchor, and the head
with four convolutions that starts at a class probability of .01.

Where this departs from torchvision, a small class below says so. One difference from the stand-in remains: a ReLU
between the two extra levels.
"""

import itertools

import torch
from torch import Tensor, nn
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from ..errors import InputError
from . import detection
from .detection import Anchors, Coder, Pyramid, Transform, at_least_float32, check_arguments, init_narrow, mean_count


def build_retinanet(
    backbone: nn.Module,
    num_classes: int,
    *,
    min_size: int,
    max_size: int,
    fpn_channels: int = 256,
    anchor_base: float = 4.0,
    detections: int = 100,
) -> nn.Module:
    """A RetinaNet that uses every map of the backbone, and two more levels of twice and four times the last stride.

    The paper's detector reads Swin's stages 2 to 4, strides 8, 16 and 32: five levels, of strides 8 to 128.

    The model is called as torchvision's detectors are. Images are a list of float tensors (3, H, W) in 0..1, of any
    sizes; they are normalised, resized, and padded to a multiple of 32 inside (or of ``backbone.divisor``). Targets are
    a list of dicts with ``boxes`` (M, 4), float ``x1, y1, x2, y2`` in pixels of the image as given, and ``labels``
    (M,), int64. Labels are 1..K in targets and in predictions, for K outputs of the head. An image without objects has
    boxes (0, 4).

    - In train mode ``model(images, targets)`` returns the two losses, ``classification`` and ``bbox_regression``.
    - In eval mode ``model(images)`` returns per image a dict of ``boxes`` (N, 4) in pixels of the image as given,
      ``scores`` (N,) and ``labels`` (N,), best score first, at most ``detections``.

    ``model.backbone.body`` is the backbone, ``model.backbone.fpn`` the neck, ``model.head`` the head.

    Args:
        backbone: Returns a list of NCHW maps and has ``out_channels`` and ``strides``, a list of integers each.
        num_classes: K, the number of classes without background.
        min_size: Length in pixels to which an image's short side is resized, ...
        max_size: ... unless the long side then exceeds this one. Both equal to the long side of images: no resizing.
        fpn_channels: Width of the feature pyramid and of the head; 256 in the paper's setting.
        anchor_base: Side of a level's smallest square anchor, in strides of that level. Lower it for small objects.
        detections: Maximum number of objects per image that are returned.

    Raises:
        InputError: For a number of classes, size, width or base that cannot work, or a backbone without the two lists;
            at the first call for maps that are not what the backbone's two lists say.
    """
    check_arguments(backbone, num_classes, [min_size], max_size, fpn_channels, detections)
    if anchor_base < 2 ** (1 / 3):
        # A box that no anchor touches is matched to every anchor that overlaps nothing. Anchors lie at multiples of the
        # stride from 0 on; to reach the right and lower edge the largest has to be two strides wide.
        raise InputError(f"anchor_base is {anchor_base}; below 1.26 anchors do not cover the image: use finer strides.")
    last = backbone.strides[-1]
    anchors = Anchors([*backbone.strides, 2 * last, 4 * last], anchor_base)
    head = _Head(fpn_channels, anchors.num_anchors_per_location()[0], num_classes)
    for tower in (head.classification_head.conv, head.regression_head.conv):
        init_narrow(*(m for m in tower.modules() if isinstance(m, nn.Conv2d)))
    extra = LastLevelP6P7(backbone.out_channels[-1], fpn_channels)
    # P6 is made from the backbone's last map, even if that is as wide as the pyramid.
    extra.use_P5 = False
    model = _RetinaNet(
        Pyramid(backbone, fpn_channels, extra),
        num_classes,
        min_size=min_size,
        max_size=max_size,
        anchor_generator=anchors,
        head=head,
        detections_per_img=detections,
    )
    mean_std = detection.IMAGE_MEAN, detection.IMAGE_STD
    model.transform = Transform(min_size, max_size, *mean_std, size_divisible=detection.divisor(backbone))
    model.box_coder = head.regression_head.box_coder = Coder(model.box_coder.weights)
    return model


class _RetinaNet(RetinaNet):
    """Torchvision's, with labels 1..K outside and 0..K-1 inside, so that no output stands for the background."""

    def forward(self, images: list[Tensor], targets: list[dict] | None = None) -> dict[str, Tensor] | list[dict]:
        if targets is not None:
            targets = [{**target, "labels": target["labels"] - 1} for target in targets]
        result = super().forward(images, targets)
        if self.training:
            return result
        return [{**detections, "labels": detections["labels"] + 1} for detections in result]


class _Head(RetinaNetHead):
    """Torchvision's, with outputs in float32 at least and losses normalised over the batch.

    Torchvision divides the losses of each image by the number of its positive anchors, which may be zero: a single
    empty image then outweighs a full batch, and the gradient grows by two orders of magnitude. Here, the losses are
    divided by the number of positive anchors in the whole batch, over all processes.
    """

    def forward(self, maps: list[Tensor]) -> dict[str, Tensor]:
        outputs = super().forward(maps)
        return {name: at_least_float32(x) for name, x in outputs.items()}

    def compute_loss(
        self,
        targets: list[dict],
        head_outputs: dict[str, Tensor],
        anchors: list[Tensor],
        matched_idxs: list[Tensor],
    ) -> dict[str, Tensor]:
        """The two losses of a batch, whose images are concatenated into one."""
        ahead = itertools.accumulate((len(target["labels"]) for target in targets[:-1]), initial=0)
        matched = [torch.where(index >= 0, index + n, index) for index, n in zip(matched_idxs, ahead, strict=True)]
        target = {key: torch.cat([target[key] for target in targets]) for key in ("boxes", "labels")}
        outputs = {name: x.flatten(0, 1)[None] for name, x in head_outputs.items()}
        losses = super().compute_loss([target], outputs, [torch.cat(anchors)], [torch.cat(matched)])
        # Torchvision divided by the positive anchors of this process, not of all processes.
        positives = sum((index >= 0).sum() for index in matched)
        share = positives.clamp(min=1) / mean_count(positives, positives.device)
        return {name: loss * share for name, loss in losses.items()}
