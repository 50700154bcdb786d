"""Runs: a folder that holds a training from its recipe to its result, and goes on where it was cut off.

recipe.yaml            every setting
last.safetensors       the newest state: what is trained, the optimiser, the step
best.safetensors       what was trained when the task's metric was best
losses.csv             a line per step, the mean over all processes
tensorboard/           the same and more, for TensorBoard
run.json               the result, written at the end
.lock                  held while a training writes into the folder
"""

import csv
import json
import math
import shutil
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from torch.utils.data import Dataset

from ..backbones.weights import fingerprint
from ..errors import InputError
from ..files import check_place, replacing
from ..recipes.schema import Recipe, load_recipe, save_recipe
from ..tasks.registry import task_module
from . import checkpoint
from .distributed import barrier, mean, rank, say, world
from .engine import Training, build_model, evaluate, fit, machine
from .export import open_trained
from .trained import BEST, LAST, RECIPE, start_from

LOSSES, BOARD, RESULT, LOCK = "losses.csv", "tensorboard", "run.json", ".lock"
SAVE_SECONDS = 600  # the longest time between two checkpoints
LOCK_SECONDS = 10  # how long a run that is resumed waits for the image readers of a killed process to end

#: Fields that do not change what is learnt: a run goes on with whatever they are now. The pretrained weights themselves
#: are compared, not the name of their file.
FREE = {"workers", "save_every", "eval_every", "weights"}
#: Fields that may be changed on purpose in the middle of a run.
CHANGEABLE = {
    *("lr", "head_lr", "weight_decay", "betas", "warmup", "schedule", "milestones", "power", "clip", "epochs", "steps"),
    *("batch", "accumulate", "precision", "seed", "options", "drop_path_rate"),
}


def train(
    root: Path,
    recipe: Recipe,
    run: Path,
    device: torch.device,
    strict: bool = False,
    overwrite: bool = False,
    resume: bool = False,
    init: Path | None = None,
    changes: Iterable[str] = (),
) -> dict | None:
    """Train on a dataset, evaluate as often as the recipe says, and keep everything in the folder ``run``.

    The state is saved before every evaluation, every ``save_every`` steps, at the latest after ten minutes, and when
    Ctrl-C, SIGTERM or an image that cannot be read ends the training.

    Args:
        root: Folder of the dataset.
        run: New, unless ``overwrite`` or ``resume``. One training at a time writes into it.
        strict: What would be left out of the data with a warning is an error.
        overwrite: Replace an earlier run, as soon as the first step of this one is done.
        resume: Go on with an earlier run, to the very weights that it would have had without the interruption.
        init: The folder of another run or an exported file: what of it fits is the starting point.
        changes: Fields of the recipe that ``resume`` may change on purpose. The change becomes part of the run, which
            is no longer one that its recipe alone repeats bit for bit.

    Returns:
        The result, which is also in ``run/run.json``; None on all processes but the first.

    Raises:
        InputError: For anything wrong with the data, the recipe or the folder, before training starts where it can be
            known then; when a loss is not finite or the disk is full.
    """
    root = Path(root).absolute()  # a run is evaluated from any folder
    if recipe.weights is not None:
        recipe = replace(recipe, weights=str(Path(recipe.weights).expanduser().absolute()))
    changed = _changes(run, recipe, set(changes)) if resume else {}
    with _claimed(run, overwrite, resume):
        task = task_module(recipe.task)
        train_set = task.dataset(recipe, root, recipe.train_split, recipe.classes, train=True, strict=strict)
        eval_set = task.dataset(recipe, root, recipe.eval_split, train_set.classes, train=False, strict=strict)
        model = build_model(recipe, len(train_set.classes))
        about = {
            "root": str(root),
            "classes": list(train_set.classes),
            "category_ids": getattr(train_set, "category_ids", None),
            "weights": fingerprint(model.backbone.body.trunk),
            "images": {recipe.train_split: len(train_set), recipe.eval_split: len(eval_set)},
            "processes": world(),
        }
        if init is not None and not (resume and (run / LAST).is_file()):
            about["init"] = start_from(model, init, about["classes"])
            say(_taken(about["init"], about["classes"]))
        barrier()
        keeper = _Keeper(run, recipe, about, eval_set, task.METRIC, resume, changed)
        try:
            with _interruptible(keeper):
                fit(model, train_set, recipe, device, keeper.begin, keeper.after)
            return keeper.finish(machine(recipe, device)) if rank() == 0 else None
        except OSError as error:  # the disk is full, or gone
            raise InputError(
                f"'{run}' cannot be written ({error}): the last good checkpoint is kept; make room and go on with "
                "--resume."
            ) from error
        finally:
            keeper.close()


