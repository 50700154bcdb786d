"""The Swin Transformer: stages, blocks and the two taps of every block.

The modules and their weights are timm's; the order of operations is the official dense-prediction one ("Swin
Transformer", Liu et al. 2021, detection and segmentation code), which pads a map to whole windows *before* it rolls it.
timm rolls first. At 224x224 nothing is padded in the first stages and the two agree; at 256x320 they do not, and
weights that were trained with one order see shifted windows cut in other places with the other.

Maps in this file are NHWC, as everywhere inside Swin.
"""

import re
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from timm.models.swin_transformer import SwinTransformer, SwinTransformerBlock, window_partition, window_reverse
from torch import Tensor, nn

from ..errors import InputError, unknown
from .base import embed, f_p1, f_p2
from .hub import from_timm
from .weights import load_weights

MIN_SIZE = 32  # pixels; below, the last stage has less than one token

#: A Swin in miniature with 3.5 M parameters, and a deeper one that computes half as much again.
NANO = {"embed_dim": 40, "depths": (2, 2, 2, 2), "num_heads": (1, 2, 4, 8), "window_size": 7, "weight_init": "jax"}
MINIATURES = {"swin_nano": NANO, "swin_nano_deep": NANO | {"depths": (2, 6, 2, 2)}}
PRETRAINED = Path(__file__).parent / "pretrained"  # their weights, each NAME.safetensors with a model card


def swin_names() -> list[str]:
    """Every Swin that :func:`create_swin` can build: timm's and the miniatures."""
    return [*MINIATURES, *timm.list_models("swin_*", exclude_filters="*cr*")]


def create_swin(
    name: str, pretrained: bool = False, weights: str | Path | None = None, drop_path_rate: float = 0.0
) -> SwinTransformer:
    """timm's Swin of that name, for images of any size, without classifier and final norm.

    Args:
        name: One of :func:`swin_names`, for timm's with or without a pretraining tag
            (``swin_base_patch4_window7_224`` or ``swin_base_patch4_window7_224.ms_in22k``).
        pretrained: Load weights: from timm's hub, ImageNet-22K where a name without a tag has them; for miniatures from
            the package.
        weights: A local ``.safetensors`` or ``.pth`` file instead: :func:`e3va_lite.backbones.weights.load_weights`.
        drop_path_rate: Stochastic depth of the last block; acts in train mode only.

    Raises:
        InputError: For an unknown name, weights that do not fit, or a hub that cannot be reached.
    """
    architecture = name.split(".")[0]
    if architecture not in swin_names():
        raise unknown("backbone", name, swin_names())
    # always_partition keeps the shift in stages that fit into a single window; dynamic size computes masks per input.
    options = {"strict_img_size": False, "always_partition": True, "drop_path_rate": drop_path_rate, "num_classes": 0}
    if architecture in MINIATURES:
        swin = SwinTransformer(**MINIATURES[architecture], **options)
        weights = weights or (PRETRAINED / f"{architecture}.safetensors" if pretrained else None)
    else:
        swin = from_timm(name, pretrained and weights is None, options)
    swin.norm, swin.head = nn.Identity(), nn.Identity()  # detectors have one norm per stage instead
    if weights is not None:
        load_weights(swin, weights)
    return swin


def image_size(text: str) -> tuple[int, int]:
    """``"224x320"`` -> (224, 320), height first.

    Raises:
        InputError: For any other form, or a side below Swin's 32 pixels.
    """
    match = re.fullmatch(r"([0-9]{1,5})x([0-9]{1,5})", text)
    if not match or min(map(int, match.groups())) < MIN_SIZE:
        raise InputError(f"size '{text}' cannot be taken: write HEIGHTxWIDTH, both {MIN_SIZE} pixels or more.")
    return int(match[1]), int(match[2])


@embed.register
def _(swin: SwinTransformer, images: Tensor) -> Tensor:
    return embed_patches(swin, images)


def embed_patches(swin: nn.Module, images: Tensor) -> Tensor:
    """Images to patches, (B, 3, H, W) -> (B, ceil(H/4), ceil(W/4), C).

    Raises:
        InputError: For a side below 32 pixels or a tensor that is not (B, 3, H, W).
    """
    if images.ndim != 4 or images.shape[1] != 3:
        raise InputError(f"images must be a float tensor of shape (B, 3, H, W), got {tuple(images.shape)}.")
    height, width = images.shape[-2:]
    if min(height, width) < MIN_SIZE:
        raise InputError(
            f"an image of {height}x{width} is too small for Swin: resize both sides to {MIN_SIZE} or more."
        )
    patch_h, patch_w = swin.patch_embed.patch_size
    return swin.patch_embed(F.pad(images, (0, -width % patch_w, 0, -height % patch_h)))


@f_p1.register
def _(block: SwinTransformerBlock, x: Tensor) -> Tensor:
    """(S)W-MSA(LN1(x))"""
    return block.drop_path1(in_windows(block, block.norm1(x)))


@f_p2.register
def _(block: SwinTransformerBlock, x: Tensor) -> Tensor:
    """MLP(LN2(x))"""
    return block.drop_path2(block.mlp(block.norm2(x)))


class RollsFirst(SwinTransformerBlock):
    """A block in timm's own order of operations, roll and then pad, for models that were built and used as timm's."""


@f_p1.register
def _(block: RollsFirst, x: Tensor) -> Tensor:
    return block.drop_path1(block._attn(block.norm1(x)))


def in_windows(block: nn.Module, x: Tensor) -> Tensor:
    """A block's attention in its shifted windows, (B, H, W, C) -> (B, H, W, C).

    Official order: pad to whole windows, roll, attend, roll back, crop.
    """
    _, height, width, _ = x.shape
    window, shift = block.window_size, block.shift_size
    x = F.pad(x, (0, 0, 0, -width % window[1], 0, -height % window[0]))  # (B, H', W', C)
    if any(shift):
        x = torch.roll(x, (-shift[0], -shift[1]), dims=(1, 2))
    windows = window_partition(x, window).flatten(1, 2)  # (B * windows, tokens per window, C)
    windows = block.attn(windows, mask=_window_mask(block, x)).unflatten(1, window)
    x = window_reverse(windows, window, *x.shape[1:3])  # (B, H', W', C)
    if any(shift):
        x = torch.roll(x, shift, dims=(1, 2))
    return x[:, :height, :width]


def _window_mask(block: nn.Module, x: Tensor) -> Tensor | None:
    """The attention mask after the roll: (windows, tokens, tokens) of 0 and -10,000, or None without a shift.

    The official mask is -100, whose softmax is not zero but a denormal number, which CPUs multiply slowly; with
    -10,000 it is zero, and the maps are the same.
    """
    mask = block.get_attn_mask(x)
    return None if mask is None else 100 * mask


def merge(x: Tensor) -> Tensor:
    """Concatenate the channels of 2x2 neighbours, (B, H, W, C) -> (B, ceil(H/2), ceil(W/2), 4 C)."""
    x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
    return x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2)).permute(0, 1, 3, 4, 2, 5).flatten(3)
