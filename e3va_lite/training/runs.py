"""Runs: a folder that holds a training from its recipe to its result, and goes on where it was cut off.

recipe.yaml            every setting
last.safetensors       the newest state: what is trained, the optimiser, the step
best.safetensors       what was trained when the task's metric was best
losses.csv             a line per step
tensorboard/           the same and more, for TensorBoard
run.json               the result, written at the end
"""

import csv
import json
import math
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.data import Dataset

from ..backbones.weights import fingerprint
from ..errors import InputError
from ..recipes.schema import Recipe, load_recipe, save_recipe
from ..tasks.registry import task_module
from . import checkpoint
from .distributed import barrier, rank, world
from .engine import Training, build_model, evaluate, fit, machine

RECIPE, LAST, BEST, LOSSES, BOARD, RESULT = (
    *("recipe.yaml", "last.safetensors", "best.safetensors"),
    *("losses.csv", "tensorboard", "run.json"),
)


def train(
    root: Path, recipe: Recipe, run: Path, device: torch.device, strict=False, overwrite=False, resume=False
) -> dict | None:
    """Train on a dataset, evaluate as often as the recipe says, and keep everything in the folder ``run``.

    Args:
        root: Folder of the dataset.
        run: New, unless ``overwrite`` or ``resume``.
        strict: What would be left out of the data with a warning is an error.
        overwrite: Replace an earlier run.
        resume: Go on with an earlier run, to the very weights that it would have had without the interruption.

    Returns:
        The result, which is also in ``run/run.json``; None on all processes but the first.

    Raises:
        InputError: For anything wrong with the data, the recipe or the folder, before training starts where it can be
            known then; when a loss is not finite or the disk is full.
    """
    if resume:
        _same_recipe(run, recipe)
        if (run / RESULT).is_file():
            raise InputError(f"'{run}' is finished: there is nothing to resume. 'e3va eval {run}' evaluates it.")
    elif rank() == 0:
        _free(run, overwrite)
    task = task_module(recipe.task)
    train_set = task.dataset(recipe, root, recipe.train_split, recipe.classes, train=True, strict=strict)
    eval_set = task.dataset(recipe, root, recipe.eval_split, train_set.classes, train=False, strict=strict)
    model = build_model(recipe, len(train_set.classes))
    about = {
        "root": str(Path(root).resolve()),
        "classes": list(train_set.classes),
        "category_ids": getattr(train_set, "category_ids", None),
        "weights": fingerprint(model.backbone.body.trunk),
        "images": {recipe.train_split: len(train_set), recipe.eval_split: len(eval_set)},
        "processes": world(),
    }
    if rank() == 0:
        run.mkdir(parents=True, exist_ok=True)
        save_recipe(recipe, run / RECIPE)
    barrier()
    keeper = _Keeper(run, recipe, about, eval_set, task.METRIC)
    try:
        fit(model, train_set, recipe, device, keeper.begin, keeper.after)
        if rank() > 0:
            return None
        result = {
            **about,
            "steps": keeper.steps,
            "train_seconds": round(keeper.seconds, 1),
            "evaluations": keeper.evaluations,
            "result": keeper.evaluations[-1],
            "recipe": asdict(recipe),
            **machine(recipe, device),
        }
        unfinished = run / (RESULT + ".tmp")
        unfinished.write_text(json.dumps(result, indent=2) + "\n")
        unfinished.replace(run / RESULT)
        return result
    except OSError as error:  # the disk is full, or gone
        raise InputError(
            f"'{run}' cannot be written ({error}): the last good checkpoint is kept; make room and go on with --resume."
        ) from error
    finally:
        keeper.close()


