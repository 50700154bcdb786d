"""A leak lab: highways with one planted mistake each, to practise the five proofs of :mod:`.isolation` on.

>>> from e3va_lite.analysis import leaks
>>> model = leaks.suspect("ada", 1)  # for a name and a number always the same
>>> leaks.findings(model)  # number of a proof -> what it finds
>>> leaks.confirm("ada", 1, kind="mode", place="mlp", stage=3)

A suspect computes equations (7) and (8) on ``swin_nano``, apart from its mistake: of one kind, at one place, in one
stage. Nothing in the model says which; the proofs do.
"""

# ruff: noqa: E741, l is the paper's letter for the frozen stream

import hashlib
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..backbones.swin import create_swin, embed, f_p1, f_p2
from ..errors import InputError, unknown
from ..highway import E3VA
from . import isolation
from .model_state import restored

#: Kind of a mistake -> what is wrong.
KINDS = {
    "highway": "what is computed there reads the highway e, not the stream l",
    "hidden": "the same, inside an autograd.Function of its own, which is one node of the graph",
    "flags": "pretrained parameters ask for a gradient there, and get one",
    "mode": "a pretrained module is left in train mode there",
    "cut": "the adapter there gets no gradient",
}

#: Place of a mistake -> where it is. A boundary is counted to the stage that it leads into, 2, 3 or 4.
PLACES = {
    "attention": "the first tap of a block and its adapter",
    "mlp": "the second tap of a block and its adapter",
    "boundary": "the reduction before the stage's first block",
}

STAGES = (1, 2, 3, 4)


class Leak(NamedTuple):
    """A mistake, and the numbers of the proofs that find it."""

    kind: str
    place: str
    stage: int
    proofs: tuple[int, ...]


_PROOFS = {"highway": (2, 3), "hidden": (3,), "flags": (1, 2, 3, 4), "mode": (5,), "cut": (4,)}

#: Every leak there is. No weight stands between a trained reduction and the highway, so the third proof has nothing to
#: find there.
LEAKS = tuple(
    Leak(kind, place, stage, (1, 2, 4) if (kind, place) == ("flags", "boundary") else _PROOFS[kind])
    for kind in KINDS
    for place in PLACES
    for stage in STAGES
    if place != "boundary" or (stage > 1 and kind in ("highway", "flags"))
)


def suspect(name: str, number: int) -> nn.Module:
    """A highway on ``swin_nano`` with one mistake; which, depends on the name and the number alone.

    Args:
        name: Whose leaks; capitals and spaces around it do not matter.
        number: From 1 on, without end; each five in a row are of five kinds. :func:`confirm` knows these. The numbers
            -1, -2 and -3 are those of assignment 4, of three kinds.

    Returns:
        A model that takes float images (B, 3, H, W). Its modules are called as in :class:`e3va_lite.E3VA`.

    Raises:
        InputError: For an empty name, or another number.
    """
    return _planted(answer(name, number))


def confirm(name: str, number: int, kind: str, place: str, stage: int) -> str:
    """Say whether this is the mistake of ``suspect(name, number)``, and what of it is not, in a sentence.

    Raises:
        InputError: For a kind, place or stage that does not exist, or a number that is not for practice.
    """
    for what, value, known in (("kind", kind, KINDS), ("place", place, PLACES), ("stage", stage, STAGES)):
        if value not in known:
            raise unknown(what, str(value), map(str, known))
    if number < 1:
        raise InputError(f"leak {number} is a task: only those from 1 on, which are for practice, are confirmed.")
    leak = answer(name, number)
    wrong = [what for what, mine in (("kind", kind), ("place", place), ("stage", stage)) if getattr(leak, what) != mine]
    if wrong:
        return f"not yet: wrong {' and '.join(wrong)}"
    found_by = " and ".join(f"proof {n}" for n in leak.proofs)
    return f"right: {KINDS[kind]} ({place}, stage {stage}); found by {found_by}"


def findings(model: nn.Module, images: Tensor | None = None) -> dict[int, list[str]]:
    """What each of the five proofs finds in a suspect, or in another model with a module called ``backbone``.

    Args:
        model: It is run in train mode and restored afterwards.
        images: Float images (B, 3, H, W); by default two random ones of 64x64.

    Returns:
        Number of a proof -> its findings; nothing found is an empty list. What the optimizer of the fourth proof does
        not move is among that proof's.
    """
    if images is None:
        images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(isolation.SEED + 1))
    given = model, (images,), isolation.find_backbone(model, None)
    loss = isolation.random_functional
    with restored(model):
        model.train()
        return {
            1: isolation.parameters_with_grad(*given, loss),
            2: isolation.reached_by_graph(*given, loss),
            3: isolation.met_in_backward(*given, loss),
            4: [line for lines in isolation.moved_by_optimizer(*given, loss) for line in lines],
            5: isolation.not_repeatable(*given),
        }


