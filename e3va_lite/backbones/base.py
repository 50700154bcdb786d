"""The interface of a pretrained backbone.

A map of tokens, (B, H, W, C), passes stages of blocks. A block adds two *taps* to the map, equation (5):

    x + f_P1(x) + f_P2(x + f_P1(x))

and every stage begins with a reduction of the map. To the methods of this package a backbone is a module with

    backbone.layers[i].downsample    the reduction, (B, H, W, C) -> (B, H', W', C'), or an identity
    backbone.layers[i].blocks        the blocks; each has its width as ``dim`` and a fused projection ``attn.qkv``

Each family of backbones is a module (:mod:`~e3va_lite.backbones.swin`, :mod:`~e3va_lite.backbones.swin_v2`,
:mod:`~e3va_lite.backbones.vit`, :mod:`~e3va_lite.backbones.dinov3`) that builds backbones and registers the functions
below for its classes.
"""

from functools import partial, singledispatch
from typing import Self

from torch import Tensor, nn


@singledispatch
def embed(backbone: nn.Module, images: Tensor) -> Tensor:
    """Images to tokens, (B, 3, H, W) -> (B, H', W', C): the stream's start ``l[0]``.

    Raises:
        InputError: For images that the backbone cannot take.
    """
    raise NotImplementedError(f"no family of backbones registers embed for {type(backbone).__name__}")


@singledispatch
def f_p1(block: nn.Module, x: Tensor) -> Tensor:
    """The tap ``f_P1`` of a block, its attention half without the skip: (B, H, W, C) -> (B, H, W, C)."""
    raise NotImplementedError(f"no family of backbones registers f_p1 for {type(block).__name__}")


@singledispatch
def f_p2(block: nn.Module, x: Tensor) -> Tensor:
    """The tap ``f_P2`` of a block, its MLP half without the skip, token by token: (..., C) -> (..., C)."""
    raise NotImplementedError(f"no family of backbones registers f_p2 for {type(block).__name__}")


def freeze(module: nn.Module) -> nn.Module:
    """Freeze a module by flag and by mode: no parameter requires a gradient, and dropout is off.

    The mode does not survive ``model.train()`` on a parent; the backbones of this package restore it in their
    ``train`` method.
    """
    return module.requires_grad_(False).eval()


def stage_dims(backbone: nn.Module) -> list[int]:
    """Channels of the stages, e.g. [192, 384, 768, 1536] for Swin-L."""
    return [stage.blocks[0].dim for stage in backbone.layers]


class FPNNorms(nn.ModuleDict):
    """One new LayerNorm per consumed stage (paper section 3.2, "FPN in E3VA"), and the conversion from NHWC to NCHW.

    Keys are stage numbers from 1. Classifiers have no such norms: they are never pretrained, and either trained or
    left at their initial values.

    Attributes:
        stages: The stages whose maps are normed.
        out_channels: Channels of each map for the neck.
        strides: Pixels per step of each map for the neck.
        divisor: The sides of images are padded to a multiple of this.
    """

    def __init__(self, backbone: nn.Module, stages: tuple[int, ...], trainable: bool) -> None:
        dims = stage_dims(backbone)
        norm = partial(nn.LayerNorm, eps=1e-5)
        super().__init__({str(stage): norm(dims[stage - 1]) for stage in stages})
        self.requires_grad_(trainable)
        self.stages = stages
        self.out_channels = [dims[stage - 1] for stage in stages]
        self.strides = [2 ** (stage + 1) for stage in stages]
        self.divisor = 32

    def forward(self, maps: dict[int, Tensor]) -> list[Tensor]:
        """Maps by stage number, (B, H, W, C) each -> list of (B, C, H, W), in the order of the stages."""
        return [to_nchw(self[str(stage)](maps[stage])) for stage in self.stages]

    def finish(self, maps: list[Tensor], images: Tensor) -> list[Tensor]:
        """The output of ``forward`` -> the maps for the neck; the same maps where every stage has its own size."""
        return maps


def is_neck(name: str) -> bool:
    """Whether the parameter of a backbone with this name is part of a pyramid, which belongs to the neck."""
    return "norms.pyramid." in name


def trainable_parameters(module: nn.Module) -> int:
    """The number of trainable parameters of a backbone without its pyramid; shared ones are counted once."""
    return sum(p.numel() for name, p in module.named_parameters() if p.requires_grad and not is_neck(name))


def to_nchw(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2).contiguous()


@singledispatch
def fpn_norms(backbone: nn.Module, stages: tuple[int, ...], trainable: bool) -> FPNNorms:
    """The norms before the neck, which define number, width and stride of the maps.

    Args:
        stages: The maps (from 1, the finest) that the task consumes.
    """
    return FPNNorms(backbone, stages, trainable)


class TunedBackbone(nn.Module):
    """A pretrained backbone and the norms before the neck: what all fine-tuning methods have in common.

    Args:
        backbone: The pretrained backbone. Stages behind the last consumed one are never run, and frozen here: DDP would
            wait for their gradients.
        stages: The stages (from 1) whose maps the task consumes; norms exist for these only.
        fpn_norm_trainable: Whether the norms before the neck are trained (Table 6).

    Attributes:
        last_stage: The last consumed stage.
        out_channels: Channels of each map.
        strides: Pixels per step of each map.
        divisor: See :class:`FPNNorms`.
        cache: Stored maps to be read in train mode, see :mod:`e3va_lite.training.feature_cache`; None: compute them.
    """

    def __init__(self, backbone: nn.Module, stages: tuple[int, ...], fpn_norm_trainable: bool) -> None:
        super().__init__()
        self.backbone, self.cache = backbone, None
        self.norms = fpn_norms(backbone, stages, fpn_norm_trainable)
        self.last_stage = max(self.norms.stages)
        backbone.layers[self.last_stage :].requires_grad_(False)
        self.out_channels, self.strides = self.norms.out_channels, self.norms.strides
        self.divisor = self.norms.divisor


class SideNetwork(TunedBackbone):
    """A frozen backbone and, in subclasses, what is trained beside it.

    Args:
        backbone: The pretrained backbone; it is frozen here.
        stages: See :class:`TunedBackbone`.
        fpn_norm_trainable: See :class:`TunedBackbone`.
    """

    def __init__(self, backbone: nn.Module, stages: tuple[int, ...], fpn_norm_trainable: bool) -> None:
        super().__init__(freeze(backbone), stages, fpn_norm_trainable)

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        self.backbone.eval()  # freezing is a mode, too: no stochastic depth in the frozen stream
        return self
