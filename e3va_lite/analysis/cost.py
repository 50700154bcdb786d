"""What a training step of each method costs: tables of memory and time.

Memory is counted (see :mod:`e3va_lite.analysis.memory`), on the device or in a dry run. For times the methods take
turns, so that a slow moment of the machine affects all of them alike; shares are those of a round, and their median is
reported.
"""

import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import replace

import numpy as np
import torch
from tqdm import tqdm

from ..methods.registry import METHODS, options_of, parse_method
from ..recipes.schema import Recipe
from ..training.engine import machine
from .memory import CATEGORIES, PHASES, Ledger
from .text_table import percent, setting, text_table
from .training_step import Step, build_step

MIB = 2**20


def with_method(recipe: Recipe, spec: str, checkpointing: bool = False) -> Recipe:
    """The recipe with the method ``METHOD[:option=value,...]`` instead of its own.

    Args:
        checkpointing: Gradient checkpointing where the method has it: where its gradient runs through the backbone.
    """
    method, options = parse_method(spec)
    if checkpointing and "checkpointing" in options_of(method):
        options = {**options, "checkpointing": True}
    return replace(recipe, method=method, options=options)


def split_methods(text: str) -> list[str]:
    """``full,e3va:rank=16,structure=stacked`` -> the two methods in it; ``all`` -> the twelve."""
    specs: list[str] = []
    for part in text.split(","):
        if "=" in part and ":" not in part and specs:
            specs[-1] += f",{part}"  # a further option of the method before
        else:
            specs.append(part.strip())
    return list(METHODS) if specs == ["all"] else list(dict.fromkeys(specs))


def with_memory(specs: Iterable[str], mode: str | None) -> list[str]:
    """The same methods, those of the E3VA family with ``memory=MODE`` unless they say something about it themselves."""
    add_mode = [spec.startswith("e3va") and "memory=" not in spec and mode is not None for spec in specs]
    return [
        f"{spec}{',' if ':' in spec else ':'}memory={mode}" if add else spec
        for spec, add in zip(specs, add_mode, strict=True)
    ]


