"""E3VA: adapters on a gradient highway beside a frozen Swin Transformer (ACM MM 2024).

>>> import e3va_lite
>>> backbone = e3va_lite.build_backbone("e3va", "swin_nano", pretrained=True)
>>> features = backbone(images)  # (B, 3, H, W) -> four maps (B, C_i, H/s_i, W/s_i)
>>> e3va_lite.assert_isolated(backbone, images)
"""

from .analysis.gradient_path import trace
from .analysis.isolation import IsolationError, assert_isolated
from .analysis.memory import ledger
from .errors import InputError
from .methods.registry import METHODS, build_backbone
from .training.export import load_adapters

__all__ = [
    "METHODS",
    "InputError",
    "IsolationError",
    "assert_isolated",
    "build_backbone",
    "ledger",
    "load_adapters",
    "trace",
]
__version__ = "0.1.0"
