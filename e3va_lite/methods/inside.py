"""The methods inside the backbone: they train parameters in it, and so the gradient flows through it."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..adapters import KernelAdapter, QVUpdate, StandardAdapter
from ..backbones.base import TunedBackbone, embed, f_p1, f_p2, freeze, is_neck
from ..fused import frozen_stream, is_recorded

MIDDLE = 64  # "middle dim of these methods are set to 64" (section 4.1): adapter, lora, adaptformer


def plain_block(block: nn.Module, x: Tensor) -> Tensor:
    """Equation (5), the Swin block itself; (B, H, W, C) -> (B, H, W, C)."""
    x = x + f_p1(block, x)
    return x + f_p2(block, x)


def serial_block(block: nn.Module, x: Tensor, a1: nn.Module, a2: nn.Module) -> Tensor:
    """Equation (6): adapters after the attention and after the MLP, inside the backbone; (B, H, W, C) as above."""
    x = x + a1(f_p1(block, x))
    return x + a2(f_p2(block, x))


class ScaledAdapter(StandardAdapter):
    """The adapter of AdaptFormer (Chen et al. 2022): no skip, and a learnt scale."""

    def __init__(self, dim: int, middle: int) -> None:
        super().__init__(dim, middle)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.change(x)


def beside_block(block: nn.Module, x: Tensor, a1: nn.Module, a2: nn.Module) -> Tensor:
    """AdaptFormer: adapters beside attention and MLP, on the same input."""
    x = x + f_p1(block, x) + a1(x)
    return x + f_p2(block, x) + a2(x)


class ThroughBackbone(TunedBackbone):
    """A backbone that gradients flow through, as far down as anything in it is trained.

    Args:
        backbone: The pretrained backbone. The caller decides which of its parameters are trained.
        stages: See :class:`~e3va_lite.backbones.base.TunedBackbone`.
        fpn_norm_trainable: See there.
        run_block: ``(block, x, *extra) -> x`` for one block.
        extra: Per block of the network in order, the modules that ``run_block`` takes; none if not given.
        checkpointing: Save only the input of each block and recompute the rest in the backward pass (gradient
            checkpointing).
        stochastic: Keep the backbone's stochastic depth on in train mode.
        frozen: Nothing before the norms is trained: compute the blocks in the fused form of
            :mod:`e3va_lite.fused.frozen_stream`, where forward hooks on them do not fire. Set it to False on a built
            backbone to have every module called.
    """

    def __init__(
        self,
        backbone: nn.Module,
        stages: tuple[int, ...],
        fpn_norm_trainable: bool,
        run_block: Callable[..., Tensor] = plain_block,
        extra: list[nn.ModuleList] | None = None,
        checkpointing: bool = False,
        stochastic: bool = False,
        frozen: bool = False,
    ) -> None:
        super().__init__(backbone, stages, fpn_norm_trainable)
        self.run_block = run_block
        self.extra = nn.ModuleList(extra or [])
        self.checkpointing = checkpointing
        self.stochastic = stochastic
        self.frozen = frozen

    def train(self, mode: bool = True) -> "ThroughBackbone":
        super().train(mode)
        self.backbone.train(mode and self.stochastic)
        return self

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) -> one map (B, C_i, ceil(H/s_i), ceil(W/s_i)) per consumed stage."""
        if self.cache is not None and self.training:
            maps = {stage: self.cache.output(stage - 1) for stage in self.norms.stages}
            return self.norms.finish(self.norms(maps), images)
        x = embed(self.backbone, images)
        extra = iter(self.extra)
        maps = {}
        for number, stage in enumerate(self.backbone.layers[: self.last_stage], start=1):
            x = stage.downsample(x)
            if self.frozen and not is_recorded():
                x = x.clone() if x is maps.get(number - 1) else x  # where nothing is reduced: it is overwritten below
                with torch.no_grad():
                    for _ in frozen_stream.run(stage, x):
                        pass
            else:
                for block in stage.blocks:
                    x = self._run(block, x, *next(extra, ()))
            maps[number] = x
        return self.norms.finish(self.norms(maps), images)

    def _run(self, *arguments: object) -> Tensor:
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(self.run_block, *arguments, use_reentrant=False)
        return self.run_block(*arguments)


