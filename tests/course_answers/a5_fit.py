from . import Wrong

#: MiB of RetinaNet on Swin-L with one image and with two, of 608x1024, by dry runs.
PEAKS = {
    "full": (6908, 11443),
    "fixed": (1181, 1477),
    "adapter": (4199, 7459),
    "adapter:checkpointing=true": (1639, 2282),
    "lora:checkpointing=true": (1639, 2284),
    "e3va": (1329, 1753),
    "e3va:memory=store": (1697, 2488),
    "e3va:memory=recompute": (1227, 1548),
}

CORRECT = {
    "bisection from a bound": {
        "largest_batch": """
def largest_batch(peak, available):
    low, high = 0, 4096
    while peak(high) <= available:
        high *= 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if peak(middle) <= available else (low, middle)
    return low
""",
        "predicted_batch": """
import math


def predicted_batch(one, two, available):
    each = two - one
    constant = one - each
    return max(0, math.floor((available - constant) / each))
""",
        "choose": """
def choose(rows, card, overhead):
    best = None
    for row in rows:
        if row["peak"] <= card * 1024 - overhead and (best is None or row["time"] < best["time"]):
            best = row
    return best["method"] if best else None
""",
        "plan": """
plan = dict(method="lora:checkpointing=true", batch=12)
""",
    },
    "the package's own search": {
        "largest_batch": """
from e3va_lite.analysis.fit_on_gpu import largest_batch as search


def largest_batch(peak, available):
    batch, _ = search(peak, available)
    return batch
""",
        "predicted_batch": """
def predicted_batch(one, two, available):
    return search(lambda batch: one + (batch - 1) * (two - one), available)[0]
""",
        "choose": """
def choose(rows, card, overhead):
    for row in sorted(rows, key=lambda row: row["time"]):
        if row["peak"] + overhead <= card * 2**10:
            return row["method"]
""",
        "plan": """
plan = {"method": "e3va:memory=recompute", "batch": 16}
""",
    },
    "recursion": {
        "largest_batch": """
def largest_batch(peak, available, fits=0, step=1):
    if peak(fits + step) <= available:
        return largest_batch(peak, available, fits + step, 2 * step)
    if step == 1:
        return fits
    return largest_batch(peak, available, fits, step // 2) if step <= 2 else below(peak, available, fits, fits + step)


def below(peak, available, fits, too_large):
    if too_large - fits == 1:
        return fits
    middle = (fits + too_large) // 2
    if peak(middle) <= available:
        return below(peak, available, middle, too_large)
    return below(peak, available, fits, middle)
""",
        "predicted_batch": """
def predicted_batch(one, two, available):
    batch, need = 0, one
    while need <= available:
        batch += 1
        need += two - one
    return batch
""",
        "choose": """
def choose(rows, card, overhead):
    times = {row["time"]: row["method"] for row in rows if row["peak"] <= 1024 * card - overhead}
    return times[min(times)] if times else None
""",
        "plan": """
plan = {"batch": 12, "method": "adapter:checkpointing=true"}
""",
    },
    "with bisect": {
        "largest_batch": """
import bisect


def largest_batch(peak, available):
    high = 1
    while peak(high) <= available:
        high *= 2
    return bisect.bisect_right(range(high), available, lo=high // 2, hi=high, key=lambda b: peak(b) if b else 0) - 1
""",
        "predicted_batch": """
import numpy as np


def predicted_batch(one, two, available):
    batches = np.arange(0, 10_000)
    needs = one + (batches - 1) * (two - one)
    needs[0] = 0
    return int(batches[needs <= available].max())
""",
        "choose": """
import pandas as pd


def choose(rows, card, overhead):
    table = pd.DataFrame(rows)
    table = table[table.peak + overhead <= 1024 * card]
    return None if table.empty else table.sort_values("time").method.iloc[0]
""",
        "plan": """
plan = {"method": "e3va:memory=recompute"}
plan["batch"] = 20
""",
    },
    "powers of two from the top": {
        "largest_batch": """
def largest_batch(peak, available):
    power = 1
    while peak(power) <= available:
        power *= 2
    batch = power // 2
    step = batch // 2
    while step:
        if peak(batch + step) <= available:
            batch += step
        step //= 2
    return batch
""",
        "predicted_batch": """
def predicted_batch(one, two, available):
    more, rest = divmod(available - one, two - one)
    return 0 if available < one else 1 + more
""",
        "choose": """
def choose(rows, card, overhead):
    fitting = filter(lambda row: overhead + row["peak"] <= card * 1024, rows)
    return min(fitting, key=lambda row: row["time"], default={"method": None})["method"]
""",
    },
}


def search(start: str = "fits, too_large = 1, 2", none: str = "0", compare: str = "<=", end: str = "fits") -> str:
    return f"""
def largest_batch(peak, available):
    if not peak(1) {compare} available:
        return {none}
    {start}
    while peak(too_large) {compare} available:
        fits, too_large = too_large, 2 * too_large
    while too_large - fits > 1:
        middle = (fits + too_large) // 2
        if peak(middle) {compare} available:
            fits = middle
        else:
            too_large = middle
    return {end}
"""


def predicted(batch: str) -> str:
    return f"def predicted_batch(one, two, available):\n    return 0 if one > available else {batch}\n"


def choose(fits: str = 'row["peak"] + overhead <= 1024 * card', key: str = "time", none: str = "None") -> str:
    return f"""
def choose(rows, card, overhead):
    fitting = [row for row in rows if {fits}]
    if not fitting:
        return {none}
    return min(fitting, key=lambda row: row["{key}"])["method"]
"""


