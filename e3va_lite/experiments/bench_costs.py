"""The measurements of :mod:`e3va_lite.experiments.bench`: memory and time of a training step, and the largest batch.

Whoever runs through :func:`costs` or :func:`largest_batches` is told what is measured next, before it is: the moment to
save what there is, or to stop. Both go on with rows that an earlier run left unfinished.
"""

import gc
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch

from ..analysis.cost import interleaved_seconds, with_method
from ..analysis.fit_on_gpu import LARGEST, MIB, fit_table, gpu_slices
from ..analysis.memory import PHASES
from ..analysis.training_step import Step, build_step
from ..errors import InputError
from ..recipes.schema import Recipe, load_recipe
from .bench_plan import Model, Plan
from .paper_tables import OVERHEAD

OUT_OF_MEMORY = "out of memory"
NEAR = 0.02  # of a large batch: so near to each other are a batch that runs and one that does not in the end


def attempt(measure: Callable[..., dict], *arguments: object) -> dict:
    """What ``measure(*arguments)`` returns, or ``{"failed": its reason}`` for an exception of any kind.

    A bench runs on cards and with versions that nobody has tried before. That a method does not work there, for lack
    of memory or of a kernel or by an error in a library that cannot be foreseen, is one of its results: it belongs
    into the table, and must not cost the measurements that come after it. Hence every ``Exception`` is recorded and
    none is raised; ``KeyboardInterrupt`` still ends the bench. What the measurement allocated is free afterwards.

    Raises:
        InputError: If the GPU does not work any more, so that nothing could be measured after this.
    """
    try:
        found = measure(*arguments)
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        if isinstance(error, torch.OutOfMemoryError) or OUT_OF_MEMORY in str(error) or "ALLOC_FAILED" in str(error):
            reason = OUT_OF_MEMORY
        elif not isinstance(error, InputError):
            reason = f"{type(error).__name__}: {reason}"
        found = {"failed": reason}
    if torch.cuda.is_initialized():
        gc.collect()  # a failed step is part of cycles
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise InputError(f"the GPU does not answer any more ({reason}): start the same command again.") from error
    return found


# Memory and time ------------------------------------------------------------------------------------------------------


def costs(entry: dict, model: Model, sweep: int, plan: Plan, device: torch.device) -> Iterator[str]:
    """Measure every method of a model once, in its own turn: only one of them is on the card at a time.

    Args:
        entry: What was measured of the model; methods that are missing in this sweep are added.
        sweep: In the first, 0, a method's memory is measured too.

    Yields:
        The method that is measured next.
    """
    for spec in plan.methods[:: -1 if sweep % 2 else 1]:
        row = next((row for row in entry["rows"] if row["method"] == spec), None)
        if row and ("failed" in row or len(row["sweeps"]) > sweep):
            continue
        if row is None and sweep:
            continue  # its first sweep is named among what was not reached
        yield spec
        recipe = with_method(load_recipe(plan.recipe, model.settings), spec)
        if row is None:
            entry["rows"].append({"method": spec, **_first_sweep(entry, recipe, model, plan.rounds, device)})
        else:
            recipe = replace(recipe, batch=entry["batch_size"])
            row["sweeps"].append(attempt(_seconds_again, recipe, entry["size"], plan.rounds, device))
        _derive(entry["rows"])


def _first_sweep(entry: dict, recipe: Recipe, model: Model, rounds: int, device: torch.device) -> dict:
    """Full fine-tuning, which needs most memory, comes first and chooses batch and size for all methods."""
    tried = ((entry["batch_size"], entry["size"]),) if entry["rows"] else model.tried
    for batch, size in tried:
        entry |= {"batch_size": batch, "size": list(size)}
        found = attempt(_memory_and_seconds, replace(recipe, batch=batch), size, rounds, device)
        if found.get("failed") != OUT_OF_MEMORY or (batch, size) == tried[-1]:
            break
        because = f"{recipe.method}: {OUT_OF_MEMORY}"
        entry["fell_back"].append({"batch_size": batch, "size": list(size), "because": because})
    return found


def _memory_and_seconds(recipe: Recipe, size: tuple[int, int], rounds: int, device: torch.device) -> dict:
    step = _built(recipe, size, device)
    ledger = step.ledger()
    return {
        "peak": ledger.peak,
        "counted": int(ledger.total.max()),
        "allocated": ledger.allocated,
        "reserved": ledger.reserved,
        "sweeps": [_seconds(step, rounds, device)],
    }


def _seconds_again(recipe: Recipe, size: tuple[int, int], rounds: int, device: torch.device) -> dict:
    return _seconds(_built(recipe, size, device), rounds, device)


