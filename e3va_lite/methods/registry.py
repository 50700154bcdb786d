"""The fine-tuning methods of Tables 1 and 2 as one dict of functions: name -> backbone module.

All modules share one contract, ``features = backbone(images)`` with ``out_channels`` and ``strides``, hold the
pretrained backbone under the state-dict prefix ``backbone.`` and, when new, compute what the frozen model computes.
They differ in what is trained and in the path that the gradient takes.

All of them can be pickled and copied. For deployment, in eval mode and under ``torch.no_grad()``, ``fixed`` and the
E3VA family can be used in every memory mode with :func:`torch.compile`, :func:`torch.export.export` (with a batch of
any size), :func:`torch.jit.trace` and the older ONNX exporter: there they compute the equations literally.
"""

import inspect
import warnings
from collections.abc import Callable
from pathlib import Path

import yaml
from torch import nn

from ..backbones.registry import create_backbone
from ..errors import InputError, unknown
from ..highway import E3VA
from .inside import MIDDLE, adapter, adaptformer, bitfit, fixed, full, lora, lorand, norm, partial1
from .losa import LoSA
from .lst import LST
from .peft_lora import PEFTLoRA

FPN_NORM = ("trainable", "fixed")


def e3va(
    backbone: nn.Module,
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
    narrowest = backbone.layers[0].blocks[0].dim
    width = narrowest // 2 if middle is None else middle
    if adapter == "low_rank" and 2 * rank >= width:
        warnings.warn(
            f"rank={rank} is no longer low: two branches of it span the middle dimension {width} of the first stage.",
            stacklevel=3,
        )
    trained_norms = fpn_norm == "trainable"
    return E3VA(backbone, stages, structure, adapter, rank, middle, reduction, trained_norms, fpn_input, start, memory)


def e3va_plus(backbone: nn.Module, stages, rank=16, **options) -> nn.Module:
    """E3VA with alpha = 16."""
    return e3va(backbone, stages, rank, **options)


def e3va_plus_plus(backbone: nn.Module, stages, rank=32, **options) -> nn.Module:
    """E3VA with alpha = 32."""
    return e3va(backbone, stages, rank, **options)


def lst(backbone: nn.Module, stages, narrower=8, fpn_norm="trainable") -> nn.Module:
    """Ladder side-tuning: a narrow network beside the frozen one, see :mod:`e3va_lite.methods.lst`."""
    return LST(backbone, stages, narrower, fpn_norm == "trainable")


def losa(backbone: nn.Module, stages, rank=16, fpn_norm="trainable") -> nn.Module:
    """Low-rank side adaptation: mixers that refine the frozen features, see :mod:`e3va_lite.methods.losa`."""
    return LoSA(backbone, stages, rank, fpn_norm == "trainable")


def peft_lora(backbone: nn.Module, stages, rank=MIDDLE, fpn_norm="fixed", checkpointing=False) -> nn.Module:
    """PEFT's LoRA in timm's own forward pass: not one of the twelve, for comparison."""
    return PEFTLoRA(backbone, stages, rank, fpn_norm == "trainable", checkpointing)


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
#: Not among the paper's twelve: two neighbours that also keep the gradient out of the backbone, and PEFT's LoRA.
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
    """Build a backbone for one of the fine-tuning methods.

    Args:
        method: A key of ``METHODS``: full fixed bitfit norm partial1 adapter lora adaptformer lorand e3va e3va+ e3va++;
            or, of ``OTHERS``, ``lst``, ``losa`` or ``peft_lora``.
        name: ``swin_nano`` or one of timm's names, see :func:`e3va_lite.backbones.registry.backbone_names`.
        pretrained: Load the published weights.
        weights: A local file of weights instead.
        stages: The stages (from 1) whose maps the task consumes.
        drop_path_rate: Stochastic depth; acts in ``full`` only, elsewhere the backbone stays in eval mode.
        **options: Options of the method: ``fpn_norm="trainable"|"fixed"`` for all; ``checkpointing`` for those whose
            gradient flows through the backbone; ``rank``, ``middle``, ``structure``, ``adapter``, ``reduction``,
            ``fpn_input``, ``start``, ``memory`` for the E3VA family, see :class:`e3va_lite.highway.E3VA`.

    Returns:
        A module with ``features = backbone(images)``, ``backbone.out_channels``, ``backbone.strides`` and
        ``backbone.name``. ``images``: float (B, 3, H, W), both sides 32 or more; ``features``: one float map
        (B, C_i, ceil(H/s_i), ceil(W/s_i)) per stage.

    Raises:
        InputError: For an unknown method, backbone, option or value, or for weights that do not fit.
    """
    check_options(method, options)
    if not stages or set(stages) - {1, 2, 3, 4} or list(stages) != sorted(set(stages)):
        raise InputError(f"stages={tuple(stages)} must be ascending numbers out of 1, 2, 3 and 4.")
    tuned = attach(method, create_backbone(name, pretrained, weights, drop_path_rate), tuple(stages), options)
    tuned.name = name  # exported adapters are loaded beside a backbone of the same name only
    return tuned


def attach(method: str, backbone: nn.Module, stages: tuple[int, ...], options: dict) -> nn.Module:
    """A method applied to a backbone that is there already; ``method``, ``stages`` and ``options`` are kept in it.

    Raises:
        InputError: For a value that the method or the backbone does not allow.
    """
    tuned = (METHODS | OTHERS)[method](backbone, stages, **options)
    tuned.built_with = {"method": method, "stages": list(stages), "options": options}
    return tuned


def check_options(method: str, options: dict) -> None:
    """Raise an InputError for an unknown method, or an option that it has not or that has a wrong value."""
    known_methods = METHODS | OTHERS
    if method not in known_methods:
        raise unknown("method", method, known_methods)
    for option in options:
        if option not in options_of(method):
            raise unknown(f"option of method {method}", option, options_of(method))
    if options.get("fpn_norm", "fixed") not in FPN_NORM:
        raise unknown("fpn_norm", options["fpn_norm"], FPN_NORM)
    for option in ("rank", "middle", "branches", "narrower"):
        value = options.get(option)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
            raise InputError(f"{option}={value} must be an integer.")


def options_of(method: str) -> list[str]:
    """The options that a method takes; none for an unknown method."""
    function = e3va if method.startswith("e3va") else (METHODS | OTHERS).get(method)
    return [] if function is None else list(inspect.signature(function).parameters)[2:]


def parse_method(spec: str) -> tuple[str, dict]:
    """Parse a method as written on the command line, ``METHOD[:option=value,...]`` -> its name and its options.

    Raises:
        InputError: For any other form; whether the names exist is not checked.
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
