"""Cascade Mask R-CNN ("Cascade R-CNN", Cai and Vasconcelos 2019) on any backbone, out of torchvision's parts.

The settings are those of the public stand-in for the paper's missing appendix, Swin's configuration in mmdetection:
proposals from three anchors per place, then three stages. Each stage starts from the boxes of the previous one and
requires more overlap; it has a box head of four convolutions with batch norm, trained with GIoU, and a mask head. As in
the cascade's paper, and in some variants of the stand-in only, one box regressor serves all classes.

Torchvision has no cascade: what follows the proposals is written out below, in the order in which it runs. One
difference from the stand-in remains: anchors that reach beyond the image take part in training.
"""

from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import batched_nms, box_area, box_iou, roi_align
from torchvision.ops import clip_boxes_to_image as clip
from torchvision.ops._utils import convert_boxes_to_roi_format
from torchvision.ops.boxes import remove_small_boxes
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from ..errors import InputError
from .detection import (
    IMAGE_MEAN,
    IMAGE_STD,
    Anchors,
    Coder,
    Pyramid,
    Transform,
    at_least_float32,
    check_arguments,
    divisor,
    mean_count,
)
from .region_proposals import ProposalNetwork

STAGES = (  # minimum overlap of a positive box, weight of the losses, weights of the box coder
    (0.5, 1.0, (10.0, 10.0, 5.0, 5.0)),
    (0.6, 0.5, (20.0, 20.0, 10.0, 10.0)),
    (0.7, 0.25, (30.0, 30.0, 15.0, 15.0)),
)
BOX_WEIGHT = 10.0  # of GIoU beside cross-entropy
POSITIVE = 0.25  # maximum share of the sampled boxes that have an object
BOX_CELLS, MASK_CELLS, MASK_SIDE = 7, 14, 28  # side of the pooled maps that the heads get, and of a mask
MASKS = 8  # that are cut out at a time
MIN_SCORE, OVERLAP = 0.05, 0.5  # of detections


def build_cascade_mask_rcnn(
    backbone: nn.Module,
    num_classes: int,
    *,
    min_sizes: list[int],
    min_size: int,
    max_size: int,
    fpn_channels: int = 256,
    anchor_base: float = 8.0,
    head_channels: int = 1024,
    samples: int = 512,
    proposals: int = 1000,
    detections: int = 100,
) -> nn.Module:
    """A Cascade Mask R-CNN that uses every map of the backbone, and for proposals one more of twice the last stride.

    The paper's detector reads Swin's stages 1 to 4, strides 4 to 32: proposals come from five levels, boxes and masks
    from four.

    The model is called as torchvision's detectors are. Images are a list of float tensors (3, H, W) in 0..1, of any
    sizes; they are normalised, resized, and padded to a multiple of 32 inside. Targets are a list of dicts with
    ``boxes`` (M, 4), float ``x1, y1, x2, y2`` in pixels of the image as given, ``labels`` (M,), int64 in 1..K, and
    ``masks`` (M, H, W), bool or uint8 of 0 and 1. An image without objects has M = 0.

    - In train mode ``model(images, targets)`` returns a dict of eleven losses, weighted: ``rpn_objectness``,
      ``rpn_box``, and for the stages 1 to 3 ``stage1_class``, ``stage1_box``, ``stage1_mask``.
    - In eval mode ``model(images)`` returns per image a dict of ``boxes`` (N, 4) in pixels of the image as given,
      ``scores`` (N,), ``labels`` (N,) in 1..K and ``masks`` (N, H, W), bool; best score first, at most ``detections``.

    ``model.backbone.body`` is the backbone, ``model.backbone.fpn`` the neck, ``model.rpn`` makes the proposals and
    ``model.roi_heads.stages`` are the three stages.

    Args:
        backbone: Returns a list of NCHW maps and has ``out_channels`` and ``strides``, a list of integers each; each
            stride is twice the one before.
        num_classes: K, the number of classes without background.
        min_sizes: Lengths in pixels to which an image's short side is resized in training, one drawn per image out of
            torch's random state, ...
        min_size: ... and the one in evaluation, ...
        max_size: ... unless the long side then exceeds this one.
        fpn_channels: Width of the feature pyramid and of the convolutions of all heads; 256 in the paper's setting.
        anchor_base: Side of a level's square anchor, in strides of that level. Lower it for small objects.
        head_channels: Width of the layer behind a box head's convolutions; 1024 in the paper's setting.
        samples: Maximum number of boxes per image on which a stage trains; 512 in the paper's setting. On small images
            the time of a step is nearly proportional to it.
        proposals: Maximum number of boxes per image that the cascade gets in evaluation; training draws its samples
            from twice as many. 1000 in the paper's setting.
        detections: Maximum number of objects per image that are returned.

    Raises:
        InputError: For a number of classes, size, width or base that cannot work, or a backbone without the two lists;
            when called, for maps that are not what the backbone's two lists say and targets without fitting masks.
    """
    if not min_sizes:
        raise InputError("min_sizes is empty; training needs at least one length of the short side.")
    check_arguments(backbone, num_classes, [*min_sizes, min_size], max_size, fpn_channels, detections)
    strides = list(backbone.strides)
    if strides != [strides[0] * 2**k for k in range(len(strides))]:
        raise InputError(f"the backbone's strides are {strides}; a feature pyramid needs each twice the one before.")
    if anchor_base < 1:
        raise InputError(f"anchor_base is {anchor_base}; below 1 there are gaps between anchors: use finer strides.")
    if head_channels < 1:
        raise InputError(f"head_channels is {head_channels}; the box heads need at least one.")
    if samples < 4:
        raise InputError(f"samples is {samples}; only a quarter may be objects: training needs at least four.")
    if proposals < 1:
        raise InputError(f"proposals is {proposals}; without any there are no detections: give 1 or more.")
    return _CascadeMaskRCNN(
        Pyramid(backbone, fpn_channels, LastLevelMaxPool()),
        ProposalNetwork(Anchors([*strides, 2 * strides[-1]], anchor_base, per_octave=1), fpn_channels, proposals),
        _Cascade(strides, fpn_channels, head_channels, num_classes, samples, detections),
        _Transform(min_sizes, min_size, max_size, divisor(backbone)),
    )