def plan(method: str, batch: int = 12) -> str:
    return f"plan = {{'method': {method!r}, 'batch': {batch}}}"


IDLE = {
    "largest_batch": "def largest_batch(peak, available):\n    return 0\n",
    "predicted_batch": predicted("0"),
    "choose": "def choose(rows, card, overhead):\n    return None\n",
    "plan": "plan = {'method': None, 'batch': None}\n",
}

WRONG = [
    Wrong(
        "exactly full does not count",
        "largest_batch",
        search(compare="<"),
        {"largest_value": (2, "one more image fits: a batch of 10 takes 1700 of 1700 bytes")},
    ),
    Wrong(
        "the first that does not fit",
        "largest_batch",
        search(end="too_large"),
        {"largest_value": (2, "a batch of 11 does not fit")},
    ),
    Wrong(
        "doubling only",
        "largest_batch",
        """
def largest_batch(peak, available):
    batch = 0
    while peak(max(1, 2 * batch)) <= available:
        batch = max(1, 2 * batch)
    return batch
""",
        {"largest_value": (2, "10 images fit, you say 8")},
    ),
    Wrong(
        "a straight line",
        "largest_batch",
        """
def largest_batch(peak, available):
    one, two = peak(1), peak(2)
    return 0 if one > available else 1 + (available - one) // (two - one)
""",
        {"largest_value": (2, "does not fit"), "largest_calls": (2, "is far from the 900 images that fit")},
    ),
    Wrong(
        "one image always fits",
        "largest_batch",
        search(none="1"),
        {"largest_none": (1, "not even one image fits here: that is a batch of 0, not of 1")},
    ),
    Wrong(
        "None for none",
        "largest_batch",
        search(none="None"),
        {"largest_none": (1, "a batch of 0, not None")},
    ),
    Wrong(
        "one by one",
        "largest_batch",
        """
def largest_batch(peak, available):
    batch = 0
    while peak(batch + 1) <= available:
        batch += 1
    return batch
""",
        {"largest_calls": (2, "1001 dry runs: a peak never falls, so double")},
    ),
    Wrong(
        "parameters once per image",
        "predicted_batch",
        predicted("available // one"),
        {"predicted": (2, "there once, not once per image")},
    ),
    Wrong(
        "what is always there forgotten",
        "predicted_batch",
        predicted("available // (two - one)"),
        {"predicted": (2, "what is there for any batch is forgotten")},
    ),
    Wrong(
        "first image forgotten",
        "predicted_batch",
        predicted("(available - one) // (two - one)"),
        {"predicted": (2, "21 fit into 10214, not 20")},
    ),
    Wrong(
        "numbers of the hint by heart",
        "predicted_batch",
        predicted("{1330: 21, 6908: 1, 4199: 0, 100: 11}[one]"),
        {"predicted": (2, "1181")},
    ),
    Wrong(
        "the smallest, not the fastest",
        "choose",
        choose(key="peak"),
        {"choose_fastest": (2, "the smallest is not the fastest"), "choose_overhead": (1, "do fit on 11 GB")},
    ),
    Wrong(
        "fastest of all",
        "choose",
        choose(fits="True"),
        {
            "choose_fastest": (2, "what does not fit is not fast"),
            "choose_overhead": (1, "the overhead is forgotten"),
            "choose_none": (1, "nothing fits on a card of 1 GB"),
        },
    ),
    Wrong(
        "overhead forgotten",
        "choose",
        choose(fits='row["peak"] <= 1024 * card'),
        {"choose_overhead": (1, "the overhead is forgotten")},
    ),
    Wrong(
        "1000 MiB for a GB",
        "choose",
        choose(fits='row["peak"] + overhead <= 1000 * card'),
        {"choose_overhead": (1, "a GB on a card's box is 1024 MiB")},
    ),
    Wrong(
        "the smallest where nothing fits",
        "choose",
        choose(none='min(rows, key=lambda row: row["peak"])["method"]'),
        {"choose_none": (1, "that is None")},
    ),
    Wrong(
        "an error where nothing fits",
        "choose",
        choose(none='min(fitting, key=len)["method"]'),
        {"choose_none": (1, "if nothing fits it is None")},
    ),
    Wrong(
        "gradients of 8 bits",
        "plan",
        plan("e3va"),
        {"plan_method": (2, "the gradients are not exact")},
    ),
    Wrong(
        "nothing trained in the backbone",
        "plan",
        plan("fixed"),
        {"plan_method": (2, "nothing is trained in the backbone")},
    ),
    Wrong(
        "an option that is none",
        "plan",
        plan("e3va:checkpointing=true"),
        {"plan_method": (2, "this method cannot be built"), "plan_batch": (3, "checkpointing")},
    ),
    Wrong(
        "taps stored",
        "plan",
        plan("e3va:memory=store"),
        {"plan_batch": (3, "1050 more are overhead")},
    ),
    Wrong(
        "adapters inside the backbone",
        "plan",
        plan("adapter"),
        {"plan_batch": (3, "that does not fit on 11264 MiB")},
    ),
    Wrong(
        "full fine-tuning",
        "plan",
        plan("full"),
        {"plan_batch": (3, "that does not fit on 11264 MiB")},
    ),
    Wrong(
        "fewer images",
        "plan",
        plan("e3va:memory=recompute", 11),
        {"plan_batch": (3, "fewer than the 12")},
    ),
    Wrong(
        "too many images",
        "plan",
        plan("e3va:memory=recompute", 40),
        {"plan_batch": (3, "that does not fit")},
    ),
]
