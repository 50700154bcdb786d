"""DINOv3's ViTs (Simeoni et al. 2025): plain ones whose attention turns queries and keys by their place (RoPE)."""

from pathlib import Path

import timm
from timm.models.eva import Eva, EvaBlock
from torch import Tensor

from .base import FPNNorms, embed, f_p1, f_p2, fpn_norms
from .hub import from_timm
from .vit import PyramidNorms, as_trunk, lay_out, patches, rows_of, take_up


def dinov3_names() -> list[str]:
    """Every ViT of DINOv3 in timm."""
    return timm.list_models("vit_*_dinov3*")


def create_dinov3(
    name: str, pretrained: bool = False, weights: str | Path | None = None, drop_path_rate: float = 0.0
) -> Eva:
    """As :func:`e3va_lite.backbones.vit.create_vit`, of one of :func:`dinov3_names`."""
    options = {"drop_path_rate": drop_path_rate, "num_classes": 0}
    vit = as_trunk(from_timm(name, pretrained and weights is None, options), weights)
    for block in vit.layers[0].blocks:
        block.turns = vit.rope.get_embed  # of a grid of patches; all blocks share them
        block.attn.qkv_bias_separate = True  # the same sum, and a call of ``qkv`` that LoRA's hook sees
    return vit


@embed.register
def _(vit: Eva, images: Tensor) -> Tensor:
    x = patches(vit, images)
    tokens, _ = vit._pos_embed(x)
    return lay_out(vit.norm_pre(tokens), vit.num_prefix_tokens, x.shape[2])


@f_p1.register
def _(block: EvaBlock, x: Tensor) -> Tensor:
    _, height, width, _ = x.shape
    rope = block.turns(shape=(height - rows_of(block.prefix, width), width))
    attended = block.attn(block.norm1(take_up(x, block.prefix)), rope=rope)
    return lay_out(block.drop_path1(block.gamma_1 * attended), block.prefix, width)


@f_p2.register
def _(block: EvaBlock, x: Tensor) -> Tensor:
    return block.drop_path2(block.gamma_2 * block.mlp(block.norm2(x)))


@fpn_norms.register
def _(vit: Eva, stages: tuple[int, ...], trainable: bool) -> FPNNorms:
    return PyramidNorms(vit, stages, trainable)
