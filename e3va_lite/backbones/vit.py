"""Plain Vision Transformers (Dosovitskiy et al. 2021), DINOv2 (Oquab et al. 2024) among them: backbones of one stage.

All blocks work on one map, so nothing is reduced, and the four sizes that a dense task needs come from the simple
pyramid of ViTDet (Li et al. 2022). The prefix tokens (class, registers) have no place in the map but take part in the
attention; they are stored as extra rows above the map, and removed after the last block.
"""

import re
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from ..errors import InputError
from .base import FPNNorms, embed, f_p1, f_p2, fpn_norms
from .hub import from_timm
from .weights import load_weights

PLAIN = re.compile(r"vit_(tiny|small|base|large|huge|giant)_patch\d+_(224|384|dinov2|reg4_dinov2)")


def vit_names() -> list[str]:
    """timm's plain ViTs: the original ones, and DINOv2's."""
    return [name for name in timm.list_models("vit_*") if PLAIN.fullmatch(name)]


def create_vit(
    name: str, pretrained: bool = False, weights: str | Path | None = None, drop_path_rate: float = 0.0
) -> VisionTransformer:
    """timm's ViT of that name, as a backbone for images of any size, without classifier and final norm.

    Args:
        name: One of :func:`vit_names`, with or without a pretraining tag.
        pretrained: Load weights from timm's hub.
        weights: A local file of weights in timm's naming instead.
        drop_path_rate: Stochastic depth of the last block; acts in train mode only.

    Raises:
        InputError: For weights that do not fit, or a hub that cannot be reached.
    """
    options = {"dynamic_img_size": True, "drop_path_rate": drop_path_rate, "num_classes": 0}
    return as_timm_stages(from_timm(name, pretrained and weights is None, options), weights)


class OneStage(nn.Module):
    """All blocks of a plain ViT as one stage, as :mod:`e3va_lite.backbones.base` asks for."""

    def __init__(self, blocks: nn.Module) -> None:
        super().__init__()
        self.downsample, self.blocks = nn.Identity(), nn.ModuleList(blocks)


def as_timm_stages(vit: nn.Module, weights: str | Path | None = None) -> nn.Module:
    """A plain ViT of timm with its blocks under ``layers``; changed in place.

    Args:
        weights: A local file to be loaded first.
    """
    vit.norm = vit.fc_norm = vit.head = nn.Identity()  # necks have norms of their own
    if weights is not None:
        load_weights(vit, weights)
    vit.layers = nn.ModuleList([OneStage(vit.blocks)])
    del vit.blocks
    for block in vit.layers[0].blocks:
        block.dim, block.prefix = vit.embed_dim, vit.num_prefix_tokens
    return vit


def patches(vit: nn.Module, images: Tensor) -> Tensor:
    """(B, 3, H, W) -> (B, ceil(H/p), ceil(W/p), C): the patches without positions.

    Raises:
        InputError: For a tensor that is not (B, 3, H, W).
    """
    if images.ndim != 4 or images.shape[1] != 3:
        raise InputError(f"images must be a float tensor of shape (B, 3, H, W), got {tuple(images.shape)}.")
    height, width = vit.patch_embed.patch_size
    return vit.patch_embed(F.pad(images, (0, -images.shape[3] % width, 0, -images.shape[2] % height)))


def to_map(tokens: Tensor, prefix: int, width: int) -> Tensor:
    """(B, prefix + H * W, C) -> (B, rows + H, W, C), the prefix tokens in rows of their own, padded with zeros."""
    first, rest = tokens[:, :prefix], tokens[:, prefix:]
    return torch.cat([F.pad(first, (0, 0, 0, -prefix % width)), rest], dim=1).unflatten(1, (-1, width))


def rows_of(prefix: int, width: int) -> int:
    """The number of rows that the prefix tokens fill."""
    return -(-prefix // width)


def to_tokens(x: Tensor, prefix: int) -> Tensor:
    """The inverse of :func:`to_map`."""
    rows = rows_of(prefix, x.shape[2])
    return torch.cat([x[:, :rows].flatten(1, 2)[:, :prefix], x[:, rows:].flatten(1, 2)], dim=1)


@embed.register
def _(vit: VisionTransformer, images: Tensor) -> Tensor:
    x = patches(vit, images)
    return to_map(vit.norm_pre(vit._pos_embed(x)), vit.num_prefix_tokens, x.shape[2])


@f_p1.register
def _(block: Block, x: Tensor) -> Tensor:
    attended = block.ls1(block.attn(block.norm1(to_tokens(x, block.prefix))))
    return to_map(block.drop_path1(attended), block.prefix, x.shape[2])


@f_p2.register
def _(block: Block, x: Tensor) -> Tensor:
    return block.drop_path2(block.ls2(block.mlp(block.norm2(x))))


@fpn_norms.register
def _(vit: VisionTransformer, stages: tuple[int, ...], trainable: bool) -> FPNNorms:
    return PyramidNorms(vit, stages, trainable)


class PyramidNorms(FPNNorms):
    """The norm after the only stage, and ViTDet's simple pyramid: maps of 4, 2, 1 and 1/2 times the backbone's size.

    The pyramid belongs to the neck and is trained in every method.
    """

    def __init__(self, vit: nn.Module, stages: tuple[int, ...], trainable: bool) -> None:
        super().__init__(vit, (1,), trainable)
        (dim,) = self.out_channels
        levels = [_level(stage, dim) for stage in stages]
        self.pyramid = nn.ModuleList(level for level, _ in levels)
        self.out_channels = [channels for _, channels in levels]
        patch = vit.patch_embed.patch_size[0]
        self.strides = [patch * 2 ** (stage - 3) for stage in stages]
        self.divisor = patch
        self.prefix = vit.num_prefix_tokens

    def finish(self, maps: list[Tensor], images: Tensor) -> list[Tensor]:
        """The map and its extra rows, (B, C, rows + H, W) -> a list of (B, C_i, ceil(H/s_i), ceil(W/s_i))."""
        (x,) = maps
        x = x[:, :, rows_of(self.prefix, x.shape[3]) :]
        sizes = [[int(-(-side // stride)) for side in images.shape[-2:]] for stride in self.strides]
        return [level(x)[:, :, :h, :w].contiguous() for level, (h, w) in zip(self.pyramid, sizes, strict=True)]


def _level(stage: int, dim: int) -> tuple[nn.Module, int]:
    """The map of stage 1, 2, 3 or 4 from one of ``dim`` channels, and its own channels."""
    twice = nn.ConvTranspose2d(dim, dim // 2, 2, stride=2)
    if stage == 1:
        again = nn.ConvTranspose2d(dim // 2, dim // 4, 2, stride=2)
        return nn.Sequential(twice, LayerNorm2d(dim // 2), nn.GELU(), again), dim // 4
    if stage == 2:
        return twice, dim // 2
    return (nn.Identity() if stage == 3 else nn.MaxPool2d(2, ceil_mode=True)), dim
