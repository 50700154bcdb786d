"""The gradient highway (section 3.2, Figs. 2-3, equations 7-8).

    (7)  l[i+1] = l[i] + f_P1(l[i]) + f_P2(l[i] + f_P1(l[i]))                       frozen, no gradient
    (8)  e[i+1] = e[i] + f_A1(f_P1(l[i])) + f_A2(f_P2(l[i] + f_P1(l[i])))           trained

``l`` is the frozen stream, ``e`` the highway. The highway starts where the stream starts, ``e[0] = l[0]``, and passes
the backbone's own reductions between stages. New adapters are the identity, so at step 0 ``e`` equals ``l`` and the
model is the frozen one. Afterwards ``e - l`` is, within a stage, a plain sum over the adapters: all adapters of a stage
receive the same gradient, over a path of length one. Nothing that is computed on ``l`` is part of the autograd graph.
"""

import copy

import torch
from torch import Tensor, nn

from .adapters import LowRankAdapter, StandardAdapter
from .backbones.base import SideNetwork, embed, f_p1, f_p2
from .errors import InputError, unknown
from .fused import highway as fused
from .fused import is_recorded

# How the two adapters of a block meet (Fig. 3): functions of e, the taps f1 and f2, and the adapters a1 and a2.


def parallel(e: Tensor, f1: Tensor, f2: Tensor, a1: nn.Module, a2: nn.Module) -> Tensor:
    return e + a1(f1) + a2(f2)  # equation (8)


def stacked(e: Tensor, f1: Tensor, f2: Tensor, a1: nn.Module, a2: nn.Module) -> Tensor:
    return e + a2(a1(f1) + f2)  # the second adapter sees the output of the first


def chained(e: Tensor, f1: Tensor, f2: Tensor, a1: nn.Module, a2: nn.Module) -> Tensor:
    return a2(a1(e + f1) + f2)  # the highway itself passes through every adapter


STRUCTURES = {"parallel": parallel, "stacked": stacked, "chained": chained}
ADAPTERS = {"low_rank": LowRankAdapter, "standard": StandardAdapter}
REDUCTIONS = ("inherited", "trainable")
FPN_INPUTS = ("e", "e+l")
STARTS = ("identity", "random")
MEMORY = (*fused.MEMORY_MODES, "reference")


