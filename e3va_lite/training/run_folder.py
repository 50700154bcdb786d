"""The folder of a run: who may write into it, and with what a run that was cut off may go on."""

import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from filelock import FileLock, Timeout

from ..errors import InputError
from ..files import check_place
from ..recipes.schema import Recipe, load_recipe
from .distributed import rank
from .trained_model import RECIPE

RESULT, LOCK = "run.json", ".lock"
LOCK_SECONDS = 10  # how long a run that is resumed waits for the image readers of a killed process to end

#: Fields that do not change what is learnt: a run goes on with whatever they are now. The pretrained weights themselves
#: are compared, not the name of their file.
FREE = {"workers", "save_every", "eval_every", "weights"}
#: Fields that may be changed on purpose in the middle of a run.
CHANGEABLE = {
    *("lr", "head_lr", "weight_decay", "betas", "warmup", "schedule", "milestones", "power", "clip", "epochs", "steps"),
    *("batch", "accumulate", "precision", "seed", "options", "drop_path_rate"),
}


@contextmanager
def claimed(run: Path, overwrite: bool, resume: bool) -> Iterator[None]:
    """Inside, no other training writes into the run's folder; a new one is made, and removed if it stays empty."""
    if rank() > 0:
        yield
        return
    if not resume:
        _check_free(run, overwrite)
    new = not run.exists()
    lock = FileLock(run / LOCK)
    try:
        run.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=LOCK_SECONDS if resume else 0)
    except Timeout:
        raise InputError(f"another training is writing into '{run}': wait for it or choose another --out.") from None
    except NotImplementedError:  # a file system without locks
        warnings.warn(f"'{run}' cannot be locked there: start no second training in it.", stacklevel=2)
    except OSError as error:
        raise InputError(f"'{run}' cannot be written ({error}): choose another --out.") from None
    try:
        if not resume:
            _check_free(run, overwrite)  # again, now that nobody else can change the answer
        yield
    finally:
        lock.release()
        if new and not contents(run):
            shutil.rmtree(run, ignore_errors=True)


def contents(run: Path) -> list[Path]:
    """What is in the folder, if there is one, but for the lock and what a process that was killed had not finished."""
    return [path for path in run.iterdir() if path.name != LOCK and path.suffix != ".tmp"] if run.is_dir() else []


def default_run(name: str, new: bool) -> Path:
    """``runs/NAME``, ``runs/NAME-2``, ...: the first that is free for a new run, or else the latest one."""
    latest, number = None, 1
    while contents(free := Path("runs") / (name if number == 1 else f"{name}-{number}")):
        latest, number = free, number + 1
    return free if new or latest is None else latest


def _check_free(run: Path, overwrite: bool) -> None:
    """Make sure that a run's folder can be written: it is new or empty, or its replacement was asked for."""
    check_place(run, overwrite=True, folder=True)
    if run.is_symlink():
        raise InputError(f"'{run}' is a link: give the folder itself as --out.")
    if contents(run):
        if not overwrite:
            raise InputError(f"'{run}' exists: choose another --out, or pass --resume or --overwrite.")
        if not (run / RECIPE).is_file():
            raise InputError(f"'{run}' is not a run and will not be overwritten: choose another --out.")


def deliberate_changes(run: Path, recipe: Recipe, named: set[str]) -> dict[str, list]:
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
        raise differing(f"the recipe of '{run}' was another", refused, hint)
    return differ


def differing(what: str, differ: dict[str, list], hint: str = "choose another --out") -> InputError:
    values = "; ".join(f"{key} {was}, not {now}" for key, (was, now) in differ.items())
    return InputError(f"{what} ({values}): resume with what it began with, or {hint}.")
