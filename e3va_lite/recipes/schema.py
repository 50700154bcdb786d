"""Recipes: all settings of a training run in one flat YAML file.

Every recipe names its task, and the task decides which fields there are: those of :class:`Recipe`, which all tasks
share, and those of one of its subclasses. They are pydantic dataclasses: frozen, and validated however they are
made, by :func:`load_recipe` or by ``dataclasses.replace``.
"""

import dataclasses
import typing
from dataclasses import field
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import BeforeValidator, ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError, model_validator
from pydantic.dataclasses import dataclass

from ..errors import InputError, unknown

FOLDER = Path(__file__).parent


def _number(value: object) -> object:
    """YAML reads ``1e-4`` as text."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


Count = PositiveInt
Number = Annotated[float, BeforeValidator(_number)]
Positive = Annotated[Number, Field(gt=0)]
Fraction = Annotated[Number, Field(gt=0, lt=1)]

_recipe = dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", strict=True, allow_inf_nan=False))


@_recipe
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
    stages: list[Count] = field(default_factory=lambda: [1, 2, 3, 4])
    options: dict = field(default_factory=dict)  # of the method, e.g. {rank: 16}
    drop_path_rate: Annotated[Number, Field(ge=0)] = 0.0  # stochastic depth; acts in `full` only
    # data
    train_split: str = "train"
    eval_split: str = "val"
    classes: list[str] | None = None  # objects of others are left out; default: all classes of the dataset
    max_megapixels: Positive = 179.0  # larger images are refused
    # training
    epochs: Count | None = None
    steps: Count | None = None
    batch: Count = 2  # images per process and backward pass
    accumulate: Count = 1  # backward passes per step
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    lr: Positive = 1e-4
    head_lr: Positive | None = None  # of neck and heads; default: lr
    weight_decay: Annotated[Number, Field(ge=0)] = 0.05
    betas: Annotated[list[Fraction], Field(min_length=2, max_length=2)] = field(default_factory=lambda: [0.9, 0.999])
    warmup: NonNegativeInt = 500  # steps of linear warm-up
    schedule: Literal["step", "poly", "cosine"] = "step"  # a tenth from each milestone on; or down to zero
    milestones: list[Count] = field(default_factory=list)
    power: Positive = 1.0  # of "poly"
    clip: Positive | None = None  # norm to which gradients are clipped
    seed: NonNegativeInt = 0
    workers: NonNegativeInt = 2  # processes that read images
    eval_every: Count | None = None  # default: at the end only
    save_every: Count = 500  # steps between checkpoints; ten minutes are the longest in any case

    @model_validator(mode="after")
    def _one_length(self) -> "Recipe":
        if (self.epochs is None) == (self.steps is None):
            raise InputError(f"epochs={self.epochs} and steps={self.steps}: give exactly one of the two.")
        return self


@_recipe
class VOCRecipe(Recipe):
    """RetinaNet on a Pascal VOC-shaped folder."""

    images: str = "JPEGImages"  # folder below the root
    annotations: str = "Annotations"  # folder of XML files below the root
    listing: str | None = None  # file that lists the names of a split; default: ImageSets/Main/{split}.txt
    fpn_channels: Count = 256
    anchor_base: Positive = 4.0  # side of a level's smallest anchor, in strides
    min_size: Count = 600
    max_size: Count = 1000
    canvas: Count | None = None  # side of the square that training images are padded to; default: the batch's largest
    zoom: bool = False  # zoom out of training images, and crop them around objects
    detections: Count = 100  # objects per image that the detector returns, at most


@_recipe
class COCOBoxesRecipe(VOCRecipe):
    """RetinaNet on the boxes of a COCO-shaped folder."""

    images: str = "{split}"  # folder below the root
    annotations: str = "annotations/instances_{split}.json"
    min_size: Count = 800
    max_size: Count = 1333


@_recipe
class COCORecipe(Recipe):
    """Cascade Mask R-CNN on a COCO-shaped folder."""

    images: str = "{split}"  # folder below the root
    annotations: str = "annotations/instances_{split}.json"
    fpn_channels: Count = 256
    anchor_base: Positive = 8.0  # side of a level's anchor, in strides
    head_channels: Count = 1024  # width of the box heads' fully connected layer
    samples: Count = 512  # boxes per image on which a stage trains
    proposals: Count = 1000  # boxes per image that evaluation looks at; training draws its samples from twice as many
    min_sizes: list[Count] = field(default_factory=lambda: list(range(480, 801, 32)))  # short side when training
    min_size: Count = 800  # short side when evaluating
    max_size: Count = 1333
    crop: bool = True  # half of the training images are cropped before they are resized
    detections: Count = 100  # objects per image that the detector returns, at most


@_recipe
class ADE20KRecipe(Recipe):
    """UPerNet on a folder of images and index masks."""

    images: str = "images/{split}"  # folder below the root
    masks: str = "annotations/{split}"
    listing: str | None = None  # file below the root with the names of a split; default: all in the folder
    image_suffix: str = ".jpg"
    mask_suffix: str = ".png"
    values: dict[int, int] | None = None  # other meanings of mask values, e.g. {255: 1}
    # mask value that is no class; below it classes keep their place, above it they move down by one
    ignore: NonNegativeInt = 0
    head_channels: Count = 512
    scale: list[Count] = field(default_factory=lambda: [2048, 512])  # long and short side that an image is fitted into
    ratio: list[Positive] = field(default_factory=lambda: [0.5, 2.0])  # of that size, when training
    crop: Count = 512
    class_weights: list[Positive] | None = None  # in the loss; where one class has most of the pixels


TASKS: dict[str, type[Recipe]] = {
    "voc": VOCRecipe,
    "coco": COCORecipe,
    "coco-boxes": COCOBoxesRecipe,
    "ade20k": ADE20KRecipe,
}


def load_recipe(name: str, overrides: dict[str, object] | None = None, task: str | None = None) -> Recipe:
    """The recipe of that name or in that YAML file, with fields overridden.

    A recipe file may have one more entry, ``methods``, that maps the name of a method to the fields in which that
    method departs from the rest; it is resolved here.

    Args:
        name: One that ships with the package (``voc``, ``voc-nano``, ``coco``, ...) or a path that ends in ``.yaml``.
        overrides: Values by field; strings are read as YAML, so ``"1e-3"`` and ``"[1, 2]"`` mean what they look like,
            but for the fields that hold text. Another length, be it ``epochs`` or ``steps``, replaces the recipe's;
            ``milestones`` and ``eval_every`` keep their share of it unless they are given, too.
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
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"recipe '{path}' is not valid YAML: {str(error).splitlines()[0]}.") from error
    except OSError as error:
        raise InputError(f"recipe '{path}' cannot be read ({error.strerror}): check the file.") from None
    if not isinstance(values, dict):
        raise InputError(f"recipe '{path}' must be a YAML mapping of fields to values.")
    overrides = overrides or {}
    recipe_type = TASKS.get(str(overrides.get("task", values.get("task"))), Recipe)
    fields = typing.get_type_hints(recipe_type)
    overrides = {key: _parsed(key, value, fields.get(key)) for key, value in overrides.items()}
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
    recipe_type = TASKS[values["task"]]
    fields = typing.get_type_hints(recipe_type)
    for key in values:
        if key not in fields:
            raise unknown(f"field of a recipe for {values['task']}", str(key), fields)
    try:
        return recipe_type(**values)
    except ValidationError as error:
        raise _sentence(error.errors()[0], fields) from None


