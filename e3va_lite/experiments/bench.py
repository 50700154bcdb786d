"""One command for somebody with a GPU: are the numbers right on this card, and what does a training step cost?

Three parts: the highway and its proofs on the card against literal equations and the CPU; memory and time of one
training step of every method, with the ledger beside the allocator; the largest batch that really runs beside the one
that dry runs predict. All models have random weights: what a step costs does not depend on them, and nothing is
downloaded.

Every measurement is written to the file as soon as it is finished. The same command goes on with what is missing.
"""

import gc
import json
import platform
import re
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from .. import __version__
from ..analysis.cost import interleaved_seconds, with_method
from ..analysis.fit_on_gpu import LARGEST, MIB, capacity, fit_table, gpu_slices
from ..analysis.memory import PHASES
from ..analysis.text_table import percent, text_table
from ..analysis.training_step import Step, build_step
from ..errors import InputError
from ..files import replacing
from ..methods.registry import METHODS
from ..recipes.schema import Recipe, load_recipe
from ..training.engine import machine
from .bench_checks import checks, full_float32
from .paper_tables import OVERHEAD, SWIN_B, SWIN_L

SWEEPS = 2  # every method is measured in each; the second goes through them in the opposite order
OUT_OF_MEMORY = "out of memory"
#: Beside the twelve; LST and LoSA with, on Swin-L, about as many trained parameters as E3VA.
OTHERS = ("e3va:memory=recompute", "lst:narrower=16", "losa:rank=90", "peft_lora")
TRIAL = "numbers of a CPU are only a trial of this command, with small models and images: it is meant for a GPU"
NEAR = 0.02  # of a large batch: so near to each other are a batch that runs and one that does not in the end


@dataclass(frozen=True)
class Model:
    """A detector and the batches and sizes that are tried in this order until full fine-tuning fits."""

    backbone: str
    tried: tuple[tuple[int, tuple[int, int]], ...]
    precision: str = "float32"

    @property
    def recipe(self) -> dict:
        return {"backbone": self.backbone, "precision": self.precision}


@dataclass(frozen=True)
class Plan:
    """What is measured, the most valuable first.

    Attributes:
        recipe: Of RetinaNet.
        fit: Methods whose largest batch is searched for, on the first model.
        rounds: Timed steps of a method in a sweep.
        card: Memory that is taken for the card's; None for the card's own.
    """

    recipe: str
    models: tuple[Model, ...]
    methods: tuple[str, ...]
    fit: tuple[str, ...]
    rounds: int
    card: str | None = None


_SWIN = ((2, (608, 1024)), (2, (416, 704)), (1, (416, 704)), (1, (224, 384)))
_VIT = ((2, (518, 518)), (1, (518, 518)), (1, (252, 252)))
PLANS = {
    "whole": Plan(
        "voc",
        (
            Model(SWIN_L, _SWIN),
            Model("vit_large_patch14_dinov2", _VIT),
            Model("swin_tiny_patch4_window7_224", _SWIN),
            Model(SWIN_L, _SWIN, "bfloat16"),
            Model(SWIN_B, _SWIN),
        ),
        (*METHODS, *OTHERS),
        ("full", "fixed", "adapter", "lora", "e3va", "e3va:memory=recompute"),
        rounds=6,
    ),
    "quick": Plan(
        "voc",
        (Model("swin_tiny_patch4_window7_224", _SWIN),),
        (*METHODS, *OTHERS),
        ("full", "e3va"),
        rounds=3,
        card="4GB",
    ),
    "trial": Plan(
        "voc-nano",
        (Model("swin_nano", ((2, (64, 96)),)), Model("vit_tiny_patch16_224", ((2, (64, 64)),))),
        (*METHODS, "e3va:memory=recompute", "lst", "losa", "peft_lora"),
        ("full", "e3va"),
        rounds=3,
        card="150MB",
    ),
}


def plan_for(device: torch.device, quick: bool) -> str:
    """The name of the plan in :data:`PLANS`."""
    return "trial" if device.type == "cpu" else "quick" if quick else "whole"


