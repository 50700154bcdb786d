"""What the paper in miniature compares: studies, which are tasks on images, and arms, which are methods.

A *study* is a dense task on images that pretraining has not seen: generated scenes of another look, or photographs. An
*arm* is a fine-tuning method in it. A *part* is a list of both that can be run by itself.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import numpy as np
from torch.utils.data import Dataset, Subset

from ..analysis.training_step import training_size
from ..backbones.swin import MINIATURES
from ..datasets.shapes import VERSION, WORLDS, write_scenes
from ..errors import InputError, unknown
from ..files import replacing
from ..methods.registry import parse_method
from ..recipes.schema import Recipe, load_recipe
from ..tasks.registry import task_module

# Arms -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Arm:
    """A method, ``METHOD[:option=value,...]``, and whether its backbone starts from pretrained weights.

    Attributes:
        backbone: Instead of the recipe's.
    """

    spec: str
    pretrained: bool = True
    backbone: str | None = None


# A quarter of the paper's ranks and widths, for the miniatures are about a quarter as wide as Swin-B and Swin-L: so two
# branches span less than the middle dimension in every stage. The paper's own are e3va++'s and ``PAPERS_WIDTHS``; with
# other backbones :func:`spec_for` restores them.
METHODS = {
    "full": Arm("full"),
    "fixed": Arm("fixed"),
    "bitfit": Arm("bitfit"),
    "norm": Arm("norm"),
    "partial1": Arm("partial1"),
    "adapter": Arm("adapter:middle=16"),
    "lora": Arm("lora:rank=16"),
    "adaptformer": Arm("adaptformer:middle=16"),
    "lorand": Arm("lorand:rank=2"),
    "e3va": Arm("e3va:rank=2"),
    "e3va+": Arm("e3va:rank=4"),
    "e3va++": Arm("e3va:rank=8"),
}
CONTROLS = {
    "fixed, norms trained": Arm("fixed:fpn_norm=trainable"),
    "from scratch": Arm("full", pretrained=False),
}
# Tables 5 and 6, and what the paper leaves open; each departs from "e3va" in one thing.
ABLATIONS = {
    "standard, as many parameters": Arm("e3va:adapter=standard,middle=6"),
    "standard": Arm("e3va:adapter=standard,middle=8"),
    "stacked": Arm("e3va:rank=2,structure=stacked"),
    "chained": Arm("e3va:rank=2,structure=chained"),
    "trainable reductions": Arm("e3va:rank=2,reduction=trainable"),
    "fixed norms": Arm("e3va:rank=2,fpn_norm=fixed"),
    "e + l": Arm("e3va:rank=2,fpn_input=e+l"),
    "random start": Arm("e3va:rank=2,start=random"),
    "rank 1": Arm("e3va:rank=1"),
    "rank 16": Arm("e3va:rank=16"),
}
PAPERS_WIDTHS = {
    "adapter, the paper's width": Arm("adapter:middle=64"),
    "lora, the paper's rank": Arm("lora:rank=64"),
    "adaptformer, the paper's width": Arm("adaptformer:middle=64"),
    "lorand, the paper's rank": Arm("lorand:rank=8"),
}
# They cut the backward pass, too; with as many parameters as "e3va", as nearly as their widths allow.
NEIGHBOURS = {"lst": Arm("lst:narrower=20"), "losa": Arm("losa:rank=18")}
LARGER = {
    "larger backbone, fixed": Arm("fixed", backbone="swin_nano_deep"),
    "larger backbone, e3va": Arm("e3va:rank=2", backbone="swin_nano_deep"),
}
ARMS = METHODS | NEIGHBOURS | CONTROLS | ABLATIONS | PAPERS_WIDTHS | LARGER
QUARTER = 4


def spec_for(arm: str, backbone: str) -> str:
    """An arm's method with a backbone: as it is with the miniatures, with four times its rank and width with others."""
    spec = ARMS[arm].spec
    if backbone in MINIATURES:
        return spec
    method, options = parse_method(spec)
    larger = {key: value * QUARTER if key in ("rank", "middle") else value for key, value in options.items()}
    return f"{method}:{','.join(f'{key}={value}' for key, value in larger.items())}".rstrip(":")


CORE = ("fixed", "adapter", "e3va", "full")
REST = [*(name for name in METHODS if name not in CORE), *CONTROLS]

RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)


