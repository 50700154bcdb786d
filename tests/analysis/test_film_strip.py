import json

import numpy as np
import pytest
import torch

from e3va_lite.analysis.cost import with_method
from e3va_lite.analysis.film_strip import SECTIONS, film, film_strip, running_parts
from e3va_lite.analysis.memory import CATEGORIES
from e3va_lite.analysis.training_step import build_step
from e3va_lite.errors import InputError
from e3va_lite.recipes.schema import load_recipe

METHODS = ("full", "adapter", "e3va")
BLOCKS = [2, 2, 2, 2]


@pytest.fixture(scope="module")
def ledgers_and_film():
    recipe = load_recipe("voc-nano", {"batch": 1})
    steps = {m: build_step(with_method(recipe, m), (64, 96), torch.device("cpu"), dry_run=True) for m in METHODS}
    ledgers = {method: step.ledger() for method, step in steps.items()}
    return ledgers, film(ledgers, {method: step.model for method, step in steps.items()})


def test_every_frame_adds_up_to_the_ledger(ledgers_and_film):
    """To the byte: each category in each frame, and the highest frame to the peak."""
    ledgers, data = ledgers_and_film
    assert sum(section["frames"] for section in data["sections"]) == len(data["methods"][0]["events"])
    for method in data["methods"]:
        ledger, events = ledgers[method["name"]], method["events"]
        assert events == sorted(events)
        live = np.zeros((len(CATEGORIES), len(events)), dtype=int)
        for size, _, category, _, first, last in method["tensors"]:
            live[category, first : last + 1] += size
        for row, name in zip(live, CATEGORIES, strict=True):
            assert (row == ledger.curve[name][events]).all(), (method["name"], name)
        assert live.sum(axis=0).max() == ledger.peak == method["peak"]


def test_the_methods_are_in_step(ledgers_and_film):
    """In the forward pass through the backbone all of them run the same block; then each section begins together."""
    _, data = ledgers_and_film
    names = [[data["parts"][part] for part in method["running"]] for method in data["methods"]]
    blocks = [{part[1:4] for part in parts} for parts in list(zip(*names, strict=True))[: SECTIONS[0][1]]]
    for stage in range(1, 5):
        for block in (1, 2):
            assert blocks.count({f"{stage}b{block}"}) >= 3  # of its 5 frames; in others a method still reduces or norms
    assert all(len({part for part in some if "b" in part}) <= 1 for some in blocks)
    start = 0
    for name, count, _ in SECTIONS:
        now = {parts[start + count - 1] for parts in names}
        if name in ("Loss", "Optimiser"):
            assert now == {"loss" if name == "Loss" else "optimizer"}
        start += count


def test_where_the_gradient_goes(ledgers_and_film):
    """What the picture is for: back through every half of every block, or through none."""
    ledgers, _ = ledgers_and_film
    backward = {}
    for name, ledger in ledgers.items():
        places = running_parts(ledger, BLOCKS)[ledger.ends["forward"] : ledger.ends["backward"]]
        backward[name] = {place for place in places if place[0] == "s"}
    halves = {f"s{stage}b{block}.{half}" for stage in range(1, 5) for block in (1, 2) for half in (1, 2)}
    assert backward == {"full": halves, "adapter": halves - {"s1b1.1"}, "e3va": set()}


def test_what_is_trained(ledgers_and_film):
    _, data = ledgers_and_film
    trained = {method["name"]: set(method["trained"]) for method in data["methods"]}
    assert {"embed", "s1b1.1", "r2", "n2", "neck", "head"} < trained["full"]
    assert trained["e3va"] - trained["adapter"] == {"n2", "n3", "n4"}
    assert not any(part.startswith(("s", "r")) for part in trained["adapter"])
    assert [method["layout"] for method in data["methods"]] == ["plain", "inside", "highway"]


def test_it_is_small_and_plain(ledgers_and_film):
    _, data = ledgers_and_film
    assert len(json.dumps(data)) < 100_000


def test_a_task_without_neck_and_head():
    with pytest.raises(InputError, match=r"take the task voc or coco-boxes, not ade20k"):
        film_strip(load_recipe("ade20k-nano"), (64, 64))
