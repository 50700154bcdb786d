"""Training steps on a card that is not there: see :mod:`tests.training.pretend_cuda`."""

import itertools
import math

import pytest

from e3va_lite.datasets.shapes import write_scenes
from e3va_lite.recipes.schema import load_recipe
from e3va_lite.tasks.registry import task_module
from e3va_lite.training.engine import Training, build_model

from .pretend_cuda import CUDA, own_process, pretend_cuda

SMALL = {
    "voc": {"min_size": 96, "max_size": 96, "fpn_channels": 16, "anchor_base": 3, "eval_split": "val"},
    "coco": {
        "min_sizes": [96],
        "min_size": 96,
        "max_size": 96,
        "fpn_channels": 16,
        "head_channels": 16,
        "samples": 32,
        "proposals": 50,
    },
    "ade20k": {"crop": 96, "scale": [96, 96], "head_channels": 16},
}
PRECISIONS = ("float32", "bfloat16", "float16")
MEMORY = ("store", "compress", "recompute", "reference")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("scenes")
    for task in SMALL:
        write_scenes(root / task, task, train=4, val=2, seed=0, size=96)
    return root


@pytest.fixture(scope="module")
def process():
    with own_process() as process:
        yield process


def parts(root, task, **changes):
    recipe = load_recipe(f"{task}-nano", {"batch": 2, "workers": 0, "pretrained": False, **SMALL[task], **changes})
    data = [
        task_module(task).dataset(recipe, root / task, split, None, train=training)
        for split, training in ((recipe.train_split, True), (recipe.eval_split, False))
    ]
    return recipe, build_model(recipe, len(data[0].classes)), *data


def steps(model, data, recipe, device, number=2):
    """That many training steps; the numbers of each."""
    training = Training(model, data, recipe, device)
    batches = training.batches()
    for _ in range(number):
        step = list(itertools.islice(batches, recipe.accumulate))
        training.backward(step)
        yield training.update(step)


def on_cuda(root, task, **changes):
    """Two training steps; the losses, and where the second one waits."""
    recipe, model, data, _ = parts(root, task, **changes)
    with pretend_cuda() as waits:
        numbers = []
        for values in steps(model, data, recipe, CUDA):
            numbers.append(values)
            lines, copies = dict(waits.lines), waits.copies
            waits.lines.clear()
            waits.copies = 0
    return numbers, lines, copies


@pytest.mark.parametrize("task", SMALL)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("memory", MEMORY)
def test_every_step_runs(task, precision, memory, root, process):
    changes = {"precision": precision, "options": {"memory": memory}}
    numbers, _, _ = process.submit(on_cuda, root, task, **changes).result()
    assert all(math.isfinite(value) for values in numbers for name, value in values.items() if name != "gradient_norm")


#: Places where a step of two images waits for the card: in this package, and in all.
WAITS = {"voc": (1, 24), "ade20k": (1, 1)}


@pytest.mark.parametrize("task", WAITS)
def test_a_step_waits_no_more_often_than_it_has_to(task, root, process):
    _, lines, _ = process.submit(on_cuda, root, task).result()
    text = "\n".join(f"{n:5d}  {line}  {what}" for (line, what), n in sorted(lines.items()))
    ours = sum(n for (line, _), n in lines.items() if line.startswith("e3va_lite/"))
    assert (ours, sum(lines.values())) == WAITS[task], text
