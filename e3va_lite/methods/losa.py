"""Low-rank side adaptation (LoSA; Mercea, Gritsenko, Schmid and Arnab, CVPR 2024): mixers that refine frozen features.

A light network runs in parallel to the frozen backbone and works on its features, so that no gradient flows through
the backbone. The abstract fixes this much. We read the rest as follows: beside every block stands one low-rank MLP,

    e[i+1] = e[i] + (l[i+1] - l[i]) + mixer_i(e[i] + l[i+1] - l[i]),

alternately over the channels of a token and over the tokens of a window, so that images may have any size (the map of a
plain ViT is cut into windows, too, its prefix tokens among them). Each mixer projects n numbers to its rank and back;
its output is zero when it is new, so that ``e`` starts as ``l``, and a new model is the frozen one. Between stages
``e`` passes the backbone's own reductions, as in E3VA.

The difference from E3VA is the input of an adapter: there a tap of the frozen stream ``l``, so that the adapters of a
stage add up; here ``e`` itself, so that the mixers of a stage form a chain.
"""

import torch
import torch.nn.functional as F
from timm.models.swin_transformer import window_partition, window_reverse
from torch import Tensor, nn

from ..adapters import at_least_one
from ..backbones.base import SideNetwork, embed, f_p1, f_p2

WINDOW = 7  # tokens by tokens that are mixed with each other


class ChannelMixer(nn.Module):
    """A low-rank MLP over the channels of each token: ``U GeLU(D LN(x))``."""

    def __init__(self, dim: int, rank: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.down, self.up = _low_rank(dim, rank)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)"""
        return self.up(F.gelu(self.down(self.norm(x))))


class TokenMixer(nn.Module):
    """A low-rank MLP over the tokens of each window, the same for every channel."""

    def __init__(self, dim: int, rank: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.down, self.up = _low_rank(WINDOW**2, rank)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C); padded to whole windows and cropped again."""
        _, height, width, _ = x.shape
        x = F.pad(self.norm(x), (0, 0, 0, -width % WINDOW, 0, -height % WINDOW))  # (B, H', W', C)
        windows = window_partition(x, (WINDOW, WINDOW)).flatten(1, 2).transpose(1, 2)  # (windows, C, tokens)
        windows = self.up(F.gelu(self.down(windows))).transpose(1, 2).unflatten(1, (WINDOW, WINDOW))
        return window_reverse(windows, (WINDOW, WINDOW), *x.shape[1:3])[:, :height, :width]


class LoSA(SideNetwork):
    """A frozen backbone and the mixers beside it.

    Args:
        backbone: The pretrained backbone; it is frozen here.
        stages: The stages (from 1) whose maps the task consumes.
        rank: Rank of every mixer.
        fpn_norm_trainable: Whether the norms before the neck are trained.

    Attributes:
        passed_by_design: The inherited reductions, see :class:`e3va_lite.highway.E3VA`.
    """

    def __init__(self, backbone: nn.Module, stages: tuple[int, ...], rank: int, fpn_norm_trainable: bool) -> None:
        at_least_one(rank=rank)
        super().__init__(backbone, stages, fpn_norm_trainable)
        kinds = (ChannelMixer, TokenMixer)
        self.mixers = nn.ModuleList(
            nn.ModuleList(kinds[i % 2](block.dim, rank) for i, block in enumerate(stage.blocks))
            for stage in backbone.layers[: self.last_stage]
        )

    @property
    def passed_by_design(self) -> list[nn.Module]:
        return [stage.downsample for stage in self.backbone.layers]

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) -> one map (B, C_i, ceil(H/s_i), ceil(W/s_i)) per consumed stage."""
        with torch.no_grad():
            l = embed(self.backbone, images)  # l[0], (B, H, W, C)
        e = l
        maps = {}
        for index, (stage, mixers) in enumerate(zip(self.backbone.layers, self.mixers, strict=False)):
            e = stage.downsample(e)  # gradients flow through these layers ...
            with torch.no_grad():
                l = stage.downsample(l)  # ... and never through these
            for block, mixer in zip(stage.blocks, mixers, strict=True):
                with torch.no_grad():
                    f1 = f_p1(block, l)
                    f2 = f_p2(block, l + f1)
                    l = l + f1 + f2
                e = e + f1 + f2
                e = e + mixer(e)
            maps[index + 1] = e
        return self.norms.finish(self.norms(maps), images)


def _low_rank(n: int, rank: int) -> tuple[nn.Linear, nn.Linear]:
    """Projections from n to the rank and back; the second is zero at the start."""
    down, up = nn.Linear(n, rank), nn.Linear(rank, n)
    nn.init.zeros_(up.weight)
    nn.init.zeros_(up.bias)
    return down, up
