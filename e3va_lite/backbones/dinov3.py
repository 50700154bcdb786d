"""DINOv3's ViTs (Simeoni et al. 2025): plain ones with rotary position embeddings (RoPE) in the attention."""

from pathlib import Path

import timm
from timm.models.eva import Eva, EvaBlock
from torch import Tensor

from .base import FPNNorms, embed, f_p1, f_p2, fpn_norms
from .hub import from_timm
from .vit import PyramidNorms, as_timm_stages, patches, rows_of, to_map, to_tokens


def dinov3_names() -> list[str]:
    """Every ViT of DINOv3 in timm."""
    return timm.list_models("vit_*_dinov3*")


def create_dinov3(
    name: str, pretrained: bool = False, weights: str | Path | None = None, drop_path_rate: float = 0.0
) -> Eva:
    """As :func:`e3va_lite.backbones.vit.create_vit`, for one of :func:`dinov3_names`."""
    options = {"drop_path_rate": drop_path_rate, "num_classes": 0}
    vit = as_timm_stages(from_timm(name, pretrained and weights is None, options), weights)
    for block in vit.layers[0].blocks:
        block.rope = vit.rope.get_embed  # for a grid of patches; shared by all blocks
        block.attn.qkv_bias_separate = True  # equal, and calls the module qkv, which LoRA hooks
    return vit


@embed.register
def _(vit: Eva, images: Tensor) -> Tensor:
    x = patches(vit, images)
    tokens, _ = vit._pos_embed(x)
    return to_map(vit.norm_pre(tokens), vit.num_prefix_tokens, x.shape[2])


@f_p1.register
def _(block: EvaBlock, x: Tensor) -> Tensor:
    _, height, width, _ = x.shape
    rope = block.rope(shape=(height - rows_of(block.prefix, width), width))
    attended = block.attn(block.norm1(to_tokens(x, block.prefix)), rope=rope)
    return to_map(block.drop_path1(block.gamma_1 * attended), block.prefix, width)


@f_p2.register
def _(block: EvaBlock, x: Tensor) -> Tensor:
    return block.drop_path2(block.gamma_2 * block.mlp(block.norm2(x)))


@fpn_norms.register
def _(vit: Eva, stages: tuple[int, ...], trainable: bool) -> FPNNorms:
    return PyramidNorms(vit, stages, trainable)
