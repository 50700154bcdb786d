"""Every way of tuning of Tables 1 and 2, as one dict of functions: name -> backbone module.

All modules keep the one contract ``features = backbone(images)`` with ``out_channels`` and ``strides``, keep the
pretrained part under the key ``trunk.`` and, when new, compute what the frozen model computes. They differ in what is
trained and in which way a gradient takes.
"""

import inspect
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import yaml
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from . import stream
from .adapters import KernelAdapter, QVUpdate, StandardAdapter
from .backbones import create_trunk
from .errors import InputError, unknown
from .highway import E3VA
from .losa import LoSA
from .lst import LST
from .peft_lora import PEFTLoRA
from .trunk import embed, f_p1, f_p2, fpn_norms, freeze

MIDDLE = 64  # "middle dim of these methods are set to 64" (section 4.1): adapter, lora, adaptformer
FPN_NORM = ("trainable", "fixed")


def plain_block(block: nn.Module, x: Tensor) -> Tensor:
    """Equation (5), the Swin block itself; (B, H, W, C) -> (B, H, W, C)."""
    x = x + f_p1(block, x)
    return x + f_p2(block, x)


def serial_block(block: nn.Module, x: Tensor, a1: nn.Module, a2: nn.Module) -> Tensor:
    """Equation (6): adapters behind the attention and behind the MLP, inside the backbone."""
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


class ThroughBackbone(nn.Module):
    """A backbone that gradients run through, as far down as anything in it is trained.

    Args:
        trunk: The pretrained part; which of its parameters are trained is the caller's business.
        stages: The stages (from 1) whose maps the task consumes.
        fpn_norm_trainable: Whether the norms before the neck are trained.
        run_block: ``(block, x, *extra) -> x`` for one block.
        extra: Per block of the network in order, the modules that ``run_block`` wants; none if not given.
        checkpointing: Keep only each block's input and compute the rest again on the way back (gradient checkpointing).
        stochastic: Leave the backbone's stochastic depth on in train mode.
        frozen: Nothing before the norms is trained: run the blocks without a graph, see :mod:`e3va_lite.stream`.
    """

    def __init__(
        self,
        trunk: nn.Module,
        stages: tuple[int, ...],
        fpn_norm_trainable: bool,
        run_block: Callable[..., Tensor] = plain_block,
        extra: list[nn.ModuleList] | None = None,
        checkpointing: bool = False,
        stochastic: bool = False,
        frozen: bool = False,
    ) -> None:
        super().__init__()
        self.trunk = trunk
        self.run_block = run_block
        self.extra = nn.ModuleList(extra or [])
        self.checkpointing = checkpointing
        self.stochastic = stochastic
        self.frozen = frozen
        self.norms = fpn_norms(trunk, stages, fpn_norm_trainable)
        self.last_stage = max(self.norms.stages)
        self.out_channels, self.strides = self.norms.out_channels, self.norms.strides
        self.divisor = self.norms.divisor

    def train(self, mode: bool = True) -> "ThroughBackbone":
        super().train(mode)
        self.trunk.train(mode and self.stochastic)
        return self

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) -> one map (B, C_i, ceil(H/s_i), ceil(W/s_i)) per consumed stage."""
        x = embed(self.trunk, images)
        extra = iter(self.extra)
        maps = {}
        for number, stage in enumerate(self.trunk.layers[: self.last_stage], start=1):
            x = stage.downsample(x)
            if self.frozen:
                with torch.no_grad():
                    for _ in stream.run(stage, x):
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


def full(trunk: nn.Module, stages, fpn_norm="trainable", checkpointing=False) -> nn.Module:
    """Everything is trained."""
    return ThroughBackbone(trunk, stages, fpn_norm == "trainable", checkpointing=checkpointing, stochastic=True)


def fixed(trunk: nn.Module, stages, fpn_norm="fixed") -> nn.Module:
    """Nothing is trained but neck and head; ``fpn_norm="trainable"`` tells what the norms alone are worth."""
    return ThroughBackbone(freeze(trunk), stages, fpn_norm == "trainable", frozen=True)


def bitfit(trunk: nn.Module, stages, fpn_norm="trainable", checkpointing=False) -> nn.Module:
    """Every parameter with "bias" in its name, relative-position bias tables and the norms' biases too."""
    model = ThroughBackbone(freeze(trunk), stages, False, checkpointing=checkpointing)
    for name, parameter in model.named_parameters():
        inside_norms = name.startswith("norms.")
        parameter.requires_grad_("bias" in name and (fpn_norm == "trainable" or not inside_norms))
    return model


