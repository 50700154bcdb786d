"""Training and evaluation on a card that is not there: see :mod:`tests.training.pretend_cuda`."""

import itertools
import math
from collections import Counter

import pytest
import torch

from e3va_lite.datasets.shapes import write_scenes
from e3va_lite.recipes.schema import load_recipe
from e3va_lite.tasks.registry import task_module
from e3va_lite.training.engine import Training, build_model, evaluate

from .pretend_cuda import CPU, CUDA, own_process, pretend_cuda

pytest.importorskip("cv2", exc_type=ImportError)

SMALL = {
    "voc": {"min_size": 96, "max_size": 96, "fpn_channels": 16, "anchor_base": 3, "eval_split": "val"},
    "coco": {"min_sizes": [96], "min_size": 96, "max_size": 96, "anchor_base": 3}
    | {"fpn_channels": 16, "head_channels": 16, "samples": 32, "proposals": 50},
    "ade20k": {"crop": 96, "scale": [96, 96], "head_channels": 16},
}
PRECISIONS = ("float32", "bfloat16", "float16")
MEMORY = ("store", "compress", "recompute", "reference")
IMAGES = 2


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("scenes")
    for task in SMALL:
        write_scenes(root / task, task, train=4, val=IMAGES, seed=0, size=96)
    return root


@pytest.fixture(scope="module")
def process():
    with own_process() as process:
        yield process


def parts(root, task, changes):
    """Recipe, model, and the data to train and to evaluate on."""
    recipe = load_recipe(f"{task}-nano", {"batch": 2, "workers": 0, "pretrained": False, **SMALL[task], **changes})
    dataset = task_module(task).dataset
    data = dataset(recipe, root / task, recipe.train_split, None, train=True)
    return recipe, build_model(recipe, len(data.classes)), data, dataset(recipe, root / task, recipe.eval_split)


def steps(training):
    """Two training steps: the numbers of each."""
    batches = training.batches()
    for _ in range(2):
        step = list(itertools.islice(batches, training.recipe.accumulate))
        training.backward(step)
        yield training.update(step)


# In the other process


def trained(root, task, changes):
    """The numbers of each of two steps, and where each waits."""
    recipe, model, data, _ = parts(root, task, changes)
    with pretend_cuda() as waits:
        training = Training(model, data, recipe, CUDA)
        waits.lines.clear()
        results = []
        for numbers in steps(training):
            results.append((numbers, Counter(waits.lines)))
            waits.lines.clear()
        return results


def evaluated(root, task):
    recipe, model, _, data = parts(root, task, {})
    with pretend_cuda() as waits:
        model.to(CUDA)
        waits.lines.clear()
        return evaluate(model, data, recipe, CUDA), Counter(waits.lines)


# What a step computes


def runs(root, process, task, precision, memory):
    changes = {"precision": precision, "options": {"memory": memory}}
    for numbers, _ in process.submit(trained, root, task, changes).result():
        losses = [value for name, value in numbers.items() if name != "gradient_norm"]
        assert losses and all(map(math.isfinite, losses))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("memory", MEMORY)
def test_no_tensor_is_on_the_wrong_device(memory, precision, root, process):
    runs(root, process, "voc", precision, memory)


QUICK = ("compress", "float16")  # float32 is below, where waits are counted
CASES = [
    pytest.param(*case, marks=[] if case == QUICK else pytest.mark.slow)
    for case in itertools.product(MEMORY, PRECISIONS)
]


@pytest.mark.parametrize("task", ["coco", "ade20k"])
@pytest.mark.parametrize(("memory", "precision"), CASES)
def test_no_tensor_is_on_the_wrong_device_in_other_tasks(memory, precision, task, root, process):
    runs(root, process, task, precision, memory)


@pytest.mark.parametrize("task", SMALL)
def test_the_losses_are_the_cpus(task, root, process):
    found = process.submit(trained, root, task, {}).result()
    recipe, model, data, _ = parts(root, task, {})
    for (numbers, _), expected in zip(found, steps(Training(model, data, recipe, CPU)), strict=True):
        assert numbers == pytest.approx(expected, rel=1e-4)


# How often it waits

#: The waits of a step of two images: in this package, and in all. Torchvision's are for numbers of boxes and anchors.
STEP = {"voc": (1, 11), "coco": (20, 46), "ade20k": (1, 1)}
#: ... and of the evaluation of one image.
IMAGE = {"voc": (3, 13), "coco": (10, 17), "ade20k": (1, 1)}


def held(lines, expected):
    """That there are as many waits as expected, or fewer of torchvision; otherwise the lines are shown."""
    lines = Counter({key: n for key, n in lines.items() if "anchor_utils" not in key[0]})  # once in a model's life
    ours = sum(n for (line, _), n in lines.items() if line.startswith("e3va_lite/"))
    listed = "\n".join(f"{n:5d}  {line}  {what}" for (line, what), n in sorted(lines.items()))
    assert ours == expected[0] and lines.total() <= expected[1], f"{ours} and {lines.total()} waits:\n{listed}"