def bench(file: Path, device: torch.device, quick: bool, minutes: float) -> dict:
    """Measure what is missing in ``file``, and write it there, one measurement after another.

    Args:
        file: A JSON file, which need not exist.
        device: The GPU, or the CPU for a trial.
        quick: One small model.
        minutes: When they are over, no further measurement begins; the result's ``not_reached`` names what is missing.

    Returns:
        ``{"environment", "plan", "correctness": [row, ...], "costs": [{"backbone", "precision", "batch_size", "size",
        "fell_back", "rows"}, ...], "fit": {"settings", "rows"}, "ledger", "not_reached", "seconds"}``. A measurement
        that failed is a row with the reason under ``failed``. Bytes, seconds.

    Raises:
        InputError: If the file holds measurements of another machine, of other versions or of another plan.
    """
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"--device {device}: e3va bench measures on CUDA, or for a trial on the CPU.")
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    begun = time.monotonic()
    name = plan_for(device, quick)
    plan = PLANS[name]
    result = _opened(file, {"environment": environment(device), "plan": {"name": name, **_plain(asdict(plan))}}, plan)
    seconds, result["not_reached"] = result["seconds"], []
    said = None
    for part, measurements in _parts(result, plan, device):
        for next_one in measurements:
            spent = time.monotonic() - begun
            result["seconds"] = round(seconds + spent, 1)
            _save(result, file)
            if spent >= 60 * minutes:
                result["not_reached"].append(f"{part}, from {next_one} on")
                break
            if said != part:
                said = part
                tqdm.write(f"{spent:5.0f} s: {part}", file=sys.stderr)
    result["ledger"] = _ledger_summary(result["costs"])
    result["seconds"] = round(seconds + time.monotonic() - begun, 1)
    _save(result, file)
    return result


def _parts(result: dict, plan: Plan, device: torch.device) -> Iterator[tuple[str, Iterator[str]]]:
    """The parts in the order of their value, and for each what names a measurement before it is done."""
    yield "correctness", _correctness(result, device)
    for sweep in range(SWEEPS):
        for number, (model, entry) in enumerate(zip(plan.models, result["costs"], strict=True)):
            title = f"{model.backbone}, {model.precision}, sweep {sweep + 1}"
            yield title, _costs(entry, model, sweep, plan, device)
            if sweep == number == 0:
                yield "largest batches", _fit(result, plan, device)


def environment(device: torch.device) -> dict:
    """Card, driver, processor, versions and date."""
    found = machine(load_recipe("voc"), device)
    del found["precision"], found["processes"]  # each model's own; one
    found["versions"]["e3va_lite"] = __version__
    found |= {"processor": _processor(), "system": platform.system(), "threads": torch.get_num_threads()}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "memory_mib": properties.total_memory // MIB,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda or torch.version.hip,
            "cudnn": torch.backends.cudnn.version(),
            "driver": _driver(),
            "tf32": {"matmul": torch.get_float32_matmul_precision(), "cudnn": torch.backends.cudnn.allow_tf32},
        }
    return found


def card_name(found: dict) -> str:
    """A folder's name for the environment's device: ``h200``, ``rtx-3090``, ``x86-64-cpu-1-thread``."""
    words = re.findall(r"[a-z0-9]+", found["device"].lower())
    return "-".join(word for word in words if word not in ("nvidia", "geforce", "tesla", "amd"))


# Correctness ----------------------------------------------------------------------------------------------------------


def _correctness(result: dict, device: torch.device) -> Iterator[str]:
    done = {row["check"] for row in result["correctness"]}
    for name, bounds, check in checks(device):
        if name not in done:
            yield name
            with full_float32():
                found = attempt(check)
            ok = "failed" not in found and all(found[key] <= bound for key, bound in bounds.items())
            result["correctness"].append({"check": name, "bounds": bounds, **found, "ok": ok})


# Memory and time ------------------------------------------------------------------------------------------------------


