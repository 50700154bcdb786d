"""E3VA: adapters on a gradient highway beside a frozen Swin Transformer (ACM MM 2024).

>>> import e3va_lite
>>> backbone = e3va_lite.build_backbone("e3va", "swin_nano", pretrained=True)
>>> features = backbone(images)  # (B, 3, H, W) -> four maps (B, C_i, H/s_i, W/s_i)
>>> e3va_lite.assert_isolated(backbone, images)
"""

from importlib import import_module

__version__ = "0.1.0"

#: Every public name and its module, which is imported when the name is first asked for: torch takes seconds.
_HOMES = {
    "E3VA": "highway",
    "LowRankAdapter": "adapters",
    "StandardAdapter": "adapters",
    "METHODS": "methods.registry",
    "build_backbone": "methods.registry",
    "load_adapters": "training.export",
    "load_backbone": "training.adapter_files",
    "save_adapters": "training.adapter_files",
    "Tuning": "tuning",
    "from_pretrained": "tuning",
    "tune": "tuning",
    "IsolationError": "analysis.isolation",
    "assert_isolated": "analysis.isolation",
    "trace": "analysis.gradient_path",
    "ledger": "analysis.memory",
    "InputError": "errors",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value  # the next time Python finds it by itself
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
