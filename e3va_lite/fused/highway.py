"""The parallel highway at the price of a frozen backbone: what :mod:`e3va_lite.highway` says, computed otherwise.

Let ``h_1 ... h_K`` be the taps of a stage, two per block, and ``A_k(h) = h + S_k z_k + b_k`` its adapters, where
``z_k`` is the adapter as far as the outer factor ``S_k`` of its up-projection. Equation (8), added up over the stage:

    e_out = l_out + (e_in - l_in) + [S_1 ... S_K] [z_1; ...; z_K] + b_1 + ... + b_K

because by equation (7) the taps themselves add up to ``l_out - l_in``. So all up-projections of a stage are one
product. On the way back all adapters of the stage receive one and the same gradient ``g = dL/de_out``, known before any
of its taps is needed. A tap is needed once, to bring its ``z_k`` back to life, and may come from anywhere: it was kept,
it was kept in 8 bits, or the stream runs once more and the taps come by again (``WAYS``).

Autograd sees one node for the whole highway; the order of the backward pass is this file's. What happens inside an
adapter, a reduction or a norm is left to autograd, on little graphs that end where the stream begins.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import accumulate, pairwise
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


@dataclass(frozen=True)
class Way:
    """What is kept between the forward and the backward pass.

    Attributes:
        taps: Whether the taps are; otherwise the stream runs once more.
        packed: Whether taps and the highway's own maps are kept in 8 bits.
    """

    taps: bool
    packed: bool

    def keep(self, x: Tensor) -> Parts:
        return pack(x) if self.packed else (x,)

    def give_back(self, parts: Parts, dtype: torch.dtype) -> Tensor:
        return unpack(*parts, dtype) if self.packed else parts[0]


WAYS = {
    "store": Way(taps=True, packed=False),
    "compress": Way(taps=True, packed=True),
    "recompute": Way(taps=False, packed=False),
}


class Kept(NamedTuple):
    """What the backward pass will ask for.

    Attributes:
        images: (B, 3, H, W)
        e: Per stage, what the next reduction sees; None if the stages up to here are rather run again.
        mapped: Per stage, what its norm sees.
        taps: Per stage, for every piece of its taps, in the order of :func:`.frozen_stream.run`, the pair.
    """

    images: Tensor
    e: list[Parts | None]
    mapped: list[Parts | None]
    taps: list[list[tuple[Parts, Parts]]]


def run(highway: nn.Module, images: Tensor) -> list[Tensor]:
    """The maps for the neck of a parallel :class:`e3va_lite.highway.E3VA`, in one of its ways with memory."""
    norms = [norm for i in range(highway.last_stage) if (norm := highway.norm(i)) is not None]
    own = [highway.adapters, *norms, *([] if highway.reductions is None else [highway.reductions])]
    trained = [p for module in own for p in _trained(module)]  # and nothing of the backbone
    if trained and torch.is_grad_enabled():
        maps = list(_Highway.apply(highway, images, *trained))
    else:
        with torch.no_grad():
            maps = _forward(highway, images)[0]
    return highway.norms.finish(maps, images)


class _Highway(torch.autograd.Function):
    @staticmethod
    def forward(ctx, highway: nn.Module, images: Tensor, *trained: nn.Parameter) -> tuple[Tensor, ...]:
        way = WAYS[highway.memory]
        maps, kept = _forward(highway, images, way)
        leaves, ctx.layout = tree_flatten(kept)
        ctx.save_for_backward(*leaves, *trained)
        ctx.highway, ctx.way, ctx.trained, ctx.precision = highway, way, trained, _precision(images)
        return tuple(maps)

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        leaves = ctx.saved_tensors[: ctx.layout.num_leaves]  # an error if a trained parameter was changed since
        kept = tree_unflatten(leaves, ctx.layout)
        with ctx.precision:
            found = _backward(ctx.highway, ctx.way, kept, gradients)
        return None, None, *(found.get(p) for p in ctx.trained)


def _forward(
    highway: nn.Module, images: Tensor, way: Way | None = None, stages: int | None = None
) -> tuple[list[Tensor], Kept]:
    """The maps for the neck, and what the backward pass will ask for; without a way, nothing.

    Args:
        stages: Stop behind so many.
    """
    stages = stages or highway.last_stage
    maps, kept = [], Kept(images, [], [], [])
    e = l = embed(highway.trunk, images)  # noqa: E741  (B, H, W, C), the paper's letter
    for index, (stage, pairs) in enumerate(zip(highway.trunk.layers[:stages], highway.adapters, strict=False)):
        e, l = highway.reduction(index)(e), stage.downsample(l)  # noqa: E741
        e = e - l  # what the highway changed so far
        adapters = [list(pair) for pair in pairs]
        outer, bias, columns = _side_by_side(adapters)
        z = l.new_empty(l[..., 0].numel(), outer.shape[1], dtype=frozen_stream.tap_dtype(l))  # (T, all bottlenecks)
        pieces = []
        for block, rows, taps in frozen_stream.run(stage, l):
            for adapter, column, tap in zip(adapters[block], columns[block], taps, strict=True):
                z[rows, column] = adapter.bottleneck(tap)
            if way is not None and way.taps:
                pieces.append(tuple(way.keep(tap) for tap in taps))
        e += F.linear(z, outer, bias).view_as(l)
        e += l
        mapped = e if highway.fpn_input == "e" else e + l
        if (norm := highway.norm(index)) is not None:
            maps.append(to_nchw(norm(mapped)))
        if way is not None:
            again = not way.taps and norm is None and index + 1 < stages  # the neck does not want it
            kept.taps.append(pieces)
            kept.e.append(None if again else way.keep(e))
            kept.mapped.append(kept.e[-1] if mapped is e else way.keep(mapped))
    return maps, kept


def _backward(highway: nn.Module, way: Way, kept: Kept, of_maps: tuple[Tensor, ...]) -> Gradients:
    """Gradients of everything that is trained, from those of the maps."""
    found: Gradients = {}
    shared = _shared_gradients(highway, way, kept, list(of_maps), found)
    for pairs, pieces in zip(highway.adapters, _taps_again(highway, way, kept, shared[0].dtype), strict=True):
        g = shared.pop(0).flatten(0, 2)  # (T, C)
        trained, adapters = [_trained(pair) for pair in pairs], [list(pair) for pair in pairs]
        outer, _, columns = _side_by_side(adapters)
        z, of_z = g.new_empty(len(g), outer.shape[1]), g @ outer
        for block, rows, taps in pieces:
            with torch.enable_grad():
                live = [adapter.bottleneck(tap) for adapter, tap in zip(adapters[block], taps, strict=True)]
            _pull(live, [of_z[rows, column] for column in columns[block]], trained[block], found)
            for column, x in zip(columns[block], live, strict=True):
                z[rows, column] = x.detach()
        of_outer, of_bias = z.t() @ g, g.sum(dim=0)
        for column, adapter in zip(_flat(columns), _flat(adapters), strict=True):
            weight, bias = adapter.outer
            found[weight], found[bias] = of_outer[column].t(), of_bias
    return found


def _shared_gradients(
    highway: nn.Module, way: Way, kept: Kept, of_maps: list[Tensor], found: Gradients
) -> list[Tensor]:
    """``dL/de_out`` of every stage: what its map's gradient says, and through the reduction the next stage's."""
    shared: list[Tensor] = []
    maps = kept.e
    for index in reversed(range(len(highway.adapters))):
        terms = []
        if (norm := highway.norm(index)) is not None:
            of_map = of_maps.pop().permute(0, 2, 3, 1)
            mapped = way.give_back(kept.mapped[index], of_map.dtype)
            terms += _through(norm, mapped, of_map, _trained(norm), found)
        if shared:
            if maps[index] is None:
                maps = _forward(highway, kept.images, way, stages=index + 1)[1].e
            e = way.give_back(maps[index], shared[0].dtype)
            terms += _through_reduction(highway.reduction(index + 1), e, shared[0], found)
        shared.insert(0, terms[0] if len(terms) == 1 else terms[0] + terms[1])
    return shared


def _taps_again(highway: nn.Module, way: Way, kept: Kept, dtype: torch.dtype) -> Iterator[frozen_stream.Taps]:
    """Per stage, its taps once more: from the stream, or as they were kept."""
    l = None if way.taps else embed(highway.trunk, kept.images)  # noqa: E741
    for stage, pieces in zip(highway.trunk.layers, kept.taps, strict=False):
        if way.taps:
            yield _as_kept(len(stage.blocks), pieces, way, dtype)
        else:
            l = stage.downsample(l)  # noqa: E741
            yield frozen_stream.run(stage, l)


def _as_kept(blocks: int, pieces: list[tuple[Parts, Parts]], way: Way, dtype: torch.dtype) -> frozen_stream.Taps:
    per_block = len(pieces) // blocks
    for block in range(blocks):
        start = 0
        for parts in pieces[block * per_block : (block + 1) * per_block]:
            f1, f2 = (way.give_back(some, dtype) for some in parts)
            yield block, slice(start, start + len(f1)), (f1, f2)
            start += len(f1)


def _through_reduction(reduction: nn.Module, e: Tensor, of_y: Tensor, found: Gradients) -> Sequence[Tensor]:
    """As :func:`_through`. What a frozen linear layer said need not be computed again for its input's gradient."""
    trained = _trained(reduction)
    if trained or not isinstance(reduction, PatchMerging):
        return _through(reduction, e, of_y, trained, found)
    return _through(lambda e: reduction.norm(merge(e)), e, of_y @ reduction.reduction.weight, [], found)