class _Keeper:
    """Writes down what happens in a training, and reads it back."""

    def __init__(self, run: Path, recipe: Recipe, about: dict, eval_set: Dataset, metric: str) -> None:
        self.run, self.recipe, self.about, self.eval_set, self.metric = run, recipe, about, eval_set, metric
        self.evaluations: list[dict] = []
        self.steps = 0
        self.seconds = 0.0  # of training, evaluations not counted, over all parts of a run that was cut off
        self.log = self.board = None

    def begin(self, training: Training) -> None:
        """Go on from the last checkpoint, if there is one."""
        if (self.run / LAST).is_file():
            tensors, state = checkpoint.read(self.run / LAST)
            now = {key: value for key, value in self.about.items() if key != "root"}  # a folder may have moved
            _same(f"the data, weights or processes of '{self.run}' have changed", state["about"], now)
            _restore(training.model, tensors, self.run / LAST)
            checkpoint.restore_optimizer(training.model, training.optimizer, tensors)
            training.scaler.load_state_dict(state["scaler"])
            training.step, self.evaluations, self.seconds = state["step"], state["evaluations"], state["seconds"]
        if rank() == 0:
            from torch.utils.tensorboard import SummaryWriter  # slow to import, and only needed here

            rows = [["step", "loss"]]
            if (self.run / LOSSES).is_file():
                with (self.run / LOSSES).open(newline="") as file:
                    rows += [row for row in csv.reader(file) if row[0].isdecimal() and int(row[0]) <= training.step]
            self.log = (self.run / LOSSES).open("w", newline="", buffering=1)
            csv.writer(self.log).writerows(rows)
            self.board = SummaryWriter(str(self.run / BOARD), purge_step=training.step + 1)
        self.steps = training.step
        self.clock = time.monotonic()
        if training.step == training.total and not self.evaluations:
            self._evaluate(training)

    def after(self, training: Training, values: dict[str, float]) -> None:
        """One step is done: write it down, evaluate and save when it is time."""
        self.steps = step = training.step
        if self.log is not None:
            csv.writer(self.log).writerow([step, repr(values["loss"])])
            values["learning_rate"] = training.optimizer.param_groups[0]["lr"]
            for name, value in values.items():
                self.board.add_scalar(f"train/{name}", value, step)
        due = step == training.total
        if self.recipe.eval_every is not None:  # units may be fractions of a step away from each other
            every = self.recipe.eval_every * training.unit
            due = due or math.floor(step / every) > math.floor((step - 1) / every)
        if due or step % self.recipe.save_every == 0:
            self.seconds += time.monotonic() - self.clock
            if due:
                self._evaluate(training)
            if rank() == 0:
                self._save(training)
            self.clock = time.monotonic()

    def _evaluate(self, training: Training) -> None:
        metrics = evaluate(training.model, self.eval_set, self.recipe, training.device)
        if metrics is None:
            return
        metrics = {"step": training.step, "split": self.recipe.eval_split, **metrics}
        for name, value in metrics.items():
            if isinstance(value, float):
                self.board.add_scalar(f"eval/{name}", value, training.step)
        # An average over nothing is not a number, and worse than every number.
        best = max((e[self.metric] or 0.0 for e in self.evaluations), default=-1.0)
        self.evaluations.append(metrics)
        if (metrics[self.metric] or 0.0) > best:
            state = {"about": self.about, "step": training.step}
            checkpoint.write(self.run / BEST, checkpoint.kept_state(training.model), state)

    def _save(self, training: Training) -> None:
        model = training.model
        state = {
            "about": self.about,
            "step": training.step,
            "evaluations": self.evaluations,
            "seconds": self.seconds,
            "scaler": training.scaler.state_dict(),
        }
        tensors = checkpoint.kept_state(model) | checkpoint.optimizer_tensors(model, training.optimizer)
        checkpoint.write(self.run / LAST, tensors, state)

    def close(self) -> None:
        for file in (self.log, self.board):
            if file is not None:
                file.close()


class Trained(NamedTuple):
    """A trained model and what has to be known to use it."""

    model: nn.Module
    recipe: Recipe
    classes: list[str]
    category_ids: list[int] | None  # COCO's numbers of the classes
    root: Path | None  # of the dataset, as it was given
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
    if fingerprint(model.backbone.body.trunk) != about["weights"]:
        raise InputError(
            f"the pretrained weights of {recipe.backbone} are not those that '{run}' was trained with: give them with "
            "--weights."
        )
    _restore(model, tensors, path)
    return Trained(
        model, recipe, about["classes"], about["category_ids"], Path(about["root"]), state["step"], about["weights"]
    )


def evaluate_run(
    run: Path, root: Path | None, split: str | None, device: torch.device, strict=False, best=False, weights=None
) -> dict | None:
    """Evaluate the model of a run, on its own data or another folder of the same layout and classes.

    Raises:
        InputError: See :func:`open_run`; for anything wrong with the data.
    """
    trained = open_run(run, best, weights)
    recipe, split = trained.recipe, split or trained.recipe.eval_split
    data = task_module(recipe.task).dataset(
        recipe, root or trained.root, split, trained.classes, train=False, strict=strict
    )
    metrics = evaluate(trained.model, data, recipe, device)
    if metrics is None:
        return None
    return {"run": str(run), "result": {"step": trained.step, "split": split, **metrics}}


def _restore(model: nn.Module, tensors: dict, path: Path) -> None:
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith("optimizer/")}
    checkpoint.restore(model, kept, path)


def _same_recipe(run: Path, recipe: Recipe) -> None:
    if not (run / RECIPE).is_file():
        raise InputError(f"'{run}' has no {RECIPE}: there is no run to resume; go without --resume.")
    was = load_recipe(str(run / RECIPE))
    _same(f"the recipe of '{run}' was another", asdict(was), asdict(recipe))


def _same(what: str, was: dict, now: dict) -> None:
    differ = [f"{key} {was.get(key)}, not {now.get(key)}" for key in now if was.get(key) != now[key]]
    if differ:
        raise InputError(f"{what} ({'; '.join(differ)}): resume with what it began with, or choose another --out.")


def _free(folder: Path, overwrite: bool) -> None:
    """Make sure that a run's folder can be written: it is new, or its replacement was asked for."""
    if folder.exists():
        if not overwrite:
            raise InputError(f"'{folder}' exists: choose another --out, or pass --resume or --overwrite.")
        if not folder.is_dir() or (any(folder.iterdir()) and not (folder / RECIPE).is_file()):
            raise InputError(f"'{folder}' is not a run and will not be overwritten: choose another --out.")
        shutil.rmtree(folder)
