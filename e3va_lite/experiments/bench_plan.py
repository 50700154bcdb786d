"""What :mod:`e3va_lite.experiments.bench` measures: models, methods, batches and sizes."""

from dataclasses import dataclass

import torch

from ..methods.registry import METHODS
from .paper_tables import SWIN_B, SWIN_L

SWEEPS = 2  # every method is measured in each; the second goes through them in the opposite order
#: Beside the twelve; LST and LoSA with, on Swin-L, about as many trained parameters as E3VA.
OTHERS = ("e3va:memory=recompute", "lst:narrower=16", "losa:rank=90", "peft_lora")


@dataclass(frozen=True)
class Model:
    """A detector and the batches and sizes that are tried in this order until full fine-tuning fits."""

    backbone: str
    tried: tuple[tuple[int, tuple[int, int]], ...]
    precision: str = "float32"

    @property
    def settings(self) -> dict:
        """What this model sets in the plan's recipe."""
        return {"backbone": self.backbone, "precision": self.precision}


@dataclass(frozen=True)
class Plan:
    """What is measured, the most valuable first.

    Attributes:
        recipe: Of RetinaNet.
        methods: Full fine-tuning is the first.
        fit: Methods whose largest batch is searched for, on the first model.
        rounds: Timed steps of a method in a sweep.
        card: Memory that is taken for the card's; None for the card's own. A trial on the CPU needs it.
    """

    recipe: str
    models: tuple[Model, ...]
    methods: tuple[str, ...]
    fit: tuple[str, ...]
    rounds: int
    card: str | None = None


_SWIN = ((2, (608, 1024)), (2, (416, 704)), (1, (416, 704)), (1, (224, 384)))
_VIT = ((2, (518, 518)), (1, (518, 518)), (1, (252, 252)))
PLANS = {
    "whole": Plan(
        "voc",
        (
            Model(SWIN_L, _SWIN),
            Model("vit_large_patch14_dinov2", _VIT),
            Model("swin_tiny_patch4_window7_224", _SWIN),
            Model(SWIN_L, _SWIN, "bfloat16"),
            Model(SWIN_B, _SWIN),
        ),
        (*METHODS, *OTHERS),
        ("full", "fixed", "adapter", "lora", "e3va", "e3va:memory=recompute"),
        rounds=6,
    ),
    "quick": Plan(
        "voc",
        (Model("swin_tiny_patch4_window7_224", _SWIN),),
        (*METHODS, *OTHERS),
        ("full", "e3va"),
        rounds=3,
        card="4GB",
    ),
    "trial": Plan(
        "voc-nano",
        (Model("swin_nano", ((2, (64, 96)),)), Model("vit_tiny_patch16_224", ((2, (64, 64)),))),
        (*METHODS, "e3va:memory=recompute", "lst", "losa", "peft_lora"),
        ("full", "e3va"),
        rounds=3,
        card="150MB",
    ),
}


def plan_for(device: torch.device, quick: bool) -> str:
    """The name of the plan in :data:`PLANS`."""
    return "trial" if device.type == "cpu" else "quick" if quick else "whole"
