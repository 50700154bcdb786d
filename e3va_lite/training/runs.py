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
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch.utils.data import Dataset

from ..backbones.weights import fingerprint
from ..errors import InputError
from ..files import replacing
from ..recipes.schema import Recipe, save_recipe
from ..tasks.registry import task_module
from . import checkpoint
from .distributed import barrier, mean, rank, say, world
from .engine import Training, build_model, evaluate, fit, machine
from .export import open_trained
from .feature_cache import cached
from .run_folder import RESULT, claimed, contents, deliberate_changes, differing
from .trained_model import BEST, LAST, RECIPE, start_from

LOSSES, BOARD = "losses.csv", "tensorboard"
SAVE_SECONDS = 600  # the longest time between two checkpoints


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
    cache: Path | None = None,
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
        cache: Folder of stored maps, see :func:`e3va_lite.training.feature_cache.cached`.

    Returns:
        The result, which is also in ``run/run.json``; None on all processes but the first.

    Raises:
        InputError: For anything wrong with the data, the recipe or the folder, before training starts where it can be
            known then; when a loss is not finite or the disk is full.
    """
    root = Path(root).absolute()  # a run is evaluated from any folder
    if recipe.weights is not None:
        recipe = replace(recipe, weights=str(Path(recipe.weights).expanduser().absolute()))
    changed = deliberate_changes(run, recipe, set(changes)) if resume else {}
    with claimed(run, overwrite, resume):
        task = task_module(recipe.task)
        train_set = task.dataset(recipe, root, recipe.train_split, recipe.classes, train=True, strict=strict)
        eval_set = task.dataset(recipe, root, recipe.eval_split, train_set.classes, train=False, strict=strict)
        model = build_model(recipe, len(train_set.classes))
        about = {
            "root": str(root),
            "classes": list(train_set.classes),
            "category_ids": getattr(train_set, "category_ids", None),
            "weights": fingerprint(model.backbone.body.backbone),
            "images": {recipe.train_split: len(train_set), recipe.eval_split: len(eval_set)},
            "processes": world(),
        }
        if init is not None and not (resume and (run / LAST).is_file()):
            about["init"] = start_from(model, init, about["classes"])
            say(_taken(about["init"], about["classes"]))
        barrier()
        recorder = _Recorder(run, recipe, about, eval_set, task.METRIC, resume, changed)
        try:
            stored = nullcontext(train_set) if cache is None else cached(model, train_set, recipe, cache, device)
            with _interruptible(recorder), stored as shown:
                fit(model, shown, recipe, device, recorder.begin, recorder.after)
            return recorder.finish(machine(recipe, device)) if rank() == 0 else None
        except OSError as error:  # the disk is full, or gone
            kept = "the last good checkpoint is kept; make room and go on with --resume"
            raise InputError(f"'{run}' cannot be written ({error}): {kept}.") from error
        finally:
            recorder.close()


def _taken(init: dict, classes: list[str]) -> str:
    """What a training starts with, for people."""
    lines = [f"started from '{init['from']}': {init['taken']} tensors taken"]
    if init["classes"] != classes:
        lines[0] += f"; its classes were {', '.join(init['classes'])}"
    lines += [f"  not taken: {name}, {why}" for name, why in init["not_taken"].items()]
    lines += [f"  new: {name}" for name in init["new"]]
    return "\n".join(lines)


@contextmanager
def _interruptible(recorder: "_Recorder") -> Iterator[None]:
    """Inside, Ctrl-C and SIGTERM let a training step end and its state be saved; asked twice, they do not wait.

    Between two steps one process stops at once. Several stop together after a step, or they would wait for each other.
    """

    def stop(*_) -> None:
        again, recorder.stop = recorder.stop, True
        if again or (world() == 1 and recorder.between_steps()):
            raise KeyboardInterrupt

    main = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM) if main}
    try:
        yield
    except BaseException as error:
        if recorder.rescue() and isinstance(error, KeyboardInterrupt):
            say(f"the state after step {recorder.saved} is saved: go on with --resume.")
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Recorder:
    """Records a training in the folder of its run, and goes on with what is recorded there."""

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
            # The data may lie elsewhere now.
            now = {key: value for key, value in self.about.items() if key not in ("root", "init")}
            if differ := {key: [was.get(key), value] for key, value in now.items() if was.get(key) != value}:
                raise differing(f"the data, weights or processes of '{self.run}' have changed", differ)
            if "init" in was:
                self.about["init"] = was["init"]
            checkpoint.restore(training.model, tensors, self.run / LAST)
            checkpoint.restore_optimizer(training.model, training.optimizer, tensors)
            training.scaler.load_state_dict(state["scaler"])
            self.evaluations, self.seconds = state["evaluations"], state["seconds"]
            self.changes = state.get("changes", [])
            self.steps = self.saved = training.step = state["step"]
            if training.step > training.total:
                raise InputError(f"'{self.run}' has done {training.step} steps already: train for more than that.")
        self.training = training
        self.clock = self.saved_at = time.monotonic()
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
            for path in contents(self.run):
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
        self.saved = training.step
        self.clock = self.saved_at = time.monotonic()

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
    dataset = task_module(recipe.task).dataset
    data = dataset(recipe, root or trained.root, split, trained.classes, train=False, strict=strict)
    metrics = evaluate(trained.model, data, recipe, device)
    return metrics and {"run": str(run), "result": {"step": trained.step, "split": split, **metrics}}


def metrics_text(metrics: dict) -> str:
    """A line per class, where a metric has a value for every class, and a line per metric."""
    tables = {name: values for name, values in metrics.items() if isinstance(values, dict)}
    lines = []
    for label in dict.fromkeys(label for values in tables.values() for label in values):
        cells = ["    -" if (x := values[label]) is None else f"{x:.3f}" for values in tables.values()]
        lines.append(f"  {label:24s} {'  '.join(cells)}")
    if tables:
        lines.append(f"  ({', '.join(tables)})")
    for name, value in metrics.items():
        if name not in ("step", "split", *tables):
            lines.append(f"{name} on '{metrics['split']}': {'-' if value is None else f'{value:.3f}'}")
    return "\n".join(lines)