def first_rates(recipe: Recipe) -> tuple[float, ...]:
    """The learning rates that every arm tries: the nearest one to the recipe's, and those on both sides of it."""
    place = int(np.argmin(np.abs(np.log(RATES) - np.log(recipe.lr))))
    place = min(max(place, 1), len(RATES) - 2)
    return RATES[place - 1 : place + 2]


# Studies on generated scenes ------------------------------------------------------------------------------------------

# Judged runs per arm. By five seeds in the stained world (data/results/shapes-5-seeds.json), eight find what separates
# E3VA from a frozen backbone after a correction for some thirty claims, and five do not.
SEEDS, SEEDS_OF_CLAIMED, SEEDS_OF_QUICK = 5, 8, 2
CLAIMED = (*CORE, *CONTROLS, "larger backbone, e3va")
TRAIN_IMAGES, TEST_IMAGES, CHOOSE_IMAGES = 480, 160, 100
WORLD = "duotone"  # of the scenes
TEST_SCENES, CHOOSE_SCENES = 0, 1  # seeds of scenes; training images are of the first


@dataclass(frozen=True)
class Scenes:
    """A recipe's task on generated scenes.

    Attributes:
        images: So many training images only.
        steps: Instead of the recipe's.
    """

    name: str
    base: str
    images: int | None = None
    steps: int | None = None
    heads_follow: ClassVar[bool] = False  # the rate of neck and heads is the recipe's

    @property
    def kind(self) -> str:
        return self.name

    def recipe(self, method: str, purpose: str) -> Recipe:
        """The recipe of one method's runs, which choose the learning rate or are judged (``choose`` or ``test``)."""
        return load_recipe(self.base, {"method": method} | ({} if self.steps is None else {"steps": self.steps}))

    def seeds(self, arm: str) -> int:
        """How many judged runs an arm gets."""
        if self.name == "quick":
            return SEEDS_OF_QUICK
        return SEEDS_OF_CLAIMED if arm in CLAIMED else SEEDS

    def prepare(self, data: Path) -> None:
        """Write the scenes below ``data``; what is there stays."""
        recipe = self.recipe("full", "test")
        size = training_size(recipe)[0]
        for purpose, seed, train, val in (
            ("test", TEST_SCENES, TRAIN_IMAGES, TEST_IMAGES),
            ("choose", CHOOSE_SCENES, 1, CHOOSE_IMAGES),
        ):
            write_scenes(data / f"{recipe.task}-{purpose}", recipe.task, train, val, seed, size, WORLD)

    def datasets(self, recipe: Recipe, purpose: str, data: Path) -> tuple[Dataset, Dataset, list[str]]:
        """The images to train on, those to be judged on, and the classes."""
        task = task_module(recipe.task)
        train_set = task.dataset(recipe, data / f"{recipe.task}-test", recipe.train_split, recipe.classes, train=True)
        judged = task.dataset(recipe, data / f"{recipe.task}-{purpose}", recipe.eval_split, train_set.classes)
        shown = train_set if self.images is None else Subset(train_set, range(self.images))
        return shown, judged, train_set.classes

    def images_used(self, purpose: str) -> dict:
        """What a line says of the images."""
        scenes = {"world": WORLD, **asdict(WORLDS[WORLD]), "version": VERSION, "train": self.images or TRAIN_IMAGES}
        scenes |= {"test": TEST_IMAGES} if purpose == "test" else {"choose": CHOOSE_IMAGES}
        return {"scenes": scenes}


STUDIES = {
    study.name: study
    for study in (
        Scenes("detection", "mini-detection"),
        Scenes("few images", "mini-detection", images=60),
        Scenes("segmentation", "mini-segmentation"),
        Scenes("instances", "mini-instances"),
        # Added when 250 steps had shown low ranks near a frozen backbone:
        Scenes("longer", "mini-detection", steps=1000),
        Scenes("quick", "mini-detection", steps=60),  # to see it work
    )
}
#: What can be run by itself; all of it is the experiment.
PARTS: dict[str, list[tuple[str, str]]] = {
    "core": [(study, arm) for study in ("detection", "segmentation") for arm in CORE],
    "few": [("few images", arm) for arm in (*CORE, *CONTROLS)],
    "instances": [("instances", arm) for arm in (*CORE, "e3va++", *CONTROLS)],
    "methods": [(study, arm) for study in ("detection", "segmentation") for arm in REST],
    "few-methods": [("few images", arm) for arm in REST if arm not in CONTROLS],
    "larger": [(study, arm) for study in ("detection", "instances") for arm in LARGER],
    "widths": [("detection", arm) for arm in PAPERS_WIDTHS],
    "neighbours": [("longer", arm) for arm in ("lora", *NEIGHBOURS)],
    "ablations": [("longer", arm) for arm in (*CORE, *CONTROLS, "e3va+", "e3va++", *ABLATIONS)],
}
QUICK = [("quick", arm) for arm in CORE]

