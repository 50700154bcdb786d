"""UPerNet ("Unified Perceptual Parsing for Scene Understanding", Xiao et al. 2018) on any backbone: mmsegmentation's.

The settings are those of the public stand-in for the paper's missing appendix: UPerHead with pools of 1, 2, 3 and 6 on
all maps, an auxiliary FCN head of one convolution and 256 channels on stage 3 with weight .4, dropout .1, and
prediction on whole images. A loss is the mean over all pixels, including void ones, which count as zero: this is
mmsegmentation's default.

Where this departs from mmsegmentation, a small class below says so.
"""

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..backbones.swin import MIN_SIZE
from ..datasets.ade20k import VOID
from ..errors import InputError
from .detection import IMAGE_MEAN, IMAGE_STD, at_least_float32, per_channel
from .mmseg_backbone import Body, mmseg


def build_upernet(
    backbone: nn.Module,
    num_classes: int,
    *,
    head_channels: int = 512,
    scale: tuple[int, int] = (2048, 512),
    class_weights: list[float] | None = None,
) -> nn.Module:
    """A UPerNet that uses every map of the backbone; the auxiliary head sees the map of stride 16, else the last.

    Images are a list of float tensors (3, H, W) in 0..1; they are normalised inside. Targets are a list of dicts with
    ``mask``, int64 (H, W): 0..K-1, and 255 for pixels that are no class.

    - In train mode ``model(images, targets)`` returns the two losses, ``decode`` and ``auxiliary``. Images are not
      resized; smaller ones are padded to the largest of the batch.
    - In eval mode ``model(images)`` returns per image a dict of ``mask``, int64 (H, W), 0..K-1, in pixels of the image
      as given. Inside, an image is resized to fit ``scale``, and its logits are
      resized back.

    ``model.backbone.body`` is the backbone, ``model.decode_head`` and ``model.auxiliary_head`` are the heads.

    Args:
        backbone: Returns a list of NCHW maps and has ``out_channels`` and ``strides``, a list of integers each.
        num_classes: K, 2 or more.
        head_channels: Width of UPerHead, 512 in the paper's setting. The auxiliary head has 256 at most.
        scale: Long and short side in pixels into which an image is fitted for prediction, keeping its aspect ratio.
        class_weights: Weight of a pixel of each class in the losses, which are then means over all pixels but void.

    Raises:
        InputError: For a number or size that cannot work.
    """
    if num_classes < 2:
        raise InputError(f"num_classes is {num_classes}: a segmenter needs at least two classes.")
    if len(scale) != 2 or min(scale) < MIN_SIZE:
        raise InputError(f"scale={list(scale)} cannot work: give a long and a short side of {MIN_SIZE} or more.")
    if class_weights is not None and len(class_weights) != num_classes:
        raise InputError(f"class_weights={class_weights} cannot work: give a number for each of {num_classes} classes.")
    loss = {"type": "CrossEntropyLoss"} if class_weights is None else {"type": _Weighted, "weights": class_weights}
    third = backbone.strides.index(16) if 16 in backbone.strides else len(backbone.strides) - 1
    common = {
        "num_classes": num_classes,
        "out_channels": num_classes,  # otherwise, mmsegmentation warns about two classes
        "dropout_ratio": 0.1,
        "norm_cfg": {"type": "BN"},
        "align_corners": False,
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"mmseg\.")  # deprecations, and what the mean is taken over
        model = _UPerNet(
            scale,
            backbone={"type": lambda: Body(backbone)},  # the registry calls it, and so takes a module that exists
            decode_head={
                "type": _UPerHead,
                "in_channels": backbone.out_channels,
                "in_index": list(range(len(backbone.out_channels))),
                "channels": head_channels,
                "pool_scales": (1, 2, 3, 6),
                "loss_decode": loss,
                **common,
            },
            auxiliary_head={
                "type": _FCNHead,
                "in_channels": backbone.out_channels[third],
                "in_index": third,
                "channels": min(256, head_channels),
                "num_convs": 1,
                "concat_input": False,
                "loss_decode": {**loss, "loss_weight": 0.4},
                **common,
            },
        )
    for head in (model.decode_head, model.auxiliary_head):  # as mmengine's init_weights would
        nn.init.normal_(head.conv_seg.weight, std=0.01)
        nn.init.zeros_(head.conv_seg.bias)
    return model


