"""Proofs that no gradient reaches the backbone, for the models of this package and for any other.

``requires_grad=False`` alone proves little: a gradient may still pass through every frozen layer on its way to an
adapter (that is what makes ordinary adapters expensive), and a flag can be wrong. There are five proofs, none of which
relies on another:

1. after a backward pass, no parameter of the backbone has a ``.grad``;
2. a walk of the autograd graph from the loss meets no parameter of the backbone, and no node that one of its modules
   produced;
3. in the backward pass, no operator takes both something computed from the loss's gradient and a weight of the
   backbone: this looks into custom functions too, which are a single node to a walk of the graph;
4. an optimizer that is given *every* parameter leaves the backbone equal bit for bit, and moves what is trainable;
5. two passes in train mode compute the same stream.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import fields, is_dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..errors import InputError
from .memory import LiveBytes, checked_loss
from .model_state import restored

SEED = 20241028  # of the random functional: one that nobody draws inputs with, else it could equal them
INHERITED = (
    "All of it is in reductions between stages. If a highway runs them itself, on its own stream, say so in the model: "
    "self.passed_by_design = [stage.downsample for stage in self.backbone.layers]"
)
STEPS = 3  # with a zero up-projection the down-projection moves at the second step; the third is for good measure


class IsolationError(AssertionError):
    """A gradient reaches, or can reach, the backbone; the message names the parameters and modules."""


def assert_isolated(
    model: nn.Module,
    *inputs: object,
    backbone: nn.Module | str | None = None,
    loss: Callable[[object], Tensor] | None = None,
    **keywords: object,
) -> None:
    """Prove in five ways that training ``model`` sends no gradient into ``backbone``.

    The model is run in train mode a few times and then restored: parameters, buffers, gradients, modes, random state.

    Args:
        model: The model to be trained. Its modules may have an attribute ``passed_by_design``: a list of modules of the
            backbone that a gradient may pass although their parameters get none (the highway's inherited reductions).
        *inputs: The positional arguments of ``model``; ``**keywords`` are its keyword arguments.
        backbone: The part that must not be reached: a module of ``model`` or its name in it. By default the innermost
            module called ``backbone``, which every tuned backbone of this package has.
        loss: Turns the model's output into a scalar. By default a random linear functional of all float tensors in the
            output, which may be nested in lists, dicts and dataclasses. (The mean square of LayerNormed maps, the
            obvious choice, is constant: its gradient is zero and would prove anything.)

    Raises:
        IsolationError: Names every parameter and module of the backbone that was reached. If none was, it says so and
            names trainable parameters of the rest that training would not move, for example those of an unused head.
        InputError: If there is no such backbone, if nothing in the model is trainable, or if the loss is not a scalar
            that depends on something trainable.
    """
    backbone = find_backbone(model, backbone)
    if not any(p.requires_grad for p in model.parameters()):
        raise InputError("nothing in the model is trainable, so there is nothing to prove.")
    compute = loss or random_functional

    def loss(output: object) -> Tensor:
        return checked_loss(compute(output))

    with restored(model):
        model.train()
        reached = [
            *parameters_with_grad(model, inputs, backbone, loss, **keywords),
            *reached_by_graph(model, inputs, backbone, loss, **keywords),
            *met_in_backward(model, inputs, backbone, loss, **keywords),
        ]
        moved, unmoved = moved_by_optimizer(model, inputs, backbone, loss, **keywords)
        changed = not_repeatable(model, inputs, backbone, **keywords)
    findings = [*reached, *moved, *changed]
    head = "no gradient reaches the backbone, but not all of the rest is trained (freeze what is not used):"
    if findings:
        head = "the backbone is not isolated:"
    passed = [text for text in reached if " passes module " in text or " meets parameter " in text]
    if passed:
        head = f"{head[:-1]} (list modules that a gradient may pass in an attribute `passed_by_design`):"
    if passed == reached and passed and all(".downsample" in text for text in passed):
        unmoved.append(INHERITED)
    if findings or unmoved:
        raise IsolationError("\n  ".join([head, *findings, *unmoved]))


def parameters_with_grad(
    model: nn.Module, inputs: tuple, backbone: nn.Module, loss: Callable, /, **keywords
) -> list[str]:
    """Proof 1: after a backward pass, which backbone parameters have a gradient? None may."""
    model.zero_grad(set_to_none=True)
    loss(model(*inputs, **keywords)).backward()
    return [f"parameter {name} got a gradient" for name, p in _named(model, backbone) if p.grad is not None]


def reached_by_graph(model: nn.Module, inputs: tuple, backbone: nn.Module, loss: Callable, /, **keywords) -> list[str]:
    """Proof 2: which backbone parameters and modules does a walk of the graph from the loss meet? None may.

    Modules in some ``passed_by_design`` list are not counted, their parameters are.
    """
    guarded = stream(model, backbone)
    with producers(model) as produced:
        root = loss(model(*inputs, **keywords)).grad_fn
    parameters = {id(p): name for name, p in _named(model, backbone)}
    findings = []
    for node in walk(root):
        if id(getattr(node, "variable", None)) in parameters:
            findings.append(f"the graph ends in parameter {parameters[id(node.variable)]}")
        if passed := [name for name in produced.get(node, ()) if name in guarded]:
            findings.append(f"the graph passes module {passed[-1]}")
    return sorted(set(findings))


def met_in_backward(model: nn.Module, inputs: tuple, backbone: nn.Module, loss: Callable, /, **keywords) -> list[str]:
    """Proof 3: which weights of the backbone does a gradient meet in an operator of the backward pass? None may.

    A gradient that goes on below a layer with weights has been multiplied by them, whoever wrote the backward pass.
    Weights of modules in some ``passed_by_design`` list are not counted.
    """
    names = stream(model, backbone)
    guarded = {id(t) for name, m in model.named_modules() if name in names for t in m.parameters(recurse=False)}
    value = loss(model(*inputs, **keywords))
    gradient = torch.ones_like(value)
    watch = _Meetings({name: p for name, p in model.named_parameters() if id(p) in guarded}, gradient)
    with closing(watch), watch:
        value.backward(gradient)
    return [f"a gradient meets parameter {name} in the backward pass" for name in sorted(watch.met)]


class _Meetings(LiveBytes):
    """Marks the storages that are computed from a gradient, and names the weights that meet one of them."""

    def __init__(self, weights: dict[str, Tensor], gradient: Tensor) -> None:
        super().__init__()
        self.met: set[str] = set()
        self._weights = {self.add(weight): name for name, weight in weights.items()}
        self._marked = {self.add(gradient)}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        numbers = [self.add(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        marked = not self._marked.isdisjoint(numbers)
        weights = [self._weights[n] for n in numbers if n in self._weights]
        if marked:
            self.met.update(weights)
        result = super().__torch_dispatch__(func, types, args, kwargs)
        for t in tree_leaves(result):
            if isinstance(t, Tensor):
                if marked:
                    self._marked.add(self.add(t))
                elif weights and len(weights) == len(numbers):  # a cast or another copy of weights is a weight
                    self._weights.setdefault(self.add(t), weights[0])
        return result


def stream(model: nn.Module, backbone: nn.Module) -> set[str]:
    """The names of the backbone's modules that no gradient may pass: all but those in some ``passed_by_design``."""
    by_design = {part for m in model.modules() for top in getattr(m, "passed_by_design", ()) for part in top.modules()}
    inside = set(backbone.modules()) - by_design
    return {name for name, module in model.named_modules() if module in inside}


@contextmanager
def producers(model: nn.Module) -> Iterator[dict[object, list[str]]]:
    """Record the forward pass: graph node -> names of the modules whose output it is, the outermost last."""
    produced: dict[object, list[str]] = {}

    def remember(name: str, module: nn.Module, args: tuple, output: object) -> None:
        for t in tensors_in(output):
            if t.grad_fn is not None:
                produced.setdefault(t.grad_fn, []).append(name)

    with ExitStack() as hooks:
        for name, module in model.named_modules():
            hooks.enter_context(module.register_forward_hook(partial(remember, name)))
        yield produced


def moved_by_optimizer(
    model: nn.Module, inputs: tuple, backbone: nn.Module, loss: Callable, **keywords
) -> tuple[list[str], list[str]]:
    """Proof 4: what of the backbone do steps on *all* parameters move? Nothing. What of the rest do they not move?

    Weight decay is zero: it would move a parameter without any gradient being involved.

    Returns:
        The findings on the backbone, and those on trainable parameters of the rest that have no gradient or a zero one.
    """
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    # Adam's steps have the same length however small a gradient is: what has one moves visibly.
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-15, weight_decay=0.0)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss(model(*inputs, **keywords)).backward()
        optimizer.step()
    frozen = {name for name, _ in _named(model, backbone)}
    moved, unmoved = [], []
    for name, p in model.named_parameters():
        if name in frozen:
            if not torch.equal(p, before[name]):
                moved.append(f"parameter {name} was moved by the optimizer")
        elif p.requires_grad and torch.equal(p, before[name]):
            why = "the loss does not depend on it" if p.grad is None else "its gradient is zero"
            unmoved.append(f"trainable parameter {name} did not move in {STEPS} steps: {why}")
    return moved, unmoved