def norm(trunk: nn.Module, stages, fpn_norm="trainable", checkpointing=False) -> nn.Module:
    """Every norm of the backbone, and the norms before the neck."""
    model = ThroughBackbone(freeze(trunk), stages, fpn_norm == "trainable", checkpointing=checkpointing)
    for module in trunk.modules():
        if isinstance(module, nn.LayerNorm):
            module.requires_grad_()
    return model


def partial1(trunk: nn.Module, stages, fpn_norm="fixed", checkpointing=False) -> nn.Module:
    """The last block."""
    model = ThroughBackbone(freeze(trunk), stages, fpn_norm == "trainable", checkpointing=checkpointing)
    _blocks(trunk, stages)[-1].requires_grad_()
    return model


def adapter(trunk: nn.Module, stages, middle=MIDDLE, fpn_norm="fixed", checkpointing=False) -> nn.Module:
    """Two standard adapters per block, inside it (Houlsby et al. 2019)."""
    extra = _pairs(trunk, stages, lambda dim: StandardAdapter(dim, middle))
    return ThroughBackbone(freeze(trunk), stages, fpn_norm == "trainable", serial_block, extra, checkpointing)


def lora(trunk: nn.Module, stages, rank=MIDDLE, fpn_norm="fixed", checkpointing=False) -> nn.Module:
    """Low-rank updates of q and v in every attention (Hu et al. 2022)."""
    model = ThroughBackbone(freeze(trunk), stages, fpn_norm == "trainable", checkpointing=checkpointing)
    model.updates = nn.ModuleList(QVUpdate(block.dim, rank) for block in _blocks(trunk, stages))
    for block, update in zip(_blocks(trunk, stages), model.updates, strict=True):
        block.attn.qkv.register_forward_hook(update.hook)
    return model


def adaptformer(trunk: nn.Module, stages, middle=MIDDLE, fpn_norm="fixed", checkpointing=False) -> nn.Module:
    """Two scaled adapters per block, beside attention and MLP (Chen et al. 2022)."""
    extra = _pairs(trunk, stages, lambda dim: ScaledAdapter(dim, middle))
    return ThroughBackbone(freeze(trunk), stages, fpn_norm == "trainable", beside_block, extra, checkpointing)


def lorand(trunk: nn.Module, stages, rank=8, branches=2, fpn_norm="fixed", checkpointing=False) -> nn.Module:
    """Two low-rank adapters with a shared kernel per block, inside it (Yin et al. 2023)."""
    extra = _pairs(trunk, stages, lambda dim: KernelAdapter(dim, rank, branches))
    return ThroughBackbone(freeze(trunk), stages, fpn_norm == "trainable", serial_block, extra, checkpointing)


def e3va(
    trunk: nn.Module,
    stages,
    rank=8,
    structure="parallel",
    adapter="low_rank",
    middle=None,
    reduction="inherited",
    fpn_norm="trainable",
    fpn_input="e",
    start="identity",
    memory=None,
) -> nn.Module:
    """Adapters on the gradient highway: no gradient enters the backbone."""
    narrowest = trunk.layers[0].blocks[0].dim
    width = narrowest // 2 if middle is None else middle
    if adapter == "low_rank" and 2 * rank >= width:
        warnings.warn(
            f"rank={rank} is no longer low: two branches of it span the middle dimension {width} of the first stage.",
            stacklevel=3,
        )
    trained_norms = fpn_norm == "trainable"
    return E3VA(trunk, stages, structure, adapter, rank, middle, reduction, trained_norms, fpn_input, start, memory)


def e3va_plus(trunk: nn.Module, stages, rank=16, **options) -> nn.Module:
    """E3VA with alpha = 16."""
    return e3va(trunk, stages, rank, **options)


def e3va_plus_plus(trunk: nn.Module, stages, rank=32, **options) -> nn.Module:
    """E3VA with alpha = 32."""
    return e3va(trunk, stages, rank, **options)


def lst(trunk: nn.Module, stages, narrower=8, fpn_norm="trainable") -> nn.Module:
    """Ladder side-tuning: a narrow network beside the frozen one, see :mod:`e3va_lite.lst`."""
    return LST(trunk, stages, narrower, fpn_norm == "trainable")


def losa(trunk: nn.Module, stages, rank=16, fpn_norm="trainable") -> nn.Module:
    """Low-rank side adaptation: mixers that refine the frozen features, see :mod:`e3va_lite.losa`."""
    return LoSA(trunk, stages, rank, fpn_norm == "trainable")


def peft_lora(trunk: nn.Module, stages, rank=MIDDLE, fpn_norm="fixed", checkpointing=False) -> nn.Module:
    """PEFT's LoRA on timm's own forward pass: none of the twelve, to be compared with."""
    return PEFTLoRA(trunk, stages, rank, fpn_norm == "trainable", checkpointing)


