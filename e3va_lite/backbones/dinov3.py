"""DINOv3's ViTs (Simeoni et al. 2025): plain ones with rotary position embeddings (RoPE) in the attention."""

from collections.abc import Callable
from pathlib import Path

import timm
import torch
from timm.models.eva import Eva, EvaBlock
from torch import Tensor

from .base import FPNNorms, embed, f_p1, f_p2, fpn_norms
from .hub import from_timm
from .vit import PyramidNorms, as_timm_stages, patches, rows_of, to_map, to_tokens

GRIDS = 16  # whose positions are kept, of a megabyte or two each


def dinov3_names() -> list[str]:
    """Every ViT of DINOv3 in timm."""
    return timm.list_models("vit_*_dinov3*")


def create_dinov3(
    name: str, pretrained: bool = False, weights: str | Path | None = None, drop_path_rate: float = 0.0
) -> Eva:
    """As :func:`e3va_lite.backbones.vit.create_vit`, for one of :func:`dinov3_names`."""
    options = {"drop_path_rate": drop_path_rate, "num_classes": 0}
    vit = as_timm_stages(from_timm(name, pretrained and weights is None, options), weights)
    vit.rope.get_embed = _Positions(vit.rope.get_embed)  # embed asks for them, too
    for block in vit.layers[0].blocks:
        block.rope = vit.rope.get_embed  # for a grid of patches; shared by all blocks
        block.attn.qkv_bias_separate = True  # equal, and calls the module qkv, which LoRA hooks
    return vit


class _Positions:
    """The position embeddings of a grid of patches (H, W). On CUDA the last few grids' are kept.

    timm makes a grid on the CPU, and every block would wait for its copy.
    """

    def __init__(self, make: Callable[..., Tensor]) -> None:
        self.make = make
        self.kept: dict[tuple, Tensor] = {}

    def __call__(self, shape: tuple[int, int]) -> Tensor:
        device = self.make.__self__.periods.device
        if device.type != "cuda":
            return self.make(shape=shape)
        if (key := (device, *shape)) not in self.kept:
            if len(self.kept) == GRIDS:
                del self.kept[next(iter(self.kept))]
            with torch.inference_mode(False), torch.no_grad():  # what evaluation computes serves training, too
                self.kept[key] = self.make(shape=shape)
        return self.kept[key]


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