def _costs(entry: dict, model: Model, sweep: int, plan: Plan, device: torch.device) -> Iterator[str]:
    """Measure every method of a model once, in its own turn: only one of them is on the card at a time."""
    for spec in plan.methods[:: -1 if sweep % 2 else 1]:
        row = next((row for row in entry["rows"] if row["method"] == spec), None)
        if row and ("failed" in row or len(row["sweeps"]) > sweep):
            continue
        if row is None and sweep:
            continue  # its first sweep is named among what was not reached
        yield spec
        recipe = load_recipe(plan.recipe, model.recipe)
        if row is None:
            row = _first(entry, with_method(recipe, spec), spec, model, plan, device)
            entry["rows"].append(row)
        else:
            again = with_method(replace(recipe, batch=entry["batch_size"]), spec)
            found = attempt(partial(_seconds, again, entry["size"], plan.rounds, device))
            row["sweeps"].append(found)
        _derive(entry["rows"])


def _first(entry: dict, recipe: Recipe, spec: str, model: Model, plan: Plan, device: torch.device) -> dict:
    """A method's row; full fine-tuning, which needs most memory, comes first and chooses batch and size for all."""
    chooses = spec == plan.methods[0]
    tried = model.tried if chooses else ((entry["batch_size"], entry["size"]),)
    if chooses:
        entry["fell_back"] = []
    for number, (batch, size) in enumerate(tried, start=1):
        entry |= {"batch_size": batch, "size": list(size)}
        found = attempt(partial(_memory_and_seconds, replace(recipe, batch=batch), size, plan.rounds, device))
        if found.get("failed") != OUT_OF_MEMORY or number == len(tried):
            break
        entry["fell_back"].append({"batch_size": batch, "size": list(size), "because": f"{spec}: {OUT_OF_MEMORY}"})
    return {"method": spec, **found}


def _memory_and_seconds(recipe: Recipe, size: tuple[int, int], rounds: int, device: torch.device) -> dict:
    step = _built(recipe, size, device)
    found = step.ledger()
    memory = {"peak": found.peak, "counted": int(found.total.max())}
    memory |= {"allocated": found.allocated, "reserved": found.reserved}
    return {**memory, "sweeps": [_timed(step, rounds, device)]}


def _seconds(recipe: Recipe, size: tuple[int, int], rounds: int, device: torch.device) -> dict:
    return _timed(_built(recipe, size, device), rounds, device)


def _timed(step: Step, rounds: int, device: torch.device) -> dict:
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
    """Medians, quartiles and shares of full fine-tuning's, from the seconds by round."""
    for row in rows:
        timed = [sweep for sweep in row.get("sweeps", ()) if "failed" not in sweep]
        if timed:
            steps = [np.sum([sweep[phase] for phase in PHASES], axis=0) for sweep in timed]
            phases = {phase: np.concatenate([sweep[phase] for sweep in timed]) for phase in PHASES}
            row["step"], *row["quartiles"] = (
                round(float(np.quantile(np.concatenate(steps), q)), 6) for q in (0.5, 0.25, 0.75)
            )
            row |= {phase: round(float(np.median(values)), 6) for phase, values in phases.items()}
            row["step_by_sweep"] = [round(float(np.median(values)), 6) for values in steps]
    full = rows[0] if rows and rows[0]["method"] == "full" else {}
    for row in rows:
        for key in ("peak", "step"):
            row[f"{key}_of_full"] = round(row[key] / full[key], 4) if key in row and key in full else None


def _ledger_summary(costs: list[dict]) -> dict:
    """How far the bytes that the ledger counts are from those of the allocator."""
    rows = [(entry, row) for entry in costs for row in entry["rows"] if row.get("allocated") is not None]
    if not rows:
        return {"compared": 0, "note": "not compared: a CPU's allocator does not count"}
    differences = [(abs(row["allocated"] - row["counted"]) / row["allocated"], entry, row) for entry, row in rows]
    worst, entry, row = max(differences, key=lambda found: found[0])
    where = f"{row['method']} on {entry['backbone']}, {entry['precision']}"
    return {"compared": len(rows), "largest_difference": round(worst, 5), "where": where}