@contextmanager
def _claimed(run: Path, overwrite: bool, resume: bool) -> Iterator[None]:
    """Inside, no other training writes into the run's folder; a new one is made, and removed if it stays empty."""
    if rank() > 0:
        yield
        return
    if not resume:
        _check_free(run, overwrite)
    new = not run.exists()
    try:
        run.mkdir(parents=True, exist_ok=True)
        lock = FileLock(run / LOCK)
        lock.acquire(timeout=LOCK_SECONDS if resume else 0)
    except Timeout:
        raise InputError(
            f"another training is writing into '{run}': wait for its end or choose another --out."
        ) from None
    except OSError as error:
        raise InputError(f"'{run}' cannot be written ({error}): choose another --out.") from None
    try:
        if not resume:
            _check_free(run, overwrite)  # again, now that nobody else can change the answer
        yield
    finally:
        lock.release()
        if new and not _contents(run):
            shutil.rmtree(run, ignore_errors=True)


def _contents(run: Path) -> list[Path]:
    return [path for path in run.iterdir() if path.name != LOCK] if run.is_dir() else []


def _check_free(run: Path, overwrite: bool) -> None:
    """Make sure that a run's folder can be written: it is new or empty, or its replacement was asked for."""
    check_place(run, overwrite=True, folder=True)
    if run.is_symlink():
        raise InputError(f"'{run}' is a link: give the folder itself as --out.")
    if _contents(run):
        if not overwrite:
            raise InputError(f"'{run}' exists: choose another --out, or pass --resume or --overwrite.")
        if not (run / RECIPE).is_file():
            raise InputError(f"'{run}' is not a run and will not be overwritten: choose another --out.")


def _changes(run: Path, recipe: Recipe, named: set[str]) -> dict[str, list]:
    """What a resumed run changes on purpose: old and new value by field.

    Raises:
        InputError: If there is nothing to resume, or something differs that was not named or cannot be changed.
    """
    if not (run / RECIPE).is_file():
        raise InputError(f"'{run}' has no {RECIPE}: there is no run to resume; go without --resume.")
    if (run / RESULT).is_file():
        raise InputError(f"'{run}' is finished: there is nothing to resume. 'e3va eval {run}' evaluates it.")
    was, now = asdict(load_recipe(str(run / RECIPE))), asdict(recipe)
    differ = {key: [was.get(key), value] for key, value in now.items() if was.get(key) != value and key not in FREE}
    if named & {"epochs", "steps"}:  # milestones keep their share of another length
        named = named | {"epochs", "steps", "milestones"}
    refused = {key: values for key, values in differ.items() if key not in named & CHANGEABLE}
    if refused:
        hint = "change it on purpose with --set" if refused.keys() <= CHANGEABLE else "choose another --out"
        raise _differing(f"the recipe of '{run}' was another", refused, hint)
    return differ


def _differing(what: str, differ: dict[str, list], hint: str = "choose another --out") -> InputError:
    values = "; ".join(f"{key} {was}, not {now}" for key, (was, now) in differ.items())
    return InputError(f"{what} ({values}): resume with what it began with, or {hint}.")


def _taken(init: dict, classes: list[str]) -> str:
    """What a training starts with, for people."""
    lines = [f"started from '{init['from']}': {init['taken']} tensors taken"]
    if init["classes"] != classes:
        lines[0] += f"; its classes were {', '.join(init['classes'])}"
    lines += [f"  not taken: {name}, {why}" for name, why in init["not_taken"].items()]
    lines += [f"  new: {name}" for name in init["new"]]
    return "\n".join(lines)