class _Weighted(nn.Module):
    """The mean over all pixels but void, weighted by class; mmsegmentation's own fails with class weights and void."""

    loss_name = "loss_ce"

    def __init__(self, weights: list[float], loss_weight: float = 1.0) -> None:
        super().__init__()
        self.register_buffer("weights", torch.tensor(weights), persistent=False)
        self.loss_weight = loss_weight

    def forward(self, logits: Tensor, labels: Tensor, ignore_index: int, **_: object) -> Tensor:
        return self.loss_weight * F.cross_entropy(logits, labels, self.weights, ignore_index=ignore_index)


class _UPerNet(mmseg.models.segmentors.EncoderDecoder):
    """mmsegmentation's, called as torchvision's detectors are: lists of images of any sizes."""

    def __init__(self, scale: tuple[int, int], **parts) -> None:
        super().__init__(**parts)
        self.scale = tuple(scale)

    def forward(self, images: list[Tensor], targets: list[dict] | None = None) -> dict[str, Tensor] | list[dict]:
        if not self.training:
            return [{"mask": self.logits(image).argmax(0)} for image in images]
        height, width = (max(sides) for sides in zip(*(image.shape[-2:] for image in images), strict=True))
        batch = torch.stack([_padded(_normalised(image), height, width) for image in images])
        labels = torch.stack([_padded(target["mask"], height, width, VOID) for target in targets])
        # The map that is pooled to a single place has one value per channel and image. A single image's have no
        # variance: for this batch its norm takes the running statistics.
        pooled = self.decode_head.psp_modules[0].modules() if len(images) == 1 else ()
        norms = [module for module in pooled if isinstance(module, nn.BatchNorm2d) and module.training]
        try:
            for norm in norms:
                norm.eval()
            losses = self.loss(batch, labels)
        finally:
            for norm in norms:
                norm.train()
        return {"decode": losses["decode.loss_ce"], "auxiliary": losses["aux.loss_ce"]}

    def logits(self, image: Tensor) -> Tensor:
        """(3, H, W) in 0..1 -> (K, H, W)."""
        height, width = image.shape[-2:]
        rows, columns = _fitted(height, width, self.scale)
        resized = F.interpolate(image[None], (rows, columns), mode="bilinear", align_corners=False)[0]
        # The short side of a very long image can be below Swin's minimum.
        batch = _padded(_normalised(resized), *(_at_least(side, MIN_SIZE) for side in (rows, columns)))[None]
        logits = self.encode_decode(batch, [{"img_shape": batch.shape[-2:]}])[..., :rows, :columns]
        return F.interpolate(logits, (height, width), mode="bilinear", align_corners=False)[0]


def _fitted(height: int, width: int, scale: tuple[int, int]) -> tuple[int, int]:
    """The size of an image that is resized to fit ``scale``, as mmcv's ``rescale_size``: sides rounded half up.

    Where a graph for images of any size is recorded, sides are tensors.
    """
    if torch.jit.is_tracing():
        sides = torch.stack([height, width]).double()
        factor = torch.minimum(max(scale) / sides.max(), min(scale) / sides.min())
        return tuple((sides * factor + 0.5).long().unbind())
    factor = min(max(scale) / max(height, width), min(scale) / min(height, width))
    return int(height * factor + 0.5), int(width * factor + 0.5)


def _at_least(side: int | Tensor, least: int) -> int | Tensor:
    return side.clamp(min=least) if isinstance(side, Tensor) else max(side, least)


class _Head:
    """Mixin for mmsegmentation's heads: logits and loss in float32 at least, and no accuracy.

    mmsegmentation also computes the accuracy on the batch, for which it sorts the logits of every pixel.
    """

    def forward(self, maps: list[Tensor]) -> Tensor:
        return at_least_float32(super().forward(maps))

    def loss_by_feat(self, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Logits (B, K, h, w) and labels (B, H, W), in the place of mmsegmentation's data samples."""
        logits = F.interpolate(logits, labels.shape[-2:], mode="bilinear", align_corners=self.align_corners)
        return {"loss_ce": self.loss_decode(logits, labels, ignore_index=self.ignore_index)}


class _UPerHead(_Head, mmseg.models.decode_heads.UPerHead):
    pass


class _FCNHead(_Head, mmseg.models.decode_heads.FCNHead):
    pass


def _normalised(image: Tensor) -> Tensor:
    mean, std = (per_channel(image, values) for values in (IMAGE_MEAN, IMAGE_STD))
    return (image - mean) / std


def _padded(x: Tensor, height: int, width: int, value: float = 0) -> Tensor:
    """(..., h, w) -> (..., height, width), padded on the right and below."""
    return F.pad(x, (0, width - x.shape[-1], 0, height - x.shape[-2]), value=value)