# The largest batch ----------------------------------------------------------------------------------------------------


def _fit(result: dict, plan: Plan, device: torch.device) -> Iterator[str]:
    """The largest batch that runs beside the one that dry runs predict, for the first model."""
    model, fit = plan.models[0], result["fit"]
    size = tuple(result["costs"][0]["size"] or model.tried[0][1])
    recipe = load_recipe(plan.recipe, model.recipe)
    if not fit:
        yield "predictions"
        card = plan.card or f"{torch.cuda.get_device_properties(device).total_memory // MIB}MB"
        fit |= attempt(partial(fit_table, recipe, list(plan.fit), size, card, 0 if plan.card else OVERHEAD))
        for row in fit.get("rows", ()):
            row["predicted"] = row.pop("batch_size")
    if "failed" in fit:
        return
    size, limit = tuple(fit["settings"]["size"]), capacity(plan.card) if plan.card else None
    for row in fit["rows"]:
        if "measured" not in row:
            yield row["method"]
            spec = with_method(recipe, row["method"])

            def failure(batch: int, spec: Recipe = spec) -> str | None:
                return attempt(partial(_two_steps, replace(spec, batch=batch), size, device, limit)).get("failed")

            row |= largest_that_runs(failure, row["predicted"])


def _two_steps(recipe: Recipe, size: tuple[int, int], device: torch.device, limit: int | None) -> dict:
    """Two training steps: the second has the optimizer's state from the start. With a limit, in so many bytes."""
    if device.type == "cpu":
        with gpu_slices():  # as the prediction, which is one for a GPU
            if limit is not None and _built(recipe, size, device).ledger().peak > limit:
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
def _limited(device: torch.device, limit: int | None) -> Iterator[None]:
    """Inside, torch's allocator takes no more than so many bytes of the card."""
    share = 1.0 if limit is None else min(1.0, limit / torch.cuda.get_device_properties(device).total_memory)
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


# What the parts share -------------------------------------------------------------------------------------------------


def attempt(measure: Callable[[], dict]) -> dict:
    """What a measurement returns, or ``{"failed": its reason}``; what it allocated is free again.

    Raises:
        InputError: If the GPU does not work any more.
    """
    try:
        found = measure()
    except Exception as error:
        lines = str(error).splitlines() or [""]
        first = next((line for line in lines if line), "")
        full = (
            isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error) or "ALLOC_FAILED" in str(error)
        )
        known = isinstance(error, InputError)
        found = {"failed": OUT_OF_MEMORY if full else first if known else f"{type(error).__name__}: {first}"}
    if torch.cuda.is_initialized():
        gc.collect()  # a failed step is part of cycles
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise InputError(f"the GPU does not answer any more ({reason}): start the same command again.") from error
    return found


def _opened(file: Path, new: dict, plan: Plan) -> dict:
    """What the file holds, or a result without measurements."""
    empty = [{**model.recipe, "batch_size": None, "size": None, "fell_back": [], "rows": []} for model in plan.models]
    new |= {"correctness": [], "costs": empty, "fit": {}, "ledger": {}, "not_reached": [], "seconds": 0.0}
    if not file.exists():
        return new
    way_out = "choose another folder with --out or pass --overwrite"
    try:
        old = json.loads(file.read_text(encoding="utf-8"))
        before, now = ({**found["environment"], "date": None, "plan": found["plan"]} for found in (old, new))
        if old.keys() != new.keys():
            raise ValueError
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise InputError(f"'{file}' was not written by this version of e3va bench: {way_out}.") from error
    for key, value in now.items():
        if before.get(key) != value:
            was, is_now = (f"{found['name']}" if key == "plan" else f"{found}" for found in (before.get(key), value))
            raise InputError(f"'{file}' was measured with another {key} ({was}, now {is_now}): {way_out}.")
    return old