def save_recipe(recipe: Recipe, path: Path) -> None:
    """Write every field, defaults too, so that the file alone repeats the run."""
    text = yaml.safe_dump(dataclasses.asdict(recipe), sort_keys=False, allow_unicode=True)
    path.write_text(text, encoding="utf-8")


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


def _parsed(key: str, value: object, kind: object) -> object:
    """An override as YAML reads it; one of a field that holds text stays as it is unless it stands in quotes."""
    if kind == str | None and value in ("", "~", "null"):
        return None
    is_text = kind in (str, str | None) and not str(value).startswith(("'", '"'))
    if is_text or not isinstance(value, str):
        return value
    try:
        return yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise InputError(f"recipe field {key}={value} is not valid YAML: put the value into quotes.") from error


def _sentence(error: dict, fields: dict[str, object]) -> InputError:
    """The first of pydantic's errors as one sentence with the way out."""
    value, kind = error["input"], error["type"]
    if kind == "value_error":
        return error["ctx"]["error"]
    key = str(error["loc"][0])
    if kind == "literal_error":
        return unknown(key, str(value), typing.get_args(fields[key]))
    if key == "betas" and ("too_" in kind or "than" in kind):
        return InputError(f"betas={value} cannot work: give two numbers between 0 and 1.")
    if "than" in kind or kind == "finite_number":
        least = "0 or more" if "equal" in kind else "a positive value"
        return InputError(f"{key}={value} cannot work: choose {least}.")
    wanted = {"string": "str", "dataclass": "mapping"}.get(kind.split("_")[0], kind.split("_")[0])
    optional = " or null" if type(None) in typing.get_args(fields[key]) and len(error["loc"]) == 1 else ""
    quotes = "; put quotes around it, since YAML reads yes, no and numbers as something else" if wanted == "str" else ""
    return InputError(f"recipe field {key}={value!r} must be of type {wanted}{optional}{quotes}.")
