"""The parallel highway in fused form: what :mod:`e3va_lite.highway` computes, at the cost of a frozen backbone.

Let ``h_1 ... h_K`` be the taps of a stage, two per block, and ``A_k(h) = h + S_k z_k + b_k`` its adapters, where
``S_k`` is the outer factor of the up-projection and ``z_k`` the bottleneck that it is applied to. Equation (8), summed
over the stage, is

    e_out = l_out + (e_in - l_in) + [S_1 ... S_K] [z_1; ...; z_K] + b_1 + ... + b_K

because by equation (7) the taps themselves sum to ``l_out - l_in``. So all up-projections of a stage are one matrix
product. In the backward pass all adapters of the stage receive the same gradient ``g = dL/de_out``, which is known
before any tap is needed. A tap is needed once, to recompute its ``z_k``, and may come from anywhere. The memory mode
decides what is saved between the two passes:

    store        the taps, as they are
    compress     the taps and the highway's own maps, in 8 bits (:mod:`e3va_lite.fused.int8`)
    recompute    the highway's own maps only; the frozen stream is run a second time

Autograd sees one node for the whole highway; its backward pass is written here, and that of an adapter's inside beside
it, in :mod:`e3va_lite.adapters`. Reductions and norms are left to autograd, on small graphs of their own.

Within the backbone some modules are not called as a whole, see :func:`e3va_lite.fused.frozen_stream.run`: forward hooks
on them do not fire. Where hooks are needed, use ``memory="reference"``.
"""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import accumulate, islice, pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.models.swin_transformer import PatchMerging
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..backbones.base import embed, to_nchw
from ..backbones.swin import merge
from . import frozen_stream
from .int8 import pack, unpack

Gradients = dict[nn.Parameter, Tensor]
Parts = tuple[Tensor, ...]
#: Adapters of a stage, as a slice; a slice of its T tokens; and the taps of these adapters there, (K, tokens, C).
Groups = Iterator[tuple[slice, slice, Tensor]]


@dataclass(frozen=True)
class MemoryMode:
    """What is saved between the forward and the backward pass.

    Attributes:
        taps: Whether the taps are saved; otherwise the frozen stream is run again.
        packed: Whether taps and the highway's own maps are saved in 8 bits.
    """

    taps: bool
    packed: bool

    def pack(self, x: Tensor) -> Parts:
        return pack(x) if self.packed else (x,)

    def unpack(self, parts: Parts, dtype: torch.dtype) -> Tensor:
        return unpack(*parts, dtype) if self.packed else parts[0]


MEMORY_MODES = {
    "store": MemoryMode(taps=True, packed=False),
    "compress": MemoryMode(taps=True, packed=True),
    "recompute": MemoryMode(taps=False, packed=False),
}


class Saved(NamedTuple):
    """What the backward pass needs.

    Attributes:
        images: (B, 3, H, W)
        e: Per stage, its output ``e``, the next reduction's input; None where it is recomputed.
        norm_inputs: Per stage, the input of its norm.
        taps: Per stage, for every group of its taps, in the order of :func:`_groups`, the stacked taps.
    """

    images: Tensor
    e: list[Parts | None]
    norm_inputs: list[Parts | None]
    taps: list[list[Parts]]


def run(highway: nn.Module, images: Tensor) -> list[Tensor]:
    """The maps for the neck of a parallel :class:`e3va_lite.highway.E3VA` in one of the ``MEMORY_MODES``."""
    trained = _own(highway)
    if trained and torch.is_grad_enabled():
        maps = list(_Highway.apply(highway, images, *trained))
    else:
        with torch.no_grad():
            maps = _forward(highway, images)[0]
    return highway.norms.finish(maps, images)


def _own(highway: nn.Module) -> list[nn.Parameter]:
    """The trained parameters of the highway, and nothing of the backbone."""
    norms = [norm for i in range(highway.last_stage) if (norm := highway.norm(i)) is not None]
    others = [*norms, *([] if highway.reductions is None else [highway.reductions])]
    adapters = [adapter for stage in highway.adapters for adapter in _flat(stage)]
    of_adapters = [p for adapter in adapters for p in (*adapter.inner, *adapter.outer) if p.requires_grad]
    return of_adapters + [p for module in others for p in _trained(module)]


class _Highway(torch.autograd.Function):
    @staticmethod
    def forward(ctx, highway: nn.Module, images: Tensor, *trained: nn.Parameter) -> tuple[Tensor, ...]:
        mode = MEMORY_MODES[highway.memory]
        maps, saved = _forward(highway, images, mode)
        leaves, ctx.layout = tree_flatten(saved)
        ctx.save_for_backward(*leaves, *trained)
        ctx.highway, ctx.mode, ctx.trained, ctx.precision = highway, mode, trained, _precision(images)
        return tuple(maps)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grad_maps: Tensor) -> tuple[Tensor | None, ...]:
        if list(map(id, ctx.trained)) != list(map(id, _own(ctx.highway))):
            raise RuntimeError("the adapters were exchanged, frozen or unfrozen between forward and backward pass")
        leaves = ctx.saved_tensors[: ctx.layout.num_leaves]  # an error if a trained parameter was changed since
        saved = tree_unflatten(leaves, ctx.layout)
        with ctx.precision:
            grads = _backward(ctx.highway, ctx.mode, saved, grad_maps)
        return None, None, *(grads.get(p) for p in ctx.trained)


