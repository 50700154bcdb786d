"""All backbones by name."""

from pathlib import Path

from torch import nn

from ..errors import unknown
from .dinov3 import create_dinov3, dinov3_names
from .swin import create_swin, swin_names
from .swin_v2 import create_swin_v2, swin_v2_names
from .vit import create_vit, vit_names

#: Per family, the function that lists its names and the one that builds a backbone from a name.
FAMILIES = (
    (swin_names, create_swin),
    (swin_v2_names, create_swin_v2),
    (vit_names, create_vit),
    (dinov3_names, create_dinov3),
)


def backbone_names() -> list[str]:
    """Every backbone that :func:`create_backbone` can build: timm's and the miniatures."""
    return [name for names, _ in FAMILIES for name in names()]


def create_backbone(
    name: str, pretrained: bool = False, weights: str | Path | None = None, drop_path_rate: float = 0.0
) -> nn.Module:
    """The backbone of that name, see :mod:`e3va_lite.backbones.base`.

    Args:
        name: One of :func:`backbone_names`, timm's with or without a pretraining tag.
        pretrained: Load the published weights.
        weights: A local file of weights instead.
        drop_path_rate: Stochastic depth of the last block; acts in train mode only.

    Raises:
        InputError: For an unknown name, weights that do not fit, or a hub that cannot be reached.
    """
    for names, create in FAMILIES:
        if name.split(".")[0] in names():
            return create(name, pretrained, weights, drop_path_rate)
    hint = "choose swin_nano or one of timm's swin_*, swinv2_*, vit_* (plain, DINOv2 or DINOv3)"
    raise unknown("backbone", name, backbone_names(), f"{hint}; {__name__}.backbone_names() lists them all")