class E3VA(SideNetwork):
    """A frozen backbone and the highway beside it; maps of the highway go to the neck.

    Args:
        backbone: The pretrained backbone; it is frozen here.
        stages: The stages (from 1) whose maps the task consumes; norms exist for these only.
        structure: How the two adapters of a block meet (Fig. 3), a key of ``STRUCTURES``.
        adapter: ``low_rank`` or ``standard`` (Fig. 4).
        rank: alpha of the low-rank adapter; E3VA 8, E3VA+ 16, E3VA++ 32.
        middle: Middle dimension. Default: n/2 for ``low_rank`` and 32 for ``standard`` (Table 5).
        reduction: ``inherited``: the highway passes the backbone's own frozen layers; ``trainable``: it passes copies
            of them, which are trained (Table 6).
        fpn_norm_trainable: Whether the norms before the neck are trained (Table 6).
        fpn_input: The input of these norms: the highway ``e``, or ``e+l``.
        start: ``identity``: new adapters are the identity; ``random``: their outer factors are random, too.
        memory: The memory mode. ``store``, ``compress`` and ``recompute`` compute a parallel highway in the fused form
            of :mod:`e3va_lite.fused.highway`, which names what each of them keeps for the backward pass; forward hooks
            on the backbone's blocks do not fire there. ``reference`` computes equations (7) and (8) literally, calls
            every module and leaves the backward pass to autograd; it is required for ``stacked`` and ``chained``, and
            taken by itself where operators are recorded, see :func:`e3va_lite.fused.is_recorded`.
            Default: ``compress`` for parallel adapters.

    Attributes:
        out_channels, strides, divisor: Of the maps, see :class:`e3va_lite.backbones.base.SideNetwork`.
        passed_by_design: The backbone's modules that the highway passes, too: the inherited reductions. Gradients flow
            through them; their parameters receive none.

    Raises:
        InputError: For an unknown value of an option, or a memory mode that the structure does not allow.
    """

    def __init__(
        self,
        backbone: nn.Module,
        stages: tuple[int, ...],
        structure: str = "parallel",
        adapter: str = "low_rank",
        rank: int = 8,
        middle: int | None = None,
        reduction: str = "inherited",
        fpn_norm_trainable: bool = True,
        fpn_input: str = "e",
        start: str = "identity",
        memory: str | None = None,
    ) -> None:
        if memory is None:
            memory = "compress" if structure == "parallel" else "reference"
        for kind, value, known in (
            ("structure", structure, STRUCTURES),
            ("adapter", adapter, ADAPTERS),
            ("reduction", reduction, REDUCTIONS),
            ("fpn_input", fpn_input, FPN_INPUTS),
            ("start", start, STARTS),
            ("memory", memory, MEMORY),
        ):
            if value not in known:
                raise unknown(kind, value, known)
        if structure != "parallel" and memory != "reference":
            raise InputError(
                f"memory={memory} needs the gradient that parallel adapters share: with structure={structure} only "
                "memory=reference is possible."
            )
        super().__init__(backbone, stages, fpn_norm_trainable)
        self.join = STRUCTURES[structure]
        self.fpn_input = fpn_input
        self.memory = memory
        sizes = (
            {"rank": rank, "middle": middle} if adapter == "low_rank" else {"middle": 32 if middle is None else middle}
        )
        self.adapters = nn.ModuleList(
            nn.ModuleList(
                nn.ModuleList(ADAPTERS[adapter](block.dim, **sizes) for _ in range(2)) for block in stage.blocks
            )
            for stage in backbone.layers[: self.last_stage]
        )
        if start == "random":
            for weight, _ in (adapter.outer for stage in self.adapters for pair in stage for adapter in pair):
                nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
        # The first entry is the identity: a stage is reduced where it begins.
        own_reductions = [copy.deepcopy(stage.downsample) for stage in backbone.layers[: self.last_stage]]
        self.reductions = nn.ModuleList(own_reductions).requires_grad_() if reduction == "trainable" else None

    @property
    def passed_by_design(self) -> list[nn.Module]:
        return [] if self.reductions is not None else [stage.downsample for stage in self.backbone.layers]

    def reduction(self, index: int) -> nn.Module:
        """The reduction of the highway before stage ``index`` (from 0); the identity before the first."""
        return self.backbone.layers[index].downsample if self.reductions is None else self.reductions[index]

    def norm(self, index: int) -> nn.Module | None:
        """The norm after stage ``index`` (from 0), or None if that stage's map is not consumed."""
        key = str(index + 1)
        return self.norms[key] if key in self.norms else None  # noqa: SIM401, a ModuleDict has no get

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) -> one map (B, C_i, ceil(H/s_i), ceil(W/s_i)) per consumed stage."""
        literal = self.memory == "reference" or is_recorded()
        return self.reference(images) if literal else fused.run(self, images)

    def reference(self, images: Tensor) -> list[Tensor]:
        """As :meth:`forward`, by equations (7) and (8) literally."""
        with torch.no_grad():
            l = embed(self.backbone, images)  # l[0], (B, H/4, W/4, C)
        e = l  # e[0]
        maps = {}
        for index, (stage, adapters) in enumerate(zip(self.backbone.layers, self.adapters, strict=False)):
            e = self.reduction(index)(e)  # gradients flow through these layers ...
            with torch.no_grad():
                l = stage.downsample(l)  # ... and never through these; both (B, H, W, C) of this stage
            for block, (a1, a2) in zip(stage.blocks, adapters, strict=True):
                with torch.no_grad():
                    f1 = f_p1(block, l)  # (B, H, W, C)
                    f2 = f_p2(block, l + f1)  # (B, H, W, C)
                    l = l + f1 + f2  # equation (7), (B, H, W, C)
                e = self.join(e, f1, f2, a1, a2)  # equation (8): e + a1(f1) + a2(f2), (B, H, W, C)
            maps[index + 1] = e if self.fpn_input == "e" else e + l
        return self.norms.finish(self.norms(maps), images)
