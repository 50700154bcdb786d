"""Swin Transformer V2 (Liu et al. 2022): the two halves of a block end in their norms instead of beginning with them.

So the taps are ``f_P1(x) = LN1(W-MSA(x))`` and ``f_P2(x) = LN2(MLP(x))``; equations (5) to (8) hold unchanged.
Padding, shift and windows are those of :mod:`e3va_lite.backbones.swin`.
"""

from pathlib import Path

import timm
from timm.models.swin_transformer_v2 import SwinTransformerV2, SwinTransformerV2Block
from torch import Tensor, nn

from .base import embed, f_p1, f_p2
from .hub import from_timm
from .swin import embed_patches, in_windows
from .weights import load_weights


def swin_v2_names() -> list[str]:
    """Every Swin V2 of timm."""
    return timm.list_models("swinv2_*", exclude_filters="*cr*")


def create_swin_v2(
    name: str, pretrained: bool = False, weights: str | Path | None = None, drop_path_rate: float = 0.0
) -> SwinTransformerV2:
    """As :func:`e3va_lite.backbones.swin.create_swin`, for one of :func:`swin_v2_names`."""
    options = {"strict_img_size": False, "always_partition": True, "drop_path_rate": drop_path_rate, "num_classes": 0}
    swin = from_timm(name, pretrained and weights is None, options)
    swin.norm, swin.head = nn.Identity(), nn.Identity()
    for block in (block for stage in swin.layers for block in stage.blocks):
        block.attn.qkv_bias_separate = True  # equal, and calls the module qkv, which LoRA hooks
    if weights is not None:
        load_weights(swin, weights)
    return swin


@embed.register
def _(swin: SwinTransformerV2, images: Tensor) -> Tensor:
    return embed_patches(swin, images)


@f_p1.register
def _(block: SwinTransformerV2Block, x: Tensor) -> Tensor:
    return block.drop_path1(block.norm1(in_windows(block, x)))


@f_p2.register
def _(block: SwinTransformerV2Block, x: Tensor) -> Tensor:
    return block.drop_path2(block.norm2(block.mlp(x)))
