"""The parallel highway at the price of a frozen backbone: what :mod:`e3va_lite.highway` says, computed otherwise.

Let ``h_1 ... h_K`` be the taps of a stage, two per block, and ``A_k(h) = h + S_k z_k + b_k`` its adapters, where
``z_k`` is the adapter as far as the outer factor ``S_k`` of its up-projection. Equation (8), added up over the stage:

    e_out = l_out + (e_in - l_in) + [S_1 ... S_K] [z_1; ...; z_K] + b_1 + ... + b_K

because by equation (7) the taps themselves add up to ``l_out - l_in``. So all up-projections of a stage are one
product. On the way back all adapters of the stage receive one and the same gradient ``g = dL/de_out``, known before any
of its taps is needed. A tap is needed once, to bring its ``z_k`` back to life, and may come from anywhere:

- ``store``: it was kept;
- ``compress``: it was kept in 8 bits;
- ``recompute``: it was not kept; the stream runs once more, and the taps come by again.

Autograd sees one node for the whole highway; the order of the backward pass is this file's. What happens inside an
adapter, a reduction or a norm is left to autograd, on little graphs that end where the stream begins.
"""

from collections.abc import Callable
from contextlib import nullcontext
from itertools import accumulate, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_flatten, tree_unflatten

from . import stream
from .eightbit import pack, unpack
from .swin import embed, merge

Gradients = dict[nn.Parameter, Tensor]


def run(highway: nn.Module, images: Tensor) -> list[Tensor]:
    """The maps for the neck of a parallel :class:`e3va_lite.highway.E3VA`, in one of its ways with memory."""
    own = [highway.adapters, highway.norms, *([] if highway.reductions is None else [highway.reductions])]
    trained = [p for module in own for p in _trained(module)]  # and nothing of the backbone
    if trained and torch.is_grad_enabled():
        return list(_Highway.apply(highway, images, *trained))
    with torch.no_grad():
        return _forward(highway, images, memory=None)[0]


class _Highway(torch.autograd.Function):
    @staticmethod
    def forward(ctx, highway: nn.Module, images: Tensor, *trained: nn.Parameter) -> tuple[Tensor, ...]:
        maps, kept = _forward(highway, images, highway.memory)
        leaves, ctx.layout = tree_flatten(kept)
        ctx.save_for_backward(*leaves, *trained)
        ctx.highway, ctx.memory, ctx.trained, ctx.precision = highway, highway.memory, trained, _precision(images)
        return tuple(maps)

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        leaves = ctx.saved_tensors[: ctx.layout.num_leaves]  # an error if a trained parameter was changed since
        kept = tree_unflatten(leaves, ctx.layout)
        with ctx.precision:
            found = _backward(ctx.highway, ctx.memory, kept, gradients)
        return None, None, *(found.get(p) for p in ctx.trained)


def _forward(
    highway: nn.Module, images: Tensor, memory: str | None, stages: int | None = None
) -> tuple[list[Tensor], dict]:
    """The maps for the neck, and what the backward pass will ask for (nothing if ``memory`` is None).

    Args:
        stages: Stop behind so many.
    """
    stages = stages or highway.last_stage
    maps, kept = [], {"images": images, "e": [], "mapped": [], "taps": []}
    e = l = embed(highway.swin, images)  # noqa: E741  (B, H, W, C), the paper's letter
    for index, (stage, adapters) in enumerate(zip(highway.swin.layers[:stages], highway.adapters, strict=False)):
        e, l = highway.reduction(index)(e), stage.downsample(l)  # noqa: E741
        e = e - l  # what the highway changed so far
        adapters = [list(pair) for pair in adapters]
        outer, bias, columns = _side_by_side(adapters)
        z = l.new_empty(l[..., 0].numel(), outer.shape[1], dtype=stream.tap_dtype(l))  # (T, all bottlenecks)
        taps: list[list[Tensor]] = []
        for block, rows, pair in stream.run(stage, l):
            for adapter, column, tap in zip(adapters[block], columns[block], pair, strict=True):
                z[rows, column] = adapter.bottleneck(tap)
            if memory in ("store", "compress"):
                taps.append([_packed(tap, memory) for tap in pair])
        e += F.linear(z, outer, bias).view_as(l)
        e += l
        mapped = e if highway.fpn_input == "e" else e + l
        if (norm := highway.norm(index)) is not None:
            maps.append(norm(mapped).permute(0, 3, 1, 2).contiguous())
        if memory is not None:
            again = memory == "recompute" and norm is None and index + 1 < stages  # the neck does not want it
            kept["taps"].append(taps)
            kept["e"].append(None if again else _packed(e, memory))
            kept["mapped"].append(kept["e"][-1] if mapped is e else _packed(mapped, memory))
    return maps, kept