METHODS: dict[str, Callable[..., nn.Module]] = {
    "full": full,
    "fixed": fixed,
    "bitfit": bitfit,
    "norm": norm,
    "partial1": partial1,
    "adapter": adapter,
    "lora": lora,
    "adaptformer": adaptformer,
    "lorand": lorand,
    "e3va": e3va,
    "e3va+": e3va_plus,
    "e3va++": e3va_plus_plus,
}
#: None of the paper's twelve: the neighbours that cut the backward pass, too, and what one would otherwise reach for.
OTHERS: dict[str, Callable[..., nn.Module]] = {"lst": lst, "losa": losa, "peft_lora": peft_lora}


def build_backbone(
    method: str,
    name: str,
    pretrained: bool = False,
    weights: str | Path | None = None,
    *,
    stages: tuple[int, ...] = (1, 2, 3, 4),
    drop_path_rate: float = 0.0,
    **options,
) -> nn.Module:
    """A backbone that is tuned in one of the twelve ways.

    Args:
        method: A key of ``METHODS``: full fixed bitfit norm partial1 adapter lora adaptformer lorand e3va e3va+ e3va++;
            or, of ``OTHERS``, ``lst``, ``losa`` or ``peft_lora``.
        name: ``swin_nano`` or one of timm's names, see :func:`e3va_lite.backbones.backbone_names`.
        pretrained: Load the published weights.
        weights: A local file of weights instead.
        stages: The stages (from 1) whose maps the task consumes.
        drop_path_rate: Stochastic depth; only ``full`` ever runs it, elsewhere the backbone stays in eval mode.
        **options: What the method takes: ``fpn_norm="trainable"|"fixed"`` for all; ``checkpointing`` for those whose
            gradient runs through the backbone; ``rank``, ``middle``, ``structure``, ``adapter``, ``reduction``,
            ``fpn_input``, ``start``, ``memory`` for the E3VA family, see :class:`e3va_lite.highway.E3VA`.

    Returns:
        A module with ``features = backbone(images)``, ``backbone.out_channels``, ``backbone.strides`` and
        ``backbone.name``. ``images``: float (B, 3, H, W), both sides 32 or more; ``features``: one float map
        (B, C_i, ceil(H/s_i), ceil(W/s_i)) per stage.

    Raises:
        InputError: For an unknown method, backbone, option or value, or for weights that do not fit.
    """
    known_methods = METHODS | OTHERS
    if method not in known_methods:
        raise unknown("method", method, known_methods)
    function = known_methods[method]
    for option in options:
        if option not in options_of(method):
            raise unknown(f"option of method {method}", option, options_of(method))
    if options.get("fpn_norm", "fixed") not in FPN_NORM:
        raise unknown("fpn_norm", options["fpn_norm"], FPN_NORM)
    for option in ("rank", "middle", "branches", "narrower"):
        value = options.get(option)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
            raise InputError(f"{option}={value} must be an integer.")
    if not stages or set(stages) - {1, 2, 3, 4} or list(stages) != sorted(set(stages)):
        raise InputError(f"stages={tuple(stages)} must be ascending numbers out of 1, 2, 3 and 4.")
    trunk = create_trunk(name, pretrained, weights, drop_path_rate)
    backbone = function(trunk, tuple(stages), **options)
    backbone.name = name  # what is trained beside it belongs to this one and to no other
    return backbone


def options_of(method: str) -> list[str]:
    """The options that a method takes; none where there is no such method."""
    function = e3va if method.startswith("e3va") else (METHODS | OTHERS).get(method)
    return [] if function is None else list(inspect.signature(function).parameters)[2:]


def parse_method(spec: str) -> tuple[str, dict]:
    """A method as it is written on a command line, ``METHOD[:option=value,...]`` -> its name and its options.

    Raises:
        InputError: For anything that is not written like this; names and options are not looked up.
    """
    method, _, options = spec.partition(":")
    pairs = [pair.partition("=") for pair in options.split(",") if pair]
    try:
        if not all(equals for _, equals, _ in pairs):
            raise ValueError
        return method, {key: yaml.safe_load(value) for key, _, value in pairs}
    except (ValueError, yaml.YAMLError) as error:
        message = f"method '{spec}' is not understood: write METHOD or METHOD:option=value,option=value."
        raise InputError(message) from error


def _blocks(trunk: nn.Module, stages: tuple[int, ...]) -> list[nn.Module]:
    return [block for stage in trunk.layers[: max(stages)] for block in stage.blocks]


def _pairs(trunk: nn.Module, stages: tuple[int, ...], make: Callable[[int], nn.Module]) -> list[nn.ModuleList]:
    return [nn.ModuleList([make(block.dim), make(block.dim)]) for block in _blocks(trunk, stages)]