@contextmanager
def _interruptible(keeper: "_Keeper") -> Iterator[None]:
    """Inside, Ctrl-C and SIGTERM let a training step end and its state be saved; asked twice, they do not wait.

    Between two steps one process stops at once. Several stop together after a step, or they would wait for each other.
    """

    def stop(*_) -> None:
        again, keeper.stop = keeper.stop, True
        if again or (world() == 1 and keeper.between_steps()):
            raise KeyboardInterrupt

    main = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM) if main}
    try:
        yield
    except BaseException as error:
        if keeper.rescue() and isinstance(error, KeyboardInterrupt):
            say(f"the state after step {keeper.saved} is saved: go on with --resume.")
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Keeper:
    """Writes down what happens in a training, and reads it back."""

    def __init__(
        self, run: Path, recipe: Recipe, about: dict, eval_set: Dataset, metric: str, resume: bool, changed: dict
    ) -> None:
        self.run, self.recipe, self.about, self.eval_set, self.metric = run, recipe, about, eval_set, metric
        self.resume, self.changed = resume, changed
        self.changes: list[dict] = []  # of the recipe, on purpose, with the step after which each begins
        self.evaluations: list[dict] = []
        self.seconds = 0.0  # of training, evaluations not counted, over all parts of a run that was cut off
        self.steps = self.saved = 0  # the last step that is written down, and that of the newest checkpoint
        self.stop = False
        self.training = self.log = self.board = None

    def between_steps(self) -> bool:
        return self.training is None or (self.training.between_steps and self.training.step == self.steps)

    def begin(self, training: Training) -> None:
        """Go on from the last checkpoint, if there is one and it is wanted."""
        if self.resume and (self.run / LAST).is_file():
            tensors, state = checkpoint.read(self.run / LAST)
            was = state["about"]
            now = {
                key: value for key, value in self.about.items() if key not in ("root", "init")
            }  # root may have moved
            if differ := {key: [was.get(key), value] for key, value in now.items() if was.get(key) != value}:
                raise _differing(f"the data, weights or processes of '{self.run}' have changed", differ)
            if "init" in was:
                self.about["init"] = was["init"]
            checkpoint.restore(training.model, checkpoint.without_optimizer(tensors), self.run / LAST)
            checkpoint.restore_optimizer(training.model, training.optimizer, tensors)
            training.scaler.load_state_dict(state["scaler"])
            self.evaluations, self.seconds, self.changes = (
                *(state["evaluations"], state["seconds"]),
                state.get("changes", []),
            )
            self.steps = self.saved = training.step = state["step"]
            if training.step > training.total:
                raise InputError(f"'{self.run}' has done {training.step} steps already: train for more than that.")
        self.training, self.clock, self.saved_at = training, time.monotonic(), time.monotonic()
        if self.resume:
            say(f"resuming at step {training.step} of {training.total}")
            self._open()
        evaluated = bool(self.evaluations) and self.evaluations[-1]["step"] == training.step
        if training.step and self._is_due() and not evaluated:
            self._evaluate()

    def _open(self) -> None:
        """Begin to write: into a new folder, over a run that is replaced, or behind what is there of this one."""
        if rank() > 0:
            return
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and only needed here

        rows: dict[int, str] = {}
        if not self.resume:
            for path in _contents(self.run):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        elif (self.run / LOSSES).is_file():
            with (self.run / LOSSES).open(encoding="utf-8", newline="") as file:
                for row in csv.reader(file):  # a line that was cut off, or is blank, is none
                    if len(row) == 2 and row[0].isdecimal() and int(row[0]) <= self.steps:
                        rows.setdefault(int(row[0]), row[1])
        if self.changed:
            self.changes.append({"after_step": self.steps, **self.changed})
            say(f"changed from here on: {'; '.join(f'{k} {a} -> {b}' for k, (a, b) in self.changed.items())}")
            if self.saved:
                self._save()  # before the recipe, from which the next resume would see no difference
        with replacing(self.run / RECIPE) as unfinished:
            save_recipe(self.recipe, unfinished)
        self.log = (self.run / LOSSES).open("w", encoding="utf-8", newline="", buffering=1)
        csv.writer(self.log).writerows([["step", "loss"], *rows.items()])
        self.board = SummaryWriter(str(self.run / BOARD), purge_step=self.steps + 1)

    def after(self, training: Training, values: dict[str, float]) -> None:
        """One step is done: write it down, save and evaluate when it is time."""
        step = training.step
        if rank() == 0:
            if self.log is None:  # a new run has proved that it can start
                self._open()
            csv.writer(self.log).writerow([step, repr(values["loss"])])
            values["learning_rate"] = training.optimizer.param_groups[0]["lr"]
            for name, value in values.items():
                self.board.add_scalar(f"train/{name}", value, step)
        self.steps = step
        stop = mean({"stop": float(self.stop)})["stop"] > 0
        late = time.monotonic() - self.saved_at > SAVE_SECONDS
        if stop or late or self._is_due() or step % self.recipe.save_every == 0:
            self._save()
        if stop:
            raise KeyboardInterrupt
        if self._is_due():
            self._evaluate()

    def _is_due(self) -> bool:
        """Whether the present step ends with an evaluation."""
        step, training = self.training.step, self.training
        if step == training.total or self.recipe.eval_every is None:
            return step == training.total
        every = self.recipe.eval_every * training.unit  # may be a fraction of a step
        return math.floor(step / every) > math.floor((step - 1) / every)

    def _evaluate(self) -> None:
        """After the state was saved: an image that cannot be read costs nothing but the evaluation."""
        training = self.training
        metrics = evaluate(training.model, self.eval_set, self.recipe, training.device)
        if metrics is not None:
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
        self.clock = time.monotonic()

    def _save(self) -> None:
        """Write the state after the last step; a resumed run repeats an evaluation that is not in it."""
        training, now = self.training, time.monotonic()
        self.seconds, self.clock = self.seconds + now - self.clock, now
        if rank() == 0:
            state = {
                "about": self.about,
                "step": training.step,
                "evaluations": self.evaluations,
                "changes": self.changes,
                "seconds": self.seconds,
                "scaler": training.scaler.state_dict(),
            }
            tensors = checkpoint.kept_state(training.model)
            tensors |= checkpoint.optimizer_tensors(training.model, training.optimizer)
            checkpoint.write(self.run / LAST, tensors, state)
        self.saved, self.saved_at = training.step, time.monotonic()
        self.clock = self.saved_at

    def rescue(self) -> bool:
        """Save the last complete step, if that is still to be done and can be; whether there is a checkpoint now."""
        if self.training is not None and self.between_steps() and self.saved < self.steps:
            with suppress(InputError):
                self._save()
        return self.saved > 0

    def finish(self, machine: dict) -> dict:
        """Write the result."""
        result = {
            **self.about,
            "steps": self.steps,
            "train_seconds": round(self.seconds, 1),
            "evaluations": self.evaluations,
            "result": self.evaluations[-1],
            "recipe": asdict(self.recipe),
            "bit_exact": not self.changes,
            "changes": self.changes,
            **machine,
        }
        with replacing(self.run / RESULT) as unfinished:
            unfinished.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        return result

    def close(self) -> None:
        for file in (self.log, self.board):
            if file is not None:
                file.close()


def evaluate_run(
    run: Path, root: Path | None, split: str | None, device: torch.device, strict=False, best=False, weights=None
) -> dict | None:
    """Evaluate a run or an exported file, on its own data or another folder of the same layout and classes.

    Raises:
        InputError: See :func:`e3va_lite.training.export.open_trained`; for anything wrong with the data.
    """
    trained = open_trained(run, best, weights)
    if root is None and trained.root is None:
        raise InputError(f"'{run}' is an exported file, which does not name its data: give the folder with --root.")
    recipe, split = trained.recipe, split or trained.recipe.eval_split
    data = task_module(recipe.task).dataset(
        recipe, root or trained.root, split, trained.classes, train=False, strict=strict
    )
    metrics = evaluate(trained.model, data, recipe, device)
    if metrics is None:
        return None
    return {"run": str(run), "result": {"step": trained.step, "split": split, **metrics}}
