"""The frozen stream ``l`` of equation (7), run as fast as possible where no gradient is needed.

The modules and the order of operations are the backbone's. But without an autograd graph a map need not pass one
operator as a whole before the next one begins: here a few windows, or a few rows of tokens, pass all operators while
they are in the processor's cache. A block's large intermediate results (four times its map) never exist, and in a Swin
padding, shift and windows are one index instead of four copies.
"""

from collections.abc import Iterator
from functools import lru_cache
from itertools import product

import numpy as np
import torch
from timm.models.swin_transformer import SwinTransformerBlock
from torch import Tensor, nn

from ..backbones.base import f_p1, f_p2
from ..backbones.swin import RollsFirst
from ..transfer import send

#: Tokens that pass a block together: few enough for a CPU's cache, many enough to keep a GPU busy.
ROWS = {"cpu": 4096, "gpu": 65536}

#: Index of a block in its stage, a slice of the B * H * W tokens, and their taps f_P1 and f_P2, (tokens, C) each.
Taps = Iterator[tuple[int, slice, tuple[Tensor, Tensor]]]


def run(stage: nn.Module, l: Tensor) -> Taps:
    """Equation (7) for all blocks of a stage after its reduction, yielding the taps as they are computed.

    Call it without gradients. The blocks themselves are never called, and of a :class:`SwinTransformerBlock` neither is
    the module ``attn``; ``norm2`` and ``mlp`` are called once per slice of tokens. Forward hooks on these modules
    therefore do not fire, or fire on parts of the map.

    Args:
        l: ``l_in``, (B, H, W, C), contiguous; overwritten, and ``l_out`` at the end.
    """
    tokens = l.view(-1, l.shape[-1])  # (T, C)
    shifts = {block.shift_size: block.window_size for block in stage.blocks if isinstance(block, SwinTransformerBlock)}
    timms_order = isinstance(stage.blocks[0], RollsFirst)
    windows = {shift: _windows(l.shape, window, shift, timms_order, l.device) for shift, window in shifts.items()}
    for number, block in enumerate(stage.blocks):
        attended = _attend(block, tokens, windows[block.shift_size]) if windows else f_p1(block, l).flatten(0, 2)
        for rows in slices(tokens):
            f1 = attended[rows]
            middle = tokens[rows] + f1
            f2 = block.mlp(block.norm2(middle)) if windows else f_p2(block, middle)
            torch.add(middle, f2, out=tokens[rows])
            yield number, rows, (f1, f2)


def slices(tokens: Tensor) -> list[slice]:
    """Slices over the rows of a (T, ...) tensor, as many rows each as pass a block together."""
    size = rows_per_slice(tokens.device)
    return [slice(start, start + size) for start in range(0, len(tokens), size)]


def tap_dtype(l: Tensor) -> torch.dtype:
    """The type that a block computes in: autocast's inside autocast, else the stream's own."""
    kind = l.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return l.dtype


def rows_per_slice(device: torch.device) -> int:
    """How many tokens pass a block together there."""
    return ROWS["cpu" if device.type == "cpu" else "gpu"]


