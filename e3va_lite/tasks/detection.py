"""What RetinaNet and the Cascade Mask R-CNN share: backbone and pyramid, anchors, checks, counts over processes."""

from collections import OrderedDict

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchvision.models.detection._utils import BoxCoder, encode_boxes
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock, FeaturePyramidNetwork

from ..errors import InputError

PAPER_CHANNELS = 256  # of pyramid and heads
IMAGE_MEAN = (123.675 / 255, 116.28 / 255, 103.53 / 255)  # of ImageNet, for images in 0..1
IMAGE_STD = (58.395 / 255, 57.12 / 255, 57.375 / 255)


class Pyramid(nn.Module):
    """Backbone and feature pyramid as torchvision's detectors expect them: images to an ordered dict of levels."""

    def __init__(self, backbone: nn.Module, channels: int, extra: ExtraFPNBlock):
        super().__init__()
        self.body = backbone
        self.fpn = FeaturePyramidNetwork(backbone.out_channels, channels, extra)
        self.out_channels = channels

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        maps = self.body(images)
        check_maps(images, maps, self.body.out_channels, self.body.strides)
        return self.fpn(OrderedDict((str(i), x) for i, x in enumerate(maps)))


class Anchors(AnchorGenerator):
    """Anchors at each place: ``per_octave`` scales times the ratios (height to width) .5, 1 and 2; nine by default.

    Torchvision estimates a level's stride from the sizes of image and map, 608 // 10 = 60 where it is 64, and computes
    in the maps' precision, which in bfloat16 leaves errors of whole pixels. Here, strides are exact, in float32.
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


class Transform(GeneralizedRCNNTransform):
    """Torchvision's, whose constants are not copied to the device one by one: every such copy waits for it."""

    def normalize(self, image: Tensor) -> Tensor:
        mean, std = (per_channel(image, values) for values in (self.image_mean, self.image_std))
        return (image - mean) / std

    def resize(self, image: Tensor, target: dict | None = None) -> tuple[Tensor, dict | None]:
        if target is None:
            return super().resize(image, target)
        resized, others = super().resize(image, {**target, "boxes": torch.empty(0, 4)})
        return resized, {**others, "boxes": resize_boxes(target["boxes"], image.shape[-2:], resized.shape[-2:])}

    def postprocess(
        self, result: list[dict], image_shapes: list[tuple[int, int]], original_image_sizes: list[tuple[int, int]]
    ) -> list[dict]:
        for found, before, after in zip(result, image_shapes, original_image_sizes, strict=False):  # none in train mode
            found["boxes"] = resize_boxes(found["boxes"], before, after)
        return result


def resize_boxes(boxes: Tensor, before: tuple[int, int], after: tuple[int, int]) -> Tensor:
    """Boxes (N, 4) of an image of one height and width in an image of another; as torchvision's of that name."""
    sides = zip(before, after, strict=True)
    down, across = (torch.tensor(b, dtype=torch.float32) / torch.tensor(a, dtype=torch.float32) for a, b in sides)
    x1, y1, x2, y2 = boxes.unbind(1)
    return torch.stack((x1 * across, y1 * down, x2 * across, y2 * down), dim=1)


class Coder(BoxCoder):
    """Torchvision's, with numbers in the place of its constant tensors, which are copied to the device at every use."""

    def encode_single(self, reference_boxes: Tensor, proposals: Tensor) -> Tensor:
        return encode_boxes(reference_boxes, proposals, self.weights)

    def decode_single(self, rel_codes: Tensor, boxes: Tensor) -> Tensor:
        x1, y1, x2, y2 = boxes.to(rel_codes.dtype)[:, :, None].unbind(1)  # (N, 1) each
        width, height = x2 - x1, y2 - y1
        dx, dy, dw, dh = (rel_codes[:, i::4] / weight for i, weight in enumerate(self.weights))
        x, y = dx * width + (x1 + 0.5 * width), dy * height + (y1 + 0.5 * height)
        dw, dh = (torch.clamp(d, max=self.bbox_xform_clip) for d in (dw, dh))  # no overflow in exp
        half_w, half_h = 0.5 * (torch.exp(dw) * width), 0.5 * (torch.exp(dh) * height)
        return torch.stack((x - half_w, y - half_h, x + half_w, y + half_h), dim=2).flatten(1)


def init_narrow(*convolutions: nn.Conv2d) -> None:
    """Initialise convolutions of a head if they are narrower than in the paper's setting.

    Torchvision's initialisation, a standard deviation of .01, halves a signal per layer at 256 channels and leaves
    nearly nothing of it in a narrower head, which would take most of a short run to recover.
    """
    for convolution in convolutions:
        if convolution.out_channels < PAPER_CHANNELS:
            nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu")


def per_channel(image: Tensor, values: tuple[float, ...]) -> Tensor:
    """One value for each of an image's channels, (C, 1, 1), made on its device."""
    return torch.cat([image.new_full((1, 1, 1), value) for value in values])


def at_least_float32(x: Tensor) -> Tensor:
    """Boxes are decoded and losses are summed in the precision of their input, which autocast may have lowered."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def mean_count(count: Tensor | int, device: torch.device) -> Tensor:
    """The mean of a count over all processes, at least ``1 / world``; a float32 scalar.

    If each process divides its loss by this number, the mean over the processes, as gradients are averaged, is the sum
    over all images divided by the count over all images: the same as one process with the whole batch computes.
    """
    if isinstance(count, Tensor):
        total = count.to(torch.float32, copy=True)
    else:
        total = torch.full((), count, dtype=torch.float32, device=device)  # a kernel's argument, and no copy
    if dist.is_initialized():
        dist.all_reduce(total)
    return total.clamp(min=1) / (dist.get_world_size() if dist.is_initialized() else 1)


def check_arguments(
    backbone: nn.Module, num_classes: int, min_sizes: list[int], max_size: int, fpn_channels: int, detections: int
) -> None:
    """Raise an :class:`InputError` for arguments with which no detector can work."""
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
    if detections < 1:
        raise InputError(f"detections is {detections}; a detector that may return none finds nothing: give 1 or more.")


def check_maps(images: Tensor, maps: list[Tensor], out_channels: list[int], strides: list[int]) -> None:
    """Compare a backbone's maps with what the backbone promised.

    Args:
        images: The input, (B, 3, H, W).
        maps: The output; should be (B, C_i, ceil(H / s_i), ceil(W / s_i)) each.
        out_channels: C_i.
        strides: s_i.

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


def divisor(backbone: nn.Module) -> int:
    """The sides of images are padded to a multiple of this: torchvision's 32, unless the backbone says otherwise."""
    return getattr(backbone, "divisor", 32)
