"""Block-wise quantisation to 8 bits: how ``memory="compress"`` saves the taps.

Up to 64 neighbouring channels of a token share one scale, so that a single large value reduces the precision of its
block only. A saved tap is read to compute gradients of adapters and for nothing else: the forward pass sees exact
values, and rounding errors do not accumulate over the layers.
"""

import torch
from torch import Tensor

BLOCK = 64  # channels that share a scale at most


def block_of(channels: int) -> int:
    """The largest divisor of the number of channels that is not above ``BLOCK``."""
    return max(size for size in range(1, BLOCK + 1) if channels % size == 0)


def pack(x: Tensor) -> tuple[Tensor, Tensor]:
    """(..., C) -> codes (..., C) in int8 and scales (..., C / block) in bfloat16: x is about code times scale."""
    blocks = x.unflatten(-1, (-1, block_of(x.shape[-1])))
    scales = (blocks.abs().amax(dim=-1) * (1.01 / 127)).bfloat16()  # not below the largest value when rounded
    per_scale = scales.float().clamp(min=torch.finfo(torch.bfloat16).tiny).reciprocal()
    return (blocks * per_scale[..., None]).round_().to(torch.int8).flatten(-2), scales


def unpack(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse of :func:`pack`, up to rounding: at most half a scale."""
    blocks = codes.to(dtype).unflatten(-1, (scales.shape[-1], -1))
    return blocks.mul_(scales.to(dtype)[..., None]).flatten(-2)