def _save(result: dict, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as unfinished:
        unfinished.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def _plain(values: dict) -> dict:
    """As JSON gives it back: lists for tuples."""
    return json.loads(json.dumps(values))


def _processor() -> str:
    file = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", file.read_text(encoding="utf-8")) if file.exists() else []
    return names[0] if names else platform.processor() or platform.machine()


def _driver() -> str | None:
    if (command := shutil.which("nvidia-smi")) is None:
        return None
    query = [command, "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, timeout=30, check=False)
    return (done.stdout.splitlines() or [None])[0]


def as_text(result: dict) -> str:
    """The tables for a terminal."""
    found = result["environment"]
    checks = result["correctness"]
    lines = [f"{found['device']}, torch {found['versions']['torch']}, {found['date']}; random weights"]
    lines.append(f"correctness: {sum(row['ok'] for row in checks)} of {len(checks)} checks are within their bounds")
    for row in checks:
        if not row["ok"]:
            what = ", ".join(f"{key} {row.get(key)} (bound {bound})" for key, bound in row["bounds"].items())
            lines.append(f"  NOT {row['check']}: {row.get('failed') or what}")
    for entry in result["costs"]:
        lines += _cost_lines(entry) if entry["rows"] else []
    ledger = result["ledger"]
    if ledger.get("compared"):
        difference = f"at most {100 * ledger['largest_difference']:.2f} % ({ledger['where']})"
        lines += [
            "",
            f"the ledger's count and the allocator's peak differ by {difference}, {ledger['compared']} compared",
        ]
    if result["fit"]:
        lines += ["", *_fit_lines(result["fit"])]
    lines += ["", *(f"not reached: {part}" for part in result["not_reached"])]
    return "\n".join([*lines, f"{result['seconds'] / 60:.1f} minutes"])


def _cost_lines(entry: dict) -> list[str]:
    rows = []
    for row in entry["rows"]:
        if "failed" in row:
            rows.append([row["method"], "-", "", "-", "", ""])
            continue
        low, high = (f"{1000 * q:.1f}" for q in row["quartiles"])
        memory = [f"{row['peak'] / MIB:.0f}", percent(row["peak_of_full"])]
        rows.append(
            [row["method"], *memory, f"{1000 * row['step']:.1f}", f"{low}-{high}", percent(row["step_of_full"])]
        )
    height, width = entry["size"]
    lines = ["", f"{entry['backbone']}, RetinaNet, {entry['batch_size']} x {height}x{width}, {entry['precision']}"]
    for tried in entry["fell_back"]:
        lines.append(f"  not {tried['batch_size']} x {tried['size'][0]}x{tried['size'][1]}: {tried['because']}")
    lines.append(text_table(["method", "peak, MiB", "of full", "step, ms", "quartiles", "of full"], rows))
    lines += [f"  {row['method']}: {row['failed']}" for row in entry["rows"] if "failed" in row]
    sweeps = {row["method"]: row["step_by_sweep"] for row in entry["rows"] if "step_by_sweep" in row}
    if noisy := [method for method, medians in sweeps.items() if max(medians) > 1.1 * min(medians)]:
        lines.append(
            f"  the two sweeps' times differ by more than 10 % for {', '.join(noisy)}: the machine was not quiet"
        )
    return lines


def _fit_lines(fit: dict) -> list[str]:
    if "failed" in fit:
        return [f"largest batches: {fit['failed']}"]
    settings = fit["settings"]
    height, width = settings["size"]
    rows = []
    for row in fit["rows"]:
        tried = [str(row.get("measured", "-")), str(row.get("too_large") or "-"), row.get("because") or ""]
        rows.append([row["method"], str(row["predicted"]), *tried])
    memory = f"{settings['bytes'] / MIB:.0f} MiB"
    return [
        f"largest batch of {settings['backbone']}, {height}x{width}, {settings['precision']}, in {memory}",
        text_table(["method", "predicted", "runs", "does not run", "because"], rows),
    ]
