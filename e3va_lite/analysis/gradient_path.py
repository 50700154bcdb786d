"""How far a gradient travels: lengths of paths in the autograd graph (section 3.4, equations 11-12, Figs. 1 and 5).

The graph that autograd keeps is walked from the loss to the parameters. Its nodes are the operations of the forward
pass, and a *link* is a node that changes the gradient on its way back: one factor in the product of equation (11). What
only passes a gradient on is no link: a node whose Jacobian holds only fixed zeros and ones, because its operation adds,
reshapes, copies, repeats, cuts, joins or moves entries (``PASS_ON``). Every other node counts, those with an
unknown name included. A fused kernel is one node, and so is a ``torch.autograd.Function`` of one's own: lengths are
comparable only where the same operations are written in the same way, as they are in this package. So backbones of this
package are walked in their literal form: a highway as ``memory="reference"`` computes it, whatever it is trained with.

Gradient checkpointing changes no length: the graph is the same, and only what is kept in it is less.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from timm.models.swin_transformer_v2 import SwinTransformerV2Block
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge, saved_tensors_hooks

from ..errors import InputError
from ..highway import E3VA
from ..methods.inside import ThroughBackbone
from .isolation import find_backbone, next_nodes, producers, random_functional, stream, walk
from .model_state import restored

#: Names of graph nodes without "Backward0" whose Jacobian is made of fixed zeros and ones.
PASS_ON = {
    "Add", "Sum", "View", "UnsafeView", "ReshapeAlias", "Alias", "AsStrided", "Permute", "Transpose", "T",
    "Squeeze", "Unsqueeze", "Expand", "Repeat", "Clone", "ToCopy", "Roll", "Flip", "ConstantPadNd", "Slice",
    "Select", "Index", "IndexSelect", "Gather", "Unbind", "Split", "SplitWithSizes", "UnsafeSplit", "Cat", "Stack",
    "Unfold", "Diagonal",
}  # fmt: skip


@dataclass(frozen=True)
class Block:
    """What the gradient meets in one Swin block, numbers from 1.

    Attributes:
        links_from_loss: Links between the loss and the block's output, on the longest path; None if none arrives.
        m: Per adapter of the block, the links between the block's output and the adapter's, on the longest path: the
            factors of equation (11). None if no gradient arrives; empty for methods without adapters.
        adapters: Names of the block's adapters in the model.
        input_reached: Whether the gradient goes on to the block's input (of the highway, for E3VA).
        stream_reached: Whether it goes on to the input of the pretrained block.
        output_reached: Whether it arrives at the output of the pretrained block: something behind the block uses that,
            and the loss depends on it.
        bytes_on_path: What autograd kept when the block ran, the pretrained block and the adapters; with checkpointing
            its input alone is kept, beforehand.
    """

    stage: int
    block: int
    links_from_loss: int | None
    m: tuple[int | None, ...]
    adapters: tuple[str, ...]
    input_reached: bool
    stream_reached: bool
    output_reached: bool
    bytes_on_path: int


@dataclass(frozen=True)
class Trace:
    """What a gradient meets between the loss and the parameters.

    Attributes:
        parameters: Names of the parameters that it ends in; ``modules``: of the modules whose outputs it passes.
        backbone_parameters_reached: How many of the parameters are the backbone's.
        backbone_activations_reached: How many outputs of the backbone's modules it passes; without those in some
            ``passed_by_design``, the reductions that the highway runs itself.
        nodes: Nodes of the graph.
        longest_path: Most links between the loss and a parameter.
        longest_path_per_stage: For each stage that runs, most links between its output (before the FPN norm) and its
            input (behind the reduction) or any parameter between the two; 0 where no gradient arrives.
        bytes_on_path: What autograd kept of the model's forward pass; each storage once, parameters and buffers not.
            These bytes grow with the images; the lengths do not.
        blocks: Every block that ran.
    """

    parameters: tuple[str, ...]
    modules: tuple[str, ...]
    backbone_parameters_reached: int
    backbone_activations_reached: int
    nodes: int
    longest_path: int
    longest_path_per_stage: tuple[int, ...]
    bytes_on_path: int
    blocks: tuple[Block, ...]


def trace(
    model: nn.Module,
    *inputs: object,
    backbone: nn.Module | str | None = None,
    loss: Callable[[object], Tensor] | None = None,
    **keywords: object,
) -> Trace:
    """Run ``model`` forward in train mode and walk the graph from the loss. The model is restored afterwards.

    Args:
        model: A backbone of this package, a model that contains one, or any other; stages and blocks are known for the
            first two. Models on the meta device cost no memory and have the same graph.
        *inputs: The positional arguments of ``model``, for a backbone float images (B, 3, H, W); ``**keywords`` are
            its keyword arguments.
        backbone: The pretrained part, a module or its name; the innermost module called ``backbone`` if not given.
        loss: Turns the model's output into a tensor. By default ``isolation.random_functional``, whose two links (a
            product and a scale) are part of the lengths. Neck, head and the task's loss would add theirs to every
            method alike.

    Raises:
        InputError: When the loss does not require a gradient (a backbone in which nothing is trained is no error: its
            trace is empty), when there is no such backbone, or for reentrant checkpointing, which hides the graph.
    """
    pretrained = find_backbone(model, backbone)
    ours = next((module for module in model.modules() if isinstance(module, ThroughBackbone | E3VA)), None)
    saved = SavedBytes(model)
    with (
        restored(model, parameters=False),
        torch.enable_grad(),
        _literal(ours),
        producers(model) as produced,
        _watched(ours, saved) as calls,
    ):
        model.train()
        with saved_tensors_hooks(saved.pack, lambda tensor: tensor):
            output = model(*inputs, **keywords)
        value = (loss or random_functional)(output)
    if isinstance(value, Tensor) and value.requires_grad:
        from_loss = longest_links(get_gradient_edge(value).node)
    elif ours is not None and not any(p.requires_grad for p in model.parameters()):
        from_loss = {}
    else:
        raise InputError(
            "the loss does not require a gradient: something in the model has to be trainable, and the loss has to be "
            "a tensor that depends on it."
        )
    if any(node.name() == "CheckpointFunctionBackward" for node in from_loss):
        raise InputError("reentrant checkpointing hides the graph of what it wraps: pass use_reentrant=False to it.")
    names = {id(p): name for name, p in model.named_parameters()}
    inside = {id(p) for p in pretrained.parameters()}
    ends = [id(node.variable) for node in from_loss if hasattr(node, "variable") and id(node.variable) in names]
    guarded = stream(model, pretrained)
    per_stage, blocks = _per_stage(model, ours, from_loss, produced, calls) if calls else ([], [])
    return Trace(
        parameters=tuple(sorted(names[i] for i in ends)),
        modules=tuple(sorted({name for node in from_loss for name in produced.get(node, ())})),
        backbone_parameters_reached=sum(i in inside for i in ends),
        backbone_activations_reached=sum(not guarded.isdisjoint(produced.get(node, ())) for node in from_loss),
        nodes=len(from_loss),
        longest_path=max(from_loss.values(), default=0),
        longest_path_per_stage=tuple(per_stage),
        bytes_on_path=saved.total,
        blocks=tuple(blocks),
    )


def changes(node: object) -> bool:
    """Whether a node of the graph counts as a link."""
    name = node.name()
    if name in ("torch::autograd::AccumulateGrad", "torch::autograd::CopyBackwards"):
        return False
    built_in = re.fullmatch(r"(\w+)Backward\d+", name)  # the names of one's own functions end without a number
    if built_in and built_in[1] in PASS_ON:
        return getattr(node, "_saved_alpha", 1) != 1  # torch.add(a, b, alpha=2) is not only an addition
    return True


def longest_links(start: object, stops: frozenset = frozenset()) -> dict[object, int]:
    """For every node from ``start`` on, and behind none of ``stops``, the most links on a path to it.

    A node stands for the gradient that arrives at it: ``start`` has 0, and a node's own link counts for those behind.
    """
    waiting = Counter(below for node in walk(start, stops) if node not in stops for below in next_nodes(node))
    longest, ready = {start: 0}, [start]
    while ready:  # a node is ready when all paths to it are known
        node = ready.pop()
        for below in () if node in stops else next_nodes(node):
            longest[below] = max(longest.get(below, 0), longest[node] + changes(node))
            waiting[below] -= 1
            if not waiting[below]:
                ready.append(below)
    return longest


class SavedBytes:
    """A count of the bytes that autograd saves for the backward pass, for ``saved_tensors_hooks(saved.pack, ...)``.

    Each storage counts once in ``total``; parameters and buffers of the model do not.
    """

    def __init__(self, model: nn.Module) -> None:
        self.total = 0
        # Storages by address; they are held, because a freed address may be used again.
        self._known = {t.untyped_storage()._cdata: t.untyped_storage() for t in (*model.parameters(), *model.buffers())}

    def pack(self, tensor: Tensor) -> Tensor:
        """Count a tensor; what is saved is a detached one, see :meth:`e3va_lite.analysis.memory.LiveBytes.pack`."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self._known:
            self._known[storage._cdata] = storage
            self.total += storage.nbytes()
        return tensor.detach()


