"""What ten images teach, a model must find again in them: model, loss, loop and metric together, for each task."""

import pytest
import torch

from e3va_lite.datasets.shapes import write_scenes
from e3va_lite.engine import build_model, evaluate, fit, machine
from e3va_lite.recipe import load_recipe
from e3va_lite.tasks import task_module

CPU = torch.device("cpu")
IMAGES, SIZE = 10, 160
TASKS = {
    "voc": ({"recipe": "shapes", "steps": 200, "batch": 5}, {"ap50_all_point": 0.9}),
}


@pytest.mark.evidence
@pytest.mark.parametrize("method", ["e3va", "full"])
@pytest.mark.parametrize("task", TASKS)
def test_ten_images_are_learnt_by_heart(task, method, results, tmp_path):
    changes, goals = TASKS[task]
    write_scenes(tmp_path, task, train=IMAGES, val=1, seed=0, size=SIZE)
    recipe = load_recipe(changes["recipe"], {**changes, "method": method} | {"recipe": None})
    split = recipe.train_split
    train_set = task_module(task).dataset(recipe, tmp_path, split, recipe.classes, train=True)
    model = build_model(recipe, len(train_set.classes))
    losses = fit(model, train_set, recipe, CPU)
    metrics = evaluate(model, task_module(task).dataset(recipe, tmp_path, split, train_set.classes), recipe, CPU)
    results("by-heart", f"{task}, {method}", {"images": IMAGES, "pixels": SIZE, "steps": len(losses), **metrics})
    for name, goal in goals.items():
        assert metrics[name] > goal, metrics
