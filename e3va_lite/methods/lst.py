"""Ladder side-tuning (LST; Sung, Cho and Bansal, NeurIPS 2022): a narrow network beside the frozen one.

The side network has as many blocks as the backbone, each 1/r as wide. The input of every block is a rung of the ladder:
the backbone's map after the same block, projected to the side's width, and a learnt gate between the two,

    s[i+1] = block_i(mu_i down_i(l[i+1]) + (1 - mu_i) s[i]),    mu_i = sigmoid(a_i / T),    T = 0.1.

No gradient enters the backbone, since the loss depends on it through frozen values only. But the gradient's path
through the side network is as long as the backbone's: the side is narrower, not shorter, and its blocks save
activations of their own.

The paper works on text; for dense tasks we read it as follows. Side blocks of a Swin are Swin blocks of less
width with the backbone's heads, windows and shifts, those of a plain ViT are plain ones. Between stages the side merges
2x2 tokens itself. The side starts from the backbone's embedding, projected down. The neck receives the backbone's map
plus the side's, projected up by a layer that is zero at the start, so that a new ladder is the frozen model. Side
blocks are initialised at random; the paper also initialises them from pruned copies of the backbone's.
"""

import torch
from timm.models.swin_transformer import PatchMerging, SwinTransformerBlock
from timm.models.swin_transformer_v2 import SwinTransformerV2Block
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from ..backbones.base import SideNetwork, embed, f_p1, f_p2, stage_dims
from ..errors import InputError

TEMPERATURE = 0.1


class Rung(nn.Module):
    """The input of a side block: ``mu down(l) + (1 - mu) s``."""

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.down = nn.Linear(dim, width)
        self.a = nn.Parameter(torch.zeros(()))  # mu = 1/2

    def forward(self, l: Tensor, s: Tensor) -> Tensor:
        """(B, H, W, C) and (B, H, W, C / r) -> (B, H, W, C / r)"""
        mu = torch.sigmoid(self.a / TEMPERATURE)
        return mu * self.down(l) + (1 - mu) * s


class LST(SideNetwork):
    """A frozen backbone and the ladder beside it.

    Args:
        backbone: The pretrained backbone; it is frozen here.
        stages: The stages (from 1) whose maps the task consumes.
        narrower: r; the side's width is 1/r of the backbone's.
        fpn_norm_trainable: Whether the norms before the neck are trained.

    Raises:
        InputError: For an r that does not divide the width of every attention head.
    """

    def __init__(self, backbone: nn.Module, stages: tuple[int, ...], narrower: int, fpn_norm_trainable: bool) -> None:
        super().__init__(backbone, stages, fpn_norm_trainable)
        layers = backbone.layers[: self.last_stage]
        for block in (stage.blocks[0] for stage in layers):
            head = block.dim // block.attn.num_heads
            if narrower < 1 or head % narrower:
                raise InputError(f"narrower={narrower} does not divide the {head} channels of an attention head.")
        dims = stage_dims(backbone)[: self.last_stage]
        widths = [dim // narrower for dim in dims]
        self.start = nn.Linear(dims[0], widths[0])
        self.reductions = nn.ModuleList(
            nn.Identity() if isinstance(layer.downsample, nn.Identity) else PatchMerging(widths[i - 1], widths[i])
            for i, layer in enumerate(layers)
        )
        per_stage = list(zip(layers, dims, widths, strict=True))
        self.rungs = nn.ModuleList(nn.ModuleList(Rung(dim, w) for _ in stage.blocks) for stage, dim, w in per_stage)
        self.blocks = nn.ModuleList(nn.ModuleList(_small(b, w) for b in stage.blocks) for stage, _, w in per_stage)
        self.up = nn.ModuleDict({str(i): nn.Linear(widths[i - 1], dims[i - 1]) for i in self.norms.stages})
        for up in self.up.values():
            nn.init.zeros_(up.weight)
            nn.init.zeros_(up.bias)

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) -> one map (B, C_i, ceil(H/s_i), ceil(W/s_i)) per consumed stage."""
        with torch.no_grad():
            l = embed(self.backbone, images)  # l[0], (B, H, W, C)
        s = self.start(l)  # (B, H, W, C / r)
        maps = {}
        for index, (stage, rungs, blocks) in enumerate(
            zip(self.backbone.layers, self.rungs, self.blocks, strict=False)
        ):
            s = self.reductions[index](s)
            with torch.no_grad():
                l = stage.downsample(l)
            for block, rung, small in zip(stage.blocks, rungs, blocks, strict=True):
                with torch.no_grad():
                    l = l + f_p1(block, l)
                    l = l + f_p2(block, l)
                s = rung(l, s)
                s = s + f_p1(small, s)
                s = s + f_p2(small, s)
            if str(index + 1) in self.up:
                maps[index + 1] = l + self.up[str(index + 1)](s)
        return self.norms.finish(self.norms(maps), images)


def _small(block: nn.Module, width: int) -> nn.Module:
    """A new block like this one, of another width."""
    heads = block.attn.num_heads
    if isinstance(block, SwinTransformerBlock | SwinTransformerV2Block):
        windows = {"window_size": block.window_size, "shift_size": block.shift_size}
        return SwinTransformerBlock(
            width, block.window_size, heads, **windows, always_partition=True, dynamic_mask=True
        )
    small = Block(width, heads, qkv_bias=True)
    small.prefix = block.prefix
    return small