def first_layer(block: nn.Module) -> nn.Module:
    """The layer of a block that sees its input first: the attention in a Swin V2, which norms afterwards."""
    return block.attn if isinstance(block, SwinTransformerV2Block) else block.norm1


@dataclass
class _Call:
    """A block that ran: graph nodes (of its input, its output, the stream's input, the taps), its adapters and bytes.

    There are taps only on a highway: elsewhere the pretrained block's output is the block's.
    """

    adapters: tuple[nn.Module, ...]
    input: object
    output: object
    stream: object
    taps: tuple[object, ...]
    bytes: int


@contextmanager
def _literal(backbone: ThroughBackbone | E3VA | None) -> Iterator[None]:
    """Let a backbone of this package compute the equations as the paper writes them, without its faster kernels."""
    with ExitStack() as changed:
        if backbone is not None:
            name, literal = ("memory", "reference") if isinstance(backbone, E3VA) else ("frozen", False)
            changed.callback(setattr, backbone, name, getattr(backbone, name))
            setattr(backbone, name, literal)
        yield


@contextmanager
def _watched(backbone: ThroughBackbone | E3VA | None, saved: SavedBytes) -> Iterator[list[_Call]]:
    """Record every call of the function that a backbone runs once per block, ``run_block`` or ``join``."""
    calls: list[_Call] = []
    if backbone is None:
        yield calls
        return
    # join(e, f1, f2, *adapters) and run_block(block, x, *adapters)
    name, first = ("join", 0) if isinstance(backbone, E3VA) else ("run_block", 1)
    inner = getattr(backbone, name)
    streams = []  # where each pretrained block starts, and what was kept before: it runs before join is called

    def watched(*args: object) -> Tensor:
        output = inner(*args)
        stream, before = streams[-1]
        taps = tuple(arg.grad_fn for arg in args[first + 1 :] if isinstance(arg, Tensor))
        adapters = tuple(arg for arg in args[first + 1 :] if isinstance(arg, nn.Module))
        calls.append(_Call(adapters, args[first].grad_fn, output.grad_fn, stream, taps, saved.total - before))
        return output

    def start(module: nn.Module, args: tuple) -> None:
        streams.append((args[0].grad_fn, saved.total))

    with ExitStack() as changed:
        changed.callback(setattr, backbone, name, inner)
        setattr(backbone, name, watched)
        for block in (block for stage in backbone.backbone.layers for block in stage.blocks):
            changed.enter_context(first_layer(block).register_forward_pre_hook(start))
        yield calls