def not_repeatable(model: nn.Module, inputs: tuple, backbone: nn.Module, /, **keywords) -> list[str]:
    """Proof 5: which backbone modules give another output in a second pass in train mode? None may.

    Stochastic depth or dropout left on, or batch statistics, show here: frozen is a mode and not only a flag.
    """
    names = {module: name for name, module in model.named_modules()}
    passes: list[list[tuple[str, Tensor]]] = []

    def remember(module: nn.Module, args: tuple, output: object) -> None:
        # A sum tells two maps apart; keeping the maps themselves would take the memory that isolation saves.
        passes[-1].extend((names[module], t.detach().double().sum()) for t in tensors_in(output))

    buffers = {name: b.clone() for name, b in backbone.named_buffers()}
    with ExitStack() as hooks, torch.no_grad():
        for module in backbone.modules():
            hooks.enter_context(module.register_forward_hook(remember))
        for _ in range(2):
            passes.append([])
            model(*inputs, **keywords)
    first, second = passes
    findings = [f"module {a} is not repeatable in train mode" for (a, x), (_, y) in zip(first, second) if x != y]  # noqa: B905
    findings += [f"buffer {n} of the backbone changed" for n, b in backbone.named_buffers() if not b.equal(buffers[n])]
    return list(dict.fromkeys(findings))[:10]  # everything behind the first random module differs too


