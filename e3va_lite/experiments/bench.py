"""One command for somebody with a GPU: are the numbers right on this card, and what does a training step cost?

Three parts: the highway and its proofs on the card against literal equations and the CPU
(:mod:`e3va_lite.experiments.bench_checks`); memory and time of one training step of every method, with the ledger
beside the allocator, and the largest batch that really runs beside the one that dry runs predict
(:mod:`e3va_lite.experiments.bench_costs`). :mod:`e3va_lite.experiments.bench_plan` says of which models. All have
random weights: what a step costs does not depend on them, and nothing is downloaded.

Every measurement is written to the file as soon as it is finished. The same command goes on with what is missing.
"""

import json
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm

from .. import __version__
from ..analysis.fit_on_gpu import MIB
from ..errors import InputError
from ..files import replacing
from ..recipes.schema import load_recipe
from ..training.engine import machine
from .bench_checks import checks, full_float32
from .bench_costs import attempt, costs, largest_batches, ledger_summary
from .bench_plan import PLANS, SWEEPS, Plan, plan_for


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
        InputError: If the file holds measurements of another machine, of other versions or of another plan, or if the
            GPU does not work any more.
    """
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"--device {device}: e3va bench measures on CUDA, or for a trial on the CPU.")
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    begun = time.monotonic()
    name = plan_for(device, quick)
    result = _opened(file, environment(device), name)
    seconds, result["not_reached"] = result["seconds"], []
    for part, measurements in _parts(result, PLANS[name], device):
        for number, next_one in enumerate(measurements):
            spent = time.monotonic() - begun
            result["seconds"] = round(seconds + spent, 1)
            _save(result, file)
            if spent >= 60 * minutes:
                result["not_reached"].append(f"{part}, from {next_one} on")
                break
            if number == 0:
                tqdm.write(f"{spent:5.0f} s: {part}", file=sys.stderr)
    result["ledger"] = ledger_summary(result["costs"])
    result["seconds"] = round(seconds + time.monotonic() - begun, 1)
    _save(result, file)
    return result


def _parts(result: dict, plan: Plan, device: torch.device) -> Iterator[tuple[str, Iterator[str]]]:
    """The parts in the order of their value, and for each what names a measurement before it is done."""
    yield "correctness", _correctness(result["correctness"], device)
    for sweep in range(SWEEPS):
        for number, (model, entry) in enumerate(zip(plan.models, result["costs"], strict=True)):
            title = f"{model.backbone}, {model.precision}, sweep {sweep + 1}"
            yield title, costs(entry, model, sweep, plan, device)
            if sweep == number == 0:
                yield "largest batches", largest_batches(result["fit"], entry["size"], plan, device)


def _correctness(rows: list[dict], device: torch.device) -> Iterator[str]:
    done = {row["check"] for row in rows}
    for name, bounds, check in checks(device):
        if name not in done:
            yield name
            with full_float32():
                found = attempt(check)
            ok = "failed" not in found and all(found[key] <= bound for key, bound in bounds.items())
            rows.append({"check": name, "bounds": bounds, **found, "ok": ok})


# The machine ----------------------------------------------------------------------------------------------------------


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


# The file -------------------------------------------------------------------------------------------------------------


def _opened(file: Path, environment: dict, name: str) -> dict:
    """What the file holds, or a result without measurements.

    Raises:
        InputError: If it was measured with another environment (the date may be another) or plan.
    """
    plan = PLANS[name]
    new = {"environment": environment, "plan": json.loads(json.dumps({"name": name, **asdict(plan)}))}  # without tuples
    empty = [{**model.settings, "batch_size": None, "size": None, "fell_back": [], "rows": []} for model in plan.models]
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
            was, is_now = (found["name"] if key == "plan" else found for found in (before.get(key), value))
            raise InputError(f"'{file}' was measured with another {key} ({was}, now {is_now}): {way_out}.")
    return old


def _save(result: dict, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as unfinished:
        unfinished.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
