"""The paper in miniature: which runs there are, and running them.

A *study* is a dense task in a world that pretraining has not seen; an *arm* is a fine-tuning method in it. Every arm
first chooses its learning rate, on scenes that are neither trained nor tested on; then it is trained once per seed and
judged on the test scenes. Steps, batch and the learning rate of neck and heads (the one that a frozen backbone chooses)
are the same for all arms of a study, and so is the order of the images for one seed. A finished run is a line of a JSON
lines file, from which :mod:`e3va_lite.experiments.report` makes everything else.
"""

import json
import os
import sys
import threading
import time
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, replace
from functools import cache
from multiprocessing import get_context, parent_process
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Subset
from tqdm import tqdm

from ..analysis.cost import interleaved_seconds, median_share, with_method
from ..analysis.training_step import Step, build_step, training_size
from ..backbones.base import trainable_parameters
from ..backbones.swin import create_swin
from ..backbones.weights import fingerprint
from ..datasets.shapes import VERSION, WORLDS, write_scenes
from ..errors import InputError
from ..highway import E3VA
from ..recipes.schema import Recipe, load_recipe
from ..tasks.registry import task_module
from ..training.engine import build_model, evaluate, fit, machine
from .jsonl import append_line


@dataclass(frozen=True)
class Study:
    """A recipe's task on generated scenes.

    Attributes:
        images: So many training images only.
        steps: Instead of the recipe's.
    """

    recipe: str
    images: int | None = None
    steps: int | None = None


@dataclass(frozen=True)
class Arm:
    """A method, ``METHOD[:option=value,...]``, the backbone, and whether that starts from pretrained weights."""

    spec: str
    pretrained: bool = True
    backbone: str = "swin_nano"


STUDIES = {
    "detection": Study("mini-detection"),
    "few images": Study("mini-detection", images=60),
    "segmentation": Study("mini-segmentation"),
    "instances": Study("mini-instances"),
    "longer": Study("mini-detection", steps=1000),  # added when 250 steps had shown low ranks near a frozen backbone
    "quick": Study("mini-detection", steps=60),  # to see it work
}

# A quarter of the paper's ranks and widths, for the backbone is about a quarter as wide as Swin-B and Swin-L: so two
# branches span less than the middle dimension in every stage. The paper's own are e3va++'s and ``PAPERS_WIDTHS``.
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
CORE = ("fixed", "adapter", "e3va", "full")
REST = [*(name for name in METHODS if name not in CORE), *CONTROLS]
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

RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
FIRST_RATES = RATES[3:6]  # of every arm; as long as the best is the lowest or highest tried, the next one is tried, too
CHOOSE_SEED = 1000  # of the runs that choose; those that are judged have 0, 1, ...
# Judged runs per arm. By five seeds in the stained world (data/results/shapes-5-seeds.json), eight find what separates
# E3VA from a frozen backbone after a correction for some thirty claims, and five do not.
SEEDS, SEEDS_OF_CLAIMED, SEEDS_OF_QUICK = 5, 8, 2
CLAIMED = (*CORE, *CONTROLS, "larger backbone, e3va")
TRAIN_IMAGES, TEST_IMAGES, CHOOSE_IMAGES = 480, 160, 100
WORLD = "duotone"  # of the scenes
TEST_SCENES, CHOOSE_SCENES = 0, 1  # seeds of scenes; training images are of the first


@dataclass(frozen=True)
class Run:
    """One training and its judgement: ``purpose`` is ``choose`` or ``test``."""

    study: str
    arm: str
    purpose: str
    lr: float
    seed: int

    def recipe(self) -> Recipe:
        arm = ARMS[self.arm]
        study = STUDIES[self.study]
        recipe = load_recipe(study.recipe, {} if study.steps is None else {"steps": study.steps})
        fields = {"backbone": arm.backbone, "pretrained": arm.pretrained, "lr": self.lr, "seed": self.seed}
        if arm.spec == "fixed":  # nothing learns but neck and heads, and theirs is the rate that it chooses
            fields["head_lr"] = self.lr
        return with_method(replace(recipe, **fields), arm.spec)


def seeds_of(study: str, arm: str) -> int:
    """How many judged runs an arm gets."""
    if study == "quick":
        return SEEDS_OF_QUICK
    return SEEDS_OF_CLAIMED if arm in CLAIMED else SEEDS


