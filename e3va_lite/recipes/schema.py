"""Recipes: all settings of a training run in one flat YAML file.

Every recipe names its task; the task decides which fields there are: those of :class:`Recipe`, which all tasks share,
and those of one of its three children.
"""

import dataclasses
import typing
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from ..errors import InputError, unknown

FOLDER = Path(__file__).parent
SCHEDULES = ("step", "poly", "cosine")
PRECISIONS = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What every task needs. Sizes in pixels; the YAML files say where each value comes from.

    Exactly one of ``epochs`` and ``steps`` is given; ``milestones`` and ``eval_every`` count in the same unit. A step
    is one update of the parameters: ``batch`` images on each process, ``accumulate`` times.
    """

    task: str
    # model
    method: str = "e3va"
    backbone: str = "swin_large_patch4_window7_224"
    pretrained: bool = True
    weights: str | None = None  # a local file instead of the published weights
    stages: list[int] = field(default_factory=lambda: [1, 2, 3, 4])
    options: dict = field(default_factory=dict)  # of the method, e.g. {rank: 16}
    drop_path_rate: float = 0.0  # stochastic depth; acts in `full` only
    # data
    train_split: str = "train"
    eval_split: str = "val"
    classes: list[str] | None = None  # objects of others are left out; without: what the dataset says of itself
    max_megapixels: float = 179.0  # larger images are refused
    # training
    epochs: int | None = None
    steps: int | None = None
    batch: int = 2  # images per process and backward pass
    accumulate: int = 1  # backward passes per step
    precision: str = "float32"
    lr: float = 1e-4
    head_lr: float | None = None  # of neck and heads; without: lr
    weight_decay: float = 0.05
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    warmup: int = 500  # steps of linear warm-up
    schedule: str = "step"  # "step" divides the rate by ten at the milestones, "poly" and "cosine" fall to zero
    milestones: list[int] = field(default_factory=list)
    power: float = 1.0  # of "poly"
    clip: float | None = None  # norm to which gradients are clipped
    seed: int = 0
    workers: int = 2  # processes that read images
    eval_every: int | None = None  # without: at the end only
    save_every: int = 500  # steps between checkpoints


@dataclass(frozen=True, kw_only=True)
class VOCRecipe(Recipe):
    """RetinaNet on a Pascal VOC-shaped folder, or on a COCO-shaped one, if ``annotations`` ends in ``.json``."""

    images: str = "JPEGImages"  # folder below the root
    annotations: str = "Annotations"  # folder of XML files; or COCO's file, where masks are not needed
    listing: str | None = None  # file that lists the names of a split; without: ImageSets/Main/{split}.txt
    fpn_channels: int = 256
    anchor_base: float = 4.0  # side of a level's smallest anchor, in strides
    min_size: int = 600
    max_size: int = 1000


@dataclass(frozen=True, kw_only=True)
class COCORecipe(Recipe):
    """Cascade Mask R-CNN on a COCO-shaped folder."""

    images: str = "{split}"  # folder below the root
    annotations: str = "annotations/instances_{split}.json"
    fpn_channels: int = 256
    anchor_base: float = 8.0  # side of a level's anchor, in strides
    head_channels: int = 1024  # width of the box heads' fully connected layer
    samples: int = 512  # boxes per image on which a stage trains
    proposals: int = 1000  # boxes per image that evaluation looks at; training draws its samples from twice as many
    min_sizes: list[int] = field(default_factory=lambda: list(range(480, 801, 32)))  # short side when training
    min_size: int = 800  # short side when evaluating
    max_size: int = 1333
    crop: bool = True  # half of the training images are cropped before they are resized


@dataclass(frozen=True, kw_only=True)
class ADE20KRecipe(Recipe):
    """UPerNet on a folder of images and index masks."""

    images: str = "images/{split}"  # folder below the root
    masks: str = "annotations/{split}"
    listing: str | None = None  # file below the root that lists the names of a split; without: all in the folder
    image_suffix: str = ".jpg"
    mask_suffix: str = ".png"
    values: dict | None = None  # other meanings of mask values, e.g. {255: 1}
    ignore: int = 0  # mask value that is no class; below it classes keep their place, above it they move down by one
    head_channels: int = 512
    scale: list[int] = field(default_factory=lambda: [2048, 512])  # long and short side that an image is fitted into
    ratio: list[float] = field(default_factory=lambda: [0.5, 2.0])  # of that size, when training
    crop: int = 512
    class_weights: list[float] | None = None  # in the loss; where one class has most of the pixels


TASKS: dict[str, type[Recipe]] = {"voc": VOCRecipe, "coco": COCORecipe, "ade20k": ADE20KRecipe}


def load_recipe(name: str, overrides: dict[str, object] | None = None, task: str | None = None) -> Recipe:
    """The recipe of that name or in that YAML file, with fields overridden.

    A recipe file may have one more entry, ``methods``, that maps the name of a method to the fields in which that
    method departs from the rest; it is resolved here.

    Args:
        name: One that ships with the package (``voc``, ``voc-nano``, ``coco``, ...) or a path that ends in ``.yaml``.
        overrides: Values by field; strings are read as YAML, so ``"1e-3"`` and ``"[1, 2]"`` mean what they look like.
            Another length, be it ``epochs`` or ``steps``, replaces the recipe's; ``milestones`` and ``eval_every`` keep
            their share of it unless they are given, too.
        task: The task that the recipe has to be for.

    Raises:
        InputError: For an unknown recipe, task or field, or a value of the wrong kind.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else FOLDER / f"{name}.yaml"
    if not path.is_file():
        if path.parent == FOLDER:
            raise unknown("recipe", name, sorted(file.stem for file in FOLDER.glob("*.yaml")))
        raise InputError(f"there is no recipe file '{path}': check the path.")
    try:
        values = yaml.safe_load(path.read_text()) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"recipe '{path}' is not valid YAML: {str(error).splitlines()[0]}.") from error
    if not isinstance(values, dict):
        raise InputError(f"recipe '{path}' must be a YAML mapping of fields to values.")
    overrides = {key: _parsed(key, value) for key, value in (overrides or {}).items()}
    by_method = values.pop("methods", {})
    values |= by_method.get(overrides.get("method", values.get("method", Recipe.method)), {})
    if {"epochs", "steps"} & overrides.keys():
        values = _rescaled(values, overrides)
    values |= overrides
    if task is not None and values.get("task") != task:
        raise InputError(f"recipe '{name}' is for the task {values.get('task')}, not for {task}: choose another.")
    return recipe_from(values)


