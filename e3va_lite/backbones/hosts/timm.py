"""timm's models as hosts: classifiers, and those that ``features_only=True`` makes."""

import copy
from collections import OrderedDict
from itertools import pairwise
from typing import ClassVar

from timm.layers import Format
from timm.models._features import FeatureDictNet, FeatureGetterNet, FeatureListNet
from timm.models.eva import Eva, EvaBlock
from timm.models.swin_transformer import SwinTransformer, SwinTransformerBlock, SwinTransformerStage
from timm.models.swin_transformer_v2 import SwinTransformerV2, SwinTransformerV2Block, SwinTransformerV2Stage
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from ...errors import InputError
from ..base import embed, f_p1
from ..swin import RollsFirst
from ..vit import rows_of, to_tokens
from .base import Host, Stage, Stages


class RollsFirstV2(SwinTransformerV2Block):
    """A block of Swin V2 in timm's order of operations, see :class:`e3va_lite.backbones.swin.RollsFirst`."""


@f_p1.register
def _(block: RollsFirstV2, x: Tensor) -> Tensor:
    return block.drop_path1(block.norm1(block._attn(x)))


IN_TIMMS_ORDER = {SwinTransformerBlock: RollsFirst, SwinTransformerV2Block: RollsFirstV2}


def swin_stages(front: nn.Module, layers: list[nn.Module]) -> Stages:
    """timm's Swin, V1 or V2, in timm's own order of operations."""
    for block in (block for layer in layers for block in layer.blocks):
        block.__class__ = IN_TIMMS_ORDER.get(type(block), type(block))
        if hasattr(block.attn, "qkv_bias_separate"):
            block.attn.qkv_bias_separate = True  # equal, and calls the module qkv, which LoRA hooks
    return Stages(front, [Stage(layer.downsample, list(layer.blocks)) for layer in layers])


class TunedFeatureDict(Host, FeatureDictNet):
    """``features_only=True`` of a Swin: maps in NHWC, as timm returns them."""

    def take_apart(self) -> tuple[Stages, tuple[int, ...]]:
        front, *layers = self.values()
        if not layers or any(type(x) not in (SwinTransformerStage, SwinTransformerV2Stage) for x in layers):
            raise InputError(f"{type(self).__name__} holds no Swin of timm: its children are {', '.join(self)}.")
        names = list(self)[1:]
        return swin_stages(front, layers), tuple(1 + names.index(name) for name in self.return_layers)

    def _collect(self, x: Tensor) -> dict[str, Tensor]:
        return OrderedDict(zip(self.return_layers.values(), self.maps_nhwc(x), strict=True))


class TunedFeatureList(TunedFeatureDict, FeatureListNet):
    """As above; :class:`FeatureListNet` makes a list of it."""


class SwinClassifier(Host):
    """timm's Swin, V1 or V2, as a classifier: norm and head are its own."""

    KEPT: ClassVar = ("norm", "head")

    def take_apart(self) -> tuple[Stages, tuple[int, ...]]:
        return swin_stages(self.patch_embed, list(self.layers)), (len(self.layers),)

    def forward_features(self, x: Tensor) -> Tensor:
        return self.norm(self.maps_nhwc(x)[-1])


class TunedSwin(SwinClassifier, SwinTransformer):
    pass


class TunedSwinV2(SwinClassifier, SwinTransformerV2):
    pass


AFTER_THE_BLOCKS = ("norm", "fc_norm", "attn_pool", "head_drop", "head")


class ViTFront(nn.Module):
    """The embedding of a plain ViT, with its prefix tokens in rows above the map, see :mod:`..vit`."""

    def __init__(self, vit: VisionTransformer | Eva) -> None:
        super().__init__()
        self.vit = copy.copy(vit)  # its parts are those of the one that was found ...
        vars(self.vit).update(
            {k: copy.copy(v) for k, v in vars(vit).items() if isinstance(v, dict)}
        )  # ... hooks are not
        self.vit._modules = {k: v for k, v in vit._modules.items() if k not in ("blocks", *AFTER_THE_BLOCKS)}
        self.vit.dynamic_img_size = True  # at the size that it was built for, this is the same

    def forward(self, images: Tensor) -> Tensor:
        return embed(self.vit, images)


def vit_stages(vit: VisionTransformer | Eva, indices: list[int]) -> Stages:
    """A plain ViT of timm; its stages end after the blocks with these indices (from 0).

    Raises:
        InputError: For blocks of another structure.
    """
    is_eva = isinstance(vit, Eva)
    if any(type(block) is not (EvaBlock if is_eva else Block) for block in vit.blocks) or (
        is_eva and (vit.rope is None or vit.rope_mixed or any(block.gamma_1 is None for block in vit.blocks))
    ):
        raise InputError(f"this {type(vit).__name__} has other blocks than timm's plain ViTs, DINOv2 and DINOv3 have.")
    for block in vit.blocks:
        block.dim, block.prefix = vit.embed_dim, vit.num_prefix_tokens
        if is_eva:
            block.rope = vit.rope.get_embed  # for a grid of patches; shared by all blocks
            block.attn.qkv_bias_separate = True  # equal, and calls the module qkv, which LoRA hooks
    embedding = vit.patch_embed
    embedding.flatten, embedding.output_fmt, embedding.strict_img_size = False, Format.NHWC, False
    starts = [0, *(index + 1 for index in indices)]
    pieces = [list(vit.blocks)[a:b] for a, b in pairwise(starts)]
    return Stages(ViTFront(vit), [Stage(nn.Identity(), blocks) for blocks in pieces])


class TunedFeatureGetter(Host, FeatureGetterNet):
    """``features_only=True`` of a plain ViT."""

    def take_apart(self) -> tuple[Stages, tuple[int, ...]]:
        if type(self.model) not in (VisionTransformer, Eva):
            raise InputError(f"features of a {type(self.model).__name__} by feature_cls='getter' cannot be tuned.")
        indices = sorted(set(self.out_indices))
        return vit_stages(self.model, indices), tuple(range(1, len(indices) + 1))

    def install_tuned(self, tuned: nn.Module) -> None:
        prefix, last_norm = self.model.num_prefix_tokens, self.model.norm if self.norm else nn.Identity()
        super().install_tuned(tuned)
        self.prefix, self.last_norm = prefix, last_norm

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = [self.last_norm(m[:, rows_of(self.prefix, m.shape[2]) :]) for m in self.maps_nhwc(x)]
        if self.output_fmt == Format.NCHW:
            return [m.permute(0, 3, 1, 2).contiguous() for m in maps]
        return [m.flatten(1, 2) for m in maps]


class ViTClassifier(Host):
    """timm's plain ViT, or DINOv3, as a classifier: what follows the blocks is its own."""

    KEPT: ClassVar = AFTER_THE_BLOCKS

    def take_apart(self) -> tuple[Stages, tuple[int, ...]]:
        return vit_stages(self, [len(self.blocks) - 1]), (1,)

    def forward_features(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        if attn_mask is not None or is_causal:
            raise InputError("the attention of a tuned backbone takes no mask: call it with images only.")
        return self.norm(to_tokens(self.maps_nhwc(x)[-1], self.num_prefix_tokens))


class TunedViT(ViTClassifier, VisionTransformer):
    pass


class TunedEva(ViTClassifier, Eva):
    pass


HOSTS = {
    FeatureDictNet: TunedFeatureDict,
    FeatureListNet: TunedFeatureList,
    FeatureGetterNet: TunedFeatureGetter,
    SwinTransformer: TunedSwin,
    SwinTransformerV2: TunedSwinV2,
    VisionTransformer: TunedViT,
    Eva: TunedEva,
}