def _backward(highway: nn.Module, memory: str, kept: dict, gradients: tuple[Tensor, ...]) -> Gradients:
    """Gradients of everything that is trained, from those of the maps."""
    found: Gradients = {}
    shared = _shared_gradients(highway, memory, kept, list(gradients), found)
    l = embed(highway.swin, kept["images"]) if memory == "recompute" else None  # noqa: E741
    for stage, adapters, taps in zip(highway.swin.layers, highway.adapters, kept["taps"], strict=False):
        g = shared.pop(0).flatten(0, 2)  # (T, C)
        trained = [_trained(pair) for pair in adapters]
        adapters = [list(pair) for pair in adapters]
        outer, _, columns = _side_by_side(adapters)
        z, of_z = g.new_empty(len(g), outer.shape[1]), g @ outer
        if memory == "recompute":
            l = stage.downsample(l)  # noqa: E741
        for block, rows, pair in (
            stream.run(stage, l) if memory == "recompute" else _again(taps, memory, len(adapters), g)
        ):
            with torch.enable_grad():
                live = [adapter.bottleneck(tap) for adapter, tap in zip(adapters[block], pair, strict=True)]
            _pull(live, [of_z[rows, column] for column in columns[block]], trained[block], found)
            for column, x in zip(columns[block], live, strict=True):
                z[rows, column] = x.detach()
        of_outer, of_bias = z.t() @ g, g.sum(dim=0)
        for column, adapter in zip(_flat(columns), _flat(adapters), strict=True):
            weight, bias = adapter.outer
            found[weight], found[bias] = of_outer[column].t(), of_bias
    return found


def _shared_gradients(
    highway: nn.Module, memory: str, kept: dict, of_maps: list[Tensor], found: Gradients
) -> list[Tensor]:
    """``dL/de_out`` of every stage: what its map's gradient says, and through the reduction the next stage's."""
    shared: list[Tensor] = []
    for index in reversed(range(len(highway.adapters))):
        terms = []
        if (norm := highway.norm(index)) is not None:
            of_map = of_maps.pop().permute(0, 2, 3, 1)
            mapped = _unpacked(kept["mapped"][index], memory, of_map.dtype)
            terms.append(_through(norm, _trained(norm), mapped, of_map, found))
        if shared:
            if kept["e"][index] is None:
                kept["e"] = _forward(highway, kept["images"], memory, stages=index + 1)[1]["e"]
            e = _unpacked(kept["e"][index], memory, shared[0].dtype)
            terms.append(_through_reduction(highway.reduction(index + 1), e, shared[0], found))
        shared.insert(0, terms[0] if len(terms) == 1 else terms[0] + terms[1])
    return shared


def _through_reduction(reduction: nn.Module, e: Tensor, of_y: Tensor, found: Gradients) -> Tensor:
    """As :func:`_through`. What a frozen linear layer said need not be computed again for its input's gradient."""
    if trained := _trained(reduction):
        return _through(reduction, trained, e, of_y, found)
    return _through(lambda e: reduction.norm(merge(e)), [], e, of_y @ reduction.reduction.weight, found)


def _through(
    function: Callable[[Tensor], Tensor], trained: list[nn.Parameter], x: Tensor, of_y: Tensor, found: Gradients
) -> Tensor:
    """The gradient of the input of ``y = function(x)``; those of its parameters join what was found."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        y = function(x)
    return _pull([y], [of_y], trained, found, x)


def _pull(
    outputs: list[Tensor],
    of_outputs: list[Tensor],
    trained: list[nn.Parameter],
    found: Gradients,
    x: Tensor | None = None,
) -> Tensor | None:
    """Autograd's part: from gradients of outputs to those of parameters, and of x."""
    if not any(y.requires_grad for y in outputs):
        return None
    of_outputs = [g.to(y.dtype) for g, y in zip(of_outputs, outputs, strict=True)]
    inputs = trained if x is None else [*trained, x]
    gradients = torch.autograd.grad(outputs, inputs, of_outputs, allow_unused=True)
    for p, gradient in zip(trained, gradients, strict=False):
        if gradient is not None:
            found[p] = gradient if p not in found else found[p].add_(gradient)
    return None if x is None else gradients[-1]


def _trained(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module.parameters() if p.requires_grad]


def _side_by_side(adapters: list[list[nn.Module]]) -> tuple[Tensor, Tensor, list[tuple[slice, ...]]]:
    """The stage's outer factors as one (C, all bottlenecks), its biases' sum, and the columns by block and place."""
    outer, bias = zip(*(adapter.outer for adapter in _flat(adapters)), strict=True)
    columns = [slice(*ends) for ends in pairwise(accumulate((w.shape[1] for w in outer), initial=0))]
    return torch.cat(outer, dim=1), torch.stack(bias).sum(dim=0), list(zip(columns[::2], columns[1::2], strict=True))


def _flat(pairs) -> list:
    return [one for pair in pairs for one in pair]


def _packed(x: Tensor, memory: str) -> tuple[Tensor, ...]:
    return pack(x) if memory == "compress" else (x,)


def _unpacked(parts: tuple[Tensor, ...], memory: str, dtype: torch.dtype) -> Tensor:
    return unpack(*parts, dtype) if memory == "compress" else parts[0]


def _again(taps: list, memory: str, blocks: int, like: Tensor) -> stream.Taps:
    """Kept taps, as they came."""
    places = ((block, rows) for block in range(blocks) for rows in stream.slices(like))
    for (block, rows), pair in zip(places, taps, strict=True):
        yield block, rows, tuple(_unpacked(tap, memory, like.dtype) for tap in pair)


def _precision(images: Tensor) -> object:
    """Autocast as it is now, for the backward pass, which runs outside of it."""
    kind = images.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return nullcontext()
    return torch.autocast(kind, torch.get_autocast_dtype(kind))