def _attend(block: SwinTransformerBlock, l: Tensor, windows: list[tuple]) -> Tensor:
    """The tap ``f_P1`` of a Swin block, (T, C) -> (T, C)."""
    attention, heads = block.attn, block.attn.num_heads
    bias = attention._get_rel_pos_bias()  # (1, heads, tokens, tokens)
    f1 = l.new_empty(len(l) + 1, l.shape[1], dtype=tap_dtype(l))  # the last row receives the output of padding
    for rows, padding, mask in windows:
        x = block.norm1(l.index_select(0, rows if padding is None else rows.clamp(max=len(l) - 1)))
        if padding is not None:
            x = x.masked_fill(padding, 0.0)  # after the norm: the official order has zeros there
        qkv = attention.qkv(x).view(-1, bias.shape[-1], 3, heads, x.shape[-1] // heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (windows, heads, tokens, C / heads) each
        weights = (q * attention.scale) @ k.transpose(-2, -1)  # (windows, heads, tokens, tokens)
        weights += bias if mask is None else bias + mask
        x = (weights.softmax(dim=-1) @ v).transpose(1, 2).reshape(len(rows), -1)
        f1.index_copy_(0, rows, attention.proj(x))
    return f1[:-1]


def _windows(
    shape: torch.Size, window: tuple[int, int], shift: tuple[int, int], timms_order: bool, device: torch.device
) -> list[tuple]:
    key = (*shape[:3], *window, *shift, timms_order, rows_per_slice(device))
    if device.type == "cuda":
        return _windows_on(device, *key)
    return _tensors(_window_indices(*key), device)


@lru_cache(maxsize=64)  # eight shapes of images, of a megabyte or two on the device each
@torch.inference_mode(False)  # what evaluation computes has to serve training, too
def _windows_on(device: torch.device, *key: int) -> list[tuple]:
    return _tensors(_window_indices(*key), device)


def _tensors(groups: list[tuple], device: torch.device) -> list[tuple]:
    return [tuple(None if x is None else send(torch.from_numpy(x), device) for x in some) for some in groups]


@lru_cache(maxsize=256)  # Pascal VOC has some thirty shapes of batches
def _window_indices(
    batch: int, height: int, width: int, wh: int, ww: int, sh: int, sw: int, timms_order: bool, size: int
) -> list[tuple]:
    """Indices of the windows of a batch of maps in the official order (pad, then roll) or in timm's (roll, then pad).

    Windows come in groups of about ``size`` tokens.

    A roll leaves four kinds of windows: whole ones, and those with a seam across, down, or both. Each group holds one
    kind, so that one matrix masks all of its windows.

    Returns:
        Per group of windows: the indices of its tokens in the B * H * W of the map, where padding has the index
        B * H * W; which of them are padding, (tokens, 1), or None; and 0 or -10,000 for each pair of tokens in a window
        without or with a seam between them, or None for windows without a seam.
    """
    h, w = height + -height % wh, width + -width % ww
    if timms_order:
        y = np.pad(np.roll(np.arange(height), -sh), (0, h - height), constant_values=height)
        x = np.pad(np.roll(np.arange(width), -sw), (0, w - width), constant_values=width)
    else:
        y, x = np.roll(np.arange(h), -sh), np.roll(np.arange(w), -sw)
    y, x = y.reshape(-1, 1, wh, 1), x.reshape(1, -1, 1, ww)  # windows down and across, tokens down and across
    indices = np.where((y < height) & (x < width), y * width + x, -1)
    # A seam across runs through the last row of windows, a seam down through the last column.
    rows_of = {False: slice(0, h // wh - (sh > 0)), True: slice(h // wh - 1, h // wh if sh else 0)}
    columns_of = {False: slice(0, w // ww - (sw > 0)), True: slice(w // ww - 1, w // ww if sw else 0)}
    past = (np.arange(wh) >= wh - sh)[:, None], np.arange(ww) >= ww - sw
    groups = []
    for down, across in product((False, True), repeat=2):
        kind = indices[rows_of[across], columns_of[down]].reshape(-1, wh * ww)
        if not len(kind):
            continue
        seam = (2 * (past[0] & across) + (past[1] & down)).ravel()
        mask = np.where(seam[:, None] == seam, np.float32(0), np.float32(-10_000)) if across or down else None
        rows = [np.where(kind < 0, batch * height * width, kind + i * height * width) for i in range(batch)]
        rows = np.concatenate(rows)
        for some in np.array_split(rows, min(-(-rows.size // size), len(rows))):
            padding = some.reshape(-1, 1) == batch * height * width
            groups.append((some.ravel(), padding if padding.any() else None, mask))
    return groups
