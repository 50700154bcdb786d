"""What ten images teach, a model must find again in them: model, loss, loop and metric together, for each task."""

import time

import pytest
import torch

from e3va_lite.datasets.shapes import write_scenes
from e3va_lite.recipes.schema import load_recipe
from e3va_lite.tasks.registry import task_module
from e3va_lite.training.engine import build_model, evaluate, fit, machine

CPU = torch.device("cpu")
IMAGES, SIZE = 10, 160
# recipe, what differs from it, whether images are augmented (mirrored, that is), and the goals
TASKS = {
    "voc": ("shapes", {"steps": 300, "batch": 5}, True, {"ap50_11_point": 0.9, "ap50_all_point": 0.9}),
    "coco": (
        "coco-nano",
        {"steps": 300, "batch": 2, "lr": 2e-3, "clip": None, "min_sizes": [224], "min_size": 224, "max_size": 224},
        True,
        {"box_ap50": 0.9, "mask_ap50": 0.8},
    ),
    "ade20k": (
        "ade20k-nano",
        {"steps": 400, "batch": 5, "scale": [SIZE, SIZE], "crop": SIZE, "weight_decay": 0.0},
        False,
        {"miou": 0.9},
    ),
}


@pytest.mark.evidence
@pytest.mark.parametrize("method", ["e3va", "full"])
@pytest.mark.parametrize("task", TASKS)
def test_ten_images_are_learnt_by_heart(task, method, results, tmp_path):
    name, changes, augmented, goals = TASKS[task]
    write_scenes(tmp_path, task, train=IMAGES, val=1, seed=0, size=SIZE)
    recipe = load_recipe(name, {**changes, "method": method})
    module, split = task_module(task), recipe.train_split
    train_set = module.dataset(recipe, tmp_path, split, recipe.classes, train=augmented)
    model = build_model(recipe, len(train_set.classes))
    start = time.monotonic()
    losses = fit(model, train_set, recipe, CPU)
    seconds = round(time.monotonic() - start, 1)
    metrics = evaluate(model, module.dataset(recipe, tmp_path, split, train_set.classes), recipe, CPU)
    about = {"images": IMAGES, "pixels": SIZE, "recipe": name, "changes": changes, "steps": len(losses)}
    about |= {"train_seconds": seconds, "seed": recipe.seed}
    results("by-heart", f"{task}, {method}", {**metrics, **about, **machine(recipe, CPU)})
    for key, goal in goals.items():
        assert metrics[key] > goal, metrics
