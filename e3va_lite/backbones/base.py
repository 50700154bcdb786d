"""What a pretrained backbone has to offer, written down once.

To the methods of this package every backbone is a *trunk*: tokens, a map (B, H, W, C), run through stages of blocks.
A block adds two *taps* to them, equation (5):

    x + f_P1(x) + f_P2(x + f_P1(x))

and every stage begins with a reduction of the map. So a trunk is a module with

    trunk.layers[i].downsample    the reduction, (B, H, W, C) -> (B, H', W', C'); an identity where nothing is reduced
    trunk.layers[i].blocks        the blocks; each has its width as ``dim`` and a fused projection ``attn.qkv``

A family of backbones is a file (:mod:`~e3va_lite.backbones.swin`, :mod:`~e3va_lite.backbones.swin_v2`,
:mod:`~e3va_lite.backbones.vit`, :mod:`~e3va_lite.backbones.dinov3`) that builds trunks and registers, for its own
classes, the functions of this one.
"""

from functools import partial, singledispatch
from typing import Self

from torch import Tensor, nn


@singledispatch
def embed(trunk: nn.Module, images: Tensor) -> Tensor:
    """Images to tokens, (B, 3, H, W) -> (B, H', W', C): the stream's start ``l[0]``.

    Raises:
        InputError: For images that the trunk cannot take.
    """
    raise NotImplementedError(f"no family of backbones has said how {type(trunk).__name__} embeds images")


@singledispatch
def f_p1(block: nn.Module, x: Tensor) -> Tensor:
    """The tap ``f_P1`` of a block, its attention half without the skip: (B, H, W, C) -> (B, H, W, C)."""
    raise NotImplementedError(f"no family of backbones has said what the taps of {type(block).__name__} are")


@singledispatch
def f_p2(block: nn.Module, x: Tensor) -> Tensor:
    """The tap ``f_P2`` of a block, its MLP half without the skip, token by token: (..., C) -> (..., C)."""
    raise NotImplementedError(f"no family of backbones has said what the taps of {type(block).__name__} are")


def freeze(module: nn.Module) -> nn.Module:
    """Freezing is a mode and a flag: no parameter asks for a gradient, and nothing is random.

    The mode does not survive ``model.train()`` on a parent; the backbones of this package re-apply it in their
    ``train`` method.
    """
    return module.requires_grad_(False).eval()


def stage_dims(trunk: nn.Module) -> list[int]:
    """Channels of the stages, e.g. [192, 384, 768, 1536] for Swin-L."""
    return [stage.blocks[0].dim for stage in trunk.layers]


class FPNNorms(nn.ModuleDict):
    """One new LayerNorm per consumed stage (paper section 3.2, "FPN in E3VA"), and the way from NHWC to NCHW.

    Keys are stage numbers from 1. Classifiers have no such norms, so they start as plain LayerNorms and are trained
    or kept, never pretrained.

    Attributes:
        stages: The stages whose maps are normed.
        out_channels: Channels of each map for the neck.
        strides: Pixels per step of each map for the neck.
        divisor: What a task pads the sides of its images to a multiple of.
    """

    def __init__(self, trunk: nn.Module, stages: tuple[int, ...], trainable: bool) -> None:
        dims = stage_dims(trunk)
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
        """What ``forward`` returned -> the maps for the neck: the same, where every stage has a size of its own."""
        return maps


def is_neck(name: str) -> bool:
    """Whether a parameter of that name, although inside a backbone, is part of a pyramid, which stands for the neck."""
    return "norms.pyramid." in name


def trainable_parameters(module: nn.Module) -> int:
    """Numbers of a backbone that an optimiser may change, shared ones counted once."""
    return sum(p.numel() for name, p in module.named_parameters() if p.requires_grad and not is_neck(name))


def to_nchw(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2).contiguous()


@singledispatch
def fpn_norms(trunk: nn.Module, stages: tuple[int, ...], trainable: bool) -> FPNNorms:
    """The norms before the neck, and what follows from them: number, width and stride of the maps.

    Args:
        stages: The maps (from 1, the finest) that the task consumes.
    """
    return FPNNorms(trunk, stages, trainable)


class SideNetwork(nn.Module):
    """A frozen backbone, the norms before the neck and, in subclasses, what is trained beside the backbone.

    Args:
        trunk: The pretrained part; it is frozen here.
        stages: The stages (from 1) whose maps the task consumes; norms exist for these only.
        fpn_norm_trainable: Whether the norms before the neck are trained (Table 6).

    Attributes:
        last_stage: What lies behind it is not run.
        out_channels: Channels of each map.
        strides: Pixels per step of each map.
        divisor: See :class:`FPNNorms`.
    """

    def __init__(self, trunk: nn.Module, stages: tuple[int, ...], fpn_norm_trainable: bool) -> None:
        super().__init__()
        self.trunk = freeze(trunk)
        self.norms = fpn_norms(trunk, stages, fpn_norm_trainable)
        self.last_stage = max(self.norms.stages)
        self.out_channels, self.strides = self.norms.out_channels, self.norms.strides
        self.divisor = self.norms.divisor

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        self.trunk.eval()  # frozen is a mode too: no stochastic depth on the stream
        return self
