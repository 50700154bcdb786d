"""Will it fit? The largest batch of each method on a card of so many gigabytes, found by dry runs."""

import re
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from multiprocessing import get_context

import torch
from tqdm import tqdm

from ..errors import unknown
from ..recipes.schema import Recipe
from .cost import memory_of, with_method
from .text import text_table

GIB, MIB = 2**30, 2**20

#: Memory of well-known cards, GiB.
CARDS = {
    "1080ti": 11, "2060": 6, "2080ti": 11, "3060": 12, "3090": 24, "4060": 8, "4090": 24, "5090": 32,
    "t4": 16, "p100": 16, "v100": 32, "v100-16gb": 16, "l4": 24, "a10": 24, "a100": 40, "a100-80gb": 80, "h100": 80,
    "h200": 141,
}  # fmt: skip
MOST = 4096  # images: nobody trains with more on one card
WORKERS = 2


def capacity(gpu: str) -> int:
    """Bytes of ``"11GB"``, ``"8192MB"`` or a card's name; a GB is 2**30 bytes, as on a card's box.

    Raises:
        InputError: For anything else.
    """
    if gpu.lower() in CARDS:
        return CARDS[gpu.lower()] * GIB
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(g|m)i?b?", gpu.lower())
    if match and float(match[1]) > 0:
        return int(float(match[1]) * (GIB if match[2] == "g" else MIB))
    raise unknown("card or memory", gpu, [*CARDS, "11GB", "8192MB"])


def largest_batch(peak: Callable[[int], int], available: int) -> tuple[int, int]:
    """The largest batch whose peak is within what is available, and its peak; 0 and the peak of one image if none is.

    The peak is all but affine in the batch: the last two batches say where to look next, until a batch that fits and
    one more that does not are found.

    Args:
        peak: Bytes for a batch, never falling.
        available: Bytes.
    """
    fits, bytes_ = 1, peak(1)
    if bytes_ > available:
        return 0, bytes_
    too_large, slope = MOST + 1, peak(2) - bytes_
    while too_large - fits > 1:
        batch = fits + int((available - bytes_) / max(slope, 1))
        batch = min(max(batch, fits + 1), 4 * fits, too_large - 1)  # a batch far too large takes long to look at
        more = peak(batch)
        slope = (more - bytes_) / (batch - fits)
        if more <= available:
            fits, bytes_ = batch, more
        else:
            too_large = batch
    return fits, bytes_


def fit_table(
    recipe: Recipe, specs: list[str], size: tuple[int, int], gpu: str, overhead: int, checkpointing: bool = False
) -> dict:
    """The largest batch of each method on a card.

    Args:
        recipe: Everything but method, batch and images.
        specs: ``METHOD[:option=value,...]`` each.
        size: Height and width of the images in pixels.
        gpu: See :func:`capacity`.
        overhead: Bytes that the card spends on other things: the CUDA context, libraries, fragmentation.
        checkpointing: See :func:`e3va_lite.analysis.cost.with_method`.

    Returns:
        ``{"settings": {...}, "rows": [{"method", "batch_size", "peak", "available"}, ...]}``: the largest batch (0: not
        even one image fits) and the bytes that it takes (or that one image would), without the overhead.

    Raises:
        InputError: For a card, method, option or size that cannot work.
    """
    available = capacity(gpu) - overhead
    recipes = [with_method(recipe, spec, checkpointing) for spec in specs]
    found = in_parallel([partial(_largest, one, size, available) for one in recipes], "fit")
    rows = [
        {"method": spec, "batch_size": batch, "peak": peak, "available": available}
        for spec, (batch, peak) in zip(specs, found, strict=True)
    ]
    settings = {"task": recipe.task, "backbone": recipe.backbone, "size": list(size), "precision": recipe.precision}
    settings |= {"checkpointing": checkpointing, "gpu": gpu, "bytes": capacity(gpu), "overhead": overhead}
    return {"settings": settings, "rows": rows}


def fit_text(table: dict) -> str:
    """The table for a terminal."""
    s = table["settings"]
    rows = [
        [row["method"], str(row["batch_size"]), f"{row['peak'] / MIB:.0f}", f"{row['available'] / MIB:.0f}"]
        for row in table["rows"]
    ]
    lines = [
        f"{s['task']}, {s['backbone']}, {s['size'][0]}x{s['size'][1]}, {s['precision']}, on {s['gpu']}: "
        f"{s['bytes'] / MIB:.0f} MiB less {s['overhead'] / MIB:.0f} for the CUDA context, libraries and fragmentation",
        text_table(["method", "largest batch", "peak, MiB", "available, MiB"], rows),
    ]
    lines += [f"{row['method']}: not even one image fits" for row in table["rows"] if row["batch_size"] == 0]
    return "\n".join(lines)


def dry_peak(recipe: Recipe, size: tuple[int, int], batch: int) -> int:
    """Peak bytes of a training step, by a dry run."""
    return memory_of(replace(recipe, batch=batch), size, torch.device("cpu"), dry_run=True).peak


def in_parallel(calls: list[Callable], name: str) -> list:
    """``[call() for call in calls]`` in a few processes: dry runs are Python from end to end."""
    if len(calls) < 4:  # a process takes seconds to come to life
        return [call() for call in tqdm(calls, name, delay=3)]
    with ProcessPoolExecutor(WORKERS, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        futures = [pool.submit(call) for call in calls]
        try:
            return [future.result() for future in tqdm(futures, name, delay=3)]
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _largest(recipe: Recipe, size: tuple[int, int], available: int) -> tuple[int, int]:
    return largest_batch(lambda batch: dry_peak(recipe, size, batch), available)