def _seconds(step: Step, rounds: int, device: torch.device) -> dict:
    """Seconds of the phases, round by round; the first two steps, in which libraries choose kernels, do not count."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    phases = interleaved_seconds({"": step}, rounds + 1, device)[""]
    found = {phase: [round(float(x), 6) for x in phases[phase][1:]] for phase in PHASES}
    if device.type == "cuda":  # without the ledger's recording, and with the workspaces of libraries
        found["max_memory_allocated"] = torch.cuda.max_memory_allocated(device)
    return found


def _built(recipe: Recipe, size: tuple[int, int], device: torch.device) -> Step:
    with warnings.catch_warnings(), device:  # random weights are drawn on the device itself, which takes no time there
        warnings.simplefilter("ignore")  # of ranks that are not low
        return build_step(recipe, tuple(size), device)


def _derive(rows: list[dict]) -> None:
    """Medians, quartiles and shares of full fine-tuning's, which is the first row, from the seconds by round."""
    for row in rows:
        timed = [sweep for sweep in row.get("sweeps", ()) if "failed" not in sweep]
        if timed:
            steps = [np.sum([sweep[phase] for phase in PHASES], axis=0) for sweep in timed]
            quantiles = np.quantile(np.concatenate(steps), (0.5, 0.25, 0.75))
            row["step"], *row["quartiles"] = (round(float(value), 6) for value in quantiles)
            for phase in PHASES:
                row[phase] = round(float(np.median(np.concatenate([sweep[phase] for sweep in timed]))), 6)
            row["step_by_sweep"] = [round(float(np.median(values)), 6) for values in steps]
    full = rows[0]
    for row in rows:
        for key in ("peak", "step"):
            row[f"{key}_of_full"] = round(row[key] / full[key], 4) if key in row and key in full else None


def ledger_summary(entries: list[dict]) -> dict:
    """How far the bytes that the ledger counts are from those of the allocator."""
    rows = [(entry, row) for entry in entries for row in entry["rows"] if row.get("allocated") is not None]
    if not rows:
        return {"compared": 0, "note": "not compared: a CPU's allocator does not count"}
    differences = [(abs(row["allocated"] - row["counted"]) / row["allocated"], entry, row) for entry, row in rows]
    worst, entry, row = max(differences, key=lambda found: found[0])
    where = f"{row['method']} on {entry['backbone']}, {entry['precision']}"
    return {"compared": len(rows), "largest_difference": round(worst, 5), "where": where}


# The largest batch ----------------------------------------------------------------------------------------------------


def largest_batches(fit: dict, size: list[int] | None, plan: Plan, device: torch.device) -> Iterator[str]:
    """Find the largest batch of the first model that runs, beside the one that dry runs predict.

    Args:
        fit: What was found; methods that are missing are added.
        size: Height and width of the images in pixels, for new predictions; None for the first that the model tries.

    Yields:
        What is predicted or tried next.
    """
    model = plan.models[0]
    recipe = load_recipe(plan.recipe, model.settings)
    if not fit:
        yield "predictions"
        card = plan.card or f"{torch.cuda.get_device_properties(device).total_memory // MIB}MB"
        overhead = 0 if plan.card else OVERHEAD
        fit |= attempt(fit_table, recipe, list(plan.fit), tuple(size or model.tried[0][1]), card, overhead)
        for row in fit.get("rows", ()):
            row["predicted"] = row.pop("batch_size")
    for row in fit.get("rows", ()):
        if "measured" not in row:
            yield row["method"]
            spec = with_method(recipe, row["method"])

            def failure(batch: int, spec: Recipe = spec) -> str | None:
                settings = fit["settings"]
                found = attempt(_two_steps, replace(spec, batch=batch), settings["size"], device, settings["bytes"])
                return found.get("failed")

            row |= largest_that_runs(failure, row["predicted"])


def _two_steps(recipe: Recipe, size: list[int], device: torch.device, limit: int) -> dict:
    """Two training steps in so many bytes: the second begins with the optimizer's state. A CPU counts one instead."""
    if device.type == "cpu":
        with gpu_slices():  # as the prediction, which is one for a GPU
            if _built(recipe, size, device).ledger().peak > limit:
                raise torch.OutOfMemoryError(f"more than {limit} bytes")
        return {}
    with _limited(device, limit):
        step = _built(recipe, size, device)
        for _ in range(2):
            step.backward(step.forward())
            step.update()
        torch.cuda.synchronize(device)
    return {}


@contextmanager
def _limited(device: torch.device, limit: int) -> Iterator[None]:
    """Inside, torch's allocator takes no more than so many bytes of the card."""
    share = min(1.0, limit / torch.cuda.get_device_properties(device).total_memory)
    torch.cuda.set_per_process_memory_fraction(share, device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


def largest_that_runs(failure: Callable[[int], str | None], guess: int) -> dict:
    """Search for the largest batch by trying; near the end only to within :data:`NEAR` of it.

    Args:
        failure: None if a batch runs, else the reason.
        guess: Where the search begins.

    Returns:
        ``{"measured": the largest that ran (0: none), "too_large": the smallest that did not, "because": its reason}``,
        the latter two None where even :data:`e3va_lite.analysis.fit_on_gpu.LARGEST` images run.
    """
    runs, too_large, because = 0, None, None
    batch, stride = min(max(guess, 1), LARGEST), max(1, round(guess * NEAR))
    while too_large is None or too_large - runs > max(1, round(NEAR * runs)):
        if reason := failure(batch):
            too_large, because = batch, reason
        else:
            runs = batch
        if runs >= LARGEST:
            break
        if too_large is None:
            batch = min(runs + stride, LARGEST)
        elif runs == 0:
            batch = max(too_large - stride, 1)
        else:
            batch = (runs + too_large) // 2
        stride *= 2
    return {"measured": runs, "too_large": too_large, "because": because}
