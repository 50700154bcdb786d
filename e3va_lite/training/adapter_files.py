"""Adapters in a file without a run: of a backbone from ``build_backbone`` in a training loop of one's own."""

from pathlib import Path

from torch import nn

from ..backbones.weights import fingerprint
from ..errors import InputError
from ..files import check_place
from ..methods.registry import build_backbone
from . import checkpoint
from .export import BODY, load_adapters


def save_adapters(backbone: nn.Module, path: str | Path) -> int:
    """Write the trained parameters of a backbone as a ``.safetensors`` file; return its size in bytes.

    The file also holds method, stages and options, and the digest of the pretrained weights: :func:`load_backbone`
    builds the backbone again, and :func:`e3va_lite.load_adapters` fills one that is there.

    Args:
        backbone: From :func:`e3va_lite.build_backbone`; its pretrained part is frozen.
        path: A new file.

    Raises:
        InputError: If the file exists or has another ending, for a module from elsewhere, or for a method that trains
            the pretrained weights themselves or nothing at all.
    """
    path = Path(path)
    if not hasattr(backbone, "built_with") or not hasattr(backbone, "name"):
        raise InputError("save_adapters takes a backbone from build_backbone: for a model of your own there is tune.")
    method = backbone.built_with["method"]
    if any(p.requires_grad for p in backbone.backbone.parameters()):
        raise InputError(f"{method} trains the pretrained weights themselves: save the backbone's state_dict.")
    state = {BODY + name: tensor for name, tensor in checkpoint.kept_state(backbone).items()}
    if not state:
        raise InputError(f"method {method} trains nothing in the backbone: there is nothing to save.")
    if path.suffix != ".safetensors":
        raise InputError(f"'{path}' must end in .safetensors.")
    check_place(path, overwrite=None, make_parents=False)
    about = {"backbone": backbone.name, "weights": fingerprint(backbone.backbone), **backbone.built_with}
    checkpoint.write(path, state, about | {"backbone_only": True})
    return path.stat().st_size


def load_backbone(path: str | Path, pretrained: bool = True, weights: str | Path | None = None) -> nn.Module:
    """Build the tuned backbone of a file: method, stages, options and the adapters' values are those in it.

    Args:
        path: A file of :func:`save_adapters` or of ``e3va export``.
        pretrained: Load the published weights that belong to the backbone's name.
        weights: A local file of pretrained weights instead.

    Raises:
        InputError: If the file cannot be read, or was made with other pretrained weights.
    """
    path = Path(path)
    _, about = checkpoint.read(path)
    if recipe := about.get("recipe"):  # of a run
        about = about | {"method": recipe["method"], "stages": recipe["stages"], "options": recipe["options"]}
    if not {"backbone", "method", "stages", "options"} <= about.keys():
        raise InputError(f"'{path}' holds no adapters: give a file of save_adapters or of `e3va export`.")
    backbone = build_backbone(
        about["method"], about["backbone"], pretrained, weights, stages=tuple(about["stages"]), **about["options"]
    )
    load_adapters(backbone, path)
    return backbone