def next_runs(arms: Iterable[tuple[str, str]], lines: list[dict]) -> Iterator[Run]:
    """What can be run now, in order: runs whose learning rate is known, and that have no line yet.

    Args:
        arms: Pairs of study and arm.
        lines: Of this experiment, runs under way among them; those have no ``score``.
    """
    for study, arm in arms:
        of_arm = [line for line in lines if (line["study"], line["arm"]) == (study, arm)]
        tried = {line["lr"]: line.get("score") for line in of_arm if line["purpose"] == "choose"}
        wanted = [lr for lr in _rates(tried) if lr not in tried]
        yield from (Run(study, arm, "choose", lr, CHOOSE_SEED) for lr in wanted)
        if wanted or None in tried.values():
            continue
        lr = chosen_rate(tried)
        done = {line["seed"] for line in of_arm if line["purpose"] == "test" and line["lr"] == lr}
        yield from (Run(study, arm, "test", lr, seed) for seed in range(seeds_of(study, arm)) if seed not in done)


def chosen_rate(tried: dict[float, float]) -> float:
    """The learning rate with the best score; of equals the lowest."""
    return min(tried, key=lambda lr: (-tried[lr], lr))


def _rates(tried: dict[float, float | None]) -> list[float]:
    """The rates that an arm has to try, as far as its scores tell."""
    if not set(FIRST_RATES) <= {lr for lr, score in tried.items() if score is not None}:
        return list(FIRST_RATES)
    if None in tried.values():
        return []
    place = RATES.index(chosen_rate(tried))
    return [lr for lr in RATES[max(place - 1, 0) : place + 2] if lr not in tried]


def write_data(data: Path, studies: Iterable[str]) -> None:
    """The scenes of the studies below ``data``; what is there stays."""
    for name in {STUDIES[study].recipe for study in studies}:
        recipe = load_recipe(name)
        size = training_size(recipe)[0]
        for purpose, seed, train, val in (
            ("test", TEST_SCENES, TRAIN_IMAGES, TEST_IMAGES),
            ("choose", CHOOSE_SCENES, 1, CHOOSE_IMAGES),
        ):
            write_scenes(data / f"{recipe.task}-{purpose}", recipe.task, train, val, seed, size, WORLD)


def perform(recipe: Recipe, images: int | None, purpose: str, data: Path, device: str) -> dict:
    """Train and judge; the run's line without what :func:`setting` says.

    A training that diverges is a run, too: its ``status`` is ``failed`` and its score 0.

    Args:
        images: Train on the first so many, or on all.
        purpose: The scenes to judge on: ``choose`` or ``test``.
        data: Folder of the scenes.
    """
    task, where = task_module(recipe.task), torch.device(device)
    train_set = task.dataset(recipe, data / f"{recipe.task}-test", recipe.train_split, recipe.classes, train=True)
    judged = task.dataset(recipe, data / f"{recipe.task}-{purpose}", recipe.eval_split, train_set.classes)
    model = build_model(recipe, len(train_set.classes))
    shown = train_set if images is None else Subset(train_set, range(images))
    line = {"trainable": trainable_parameters(model.backbone.body), **machine(recipe, where)}
    start = time.monotonic()
    try:
        losses = fit(model, shown, recipe, where)
    except InputError as error:
        return {"status": "failed", "score": 0.0, "message": str(error), **line}
    result = evaluate(model, judged, recipe, where)
    return {
        "status": "done",
        "score": result[task.METRIC],
        "result": result,
        "last_losses": round(sum(losses[-20:]) / len(losses[-20:]), 4),
        "seconds": round(time.monotonic() - start, 1),
        **line,
    }


def setting(run: Run) -> dict:
    """Everything that a run's result depends on besides the code: a line of another setting is not this run's."""
    recipe = run.recipe()
    images = {"world": WORLD, **asdict(WORLDS[WORLD]), "version": VERSION}
    images |= {"train": STUDIES[run.study].images or TRAIN_IMAGES}
    images |= {"test": TEST_IMAGES} if run.purpose == "test" else {"choose": CHOOSE_IMAGES}
    weights = _pretrained(recipe.backbone) if recipe.pretrained else None
    return {**asdict(run), "recipe": asdict(recipe), "scenes": images, "weights": weights}


@cache
def _pretrained(backbone: str) -> str:
    """Fingerprint of the weights that arms start from."""
    return fingerprint(create_swin(backbone, pretrained=True))


