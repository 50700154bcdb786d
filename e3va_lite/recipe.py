"""Recipes: all settings of a training run in one flat YAML file."""

import dataclasses
import typing
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from .errors import InputError, unknown

FOLDER = Path(__file__).parent / "recipes"


@dataclass(frozen=True)
class Recipe:
    """A detection run. Sizes in pixels, rates per step; the YAML files say where each value comes from."""

    # model
    method: str = "e3va"
    backbone: str = "swin_large_patch4_window7_224"
    pretrained: bool = True
    weights: str | None = None
    stages: list[int] = field(default_factory=lambda: [2, 3, 4])
    options: dict = field(default_factory=dict)  # of the method, e.g. {rank: 16}
    fpn_channels: int = 256
    anchor_base: float = 4.0
    # images
    train_split: str = "trainval"
    eval_split: str = "test"
    classes: list[str] | None = None
    min_size: int = 600
    max_size: int = 1000
    # training
    epochs: int = 12
    batch: int = 2
    lr: float = 1e-4
    weight_decay: float = 0.05
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    warmup: int = 500  # steps of linear warm-up
    schedule: str = "step"  # of the learning rate: "step" divides by ten at the milestones, "cosine" falls to zero
    milestones: list[int] = field(default_factory=lambda: [8, 11])  # epochs
    clip: float | None = None  # norm to which gradients are clipped
    seed: int = 0
    workers: int = 2


def load_recipe(name: str, overrides: dict[str, object] | None = None) -> Recipe:
    """The recipe of that name or in that YAML file, with fields overridden.

    Args:
        name: One that ships with the package (``voc``, ``voc-nano``, ``shapes``) or a path that ends in ``.yaml``.
        overrides: Values by field; strings are read as YAML, so ``"1e-3"`` and ``"[1, 2]"`` mean what they look like.

    Raises:
        InputError: For an unknown recipe or field, or a value of the wrong kind.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else FOLDER / f"{name}.yaml"
    if not path.is_file():
        if path.parent == FOLDER:
            raise unknown("recipe", name, sorted(file.stem for file in FOLDER.glob("*.yaml")))
        raise InputError(f"there is no recipe file '{path}': check the path.")
    try:
        values = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise InputError(f"recipe '{path}' is not valid YAML: {str(error).splitlines()[0]}.") from error
    if not isinstance(values, dict):
        raise InputError(f"recipe '{path}' must be a YAML mapping of fields to values.")
    for key, value in (overrides or {}).items():
        values[key] = yaml.safe_load(value) if isinstance(value, str) else value
    kinds = typing.get_type_hints(Recipe)
    for key, value in values.items():
        if key not in kinds:
            raise unknown("recipe field", key, kinds)
        values[key] = _as(kinds[key], value, key)
    recipe = Recipe(**values)
    for key in ("epochs", "batch", "min_size", "max_size", "fpn_channels", "lr"):
        if getattr(recipe, key) <= 0:
            raise InputError(f"{key}={getattr(recipe, key)} cannot work: choose a positive value.")
    if recipe.schedule not in ("step", "cosine"):
        raise unknown("schedule", recipe.schedule, ("step", "cosine"))
    return recipe


def save_recipe(recipe: Recipe, path: Path) -> None:
    """Write every field, defaults too, so that the file alone repeats the run."""
    path.write_text(yaml.safe_dump(dataclasses.asdict(recipe), sort_keys=False))


def _as(kind: object, value: object, key: str) -> object:
    """The value, if it is of that kind; a number written as text or without a point is forgiven."""
    choices = typing.get_args(kind) if type(None) in typing.get_args(kind) else (kind,)
    for choice in choices:
        plain = typing.get_origin(choice) or choice
        if plain is float and isinstance(value, int | float | str) and not isinstance(value, bool):
            try:
                return float(value)  # YAML reads 1e-4 as text
            except ValueError:
                continue
        if isinstance(value, plain) and not (plain is int and isinstance(value, bool)):
            return value
    wanted = " or ".join(getattr(choice, "__name__", str(choice)) for choice in choices).replace("NoneType", "null")
    raise InputError(f"recipe field {key}={value!r} must be of type {wanted}.")