def _forward(
    highway: nn.Module, images: Tensor, mode: MemoryMode | None = None, stages: int | None = None
) -> tuple[list[Tensor], Saved]:
    """The maps for the neck, and what the backward pass needs.

    Args:
        mode: Save nothing if not given.
        stages: Stop after this many.
    """
    stages = stages or highway.last_stage
    maps, saved = [], Saved(images, [], [], [])
    stream = frozen_stream.Stream(highway.backbone) if highway.cache is None or not highway.training else highway.cache
    e = l = stream.start(images)  # (B, H, W, C)
    for index, pairs in enumerate(highway.adapters[:stages]):
        e, l = highway.reduction(index)(e), stream.reduce(index, l)
        e = e - l  # the deviation e_in - l_in
        adapters = _flat(pairs)
        outer, bias, columns = _concatenate_outer(adapters)
        z = l.new_empty(l[..., 0].numel(), outer.shape[1], dtype=frozen_stream.tap_dtype(l))  # (T, all bottlenecks)
        packed = []
        for some, rows, taps in _groups(stream.run(index, l), l, adapters):
            _columns(z, rows, columns[some]).copy_(_project(adapters[some], taps))
            if mode is not None and mode.taps:
                packed.append(mode.pack(taps))
        e += F.linear(z, outer, bias).view_as(l)
        e += l
        norm_input = e if highway.fpn_input == "e" else e + l
        if (norm := highway.norm(index)) is not None:
            maps.append(to_nchw(norm(norm_input)))
        if mode is not None:
            recomputed = not mode.taps and norm is None and index + 1 < stages  # no norm needs it either
            saved.taps.append(packed)
            saved.e.append(None if recomputed else mode.pack(e))
            saved.norm_inputs.append(saved.e[-1] if norm_input is e else mode.pack(norm_input))
    return maps, saved


def _backward(highway: nn.Module, mode: MemoryMode, saved: Saved, grad_maps: tuple[Tensor, ...]) -> Gradients:
    """Gradients of all trained parameters from those of the maps."""
    grads: Gradients = {}
    grad_e = _shared_gradients(highway, mode, saved, list(grad_maps), grads)
    l = None if mode.taps else embed(highway.backbone, saved.images)
    for stage, pairs, packed in zip(highway.backbone.layers, highway.adapters, saved.taps, strict=False):
        if not mode.taps:
            l = stage.downsample(l)
        g = grad_e.pop(0).flatten(0, 2)  # (T, C), the gradient that all adapters of the stage receive
        adapters = _flat(pairs)
        outer, _, columns = _concatenate_outer(adapters)
        z, grad_z = g.new_empty(len(g), outer.shape[1]), g @ outer
        again = _unpacked(packed, mode, adapters, g) if mode.taps else _groups(frozen_stream.run(stage, l), l, adapters)
        for some, rows, taps in again:
            grad = _columns(grad_z, rows, columns[some])
            _columns(z, rows, columns[some]).copy_(_project(adapters[some], taps, grad, grads))
        grad_outer, grad_bias = z.t() @ g, g.sum(dim=0)
        for column, adapter in zip(columns, adapters, strict=True):
            weight, bias = adapter.outer
            grads[weight], grads[bias] = grad_outer[column].t(), grad_bias
    return grads


def _shared_gradients(
    highway: nn.Module, mode: MemoryMode, saved: Saved, grad_maps: list[Tensor], grads: Gradients
) -> list[Tensor]:
    """``dL/de_out`` of every stage: from its own map, and through the reduction from the next stage."""
    grad_e: list[Tensor] = []
    outputs = saved.e
    for index in reversed(range(len(highway.adapters))):
        terms = []
        if (norm := highway.norm(index)) is not None:
            grad_map = grad_maps.pop().permute(0, 2, 3, 1)
            norm_input = mode.unpack(saved.norm_inputs[index], grad_map.dtype)
            terms.append(_vjp(norm, norm_input, grad_map, _trained(norm), grads))
        if grad_e:
            if outputs[index] is None:
                outputs = _forward(highway, saved.images, mode, stages=index + 1)[1].e
            e = mode.unpack(outputs[index], grad_e[0].dtype)
            terms.append(_vjp_of_reduction(highway.reduction(index + 1), e, grad_e[0], grads))
        grad_e.insert(0, terms[0] if len(terms) == 1 else terms[0] + terms[1])
    return grad_e