def run_experiment(
    arms: list[tuple[str, str]], lines: list[dict], file: Path, data: Path, device: torch.device, jobs: int
) -> None:
    """Run what is missing, ``jobs`` at a time, each in a process of its own with one thread.

    It may be stopped at any time: what is finished is a line of ``file``, and the rest is run next time.

    Args:
        arms: Pairs of study and arm, the most urgent first.
        lines: Of earlier runs; lines of other settings are left aside.
        file: To which finished runs are added.
        data: Folder of the scenes, which are made where they are missing.
    """
    write_data(data, {study for study, _ in arms})
    known = [line for line in lines if _is_ours(line)]
    under_way: dict[Future, Run] = {}
    total = sum(seeds_of(*pair) + len(FIRST_RATES) + 1 for pair in arms)  # about: some try more learning rates
    counted = {(study, arm) for study, arm in arms}
    with (
        ProcessPoolExecutor(jobs, get_context("spawn"), _init_worker) as pool,
        tqdm(total=total, initial=sum((x["study"], x["arm"]) in counted for x in known), unit="run") as bar,
    ):
        try:
            while True:
                started = known + [asdict(run) for run in under_way.values()]
                free = jobs - len(under_way)
                for run in [run for run, _ in zip(next_runs(arms, started), range(free), strict=False)]:
                    images = STUDIES[run.study].images
                    under_way[pool.submit(perform, run.recipe(), images, run.purpose, data, str(device))] = run
                if not under_way:
                    return
                done, _ = wait(under_way, return_when=FIRST_COMPLETED)
                for future in done:
                    run = under_way.pop(future)
                    known.append({**setting(run), **future.result()})
                    append_line(file, known[-1])
                    bar.set_postfix_str(f"{run.study}, {run.arm}: {known[-1]['score']:.3f}")
                    bar.update()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def measure_costs(arms: Iterable[tuple[str, str]], device: torch.device, rounds: int = 6) -> Iterator[dict]:
    """What a training step of each arm needs, a line per study; to be measured when nothing else runs.

    Yields:
        ``rows``: per arm the ``peak`` in bytes, the ``seconds`` of a training step, their share of full fine-tuning's,
        and ``images_per_second`` of the backbone alone without gradients, literal equations for every highway. Medians
        over rounds, arms in turn.
    """
    pairs = list(arms)
    for study in dict.fromkeys(study for study, _ in pairs):
        recipes = {arm: Run(study, arm, "test", 1e-3, 0).recipe() for s, arm in pairs if s == study}
        any_of_them = next(iter(recipes.values()))
        size = training_size(any_of_them)
        steps = {arm: build_step(recipe, size, device) for arm, recipe in recipes.items()}
        peaks = {arm: step.ledger().peak for arm, step in steps.items()}
        training = {arm: x["step"] for arm, x in interleaved_seconds(steps, rounds, device).items()}
        passes = {arm: _Inference(step) for arm, step in steps.items()}
        inference = {arm: x["step"] for arm, x in interleaved_seconds(passes, rounds, device).items()}
        rows = []
        for arm in steps:
            row = {"arm": arm, "peak": peaks[arm], "seconds": round(float(np.median(training[arm])), 5)}
            if "full" in training:
                row["seconds_of_full"] = median_share(training[arm], training["full"])
            rows.append(row | {"images_per_second": round(float(any_of_them.batch / np.median(inference[arm])), 2)})
        yield {"purpose": "cost", "study": study, "rounds": rounds, "rows": rows, **machine(any_of_them, device)}


class _Inference:
    """The backbone's part of inference, to be timed like a training step."""

    def __init__(self, step: Step) -> None:
        self.body, self.images = step.model.backbone.body.eval(), torch.stack(step.images)
        if isinstance(self.body, E3VA):
            self.body.memory = "reference"  # so that structures are compared, not ways of computing them

    @torch.no_grad()
    def forward(self) -> None:
        self.body(self.images)

    def backward(self, loss: None) -> None: ...

    def update(self) -> None: ...


def _is_ours(line: dict) -> bool:
    """Whether a line is of a run of this experiment as it is now."""
    if line.get("purpose") not in ("choose", "test") or line["arm"] not in ARMS or line["study"] not in STUDIES:
        return False
    run = Run(**{key: line[key] for key in Run.__dataclass_fields__})
    return json.loads(json.dumps(setting(run))).items() <= line.items()


def _init_worker() -> None:
    """Before a process's first run: one thread, no warnings or progress bars, and an exit when the parent exits."""

    def exit_with_parent(parent: BaseProcess) -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=exit_with_parent, args=(parent_process(),), daemon=True).start()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115, for as long as the process lives
