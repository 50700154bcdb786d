"""Trained models, out of the folder of a run: to use them, or to start another training from them."""

from pathlib import Path
from typing import NamedTuple

from torch import nn

from ..backbones.weights import fingerprint
from ..errors import InputError
from ..recipes.schema import Recipe, load_recipe
from . import checkpoint
from .engine import build_model

RECIPE, LAST, BEST = "recipe.yaml", "last.safetensors", "best.safetensors"


class Trained(NamedTuple):
    """A trained model and what has to be known to use it."""

    model: nn.Module
    recipe: Recipe
    classes: list[str]
    category_ids: list[int] | None  # COCO's numbers of the classes
    root: Path | None  # of the dataset
    step: int
    weights: str  # fingerprint of the pretrained part


def open_run(run: Path, best: bool = False, weights: str | None = None) -> Trained:
    """The model of a run, finished or not, on the CPU.

    Args:
        run: A folder that ``e3va train`` wrote.
        best: Take the best checkpoint, not the last one.
        weights: File of the pretrained weights, where the recipe's is elsewhere now.

    Raises:
        InputError: For a folder that is no run, a model that does not fit its recipe, or other pretrained weights.
    """
    path = run / (BEST if best else LAST)
    for file in (run / RECIPE, path):
        if not file.is_file():
            raise InputError(f"'{run}' is not a run with a checkpoint, it has no {file.name}: give the folder of one.")
    recipe = load_recipe(str(run / RECIPE), {"weights": weights} if weights else None)
    tensors, state = checkpoint.read(path)
    about = state["about"]
    model = build_model(recipe, len(about["classes"]))
    if fingerprint(model.backbone.body.backbone) != about["weights"]:
        raise InputError(
            f"the pretrained weights of {recipe.backbone} are not those that '{run}' was trained with: give them with "
            "--weights."
        )
    checkpoint.restore(model, checkpoint.without_optimizer(tensors), path)
    return Trained(
        model, recipe, about["classes"], about["category_ids"], Path(about["root"]), state["step"], about["weights"]
    )


def start_from(model: nn.Module, source: Path, classes: list[str]) -> dict:
    """Put what an earlier training learnt into a new model: everything whose name and shape are the same in both.

    Args:
        model: A new model, perhaps of another method or with other classes.
        source: The folder of a run, or a file that ``e3va export`` wrote.
        classes: The new model's.

    Returns:
        ``{"from": ..., "taken": number of tensors, "not_taken": {name: why}, "new": names that nothing was put into}``.

    Raises:
        InputError: If ``source`` is neither, was trained beside other pretrained weights, or has nothing that fits.
    """
    path = source / LAST if source.is_dir() else source
    if source.is_dir() and not path.is_file():
        raise InputError(f"'{source}' is not a run with a checkpoint, it has no {LAST}: give the folder of one.")
    tensors, about = checkpoint.read(path)
    about = about.get("about", about)  # a run's checkpoint has more to say than an exported file
    if fingerprint(model.backbone.body.backbone) != about["weights"]:
        raise InputError(
            f"'{source}' was trained beside other pretrained weights: start with its backbone and weights."
        )
    wanted = checkpoint.kept_state(model)
    earlier = checkpoint.without_optimizer(tensors)
    fits = {name: x for name, x in earlier.items() if name in wanted and x.shape == wanted[name].shape}
    if not fits:
        raise InputError(f"nothing in '{source}' fits this model: start with its method, or without --init.")
    model.load_state_dict(fits, strict=False)
    shapes = {name: tuple(x.shape) for name, x in wanted.items()}
    return {
        "from": str(source.absolute()),
        "classes": about["classes"],
        "taken": len(fits),
        "not_taken": {
            name: f"{tuple(x.shape)} there, {shapes.get(name, 'nothing')} here"
            for name, x in earlier.items()
            if name not in fits
        },
        "new": [name for name in wanted if name not in earlier],
    }