@pytest.mark.parametrize("task", STEP)
def test_a_step_waits_no_more_often_than_it_has_to(task, root, process):
    for _, lines in process.submit(trained, root, task, {}).result():  # the first, of a new size, no more than the next
        held(lines, STEP[task])


def test_all_batches_of_a_step_are_waited_for_once(root, process):
    for _, lines in process.submit(trained, root, "ade20k", {"accumulate": 3}).result():
        held(lines, (1, 1))


def test_a_step_in_float16_does_not_wait_for_the_scaler(root, process):
    """The fused AdamW skips an update by itself where a gradient is infinite."""
    for _, lines in process.submit(trained, root, "ade20k", {"precision": "float16"}).result():
        held(lines, (1, 1))


def test_rotary_positions_are_not_copied_for_every_block(root, process):
    changes = {"backbone": "vit_small_patch16_dinov3"}
    held(process.submit(trained, root, "voc", changes).result()[1][1], STEP["voc"])


@pytest.mark.parametrize("task", IMAGE)
def test_an_evaluation_waits_no_more_often_than_it_has_to(task, root, process):
    result, lines = process.submit(evaluated, root, task).result()
    assert result
    held(lines, [IMAGES * n for n in IMAGE[task]])


# The pretence itself


def mistakes():
    """What goes wrong on a card, by name: the error, or the waits."""
    results = {}

    def attempt(name, function):
        waits.lines.clear()
        try:
            function()
            results[name] = [what for (_, what), n in waits.lines.items() for _ in range(n)]
        except (RuntimeError, TypeError) as error:
            results[name] = str(error)

    def masked():
        (x.clone().requires_grad_() * 1)[mask].sum().backward()

    with pretend_cuda() as waits:
        x, mask = torch.rand(3, 4, device=CUDA), torch.ones(3, dtype=torch.bool, device=CUDA)
        on_cpu = torch.rand(3, 4)
        assert x.device == CUDA and x.is_cuda and (x + 1).device == CUDA and x.cpu().device == CPU
        attempt("sum of two devices", lambda: x + on_cpu)
        attempt("cat of two devices", lambda: torch.cat([on_cpu, x]))
        attempt("number on the cpu", lambda: x + torch.tensor(2.0))
        attempt("numpy", x.numpy)
        attempt("no kernel", x.to_mkldnn)
        attempt("item", lambda: x.sum().item())
        attempt("if", lambda: bool((x > 0).all()))
        attempt("tolist", x.tolist)
        attempt("index on the cpu", lambda: x[torch.tensor([0, 1])])
        attempt("index", lambda: x[torch.arange(2, device=CUDA)])
        attempt("mask", masked)  # forward and backward
        attempt("filled mask", lambda: x.clone().__setitem__(mask, 0.0))
        attempt("from the cpu", lambda: on_cpu.to(CUDA))
        attempt("from pageable memory", lambda: on_cpu.to(CUDA, non_blocking=True))
        attempt("from pinned memory", lambda: on_cpu.pin_memory().to(CUDA, non_blocking=True))
        attempt("constant", lambda: torch.tensor([1.0, 2.0], device=CUDA))
        attempt("made there", lambda: torch.full((2,), 1.0, device=CUDA))
        attempt("sized by numbers", lambda: (x > 0).nonzero())
        attempt("of known size", lambda: (x > 0).nonzero_static(size=5))
        with torch.autocast("cuda", torch.float16):
            results["types"] = [(x @ x.T).dtype, x.half().sum().dtype]
    return results


def test_the_pretence_sees_what_a_card_would(process):
    found = process.submit(mistakes).result()
    assert "on cuda:0 and a tensor (3, 4) on the cpu" in found.pop("sum of two devices")
    assert "on cuda:0 and a tensor (3, 4) on the cpu" in found.pop("cat of two devices")
    assert found.pop("numpy") == "numpy() of a tensor on CUDA"
    assert "has no kernel on CUDA" in found.pop("no kernel") or torch.version.cuda is None
    assert found.pop("types") == [torch.float16, torch.float32]  # CUDA's lists; a CPU's sum is float16
    assert found == {
        "number on the cpu": [],
        "item": ["number"],
        "if": ["number"],
        "tolist": ["copy to the CPU"],
        "index on the cpu": ["copy of an index to the card"],
        "index": [],
        "mask": ["boolean mask"] * 2,
        "filled mask": [],
        "from the cpu": ["copy to the card"],
        "from pageable memory": ["copy to the card"],
        "from pinned memory": [],
        "constant": ["copy to the card"],
        "made there": [],
        "sized by numbers": ["nonzero"],
        "of known size": [],
    }