class _CascadeMaskRCNN(GeneralizedRCNN):
    """Torchvision's, which joins backbone, proposals and heads; targets are checked before anything is computed."""

    def forward(self, images: list[Tensor], targets: list[dict] | None = None) -> dict[str, Tensor] | list[dict]:
        for n, target in enumerate(targets or []):
            wanted = (len(target["boxes"]), *images[n].shape[-2:])
            given = tuple(target["masks"].shape) if "masks" in target else "missing"
            if given != wanted:
                raise InputError(f"the masks of target {n} are {given}; its boxes and image ask for {wanted}.")
        return super().forward(images, targets)


class _Transform(Transform):
    """Torchvision's, with a separate size for evaluation, and with masks pasted without rounding.

    Torchvision rounds a box to whole pixels before it pastes a mask into it, which is worst for small objects.
    """

    def __init__(self, min_sizes: list[int], min_size: int, max_size: int, divisor: int):
        super().__init__(min_size, max_size, IMAGE_MEAN, IMAGE_STD, size_divisible=divisor)
        self.min_sizes = min_sizes

    def torch_choice(self, k: list[int]) -> int:  # called in train mode only
        return super().torch_choice(self.min_sizes)

    def postprocess(
        self, result: list[dict], image_shapes: list[tuple[int, int]], original_image_sizes: list[tuple[int, int]]
    ) -> list[dict]:
        for found, size in zip(
            super().postprocess(result, image_shapes, original_image_sizes), original_image_sizes, strict=False
        ):
            found["masks"] = paste(found["masks"], found["boxes"], size)
        return result


