"""The frozen stream ``l`` of equation (7), run as fast as it can be when nobody asks it for a gradient.

The modules and the order of operations are those of the trunk. But without a graph a map need not pass as a whole
through one operator after the other: here a few windows, or a few rows of tokens, go all the way while they are in the
processor's cache. A block's large intermediate results (four times its map) never exist, and in a Swin padding, shift
and windows are one index instead of four copies.
"""

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import torch
from timm.models.swin_transformer import SwinTransformerBlock
from torch import Tensor, nn

from ..backbones.base import f_p1, f_p2

#: Tokens that go through a block together: what a CPU's cache holds; enough to keep a GPU busy.
ROWS = {"cpu": 4096, "gpu": 65536}

#: A block's number in its stage, some of the B * H * W tokens, and their taps f_P1 and f_P2, (tokens, C) each.
Taps = Iterator[tuple[int, slice, tuple[Tensor, Tensor]]]


def run(stage: nn.Module, l: Tensor) -> Taps:  # noqa: E741, the paper's letter
    """Equation (7) for all blocks of a stage behind its reduction, yielding the taps as they come into being.

    Call it without gradients.

    Args:
        l: ``l_in``, (B, H, W, C), contiguous; overwritten, ``l_out`` in the end.
    """
    tokens = l.view(-1, l.shape[-1])  # (T, C)
    shifts = {block.shift_size: block.window_size for block in stage.blocks if isinstance(block, SwinTransformerBlock)}
    windows = {shift: _windows(l.shape, window, shift, l.device) for shift, window in shifts.items()}
    for number, block in enumerate(stage.blocks):
        attended = _attend(block, tokens, windows[block.shift_size]) if windows else f_p1(block, l).flatten(0, 2)
        for rows in slices(tokens):
            f1 = attended[rows]
            middle = tokens[rows] + f1
            f2 = block.mlp(block.norm2(middle)) if windows else f_p2(block, middle)
            torch.add(middle, f2, out=tokens[rows])
            yield number, rows, (f1, f2)


def slices(tokens: Tensor) -> list[slice]:
    """Rows of a (T, ...) tensor, as many at a time as go through a block together."""
    size = _rows(tokens.device)
    return [slice(start, start + size) for start in range(0, len(tokens), size)]


def tap_dtype(l: Tensor) -> torch.dtype:  # noqa: E741
    """What a block computes with: autocast's type inside autocast, else the stream's own."""
    kind = l.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return l.dtype


def _rows(device: torch.device) -> int:
    return ROWS["cpu" if device.type == "cpu" else "gpu"]


def _attend(block: SwinTransformerBlock, l: Tensor, windows: list[tuple]) -> Tensor:  # noqa: E741
    """The tap ``f_P1`` of a Swin block, (T, C) -> (T, C)."""
    attention, heads = block.attn, block.attn.num_heads
    bias = attention._get_rel_pos_bias()  # (1, heads, tokens, tokens)
    f1 = l.new_empty(len(l) + 1, l.shape[1], dtype=tap_dtype(l))  # the last row takes what comes out of the padding
    for rows, padding, mask in windows:
        x = block.norm1(l.index_select(0, rows if padding is None else rows.clamp(max=len(l) - 1)))
        if padding is not None:
            x = x.masked_fill(padding, 0.0)  # behind the norm: padding has keys and values of its own
        qkv = attention.qkv(x).view(-1, bias.shape[-1], 3, heads, x.shape[-1] // heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (windows, heads, tokens, C / heads) each
        weights = (q * attention.scale) @ k.transpose(-2, -1)  # (windows, heads, tokens, tokens)
        weights += bias if mask is None else bias + mask
        x = (weights.softmax(dim=-1) @ v).transpose(1, 2).reshape(len(rows), -1)
        f1.index_copy_(0, rows, attention.proj(x))
    return f1[:-1]


def _windows(shape: torch.Size, window: tuple[int, int], shift: tuple[int, int], device: torch.device) -> list[tuple]:
    arrays = _places(*shape[:3], *window, *shift, _rows(device))
    return [tuple(None if x is None else torch.from_numpy(x).to(device) for x in some) for some in arrays]


@lru_cache(maxsize=64)
def _places(batch: int, height: int, width: int, wh: int, ww: int, sh: int, sw: int, size: int) -> list[tuple]:
    """The windows of a batch of maps in the official order (pad, then roll), about ``size`` tokens at a time.

    A roll leaves four kinds of windows: whole ones, those with a seam across, down, or both. Kinds are kept apart, so
    that what may not attend to what is one matrix.

    Returns:
        Per group of windows: the places of its tokens in the B * H * W of the map, padding having the place behind the
        last one; what of it is padding, (tokens, 1), or None; 0 or -10,000 for two tokens of a window that have no seam
        or a seam between them, or None for windows without a seam.
    """
    h, w = height + -height % wh, width + -width % ww
    y, x = np.roll(np.arange(h), -sh)[:, None], np.roll(np.arange(w), -sw)
    behind_seam = 2 * (np.arange(h) >= h - sh)[:, None] + (np.arange(w) >= w - sw)

    def cut(values: np.ndarray) -> np.ndarray:
        """(h, w) -> (windows, tokens)"""
        return values.reshape(h // wh, wh, w // ww, ww).transpose(0, 2, 1, 3).reshape(-1, wh * ww)

    places = cut(np.where((y < height) & (x < width), y * width + x, -1))
    kinds, kind = np.unique(cut(behind_seam), axis=0, return_inverse=True)
    groups = []
    for number, seam in enumerate(kinds):
        mask = np.where(seam[:, None] == seam, np.float32(0), np.float32(-10_000)) if np.ptp(seam) else None
        rows = [np.where(places < 0, batch * height * width, places + i * height * width) for i in range(batch)]
        rows = np.concatenate([image[kind.ravel() == number] for image in rows])
        for some in np.array_split(rows, min(-(-rows.size // size), len(rows))):
            padding = some.reshape(-1, 1) == batch * height * width
            groups.append((some.ravel(), padding if padding.any() else None, mask))
    return groups
