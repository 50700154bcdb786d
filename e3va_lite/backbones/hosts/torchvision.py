"""torchvision's Swin and Swin V2 as hosts: the classifier, and its ``features`` in an IntermediateLayerGetter.

``torchvision.models.detection.backbone_utils.BackboneWithFPN`` holds such a getter as its ``body``.
"""

from collections import OrderedDict
from typing import ClassVar

from torch import Tensor, nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.swin_transformer import SwinTransformer, SwinTransformerBlock, SwinTransformerBlockV2

from ...errors import InputError
from ..base import f_p1, f_p2
from .base import Host, Stage, Stages


@f_p1.register
def _(block: SwinTransformerBlock, x: Tensor) -> Tensor:
    return block.stochastic_depth(block.attn(block.norm1(x)))


@f_p2.register
def _(block: SwinTransformerBlock, x: Tensor) -> Tensor:
    return block.stochastic_depth(block.mlp(block.norm2(x)))


@f_p1.register
def _(block: SwinTransformerBlockV2, x: Tensor) -> Tensor:
    return block.stochastic_depth(block.norm1(block.attn(x)))


@f_p2.register
def _(block: SwinTransformerBlockV2, x: Tensor) -> Tensor:
    return block.stochastic_depth(block.norm2(block.mlp(x)))


def stages_of(features: list[nn.Module]) -> Stages:
    """The children of a Swin's ``features``: patches, then blocks and patch mergings in turn."""
    front, *layers = features
    for block in (block for blocks in layers[::2] for block in blocks):
        block.dim = block.norm1.normalized_shape[0]
    downsamples = [nn.Identity(), *layers[1::2]]
    return Stages(front, [Stage(d, list(blocks)) for d, blocks in zip(downsamples, layers[::2], strict=False)])


class TunedTorchvisionSwin(Host, SwinTransformer):
    """The classifier: what follows ``features`` is its own."""

    KEPT: ClassVar = ("norm", "permute", "avgpool", "flatten", "head")
    REFUSED: ClassVar = ("lora", "lst")

    def take_apart(self) -> tuple[Stages, tuple[int, ...]]:
        return stages_of(list(self.features)), ((len(self.features) + 1) // 2,)

    def forward(self, x: Tensor) -> Tensor:
        x = self.permute(self.norm(self.maps_nhwc(x)[-1]))
        return self.head(self.flatten(self.avgpool(x)))


class TunedLayerGetter(Host, IntermediateLayerGetter):
    """The children of ``features`` by their numbers, '0' for the patches to '7' for the last blocks; maps in NHWC."""

    REFUSED: ClassVar = ("lora", "lst")

    def take_apart(self) -> tuple[Stages, tuple[int, ...]]:
        if "1" not in self or not isinstance(self["1"], nn.Sequential) or not _is_block(self["1"][0]):
            raise InputError(
                f"this IntermediateLayerGetter holds no Swin of torchvision: its children are {list(self)}."
            )
        if halfway := [name for name in self.return_layers if int(name) % 2 == 0]:
            raise InputError(
                f"layer '{halfway[0]}' of torchvision's Swin is no stage: return_layers can be 1, 3, 5, 7."
            )
        return stages_of(list(self.values())), tuple((int(name) + 1) // 2 for name in self.return_layers)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return OrderedDict(zip(self.return_layers.values(), self.maps_nhwc(x), strict=True))


def _is_block(module: nn.Module) -> bool:
    return type(module) in (SwinTransformerBlock, SwinTransformerBlockV2)


HOSTS = {SwinTransformer: TunedTorchvisionSwin, IntermediateLayerGetter: TunedLayerGetter}
