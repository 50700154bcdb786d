"""RetinaNet ("Focal Loss for Dense Object Detection", Lin et al. 2017) on any backbone, out of torchvision's parts.

The settings are those of the public stand-in for the paper's missing appendix: a feature pyramid with two extra levels
made from the backbone's last map, nine anchors per place, focal loss (.25, 2) and L1. Torchvision's defaults that agree
are not repeated here: both losses, the matching at IoU .5 and .4 in which each box keeps its best anchor, and the head
with four convolutions that starts at a class probability of .01.

Where we depart from torchvision, a small class below says so. One of its ways that differs from the stand-in stays: a
ReLU between the two extra levels.
"""

import itertools
from collections import OrderedDict

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock, FeaturePyramidNetwork, LastLevelP6P7

from ..errors import InputError

PAPER_CHANNELS = 256  # of pyramid and head
IMAGE_MEAN = (123.675 / 255, 116.28 / 255, 103.53 / 255)  # of ImageNet, for images in 0..1
IMAGE_STD = (58.395 / 255, 57.12 / 255, 57.375 / 255)


def build_retinanet(
    backbone: nn.Module,
    num_classes: int,
    *,
    min_size: int,
    max_size: int,
    fpn_channels: int = 256,
    anchor_base: float = 4.0,
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
      ``scores`` (N,) and ``labels`` (N,), best score first, at most 100.

    ``model.backbone.body`` is the backbone, ``model.backbone.fpn`` the neck, ``model.head`` the head.

    Args:
        backbone: Returns a list of NCHW maps and has ``out_channels`` and ``strides``, a list of integers each.
        num_classes: K, the number of classes without background.
        min_size: Length in pixels to which an image's short side is resized, ...
        max_size: ... unless the long side then exceeds this one. Both equal to the long side of images: no resizing.
        fpn_channels: Width of the feature pyramid and of the head; 256 in the paper's setting.
        anchor_base: Side of a level's smallest square anchor, in strides of that level. Lower it for small objects.

    Raises:
        InputError: For a number of classes, size, width or base that cannot work, or a backbone without the two lists;
            at the first call for maps that are not what the backbone's two lists say.
    """
    _check(backbone, num_classes, [min_size], max_size, fpn_channels)
    if anchor_base < 2 ** (1 / 3):
        # A box that no anchor touches is matched to *every* anchor that overlaps nothing. Anchors sit at multiples of
        # the stride from 0 on; to reach the right and lower edge the largest has to be two strides wide.
        raise InputError(f"anchor_base is {anchor_base}; below 1.26 anchors do not cover the image: use finer strides.")
    last = backbone.strides[-1]
    anchors = _Anchors([*backbone.strides, 2 * last, 4 * last], anchor_base)
    head = _Head(fpn_channels, anchors.num_anchors_per_location()[0], num_classes)
    if fpn_channels < PAPER_CHANNELS:
        # Torchvision's start, a deviation of .01, halves a signal per layer at 256 channels and all but ends it in a
        # narrower head: that one would spend a short run on waking up.
        for tower in (head.classification_head.conv, head.regression_head.conv):
            for conv in (m for m in tower.modules() if isinstance(m, nn.Conv2d)):
                nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
    extra = LastLevelP6P7(backbone.out_channels[-1], fpn_channels)
    # "On input": P6 comes from the backbone's last map, also where that happens to be as wide as the pyramid.
    extra.use_P5 = False
    return _RetinaNet(
        _Pyramid(backbone, fpn_channels, extra),
        num_classes,
        min_size=min_size,
        max_size=max_size,
        image_mean=IMAGE_MEAN,
        image_std=IMAGE_STD,
        size_divisible=divisor(backbone),
        anchor_generator=anchors,
        head=head,
        detections_per_img=100,
    )


def divisor(backbone: nn.Module) -> int:
    """What the sides of images are padded to a multiple of: torchvision's 32, if the backbone does not say."""
    return getattr(backbone, "divisor", 32)


class _RetinaNet(RetinaNet):
    """Torchvision's, with labels 1..K outside for 0..K-1 inside, so that no output is spent on a class that is none."""

    def forward(self, images: list[Tensor], targets: list[dict] | None = None) -> dict[str, Tensor] | list[dict]:
        if targets is not None:
            targets = [{**target, "labels": target["labels"] - 1} for target in targets]
        result = super().forward(images, targets)
        if self.training:
            return result
        return [{**detections, "labels": detections["labels"] + 1} for detections in result]


class _Pyramid(nn.Module):
    """Backbone and feature pyramid as torchvision's detectors want them: images to an ordered dict of levels."""

    def __init__(self, backbone: nn.Module, channels: int, extra: ExtraFPNBlock):
        super().__init__()
        self.body = backbone
        self.fpn = FeaturePyramidNetwork(backbone.out_channels, channels, extra)
        self.out_channels = channels

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        maps = self.body(images)
        check_maps(images, maps, self.body.out_channels, self.body.strides)
        return self.fpn(OrderedDict((str(i), x) for i, x in enumerate(maps)))


class _Anchors(AnchorGenerator):
    """Anchors at each place: ``per_octave`` scales times the ratios (height to width) .5, 1 and 2; nine by default.

    Torchvision guesses a level's stride from the sizes of image and map, 608 // 10 = 60 where it is 64, and computes in
    the maps' precision, which in bfloat16 leaves whole pixels of error. Here strides are the real ones, in float32.
    """

    def __init__(self, strides: list[int], base: float, per_octave: int = 3):
        sizes = tuple(tuple(base * stride * 2 ** (k / per_octave) for k in range(per_octave)) for stride in strides)
        with torch.device("cpu"):  # anchors are numbers, not weights: a model on the meta device has them too
            super().__init__(sizes, ((0.5, 1.0, 2.0),) * len(strides))
        self.strides = strides

    def forward(self, images: ImageList, maps: list[Tensor]) -> list[Tensor]:
        self.set_cell_anchors(torch.float32, maps[0].device)
        anchors = self.grid_anchors([x.shape[-2:] for x in maps], [(s, s) for s in self.strides])
        return [torch.cat(anchors)] * len(images.image_sizes)  # (A, 4) per image


class _Head(RetinaNetHead):
    """Torchvision's, with outputs in float32 at least: boxes are decoded and losses summed in their precision.

    Torchvision divides each image's losses by that image's own number of positive anchors, which may be none: one empty
    image then outweighs a full batch, and the gradient jumps by two orders of magnitude. Here the batch counts as one,
    on however many processes it lies.
    """

    def forward(self, maps: list[Tensor]) -> dict[str, Tensor]:
        outputs = super().forward(maps)
        return {name: x.to(torch.promote_types(x.dtype, torch.float32)) for name, x in outputs.items()}

    def compute_loss(
        self,
        targets: list[dict],
        head_outputs: dict[str, Tensor],
        anchors: list[Tensor],
        matched_idxs: list[Tensor],
    ) -> dict[str, Tensor]:
        """The two losses of a batch laid end to end, as if it were one long image."""
        ahead = itertools.accumulate((len(target["labels"]) for target in targets[:-1]), initial=0)
        matched = [torch.where(index >= 0, index + n, index) for index, n in zip(matched_idxs, ahead, strict=True)]
        target = {key: torch.cat([target[key] for target in targets]) for key in ("boxes", "labels")}
        outputs = {name: x.flatten(0, 1)[None] for name, x in head_outputs.items()}
        losses = super().compute_loss([target], outputs, [torch.cat(anchors)], [torch.cat(matched)])
        # Torchvision divided by this process's positive anchors; what counts are those of all processes.
        positives = sum((index >= 0).sum() for index in matched)
        share = positives.clamp(min=1) / mean_count(positives, positives.device)
        return {name: loss * share for name, loss in losses.items()}


def mean_count(count: Tensor | int, device: torch.device) -> Tensor:
    """The mean of a count over all processes, at least ``1 / world``; a float32 scalar.

    A loss that each process divides by *this*, averaged over the processes as gradients are, is the sum over all images
    divided by the count over all images: the same as one process with the whole batch would compute.
    """
    total = torch.as_tensor(count, dtype=torch.float32, device=device).clone()
    if dist.is_initialized():
        dist.all_reduce(total)
    return total.clamp(min=1) / (dist.get_world_size() if dist.is_initialized() else 1)


def check_maps(images: Tensor, maps: list[Tensor], out_channels: list[int], strides: list[int]) -> None:
    """Compare a backbone's maps with what the backbone promised.

    Args:
        images: What went in, (B, 3, H, W).
        maps: What came out, to be (B, C_i, ceil(H / s_i), ceil(W / s_i)) each.
        out_channels: The promised C_i.
        strides: The promised s_i.

    Raises:
        InputError: If a map is missing, surplus, or of another shape.
    """
    height, width = images.shape[-2:]
    promised = [(len(images), c, -(-height // s), -(-width // s)) for c, s in zip(out_channels, strides, strict=True)]
    returned = [tuple(x.shape) for x in maps]
    if returned != promised:
        raise InputError(
            f"the backbone returned maps of shapes {returned}; its out_channels and strides promise {promised}, NCHW."
        )


def _check(backbone, num_classes, min_sizes, max_size, fpn_channels) -> None:
    channels, strides = getattr(backbone, "out_channels", None), getattr(backbone, "strides", None)
    lists = all(isinstance(x, (list, tuple)) and x for x in (channels, strides))
    if not lists or len(channels) != len(strides):
        raise InputError(
            f"the backbone {type(backbone).__name__} needs out_channels and strides, lists of one integer per map; "
            f"it has {channels} and {strides}."
        )
    if num_classes < 1:
        raise InputError(f"num_classes is {num_classes}; a detector needs at least one class.")
    for min_size in min_sizes:
        if not 0 < min_size <= max_size:
            raise InputError(
                f"min_size is {min_size} and max_size {max_size}; sizes in pixels, min_size not above max_size."
            )
    if fpn_channels < 1:
        raise InputError(f"fpn_channels is {fpn_channels}; the feature pyramid needs at least one.")
