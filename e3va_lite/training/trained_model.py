"""Trained models, out of the folder of a run: to use them, or to start another training from them."""

from pathlib import Path
from typing import NamedTuple

from torch import Tensor, nn

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
    recipe, path = _file_of(run, RECIPE), _file_of(run, BEST if best else LAST)
    recipe = load_recipe(str(recipe), {"weights": weights} if weights else None)
    tensors, state = checkpoint.read(path)
    return rebuild(recipe, tensors, state["about"] | {"step": state["step"]}, path)


def rebuild(recipe: Recipe, tensors: dict[str, Tensor], about: dict, path: Path) -> Trained:
    """The model of a recipe with what was read from the checkpoint or exported file ``path``, on the CPU.

    Raises:
        InputError: If the tensors do not fit, or the pretrained weights are not those that they were trained with.
    """
    model = build_model(recipe, len(about["classes"]))
    check_weights(model.backbone.body, about, path)
    checkpoint.restore(model, tensors, path)
    root = Path(about["root"]) if "root" in about else None
    return Trained(model, recipe, about["classes"], about["category_ids"], root, about["step"], about["weights"])


def check_weights(backbone: nn.Module, about: dict, path: Path) -> None:
    """Raise an :class:`InputError` if a backbone has other pretrained weights than those that ``path`` belongs to."""
    if fingerprint(backbone.backbone) != about["weights"]:
        wanted = f"their digest begins with {about['weights'][:12]}"
        raise InputError(
            f"'{path}' was trained with another backbone or other pretrained weights of {backbone.name} ({wanted}): "
            "give those, on the command line with --weights."
        )


def _file_of(run: Path, name: str) -> Path:
    if not (run / name).is_file():
        raise InputError(f"'{run}' is not a run with a checkpoint, it has no {name}: give the folder of one.")
    return run / name


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
    tensors, about = checkpoint.read(_file_of(source, LAST) if source.is_dir() else source)
    about = about.get("about", about)  # a run's checkpoint has more to say than an exported file
    check_weights(model.backbone.body, about, source)
    earlier = checkpoint.without_optimizer(tensors)
    there, here = (
        {name: tuple(x.shape) for name, x in state.items()} for state in (earlier, checkpoint.kept_state(model))
    )
    fits = [name for name in there if there[name] == here.get(name)]
    if not fits:
        raise InputError(f"nothing in '{source}' fits this model: start with its method, or without --init.")
    model.load_state_dict({name: earlier[name] for name in fits}, strict=False)
    return {
        "from": str(source.absolute()),
        "classes": about["classes"],
        "taken": len(fits),
        "not_taken": {k: f"{v} there, {here.get(k, 'nothing')} here" for k, v in there.items() if k not in fits},
        "new": [name for name in here if name not in there],
    }