def _through(
    function: Callable[[Tensor], Tensor], x: Tensor, of_y: Tensor, trained: list[nn.Parameter], found: Gradients
) -> Sequence[Tensor]:
    """The gradient of the input of ``y = function(x)``; those of its parameters join what was found."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        y = function(x)
    return _pull([y], [of_y], trained, found, x)


def _pull(
    outputs: list[Tensor], of_outputs: list[Tensor], trained: list[nn.Parameter], found: Gradients, *inputs: Tensor
) -> Sequence[Tensor]:
    """Autograd's part: from gradients of outputs to those of inputs, and of parameters, which join what was found."""
    if not any(y.requires_grad for y in outputs):
        return ()
    of_outputs = [g.to(y.dtype) for g, y in zip(of_outputs, outputs, strict=True)]
    gradients = torch.autograd.grad(outputs, [*trained, *inputs], of_outputs, allow_unused=True)
    for p, gradient in zip(trained, gradients[: len(trained)], strict=True):
        if gradient is not None:
            found[p] = gradient if p not in found else found[p].add_(gradient)
    return gradients[len(trained) :]


def _trained(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module.parameters() if p.requires_grad]


def _side_by_side(adapters: list[list[nn.Module]]) -> tuple[Tensor, Tensor, list[tuple[slice, ...]]]:
    """The stage's outer factors as one (C, all bottlenecks), its biases' sum, and the columns by block and place."""
    outer, bias = zip(*(adapter.outer for adapter in _flat(adapters)), strict=True)
    columns = [slice(*ends) for ends in pairwise(accumulate((w.shape[1] for w in outer), initial=0))]
    return torch.cat(outer, dim=1), torch.stack(bias).sum(dim=0), list(zip(columns[::2], columns[1::2], strict=True))


def _flat(pairs) -> list:
    return [one for pair in pairs for one in pair]


def _precision(images: Tensor) -> object:
    """Autocast as it is now, for the backward pass, which runs outside of it."""
    kind = images.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return nullcontext()
    return torch.autocast(kind, torch.get_autocast_dtype(kind))