def random_functional(output: object) -> Tensor:
    """The same random linear functional at every call: sum of <w, t> over all float tensors t in ``output``, scaled.

    Raises:
        InputError: If there is no float tensor in ``output``.
    """
    generator = torch.Generator().manual_seed(SEED)
    terms = []
    for t in tensors_in(output):
        if t.is_floating_point():
            w = torch.randn(t.shape, generator=generator, device="meta" if t.is_meta else "cpu").to(t)
            terms.append((w * t).sum() / max(t.numel(), 1) ** 0.5)
    if not terms:
        raise InputError(f"no float tensor was found in the output, a {type(output).__name__}: pass loss=<a function>.")
    return torch.stack(terms).sum()


def tensors_in(value: object) -> Iterator[Tensor]:
    """All tensors in nested lists, tuples, mappings and dataclasses."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from tensors_in(list(value.values()))
    elif is_dataclass(value) and not isinstance(value, type):
        yield from tensors_in([getattr(value, field.name) for field in fields(value)])
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)


def walk(root: object, stops: frozenset = frozenset()) -> Iterator[object]:
    """Every node of the autograd graph from ``root`` (a ``grad_fn``) on, each once; none behind one of ``stops``."""
    seen, todo = {root}, [root]
    while todo:
        node = todo.pop()
        yield node
        for below in () if node in stops else next_nodes(node):
            if below not in seen:
                seen.add(below)
                todo.append(below)


def next_nodes(node: object) -> list[object]:
    """The nodes that a node of the graph passes its gradient to, once per input: twice the same for ``x * x``."""
    return [below for below, _ in node.next_functions if below is not None]


def find_backbone(model: nn.Module, backbone: nn.Module | str | None) -> nn.Module:
    """The frozen part: as given, by its name in the model, or the innermost module called ``backbone``.

    Innermost, since a detector calls by that name what contains the tuned backbone, which contains the pretrained one.

    Raises:
        InputError: If there is none.
    """
    modules = dict(model.named_modules())
    if backbone is None:
        found = [name for name in modules if name.split(".")[-1] == "backbone"]
        if not found:
            raise InputError("name the frozen part: backbone=<a module of the model, or its name in it>.")
        backbone = modules[max(found, key=lambda name: name.count("."))]
    elif isinstance(backbone, str):
        if backbone not in modules:
            raise InputError(f"the model has no module named '{backbone}'.")
        backbone = modules[backbone]
    elif backbone not in modules.values():
        raise InputError("backbone is not a part of the model.")
    return backbone


def _named(model: nn.Module, backbone: nn.Module) -> list[tuple[str, nn.Parameter]]:
    inside = {id(p) for p in backbone.parameters()}
    return [(name, p) for name, p in model.named_parameters() if id(p) in inside]
