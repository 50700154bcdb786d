"""Will it fit? The largest batch of each method on a card of so many gigabytes, found by dry runs."""

import re
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from multiprocessing import get_context

import torch
from tqdm import tqdm

from ..errors import unknown
from ..fused import frozen_stream
from ..recipes.schema import Recipe
from .cost import memory_of, with_method
from .text_table import text_table

GIB, MIB = 2**30, 2**20

#: Memory of well-known cards, GiB.
CARDS = {
    "1080ti": 11, "2060": 6, "2080ti": 11, "3060": 12, "3090": 24, "4060": 8, "4090": 24, "5090": 32,
    "t4": 16, "p100": 16, "v100": 32, "v100-16gb": 16, "l4": 24, "a10": 24, "a100": 40, "a100-80gb": 80, "h100": 80,
    "h200": 141,
}  # fmt: skip
FIRST = 4  # images: the peak of fewer may be that of the optimizer's step, which does not depend on the batch
FAR = 128  # images: a wrong prediction beyond would cost minutes
LARGEST = 4096  # images: nobody trains with more on one card
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

    Peaks are affine in the batch, except for a few images, whose peak may be in another part of the step. Two peaks
    predict the answer and a third, at the answer, confirms the line; an answer above ``FAR`` images is confirmed there
    first. Where the three are not on a line, the search goes on until a batch that fits and one more that does not are
    found.

    Args:
        peak: Bytes for a batch, never falling.
        available: Bytes.
    """
    peaks: dict[int, int] = {}
    fits, too_large, batch = 0, LARGEST + 1, FIRST
    while too_large - fits > 1:
        peaks[batch] = peak(batch)
        if peaks[batch] <= available:
            fits = batch
        else:
            too_large = batch
        if len(peaks) == 1:
            batch = 2 * FIRST if fits else 1
            continue
        # The line through the two batches around the answer, or the two largest: the third confirms it or does not.
        *others, low, high = sorted(peaks, key=lambda known: (known in (fits, too_large), known))
        slope = max(peaks[high] - peaks[low], 1) / (high - low)
        predicted = max(min(low + int((available - peaks[low]) / slope), too_large - 1), fits)
        confirmed = any(abs(peaks[low] + slope * (x - low) - peaks[x]) <= 1e-5 * abs(x - low) * slope for x in others)
        if fits and confirmed and predicted == fits:
            break
        if predicted > FAR > fits and FAR not in peaks:
            predicted = FAR
        elif len(peaks) > 5:  # no line at all
            predicted = (fits + too_large) // 2
        batch = min(max(predicted, fits + 1), too_large - 1)
    return fits, peaks[fits or 1]


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


@contextmanager
def gpu_slices() -> Iterator[None]:
    """Inside, dry runs send as many tokens through a frozen block at a time as a GPU does: many, in fewer operators."""
    cpu = frozen_stream.ROWS["cpu"]
    frozen_stream.ROWS["cpu"] = frozen_stream.ROWS["gpu"]
    try:
        yield
    finally:
        frozen_stream.ROWS["cpu"] = cpu


def _largest(recipe: Recipe, size: tuple[int, int], available: int) -> tuple[int, int]:
    with gpu_slices():
        return largest_batch(lambda batch: dry_peak(recipe, size, batch), available)
