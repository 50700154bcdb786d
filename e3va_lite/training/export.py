"""Exported files: the trained parameters of a run in one small file, without the frozen pretrained ones."""

from dataclasses import asdict
from pathlib import Path

from torch import nn

from ..errors import InputError
from ..files import check_place
from ..recipes.schema import recipe_from
from . import checkpoint
from .trained_model import Trained, check_weights, open_run, rebuild

BODY = "backbone.body."  # where every task's model has its backbone


def export(run: Path, path: Path, backbone_only: bool = False, best: bool = False, weights: str | None = None) -> int:
    """Write the trained parameters of a run as a ``.safetensors`` file; return its size in bytes.

    Args:
        run: A folder that ``e3va train`` wrote.
        path: A new file.
        backbone_only: Only the trained parameters of the backbone and its adapters, without neck and head.
        best: Take the best checkpoint, not the last one.
        weights: See :func:`e3va_lite.training.trained_model.open_run`.

    Raises:
        InputError: If the file exists or has another ending, or for a folder that is no run.
    """
    if path.suffix != ".safetensors":
        raise InputError(f"'{path}' must end in .safetensors.")
    check_place(path, overwrite=None)
    trained = open_run(run, best, weights)
    state = checkpoint.kept_state(trained.model)
    if backbone_only:
        state = {name: tensor for name, tensor in state.items() if name.startswith(BODY)}
        if not state:
            raise InputError(f"{trained.recipe.method} trains nothing in the backbone: export neck and head too.")
    about = {
        "backbone": trained.recipe.backbone,
        "weights": trained.weights,
        "classes": trained.classes,
        "category_ids": trained.category_ids,
        "recipe": asdict(trained.recipe),
        "step": trained.step,
        "backbone_only": backbone_only,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.write(path, state, about)
    return path.stat().st_size


def load_adapters(backbone: nn.Module, path: str | Path) -> None:
    """Load the adapters and norms of an exported file into a backbone from :func:`e3va_lite.build_backbone`.

    Raises:
        InputError: If the file cannot be read, or was made with another backbone, other pretrained weights, or another
            method.
    """
    path = Path(path)
    tensors, about = checkpoint.read(path)
    if "backbone" not in about:
        raise InputError(f"'{path}' was not written by `e3va export`: give the file of one.")
    if backbone.name.split(".")[0] != about["backbone"].split(".")[0]:  # whatever the tag of timm's weights
        raise InputError(f"'{path}' belongs to the backbone {about['backbone']}, not to {backbone.name}.")
    check_weights(backbone, about, path)
    mine = {name.removeprefix(BODY): tensor for name, tensor in tensors.items() if name.startswith(BODY)}
    checkpoint.restore(backbone, mine, path)


def load_exported(path: str | Path, weights: str | None = None) -> Trained:
    """The whole model of an exported file, on the CPU.

    Args:
        weights: File of the pretrained weights, where the recipe's is elsewhere now.

    Raises:
        InputError: If the file cannot be read or holds no neck and head, or the backbone or its weights are others.
    """
    path = Path(path)
    tensors, about = checkpoint.read(path)
    if about.get("backbone_only", True):
        raise InputError(f"'{path}' holds no neck and head: put it into a backbone with e3va_lite.load_adapters.")
    recipe = recipe_from(about["recipe"] | ({"weights": weights} if weights else {}))
    return rebuild(recipe, tensors, about, path)


def open_trained(path: Path, best: bool = False, weights: str | None = None) -> Trained:
    """The model of a run's folder or of an exported file; see :func:`load_exported` and
    :func:`e3va_lite.training.trained_model.open_run`.
    """
    return load_exported(path, weights) if path.is_file() else open_run(path, best, weights)
