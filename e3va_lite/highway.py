"""The gradient highway (section 3.2, Figs. 2-3, equations 7-8).

    (7)  l[i+1] = l[i] + f_P1(l[i]) + f_P2(l[i] + f_P1(l[i]))                       frozen, no gradient
    (8)  e[i+1] = e[i] + f_A1(f_P1(l[i])) + f_A2(f_P2(l[i] + f_P1(l[i])))           trained

The highway starts where the stream starts, ``e[0] = l[0]``, and passes the stream's own reductions between stages. Its
adapters are the identity when new, so at step 0 ``e`` equals ``l`` and the model is the frozen one. Afterwards
``e - l`` is, within a stage, a plain sum over the adapters: all adapters of a stage receive the same gradient, and its
way to each of them has length one. Nothing that is computed on the stream ``l`` is ever part of the graph.
"""

import copy

import torch
from torch import Tensor, nn

from .adapters import LowRankAdapter, StandardAdapter
from .backbones.base import SideNetwork, embed, f_p1, f_p2
from .errors import InputError, unknown
from .fused import highway as fused

# Figure 3 and the words around it. Each takes e, the taps f1 and f2 and the block's two adapters.
STRUCTURES = {
    "parallel": lambda e, f1, f2, a1, a2: e + a1(f1) + a2(f2),  # equation (8)
    "stacked": lambda e, f1, f2, a1, a2: e + a2(a1(f1) + f2),  # the second adapter sees the first
    "chained": lambda e, f1, f2, a1, a2: a2(a1(e + f1) + f2),  # the highway itself runs through every adapter
}
ADAPTERS = {"low_rank": LowRankAdapter, "standard": StandardAdapter}
REDUCTIONS = ("inherited", "trainable")
FPN_INPUTS = ("e", "e+l")
STARTS = ("identity", "random")
MEMORY = (*fused.WAYS, "reference")


class E3VA(SideNetwork):
    """A frozen backbone and the highway beside it; maps of the highway go to the neck.

    Args:
        trunk: The pretrained part; it is frozen here.
        stages: The stages (from 1) whose maps the task consumes; norms exist for these only.
        structure: How the two adapters of a block meet (Fig. 3), a key of ``STRUCTURES``.
        adapter: ``low_rank`` or ``standard`` (Fig. 4).
        rank: alpha of the low-rank adapter; E3VA 8, E3VA+ 16, E3VA++ 32.
        middle: Middle dimension; n/2 for ``low_rank`` and 32 for ``standard`` if not given (Table 5).
        reduction: ``inherited``: the highway passes the backbone's own frozen layers; ``trainable``: copies of them,
            trained (Table 6).
        fpn_norm_trainable: Whether the norms before the neck are trained (Table 6).
        fpn_input: What the norms see: the highway ``e``, or ``e+l``.
        start: New adapters are the identity, or, with ``random``, their outer factors are random like the inner ones.
        memory: How a parallel highway is computed: ``store``, ``compress`` or ``recompute`` say what happens to the
            taps until the backward pass, see :mod:`e3va_lite.fused.highway`; ``reference`` computes equations (7) and
            (8) word for word and leaves the rest to autograd, and is the only way for ``stacked`` and ``chained``.
            If not given, ``compress`` where it can be.

    Attributes:
        out_channels, strides, divisor: Of the maps, see :class:`e3va_lite.backbones.base.SideNetwork`.
        passed_by_design: The backbone's modules that the highway runs through although they belong to the stream:
            the inherited reductions. Gradients pass them; their parameters get none.
    """

    def __init__(
        self,
        trunk: nn.Module,
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
                f"memory={memory} needs the one gradient that parallel adapters share: with structure={structure} only "
                "memory=reference is possible."
            )
        super().__init__(trunk, stages, fpn_norm_trainable)
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
            for stage in trunk.layers[: self.last_stage]
        )
        if start == "random":
            for weight, _ in (adapter.outer for stage in self.adapters for pair in stage for adapter in pair):
                nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
        # The first entry is the identity: a stage is reduced where it begins.
        own_reductions = [copy.deepcopy(stage.downsample) for stage in trunk.layers[: self.last_stage]]
        self.reductions = nn.ModuleList(own_reductions).requires_grad_() if reduction == "trainable" else None

    @property
    def passed_by_design(self) -> list[nn.Module]:
        return [] if self.reductions is not None else [stage.downsample for stage in self.trunk.layers]

    def reduction(self, index: int) -> nn.Module:
        """What the highway passes before stage ``index`` (from 0); before the first it is the identity."""
        return self.trunk.layers[index].downsample if self.reductions is None else self.reductions[index]

    def norm(self, index: int) -> nn.Module | None:
        """The norm behind stage ``index`` (from 0), if its map is consumed."""
        key = str(index + 1)
        return self.norms[key] if key in self.norms else None  # noqa: SIM401, a ModuleDict has no get

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) -> one map (B, C_i, ceil(H/s_i), ceil(W/s_i)) per consumed stage."""
        return self.reference(images) if self.memory == "reference" else fused.run(self, images)

    def reference(self, images: Tensor) -> list[Tensor]:
        """The same, equations (7) and (8) word for word."""
        with torch.no_grad():
            l = embed(self.trunk, images)  # noqa: E741  (B, H/4, W/4, C), the paper's letter
        e = l
        maps = {}
        for index, (stage, adapters) in enumerate(zip(self.trunk.layers, self.adapters, strict=False)):
            e = self.reduction(index)(e)  # the gradient passes these layers ...
            with torch.no_grad():
                l = stage.downsample(l)  # noqa: E741  ... and never these
            for block, (a1, a2) in zip(stage.blocks, adapters, strict=True):
                with torch.no_grad():
                    f1 = f_p1(block, l)
                    f2 = f_p2(block, l + f1)
                    l = l + f1 + f2  # noqa: E741  equation (7)
                e = self.join(e, f1, f2, a1, a2)  # equation (8)
            maps[index + 1] = e if self.fpn_input == "e" else e + l
        return self.norms.finish(self.norms(maps), images)