def _groups(stage: frozen_stream.Taps, l: Tensor, adapters: list[nn.Module]) -> Groups:
    """The taps of a stage as :func:`.frozen_stream.run` yields them."""
    taps = (tap for _, _, pair in stage for tap in pair)
    for some, rows in _layout(adapters, l.flatten(0, 2)):
        group = list(islice(taps, some.stop - some.start))
        yield some, rows, torch.stack(group) if len(group) > 1 else group[0][None]


def _unpacked(packed: list[Parts], mode: MemoryMode, adapters: list[nn.Module], g: Tensor) -> Groups:
    """The saved taps of a stage, in the type of ``g`` (T, C), as :func:`_groups` yielded them."""
    for (some, rows), parts in zip(_layout(adapters, g), packed, strict=True):
        yield some, rows, mode.unpack(parts, g.dtype)


def _layout(adapters: list[nn.Module], tokens: Tensor) -> list[tuple[slice, slice]]:
    """Which adapters of a stage are computed together, and for which of its T tokens (T, C), in order.

    On a large map one product of an adapter keeps the processor busy. On a small one it is computed faster than called;
    there the adapters of as many blocks share a batched product as give it the size of a slice of a large map.
    """
    rows, count = frozen_stream.slices(tokens), len(adapters)
    small = len(rows) == 1 and 4 * len(tokens) <= (most := frozen_stream.rows_per_slice(tokens.device))
    if small and len({(type(adapter), *(p.shape for p in adapter.inner)) for adapter in adapters}) == 1:
        size = most // len(tokens) // 2 * 2  # adapters; both of a block
        return [(slice(i, min(i + size, count)), rows[0]) for i in range(0, count, size)]
    return [(slice(i, i + 1), some) for block in range(0, count, 2) for some in rows for i in (block, block + 1)]


def _project(
    adapters: list[nn.Module], taps: Tensor, grad_z: Tensor | None = None, grads: Gradients | None = None
) -> Tensor:
    """The bottlenecks ``z`` of K adapters, (K, tokens, C) -> (K, tokens, width).

    Args:
        grad_z: The gradient of the result; with it, those of the adapters' inner parameters are added to ``grads``.
    """
    kinds = list(zip(*(adapter.inner for adapter in adapters), strict=True))
    stacked = [torch.stack(kind) if len(kind) > 1 else kind[0][None] for kind in kinds]
    if grad_z is None:
        return type(adapters[0]).project(taps, *stacked)
    z, *gradients = type(adapters[0]).project_again(taps, grad_z.to(taps.dtype), *stacked)
    for kind, gradient in zip(kinds, gradients, strict=True):
        for p, one in zip(kind, gradient.to(kind[0].dtype), strict=True):
            if p.requires_grad:  # a tensor of its own
                grads[p] = grads[p].add_(one) if p in grads else one.clone() if len(kind) > 1 else one
    return z


def _vjp_of_reduction(reduction: nn.Module, e: Tensor, grad_y: Tensor, grads: Gradients) -> Tensor:
    """As :func:`_vjp`. The output of a frozen linear layer is not needed for its input's gradient."""
    trained = _trained(reduction)
    if trained or not isinstance(reduction, PatchMerging):
        return _vjp(reduction, e, grad_y, trained, grads)
    return _vjp(lambda e: reduction.norm(merge(e)), e, grad_y @ reduction.reduction.weight, [], grads)


def _vjp(
    function: Callable[[Tensor], Tensor], x: Tensor, grad_y: Tensor, trained: list[nn.Parameter], grads: Gradients
) -> Tensor:
    """Vector-Jacobian product of ``y = function(x)``: returns that of ``x``, adds those of ``trained`` to ``grads``."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        y = function(x)
    grad_x, *gradients = torch.autograd.grad(y, [x, *trained], grad_y.to(y.dtype))
    grads.update(zip(trained, gradients, strict=True))
    return grad_x


def _trained(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module.parameters() if p.requires_grad]


def _concatenate_outer(adapters: list[nn.Module]) -> tuple[Tensor, Tensor, list[slice]]:
    """The outer factors of a stage as one (C, all bottlenecks), the sum of its biases, and each adapter's columns."""
    outer, bias = zip(*(adapter.outer for adapter in adapters), strict=True)
    columns = [slice(*ends) for ends in pairwise(accumulate((w.shape[1] for w in outer), initial=0))]
    return torch.cat(outer, dim=1), torch.stack(bias).sum(dim=0), columns


def _columns(z: Tensor, rows: slice, columns: list[slice]) -> Tensor:
    """The part of z (T, all bottlenecks) that belongs to K neighbouring adapters, as (K, tokens, width)."""
    return z[rows, columns[0].start : columns[-1].stop].unflatten(-1, (len(columns), -1)).transpose(0, 1)


def _flat(pairs) -> list:
    return [one for pair in pairs for one in pair]


def _precision(images: Tensor) -> object:
    """The current autocast context, for the backward pass, which runs outside of it."""
    kind = images.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return nullcontext()
    return torch.autocast(kind, torch.get_autocast_dtype(kind))
