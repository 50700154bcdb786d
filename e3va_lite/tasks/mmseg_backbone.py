"""Importing this module registers the backbones of this package with mmsegmentation, for configurations of its own:

    custom_imports = dict(imports=["e3va_lite.tasks.mmseg_backbone"])
    model = dict(
        type="EncoderDecoder",
        backbone=dict(
            type="E3VABackbone",
            method="e3va",
            name="swin_large_patch4_window7_224",
            pretrained=True,
            stages=[1, 2, 3, 4],
        ),
        decode_head=dict(type="UPerHead", in_channels=[192, 384, 768, 1536], in_index=[0, 1, 2, 3], ...),
        ...
    )

The entries beside ``type`` are the arguments of :func:`e3va_lite.build_backbone`. Images come normalised, as mmseg's
``SegDataPreProcessor`` does it.
"""

from torch import Tensor, nn

from ..datasets.mmseg_import import import_mmseg
from ..methods.registry import build_backbone
from .detection import check_maps

mmseg = import_mmseg()


class Body(nn.Module):
    """The backbone of a segmenter: ``body``, any backbone that returns NCHW maps, which are checked.

    This module has no ``init_weights``, the method by which mmengine would overwrite loaded weights, and hides the one
    that timm's Swin has.
    """

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.body = backbone

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) -> one map (B, C_i, ceil(H/s_i), ceil(W/s_i)) per stage."""
        maps = self.body(images)
        check_maps(images, maps, self.body.out_channels, self.body.strides)
        return maps


@mmseg.registry.MODELS.register_module(name="E3VABackbone")
def e3va_backbone(method: str = "e3va", name: str = "swin_large_patch4_window7_224", **options) -> Body:
    """A backbone with the arguments of :func:`e3va_lite.build_backbone`, as mmsegmentation builds it."""
    return Body(build_backbone(method, name, **options))