def paste(masks: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Paste masks, given relative to their boxes, into an image: bilinear interpolation, zero outside.

    Args:
        masks: Probabilities (N, M, M).
        boxes: (N, 4) in pixels.
        size: Height and width of the image.

    Returns:
        Bool (N, height, width): where the probability at the centre of a pixel is at least one half.
    """

    def weights(start: Tensor, stop: Tensor, length: int) -> Tensor:
        """(N, length, M): the interpolation weight of each of the mask's M rows (columns) for a row of the image."""
        centres = torch.arange(length, device=boxes.device) + 0.5
        place = (centres - start[:, None]) / (stop - start)[:, None] * side - 0.5
        return (1 - (place[..., None] - torch.arange(side, device=boxes.device)).abs()).clamp(min=0)

    side = masks.shape[-1]
    x1, y1, x2, y2 = boxes.unbind(1)
    rows, columns = weights(y1, y2, size[0]), weights(x1, x2, size[1]).mT
    result = torch.zeros(len(boxes), *size, dtype=torch.bool, device=boxes.device)
    with torch.autocast(boxes.device.type, enabled=False):
        for n, mask in enumerate(masks):  # one at a time: a hundred large masks in float32 are gigabytes
            result[n] = rows[n] @ mask @ columns[n] >= 0.5
    return result


class _Cascade(nn.Module):
    """From proposals to detections in three stages; boxes are lists of one (R, 4) per image throughout."""

    def __init__(
        self, strides: list[int], channels: int, head_channels: int, num_classes: int, samples: int, most: int
    ):
        super().__init__()
        self.strides, self.sampler = strides, BalancedPositiveNegativeSampler(samples, POSITIVE)
        self.detections_per_image = most
        self.stages = nn.ModuleList(_Stage(*stage, channels, head_channels, num_classes) for stage in STAGES)

    def forward(
        self,
        levels: OrderedDict[str, Tensor],
        proposals: list[Tensor],
        sizes: list[tuple[int, int]],
        targets: list[dict] | None = None,
    ) -> tuple[list[dict], dict[str, Tensor]]:
        """Detections in eval mode, losses in train mode, as torchvision's detectors expect them."""
        maps = [at_least_float32(x) for x in levels.values()][: len(self.strides)]  # the last is for proposals only
        boxes = [_nonempty(b, size) for b, size in zip(proposals, sizes, strict=True)]
        if self.training:
            return [], self.losses(maps, boxes, sizes, targets)
        return self.detections(maps, boxes, sizes), {}

    def losses(
        self, maps: list[Tensor], boxes: list[Tensor], sizes: list[tuple[int, int]], targets: list[dict]
    ) -> dict[str, Tensor]:
        """The weighted losses of all stages; each stage trains on the boxes of the previous one."""
        losses = {}
        for n, stage in enumerate(self.stages, start=1):
            drawn = [_sample(b, target, stage.min_iou, self.sampler) for b, target in zip(boxes, targets, strict=True)]
            boxes, labels, truth, shapes, new = zip(*drawn, strict=True)
            scores, offsets = stage.classify(pool(maps, self.strides, boxes, BOX_CELLS))
            refined = stage.coder.decode_single(offsets, torch.cat(boxes))
            found = [label.nonzero_static(size=len(shape))[:, 0] for label, shape in zip(labels, shapes, strict=True)]
            positive = [b[one] for b, one in zip(boxes, found, strict=True)]
            logits = stage.mask(pool(maps, self.strides, positive, MASK_CELLS))

            label, truth, shapes = torch.cat(labels), torch.cat(truth), torch.cat(shapes)
            found = label.nonzero_static(size=len(shapes))[:, 0]
            logits = logits[torch.arange(len(logits), device=label.device), label[found] - 1]
            # The sums are divided by the counts over all processes. This also has to run where a batch has no objects,
            # since the other processes wait for the counts.
            boxes_in_all, found_in_all = (mean_count(len(x), x.device) for x in (scores, logits))
            terms = {
                "class": F.cross_entropy(scores, label, reduction="sum") / boxes_in_all,
                "box": BOX_WEIGHT * giou_loss(refined[found], truth[found]) / boxes_in_all,
                "mask": F.binary_cross_entropy_with_logits(logits, shapes.to(logits), reduction="sum")
                / (MASK_SIDE**2 * found_in_all),
            }
            losses |= {f"stage{n}_{name}": stage.weight * term for name, term in terms.items()}

            if n < len(self.stages):
                refined = refined.detach().split([len(b) for b in boxes])
                boxes = [_nonempty(clip(b, size), size, own) for b, own, size in zip(refined, new, sizes, strict=True)]
        return losses

    def detections(self, maps: list[Tensor], boxes: list[Tensor], sizes: list[tuple[int, int]]) -> list[dict]:
        """Per image ``boxes``, ``scores``, ``labels``, and ``masks`` (N, 28, 28) relative to the boxes."""
        logits = 0
        for stage in self.stages:
            scores, offsets = stage.classify(pool(maps, self.strides, boxes, BOX_CELLS))
            logits = logits + scores / len(self.stages)  # as in the stand-in: the mean is taken before the softmax
            refined = stage.coder.decode_single(offsets, torch.cat(boxes)).split([len(b) for b in boxes])
            boxes = [clip(b, size) for b, size in zip(refined, sizes, strict=True)]
        scores = logits.softmax(dim=1)[:, 1:].split([len(b) for b in boxes])
        results = [_select(b, s, self.detections_per_image) for b, s in zip(boxes, scores, strict=True)]

        labels = torch.cat([found["labels"] for found in results])
        cells = pool(maps, self.strides, [found["boxes"] for found in results], MASK_CELLS)
        masks = sum(stage.mask(cells).sigmoid() for stage in self.stages) / len(self.stages)
        masks = masks[torch.arange(len(labels), device=labels.device), labels - 1].split(
            [len(found["boxes"]) for found in results]
        )
        return [{**found, "masks": mask} for found, mask in zip(results, masks, strict=True)]


class _Stage(nn.Module):
    """One stage's heads and settings."""

    def __init__(
        self,
        min_iou: float,
        weight: float,
        coder: tuple[float, float, float, float],
        channels: int,
        head_channels: int,
        num_classes: int,
    ):
        super().__init__()
        self.min_iou, self.weight, self.coder = min_iou, weight, Coder(coder)
        shape = (channels, BOX_CELLS, BOX_CELLS)
        self.box_head = FastRCNNConvFCHead(shape, [channels] * 4, [head_channels], norm_layer=nn.BatchNorm2d)
        self.scores = nn.Linear(head_channels, 1 + num_classes)  # the background is 0
        self.offsets = nn.Linear(head_channels, 4)
        for layer, deviation in ((self.scores, 0.01), (self.offsets, 0.001)):
            nn.init.normal_(layer.weight, std=deviation)
            nn.init.zeros_(layer.bias)
        self.mask_head = nn.Sequential(
            MaskRCNNHeads(channels, [channels] * 4, dilation=1), MaskRCNNPredictor(channels, channels, num_classes)
        )

    def classify(self, cells: Tensor) -> tuple[Tensor, Tensor]:
        """(R, C, 7, 7) to logits of background and classes (R, 1 + K) and offsets of the boxes (R, 4)."""
        x = self.box_head(cells)
        return at_least_float32(self.scores(x)), at_least_float32(self.offsets(x))

    def mask(self, cells: Tensor) -> Tensor:
        """(R, C, 14, 14) to logits (R, K, 28, 28)."""
        return at_least_float32(self.mask_head(cells))


def pool(maps: list[Tensor], strides: list[int], boxes: list[Tensor], cells: int) -> Tensor:
    """RoIAlign; a box is pooled from the level on which it is 14 to 28 strides wide, or the nearest one.

    Torchvision's module for this estimates strides from sizes and is off by half a pixel of the map.

    Args:
        maps: (B, C, h_i, w_i).
        strides: The maps' strides, in pixels.
        boxes: Per image (R_b, 4), in pixels.
        cells: Side of the result.

    Returns:
        (R, C, cells, cells), R being the number of all boxes.
    """
    rois = convert_boxes_to_roi_format(list(boxes)).to(maps[0].dtype)  # (R, 5), the number of its image before each
    level = torch.log2(box_area(rois[:, 1:]).sqrt() / (14 * strides[0]) + 1e-6).floor().clamp(0, len(maps) - 1)
    level = level.nan_to_num(len(maps))  # a box that is not a number has no level
    counts = (level[:, None] == torch.arange(len(maps) + 1, device=level.device)).sum(0).tolist()
    *order, _ = level.argsort(stable=True).split(counts)
    result = maps[0].new_zeros(len(rois), maps[0].shape[1], cells, cells)
    for x, stride, here in zip(maps, strides, order, strict=True):
        result[here] = roi_align(x, rois[here], cells, 1 / stride, sampling_ratio=0, aligned=True)
    return result


def _sample(
    boxes: Tensor, target: dict, min_iou: float, sampler: BalancedPositiveNegativeSampler
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Sample the boxes of one image that a stage trains on, from ``boxes`` and the ground-truth boxes.

    Returns:
        The boxes (R, 4); their labels (R,), 0 where they overlap no object by ``min_iou``; the boxes (R, 4) of the
        objects that they overlap most; for the P boxes with an object its mask relative to the box, bool (P, 28, 28);
        and whether (R,) a box comes from ``boxes`` and not from the ground truth.
    """
    given, true = len(boxes), target["boxes"].to(boxes)
    boxes = torch.cat([boxes, true])
    labels = objects = torch.zeros(len(boxes), dtype=torch.int64, device=boxes.device)
    if len(true):
        overlap, objects = box_iou(true, boxes).max(dim=0)
        labels = torch.where(overlap >= min_iou, target["labels"][objects], 0)
    (positive,), (negative,) = sampler([labels])
    chosen = positive | negative
    of_object = (objects[:, None] == torch.arange(len(true), device=boxes.device)) & positive.bool()[:, None]
    number, *counts = torch.cat([chosen.sum()[None], of_object.sum(0)]).tolist()  # how many of what, in one transfer
    drawn = chosen.nonzero_static(size=number)[:, 0]
    boxes, labels, objects = boxes[drawn], labels[drawn], objects[drawn]
    found = labels.nonzero_static(size=sum(counts))[:, 0]
    shapes = _shapes(target["masks"], boxes[found], objects[found], counts)
    return boxes, labels, true[objects] if len(true) else boxes, shapes, drawn < given


def _shapes(masks: Tensor, boxes: Tensor, objects: Tensor, counts: list[int]) -> Tensor:
    """The masks (M, H, W) of the ``objects`` (P,) relative to their ``boxes`` (P, 4): bool (P, 28, 28).

    Args:
        counts: How many of the P boxes each of the M objects has.
    """
    present = [n for n, count in enumerate(counts) if count]
    order = objects.argsort(stable=True)
    theirs = boxes[order].split([counts[n] for n in present]) if present else []
    parts = []
    for start in range(0, len(present), MASKS):  # all masks of a crowded image in float32 are half a gigabyte
        some = slice(start, start + MASKS)
        few = torch.stack([masks[n] for n in present[some]])[:, None].to(boxes)
        parts.append(roi_align(few, list(theirs[some]), MASK_SIDE, sampling_ratio=0, aligned=True)[:, 0] >= 0.5)
    shapes = torch.zeros(len(boxes), MASK_SIDE, MASK_SIDE, dtype=torch.bool, device=boxes.device)
    if parts:
        shapes[order] = torch.cat(parts)
    return shapes


def _nonempty(boxes: Tensor, size: tuple[int, int], wanted: Tensor | None = None) -> Tensor:
    """The boxes (R, 4) that are not empty; if there are none, the whole image, so that the heads always get a box.

    Args:
        wanted: Which boxes (R,) may remain; default: all.
    """
    large = (boxes[:, 2:] - boxes[:, :2] >= 1e-2).all(dim=1)
    boxes = boxes[(large if wanted is None else large & wanted).nonzero()[:, 0]]
    return boxes if len(boxes) else boxes.new_tensor([[0, 0, size[1], size[0]]])


def giou_loss(boxes: Tensor, truth: Tensor) -> Tensor:
    """The sum of 1 - GIoU over pairs of boxes, (P, 4) each, as :func:`torchvision.ops.generalized_box_iou_loss`.

    Torchvision's picks the pairs that overlap, and a device has to be asked how many these are.
    """
    (x1, y1, x2, y2), (u1, v1, u2, v2) = boxes.unbind(dim=-1), truth.unbind(dim=-1)
    left, top, right, bottom = torch.max(x1, u1), torch.max(y1, v1), torch.min(x2, u2), torch.min(y2, v2)
    overlap = (right - left) * (bottom - top)
    overlap = torch.where((bottom > top) & (right > left), overlap, 0)
    union = (x2 - x1) * (y2 - y1) + (u2 - u1) * (v2 - v1) - overlap
    hull = (torch.max(x2, u2) - torch.min(x1, u1)) * (torch.max(y2, v2) - torch.min(y1, v1))
    return (1 - (overlap / (union + 1e-7) - (hull - union) / (hull + 1e-7))).sum()


def _select(boxes: Tensor, scores: Tensor, most: int) -> dict[str, Tensor]:
    """The detections, at most ``most``, among boxes (R, 4) with scores (R, K)."""
    box, label = (scores > MIN_SCORE).nonzero(as_tuple=True)
    boxes, scores, labels = boxes[box], scores[box, label], label + 1
    keep = remove_small_boxes(boxes, min_size=1e-2)
    keep = keep[batched_nms(boxes[keep], scores[keep], labels[keep], OVERLAP)[:most]]
    return {"boxes": boxes[keep], "scores": scores[keep], "labels": labels[keep]}
