"""The usual alternative: LoRA from the PEFT library on timm's Swin, in timm's own forward pass.

It is here for comparison and shares only the norms before the neck with this package's methods.
"""

from timm.models.swin_transformer import SwinTransformer
from torch import Tensor

from ..backbones.base import TunedBackbone, embed, freeze
from ..errors import InputError


class PEFTLoRA(TunedBackbone):
    """timm's Swin with PEFT's LoRA on every fused qkv projection.

    Args:
        swin: The pretrained backbone.
        stages: The stages (from 1) whose maps the task consumes.
        rank: Rank of the updates.
        fpn_norm_trainable: Whether the norms before the neck are trained.
        checkpointing: timm's gradient checkpointing.

    Raises:
        InputError: If PEFT is not installed, or for anything but a Swin.
    """

    def __init__(
        self, swin: SwinTransformer, stages: tuple[int, ...], rank: int, fpn_norm_trainable: bool, checkpointing: bool
    ) -> None:
        if not isinstance(swin, SwinTransformer):
            raise InputError(
                f"peft_lora runs timm's own Swin, not {type(swin).__name__}: use a swin_* backbone, or lora."
            )
        try:
            from peft import LoraConfig, inject_adapter_in_model
        except ImportError as error:
            raise InputError('peft_lora needs the library PEFT: pip install "e3va_lite[peft]".') from error
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=["qkv"])
        super().__init__(inject_adapter_in_model(config, freeze(swin)), stages, fpn_norm_trainable)
        self.backbone.set_grad_checkpointing(checkpointing)

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) -> one map (B, C_i, ceil(H/s_i), ceil(W/s_i)) per consumed stage."""
        x = embed(self.backbone, images)
        maps = {}
        for number, stage in enumerate(self.backbone.layers[: self.last_stage], start=1):
            x = maps[number] = stage(x)
        return self.norms(maps)