def _per_stage(
    model: nn.Module,
    backbone: ThroughBackbone | E3VA,
    from_loss: dict[object, int],
    produced: dict[object, list[str]],
    calls: list[_Call],
) -> tuple[list[int], list[Block]]:
    """The longest path of every stage that runs, and all its blocks."""
    names = {module: name for name, module in model.named_modules()}
    outputs = {name: node for node, by in produced.items() for name in by}
    per_stage, blocks, todo = [], [], iter(calls)
    for number, stage in enumerate(backbone.backbone.layers[: backbone.last_stage], start=1):
        ran = [call for _, call in zip(stage.blocks, todo, strict=False)]

        def inside(output: object, input: object) -> dict[object, int]:
            return longest_links(output, frozenset({input})) if output in from_loss else {}

        per_stage.append(max(inside(ran[-1].output, ran[0].input).values(), default=0))
        for place, call in enumerate(ran, start=1):
            within = inside(call.output, call.input)
            adapters = tuple(names[adapter] for adapter in call.adapters)
            blocks.append(
                Block(
                    stage=number,
                    block=place,
                    links_from_loss=from_loss.get(call.output),
                    m=tuple(within.get(outputs.get(adapter)) for adapter in adapters),
                    adapters=adapters,
                    input_reached=call.input in from_loss,
                    stream_reached=call.stream in from_loss,
                    output_reached=_goes_on(call, from_loss),
                    bytes_on_path=call.bytes,
                )
            )
    return per_stage, blocks


def _goes_on(call: _Call, from_loss: dict[object, int]) -> bool:
    """Whether the loss depends on the output of the pretrained block.

    On a highway that output is not seen, for nobody is handed it. But it is computed from the last tap: whatever the
    gradient passes right above that tap, and is no part of the way from the highway's output to it, is the stream.
    """
    if not call.taps:
        return call.output in from_loss
    tap = call.taps[-1]
    if tap is None or tap not in from_loss:
        return False
    beside = set(walk(call.output, frozenset({call.input, *call.taps}))) if call.output is not None else set()
    return any(tap in next_nodes(node) for node in from_loss.keys() - beside)