# Studies on photographs -----------------------------------------------------------------------------------------------

HELD_OUT, FEW = 0.2, 0.1  # shares of the training images: to choose on; to train on where there are few
SHORTER = 0.3  # of the steps: a run that chooses, and any on few images
CHOOSE_PHOTOGRAPHS = 200  # to choose on, at most
DIVIDE_SEED = 0  # of the held-out images and the few
SEEDS_OF_VIT = 2
FEW_KIND, VIT_KIND = "photographs, few", "photographs, ViT"


@dataclass(frozen=True)
class Photographs:
    """A recipe's task on photographs in one of the standard layouts.

    Rates are chosen on training images that are held out: a run that chooses trains on the others and is shorter, one
    that is judged trains on all and is tested on the evaluation split. Where there are few images to train on, these
    are a tenth of all training images, none of them held out.

    Attributes:
        name: Of the images, for people.
        kind: A key of ``ON_PHOTOGRAPHS``.
        base: Name or file of the recipe.
        root: Folder of the photographs.
        fields: Of the recipe, to be overridden.
    """

    name: str
    kind: str
    base: str
    root: Path
    fields: dict[str, object] = field(default_factory=dict)
    heads_follow: ClassVar[bool] = True  # neck and heads learn at the rate that a frozen backbone chooses

    @property
    def few(self) -> bool:
        return self.kind == FEW_KIND

    def recipe(self, method: str, purpose: str) -> Recipe:
        """See :meth:`Scenes.recipe`."""
        fields = {**self.fields, "method": method}
        recipe = load_recipe(self.base, fields)
        unit = "epochs" if recipe.steps is None else "steps"
        if purpose == "test" and not (self.few and unit == "steps"):
            return recipe
        return load_recipe(self.base, {**fields, unit: max(1, round(SHORTER * getattr(recipe, unit)))})

    def seeds(self, arm: str) -> int:
        """See :meth:`Scenes.seeds`."""
        return SEEDS_OF_VIT if self.kind == VIT_KIND else SEEDS

    def prepare(self, data: Path) -> None:
        """Raise an InputError now, not in a process of the experiment, if something is wrong with the photographs."""
        _ = self.lists

    def datasets(self, recipe: Recipe, purpose: str, data: Path | None = None) -> tuple[Dataset, Dataset, list[str]]:
        """See :meth:`Scenes.datasets`."""
        task = task_module(recipe.task)
        train_set = task.dataset(recipe, self.root, recipe.train_split, recipe.classes, train=True)
        shown, held = self._divided(len(train_set))
        if purpose == "test":
            judged = task.dataset(recipe, self.root, recipe.eval_split, train_set.classes)
            return Subset(train_set, shown if self.few else range(len(train_set))), judged, train_set.classes
        judged = task.dataset(recipe, self.root, recipe.train_split, train_set.classes)
        return Subset(train_set, shown), judged.only(held), train_set.classes

    def _divided(self, length: int) -> tuple[list[int], list[int]]:
        """Which of the training images a run that chooses trains on, and which it is judged on."""
        order = np.random.default_rng(DIVIDE_SEED).permutation(length).tolist()
        held = max(1, round(HELD_OUT * length))
        shown = order[held:]
        shown = shown[: max(1, round(FEW * length))] if self.few else shown
        return sorted(shown), sorted(order[:held][:CHOOSE_PHOTOGRAPHS])

    @cached_property
    def lists(self) -> dict[str, list[str]]:
        """The files of the images below the root, sorted: those to ``train`` on in judged runs, those to ``choose`` on,
        and those of the ``test``."""
        found = {}
        for purpose in ("choose", "test"):
            shown, judged, _ = self.datasets(self.recipe("full", purpose), purpose)
            found[purpose] = self._names(judged.paths)
        return {"train": self._names(shown.dataset.paths[i] for i in shown.indices), **found}

    def _names(self, paths: Iterable[Path]) -> list[str]:
        return sorted(path.relative_to(self.root).as_posix() for path in paths)

    def images_used(self, purpose: str) -> dict:
        """See :meth:`Scenes.images_used`."""
        return {"kind": self.kind, "images": {part: summary_of(self.lists[part]) for part in ("train", purpose)}}