def answer(name: str, number: int) -> Leak:
    """The mistake of ``suspect(name, number)``: for those who grade.

    Raises:
        InputError: As :func:`suspect`.
    """
    name = name.strip().casefold()
    if not name:
        raise InputError("the name is empty: the leaks are drawn from it, so give one.")
    if number < -3 or number == 0:
        raise InputError(f"there is no leak {number}: practise on 1, 2, 3, ...; -1, -2 and -3 are the assignment's.")
    five, place = divmod(number - 1, len(KINDS))

    def drawn(item: object) -> bytes:
        return hashlib.sha256(repr((name, five, item)).encode()).digest()

    kind = sorted(KINDS, key=drawn)[place]
    return min((leak for leak in LEAKS if leak.kind == kind), key=lambda leak: drawn(leak[:3]))


class _Lab(nn.Module):
    """The parts of the package's highway in a loop of its own, whose steps are given."""

    def __init__(self, highway: E3VA, enter: Callable, pass_block: Callable, set_mode: Callable) -> None:
        super().__init__()
        self.backbone, self.adapters, self.norms = highway.backbone, highway.adapters, highway.norms
        self.passed_by_design = highway.passed_by_design
        self._steps = enter, pass_block, set_mode
        self.train()

    def train(self, mode: bool = True) -> nn.Module:
        super().train(mode)
        self.backbone.eval()
        self._steps[2](self.backbone, mode)
        return self

    def forward(self, images: Tensor) -> list[Tensor]:
        enter, pass_block, _ = self._steps
        with torch.no_grad():
            l = embed(self.backbone, images)  # (B, H/4, W/4, C)
        e = l
        maps = {}
        for number, (stage, pairs) in enumerate(zip(self.backbone.layers, self.adapters, strict=True), start=1):
            l, e = enter(number, stage, l, e)
            for block, (a1, a2) in zip(stage.blocks, pairs, strict=True):
                l, e = pass_block(number, block is stage.blocks[-1], block, l, e, a1, a2)
            maps[number] = e
        return self.norms.finish(self.norms(maps), images)


class _Tap(torch.autograd.Function):
    """A function computed without a graph whose backward pass computes it once more, with one."""

    @staticmethod
    def forward(ctx, x: Tensor, function: Callable) -> Tensor:
        ctx.function = function
        ctx.save_for_backward(x)
        return function(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            y = ctx.function(x)
        return *torch.autograd.grad(y, x, gradient), None


def _planted(leak: Leak | None) -> _Lab:
    """A highway with this mistake, or without one; its adapters are not new: gradients reach all of their factors."""
    kind, where, at, _ = leak or (None, None, None, ())
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        highway = E3VA(create_swin("swin_nano"), STAGES, start="random", memory="reference")
    for block in (block for stage in highway.backbone.layers for block in stage.blocks):
        block.attn.proj_drop.p = block.mlp.drop2.p = 0.1  # acts in train mode only
    if kind == "flags":
        stage = highway.backbone.layers[at - 1]
        asking = {"attention": stage.blocks[-1].norm1, "mlp": stage.blocks[-1].norm2, "boundary": stage.downsample}
        asking[where].requires_grad_(True)

    def set_mode(backbone: nn.Module, mode: bool) -> None:
        if kind == "mode":
            block = backbone.layers[at - 1].blocks[-1]
            (block.attn.proj_drop if where == "attention" else block.mlp.drop2).train(mode)

    def enter(number: int, stage: nn.Module, l: Tensor, e: Tensor) -> tuple[Tensor, Tensor]:
        e = stage.downsample(e)
        if (kind, where, at) == ("highway", "boundary", number):
            return e, e
        with torch.no_grad():
            return stage.downsample(l), e

    again = {
        "highway": lambda function, x, e: function(e),
        "hidden": lambda function, x, e: _Tap.apply(e, function),
        "flags": lambda function, x, e: function(x),
    }

    def pass_block(
        number: int, last: bool, block: nn.Module, l: Tensor, e: Tensor, a1: nn.Module, a2: nn.Module
    ) -> tuple[Tensor, Tensor]:
        here = where if last and at == number else None
        with torch.no_grad():
            f1 = f_p1(block, l)
            middle = l + f1
            f2 = f_p2(block, middle)
        after = middle + f2  # equation (7), (B, H, W, C)
        if l.requires_grad:  # the stream comes from the highway: its graph ends with this block
            f1 = f_p1(block, l)
            f2 = f_p2(block, l + f1)
        if here == "attention" and kind in again:
            f1 = again[kind](partial(f_p1, block), l, e)
        if here == "mlp" and kind in again:
            f2 = again[kind](partial(f_p2, block), middle, e)
        added = {"attention": a1(f1), "mlp": a2(f2)}
        if kind == "cut" and here:
            added[here] = added[here].detach()
        return after, e + added["attention"] + added["mlp"]  # equation (8), (B, H, W, C)

    return _Lab(highway, enter, pass_block, set_mode)