class LoRA(ThroughBackbone):
    """A frozen backbone with low-rank updates of q and v in every attention.

    The arguments are those of :class:`ThroughBackbone`, and the rank of the updates.
    """

    def __init__(
        self, backbone: nn.Module, stages: tuple[int, ...], rank: int, fpn_norm_trainable: bool, checkpointing: bool
    ) -> None:
        super().__init__(freeze(backbone), stages, fpn_norm_trainable, checkpointing=checkpointing)
        self.updates = nn.ModuleList(QVUpdate(block.dim, rank) for block in _blocks(backbone, stages))
        for block, update in zip(_blocks(backbone, stages), self.updates, strict=True):
            block.attn.qkv.register_forward_hook(update.hook)

    @torch.no_grad()
    def merge(self) -> None:
        """Add the updates to the weights of q and v and drop them: the same maps, at the cost of a frozen backbone.

        The backbone then has other weights than the pretrained ones, so that adapters no longer fit it.
        """
        for block, update in zip(_blocks(self.backbone, self.norms.stages), self.updates, strict=True):
            qkv = block.attn.qkv
            q, v = update.b @ update.a  # (C, C) each
            qkv.weight += torch.cat([q, torch.zeros_like(q), v])
            for key, hook in list(qkv._forward_hooks.items()):  # a copied model has no handles
                if getattr(hook, "__self__", None) is update:
                    del qkv._forward_hooks[key]
        self.updates, self.frozen = nn.ModuleList(), True


def full(backbone: nn.Module, stages, fpn_norm="trainable", checkpointing=False) -> nn.Module:
    """Everything is trained."""
    return ThroughBackbone(backbone, stages, fpn_norm == "trainable", checkpointing=checkpointing, stochastic=True)


def fixed(backbone: nn.Module, stages, fpn_norm="fixed") -> nn.Module:
    """Nothing but neck and head is trained; ``fpn_norm="trainable"`` shows what the norms alone contribute."""
    return ThroughBackbone(freeze(backbone), stages, fpn_norm == "trainable", frozen=True)


def bitfit(backbone: nn.Module, stages, fpn_norm="trainable", checkpointing=False) -> nn.Module:
    """Every parameter with "bias" in its name, relative-position bias tables and the norms' biases too."""
    for name, parameter in freeze(backbone).named_parameters():
        parameter.requires_grad_("bias" in name)
    model = ThroughBackbone(backbone, stages, False, checkpointing=checkpointing)
    for name, parameter in model.norms.named_parameters():
        if name.endswith("bias"):
            parameter.requires_grad_(fpn_norm == "trainable" or is_neck(f"norms.{name}"))
    return model


def norm(backbone: nn.Module, stages, fpn_norm="trainable", checkpointing=False) -> nn.Module:
    """Every norm of the backbone, and the norms before the neck."""
    for module in freeze(backbone).modules():
        if isinstance(module, nn.LayerNorm):
            module.requires_grad_()
    return ThroughBackbone(backbone, stages, fpn_norm == "trainable", checkpointing=checkpointing)


def partial1(backbone: nn.Module, stages, fpn_norm="fixed", checkpointing=False) -> nn.Module:
    """The last block."""
    model = ThroughBackbone(freeze(backbone), stages, fpn_norm == "trainable", checkpointing=checkpointing)
    _blocks(backbone, stages)[-1].requires_grad_()
    return model


def adapter(backbone: nn.Module, stages, middle=MIDDLE, fpn_norm="fixed", checkpointing=False) -> nn.Module:
    """Two standard adapters per block, inside it (Houlsby et al. 2019)."""
    extra = _pairs(backbone, stages, lambda dim: StandardAdapter(dim, middle))
    return ThroughBackbone(freeze(backbone), stages, fpn_norm == "trainable", serial_block, extra, checkpointing)


def lora(backbone: nn.Module, stages, rank=MIDDLE, fpn_norm="fixed", checkpointing=False) -> nn.Module:
    """Low-rank updates of q and v in every attention (Hu et al. 2022)."""
    return LoRA(backbone, stages, rank, fpn_norm == "trainable", checkpointing)


def adaptformer(backbone: nn.Module, stages, middle=MIDDLE, fpn_norm="fixed", checkpointing=False) -> nn.Module:
    """Two scaled adapters per block, beside attention and MLP (Chen et al. 2022)."""
    extra = _pairs(backbone, stages, lambda dim: ScaledAdapter(dim, middle))
    return ThroughBackbone(freeze(backbone), stages, fpn_norm == "trainable", beside_block, extra, checkpointing)


def lorand(backbone: nn.Module, stages, rank=8, branches=2, fpn_norm="fixed", checkpointing=False) -> nn.Module:
    """Two low-rank adapters with a shared kernel per block, inside it (Yin et al. 2023)."""
    extra = _pairs(backbone, stages, lambda dim: KernelAdapter(dim, rank, branches))
    return ThroughBackbone(freeze(backbone), stages, fpn_norm == "trainable", serial_block, extra, checkpointing)


def _blocks(backbone: nn.Module, stages: tuple[int, ...]) -> list[nn.Module]:
    return [block for stage in backbone.layers[: max(stages)] for block in stage.blocks]


def _pairs(backbone: nn.Module, stages: tuple[int, ...], make: Callable[[int], nn.Module]) -> list[nn.ModuleList]:
    return [nn.ModuleList([make(block.dim), make(block.dim)]) for block in _blocks(backbone, stages)]