def summary_of(names: list[str]) -> dict:
    """How many file names there are, and the SHA-256 of their list, one a line."""
    return {"count": len(names), "sha256": hashlib.sha256("\n".join(names).encode()).hexdigest()}


#: By kind: the word for it on the command line, the name of the images and the recipe unless others are given.
ON_PHOTOGRAPHS = {
    "photographs, detection": ("detection", "VOC 2007", "photos-detection"),
    "photographs, segmentation": ("segmentation", "MiniPlaces segmentation", "photos-segmentation"),
    "photographs, instances": ("instances", "MiniPlaces instances", "photos-instances"),
    "photographs, few": ("detection", "VOC 2007", "photos-detection"),
    "photographs, ViT": ("vit", "VOC 2007, ViT-S/14", "photos-vit"),
}
COMPARED = ("fixed", "fixed, norms trained", "e3va", "adapter", "lora", "full", "from scratch")
DESIGN = (
    "e3va+",
    "e3va++",
    "standard, as many parameters",
    "stacked",
    "chained",
    "trainable reductions",
    "fixed norms",
)
CAPACITY = ("e3va+", "e3va++", "trainable reductions")  # more to learn for the highway
OTHERS = ("bitfit", "norm", "partial1", "adaptformer", "lorand", *NEIGHBOURS)
#: As ``PARTS``, with kinds of studies; the most urgent first.
PHOTOGRAPH_PARTS: dict[str, list[tuple[str, str]]] = {
    "detection": [("photographs, detection", arm) for arm in COMPARED],
    "segmentation": [("photographs, segmentation", arm) for arm in COMPARED],
    "instances": [("photographs, instances", arm) for arm in COMPARED],
    "few": [("photographs, few", arm) for arm in COMPARED],
    "design": [
        *(("photographs, segmentation", arm) for arm in CAPACITY),
        *(("photographs, detection", arm) for arm in DESIGN),
    ],
    "methods": [("photographs, detection", arm) for arm in OTHERS],
    "vit": [("photographs, ViT", arm) for arm in ("fixed", "e3va", "lora", "full")],
}


def photograph_studies(roots: dict[str, Path], settings: dict[str, str]) -> dict[str, Photographs]:
    """The studies by kind, for which there are photographs.

    Args:
        roots: Folders by the word for a study: ``detection``, ``segmentation``, ``instances``, ``vit``.
        settings: Values by ``WORD.FIELD``: fields of the recipe, ``recipe`` itself or ``name``, that of the images.

    Raises:
        InputError: For an unknown word, a setting of a study without photographs, or a folder that is not there.
    """
    words = dict.fromkeys(word for word, *_ in ON_PHOTOGRAPHS.values())
    fields: dict[str, dict[str, str]] = {word: {} for word in roots}
    for word, root in roots.items():
        if word not in words:
            raise unknown("study on photographs", word, words)
        if not root.is_dir():
            raise InputError(f"there is no folder '{root}': --photographs {word}=FOLDER names that of the photographs.")
    for key, value in settings.items():
        word, _, name = key.partition(".")
        if word not in fields or not name:
            there = ", ".join(roots)
            raise InputError(f"--set {key}={value} is not understood: write STUDY.FIELD=VALUE, STUDY out of {there}.")
        fields[word][name] = value
    studies: dict[str, Photographs] = {}
    for kind, (word, name, base) in ON_PHOTOGRAPHS.items():
        if word in roots:
            own = dict(fields[word])
            name, base = own.pop("name", name), own.pop("recipe", base)
            name += ", a tenth of the images" if kind == FEW_KIND else ""
            if name in (study.name for study in studies.values()):
                raise InputError(f"two studies are called '{name}': give one of them another {word}.name.")
            studies[kind] = Photographs(name, kind, base, roots[word], own)
    return studies


def write_lists(studies: Iterable[Photographs], file: Path) -> None:
    """Add to a JSON file on which images studies are run: by study the number of images and the hash of the list of
    their files, and by hash the lists themselves."""
    content = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"studies": {}, "lists": {}}
    for study in studies:
        content["studies"][study.name] = {part: summary_of(names) for part, names in study.lists.items()}
        content["lists"] |= {summary_of(names)["sha256"]: names for names in study.lists.values()}
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as unfinished:
        unfinished.write_text(json.dumps(content) + "\n", encoding="utf-8")