def recipe_from(values: dict[str, object]) -> Recipe:
    """The recipe with these fields, checked; see :func:`load_recipe`."""
    if values.get("task") not in TASKS:
        raise unknown("task of a recipe", str(values.get("task")), TASKS)
    kinds = typing.get_type_hints(TASKS[values["task"]])
    for key in values:
        if key not in kinds:
            raise unknown(f"field of a recipe for {values['task']}", key, kinds)
    recipe = TASKS[values["task"]](**{key: _as(kinds[key], value, key) for key, value in values.items()})
    _check(recipe)
    return recipe


def save_recipe(recipe: Recipe, path: Path) -> None:
    """Write every field, defaults too, so that the file alone repeats the run."""
    path.write_text(yaml.safe_dump(dataclasses.asdict(recipe), sort_keys=False))


def _rescaled(values: dict, overrides: dict) -> dict:
    """The recipe without its length, and with what counts in its unit in proportion to the new one."""
    old = values.get("epochs") or values.get("steps")
    new = overrides.get("epochs") or overrides.get("steps")
    values = {key: value for key, value in values.items() if key not in ("epochs", "steps")}
    if isinstance(old, int) and isinstance(new, int):
        if values.get("milestones"):
            values["milestones"] = [max(1, round(milestone * new / old)) for milestone in values["milestones"]]
        if values.get("eval_every"):
            values["eval_every"] = max(1, round(values["eval_every"] * new / old))
    return values


def _parsed(key: str, value: object) -> object:
    try:
        return yaml.safe_load(value) if isinstance(value, str) else value
    except yaml.YAMLError as error:
        raise InputError(f"recipe field {key}={value} is not valid YAML: put the value into quotes.") from error


def _as(kind: object, value: object, key: str) -> object:
    """The value, if it is of that kind; a number written as text or without a point is forgiven."""
    choices = typing.get_args(kind) if type(None) in typing.get_args(kind) else (kind,)
    for choice in choices:
        plain = typing.get_origin(choice) or choice
        if plain is list and isinstance(value, list):
            return [_as(typing.get_args(choice)[0], item, key) for item in value]
        if plain is float and isinstance(value, int | float | str) and not isinstance(value, bool):
            try:
                return float(value)  # YAML reads 1e-4 as text
            except ValueError:
                continue
        if isinstance(value, plain) and not (plain is int and isinstance(value, bool)):
            return value
    wanted = " or ".join(getattr(choice, "__name__", str(choice)) for choice in choices).replace("NoneType", "null")
    hint = ": put it into quotes" if kind is str and isinstance(value, bool | int | float) else ""  # YAML's no, 1
    raise InputError(f"recipe field {key}={value!r} must be of type {wanted}{hint}.")


def _check(recipe: Recipe) -> None:
    """Values that cannot work, said before anything is read or built."""
    if (recipe.epochs is None) == (recipe.steps is None):
        raise InputError(f"epochs={recipe.epochs} and steps={recipe.steps}: give exactly one of the two.")
    for key, value in dataclasses.asdict(recipe).items():
        for number in value if isinstance(value, list) else [value]:
            if key in ZERO_IS_FINE or not isinstance(number, int | float) or isinstance(number, bool):
                continue
            if not number > 0:
                raise InputError(f"{key}={value} cannot work: choose a positive value.")
    for key in ZERO_IS_FINE:
        if getattr(recipe, key, 0) < 0:
            raise InputError(f"{key}={getattr(recipe, key)} cannot work: choose 0 or more.")
    for key, known in (("schedule", SCHEDULES), ("precision", PRECISIONS)):
        if getattr(recipe, key) not in known:
            raise unknown(key, getattr(recipe, key), known)
    if len(recipe.betas) != 2 or not all(0 < beta < 1 for beta in recipe.betas):
        raise InputError(f"betas={recipe.betas} cannot work: give two numbers between 0 and 1.")


ZERO_IS_FINE = ("weight_decay", "warmup", "seed", "workers", "drop_path_rate", "ignore")