def memory_of(recipe: Recipe, size: tuple[int, int], device: torch.device, dry_run: bool) -> Ledger:
    """The ledger of one training step of the recipe's model: :func:`e3va_lite.analysis.training_step.build_step`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of ranks that are not low, and of torch's about its own fake tensors
        return build_step(recipe, size, device, dry_run).ledger()


def memory_table(
    recipe: Recipe,
    specs: list[str],
    size: tuple[int, int],
    device: torch.device,
    dry_run: bool = False,
    checkpointing: bool = False,
) -> dict:
    """Bytes of one training step for each method, at the moment when there are most in all.

    Args:
        recipe: Everything but method and images.
        specs: ``METHOD[:option=value,...]`` each.
        size: Height and width of the images in pixels.
        device: Where to count; for a dry run what to imitate.
        dry_run: With fake tensors: nothing is allocated or computed.
        checkpointing: See :func:`with_method`.

    Returns:
        ``{"settings": {...}, "rows": [{"method", *CATEGORIES, "peak", "share_of_full", "largest", "by_module",
        "curve", "ends"}, ...]}``, all in bytes. The categories add up to the peak; ``largest`` has each category's own
        maximum; ``by_module`` the activations by module; ``curve`` the live bytes over the step and ``ends`` where in
        it the phases end, as fractions. On CUDA ``allocated_mib`` and ``reserved_mib`` are the allocator's.

    Raises:
        InputError: For a method, option or size that cannot work.
    """
    rows = []
    for spec in tqdm(specs, "memory", unit="method", delay=3):
        found = memory_of(with_method(recipe, spec, checkpointing), size, device, dry_run)
        row = {"method": spec, **found.as_row(), "share_of_full": None}
        if found.allocated is not None:
            row |= {"allocated_mib": round(found.allocated / MIB, 1), "reserved_mib": round(found.reserved / MIB, 1)}
        rows.append(row)
    share(rows, "peak", "share_of_full")
    how = "dry run (fake tensors)" if dry_run else f"counted on {device.type}"
    return {"settings": {"measured": how, **_settings(recipe, size, checkpointing, device)}, "rows": rows}


def memory_text(table: dict, modules: int = 0) -> str:
    """The table for a terminal, in MiB; with the ``modules`` largest places of activations per method."""
    rows = [
        [row["method"], *(f"{row[key] / MIB:.1f}" for key in (*CATEGORIES, "peak")), percent(row["share_of_full"])]
        for row in table["rows"]
    ]
    lines = [_headline(table["settings"]), text_table(["MiB", *CATEGORIES, "peak", "of full"], rows)]
    lines.append("the categories at the moment of the peak; they add up to it")
    for row in table["rows"]:
        if "reserved_mib" in row:
            lines.append(f"{row['method']}: allocated {row['allocated_mib']} MiB, reserved {row['reserved_mib']} MiB")
        places = list(row["by_module"].items())[:modules]
        lines += [f"  {row['method']}: {size / MIB:8.1f} MiB kept by {name or 'the model'}" for name, size in places]
    return "\n".join(lines)


def interleaved_seconds(
    steps: dict[str, Step], rounds: int, device: torch.device, clock: Callable[[], float] = time.perf_counter
) -> dict[str, dict[str, np.ndarray]]:
    """Seconds of each step's phases; the steps take turns, and every round begins with another one.

    Args:
        steps: A step per name.
        rounds: How often each is run; one more round, not counted, comes first.
        device: Where the steps run.

    Returns:
        Per name and phase an array (rounds,); the phase ``step`` is their sum.
    """

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return clock()

    seconds = {name: np.zeros((rounds + 1, len(PHASES))) for name in steps}
    names = list(steps)
    for number in tqdm(range(rounds + 1), "time", unit="round", delay=3, leave=False):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            step = steps[name]
            times = [now()]
            loss = step.forward()
            times.append(now())
            step.backward(loss)
            times.append(now())
            step.update()
            times.append(now())
            seconds[name][number] = np.diff(times)
    return {
        name: {**dict(zip(PHASES, values[1:].T, strict=True)), "step": values[1:].sum(axis=1)}
        for name, values in seconds.items()
    }


def time_table(
    recipe: Recipe,
    specs: list[str],
    size: tuple[int, int],
    device: torch.device,
    rounds: int,
    checkpointing: bool = False,
) -> dict:
    """Seconds and peak bytes of a training step of each method; see :func:`memory_table` for arguments.

    All models are held at once; a peak is that of a method's own model.

    Returns:
        ``{"settings": {...}, "rows": [{"method", "forward", "backward", "optimizer", "step", "quartiles", "peak",
        "of_full", "of_fixed", "seconds_by_round"}, ...]}``: medians over the rounds in seconds, their quartiles, the
        peak in bytes, and, where ``full`` and ``fixed`` are among the methods, the shares of theirs: of seconds the
        medians of the shares that each round has, and of the peak.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        steps = {spec: build_step(with_method(recipe, spec, checkpointing), size, device) for spec in specs}
    seconds = interleaved_seconds(steps, rounds, device)
    peaks = {spec: step.ledger().peak for spec, step in tqdm(steps.items(), "peak", unit="method", delay=3)}
    rows = []
    for spec, phases in seconds.items():
        row = {"method": spec, **{phase: round(float(np.median(x)), 5) for phase, x in phases.items()}}
        row["quartiles"] = {p: [round(float(q), 5) for q in np.quantile(x, (0.25, 0.75))] for p, x in phases.items()}
        row["peak"] = peaks[spec]
        for other in ("full", "fixed"):
            row[f"of_{other}"] = None
            if whole := seconds.get(other):
                shares = {phase: median_share(x, whole[phase]) for phase, x in phases.items()}
                row[f"of_{other}"] = {**shares, "peak": round(peaks[spec] / peaks[other], 4)}
        row["seconds_by_round"] = [round(float(x), 5) for x in phases["step"]]
        rows.append(row)
    return {"settings": {"rounds": rounds, **_settings(recipe, size, checkpointing, device)}, "rows": rows}


def median_share(seconds: np.ndarray, whole: np.ndarray) -> float:
    """The median over the rounds, (rounds,) each, of the shares that a round has: they survive a noisy machine."""
    return round(float(np.median(np.divide(seconds, whole))), 4)


def time_text(table: dict) -> str:
    """The table for a terminal: medians, the step's quartiles, and shares."""
    rows = []
    for row in table["rows"]:
        quartiles = "-".join(f"{q:.3f}" for q in row["quartiles"]["step"])
        steps, peaks = (
            [percent((row[f"of_{other}"] or {}).get(key)) for other in ("full", "fixed")] for key in ("step", "peak")
        )
        times = [f"{row[phase]:.3f}" for phase in (*PHASES, "step")]
        rows.append([row["method"], *times, quartiles, *steps, f"{row['peak'] / MIB:.0f}", *peaks])
    header = ["seconds", *PHASES, "step", "quartiles", "of full", "of fixed", "peak, MiB", "of full", "of fixed"]
    return "\n".join([_headline(table["settings"]), text_table(header, rows)])


def share(rows: list[dict], key: str, into: str) -> None:
    """Give every row its share of full fine-tuning's value, where that is among the rows; None where that is zero."""
    for whole in [row[key] for row in rows if row["method"] == "full"]:
        for row in rows:
            row[into] = round(row[key] / whole, 4) if whole else None


def _settings(recipe: Recipe, size: tuple[int, int], checkpointing: bool, device: torch.device) -> dict:
    return {
        "task": recipe.task,
        "backbone": recipe.backbone,
        "size": list(size),
        "batch_size": recipe.batch,
        "checkpointing": checkpointing,
        **machine(recipe, device),
    }


def _headline(settings: dict) -> str:
    return f"{setting(settings)}, {settings['device']}, {settings['date']}"
