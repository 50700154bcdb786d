"""The paper's models themselves: Swin-B and Swin-L, at the paper's image sizes."""

import json
import resource
import subprocess
import sys
import time

import pytest
import torch

from e3va_lite.recipes.schema import load_recipe
from e3va_lite.training.engine import Training, build_model, machine

LARGE, BASE = "swin_large_patch4_window7_224", "swin_base_patch4_window7_224"
# recipe, backbone, classes, height and width of a training image, trainable parameters of the backbone (Tables 1 and 2)
MODELS = {
    "RetinaNet, Swin-L": ("voc", LARGE, 20, (600, 1000), 1_792_128),
    "UPerNet, Swin-L": ("ade20k", LARGE, 150, (512, 512), 1_792_512),
    "Cascade Mask R-CNN, Swin-B": ("coco", BASE, 80, (800, 1333), 1_195_008),
    "Cascade Mask R-CNN, Swin-L": ("coco", LARGE, 80, (800, 1333), 1_792_512),
}


def recipe_of(name):
    recipe, backbone, *_ = MODELS[name]
    return load_recipe(recipe, {"backbone": backbone, "pretrained": False, "batch": 1, "steps": 2, "workers": 0})


@pytest.mark.parametrize("name", MODELS)
def test_builds_on_the_meta_device(name):
    if name.startswith("UPerNet"):
        pytest.importorskip("cv2", exc_type=ImportError)
    with torch.device("meta"):
        model = build_model(recipe_of(name), MODELS[name][2])
    assert all(p.is_meta for p in model.parameters())
    body = model.backbone.body
    assert sum(p.numel() for p in body.parameters() if p.requires_grad) == MODELS[name][4]


class OneImage:
    """A random image of the paper's size with two objects, for every task."""

    def __init__(self, classes, size):
        self.classes, self.size = [str(c) for c in range(classes)], size

    def __len__(self):
        return 1

    def __getitem__(self, index):
        height, width = self.size
        boxes = torch.tensor([[0.1, 0.2, 0.5, 0.8], [0.6, 0.1, 0.9, 0.4]]) * torch.tensor([width, height] * 2)
        masks = torch.zeros(2, height, width, dtype=torch.uint8)
        for mask, (x1, y1, x2, y2) in zip(masks, boxes.int().tolist(), strict=True):
            mask[y1:y2, x1:x2] = 1
        target = {"boxes": boxes, "labels": torch.tensor([1, 2]), "masks": masks, "mask": masks.sum(0).long()}
        return torch.rand(3, height, width), {**target, "image_id": 1, "file": "random"}


def steps_of(name):
    """Two training steps: the optimiser's state is there in the second. Printed as JSON: seconds and peak."""
    _, _, classes, size, _ = MODELS[name]
    recipe = recipe_of(name)
    training = Training(build_model(recipe, classes), OneImage(classes, size), recipe, torch.device("cpu"))
    seconds = []
    for _ in range(2):
        start = time.monotonic()
        batch = [next(training.batches())]
        training.backward(batch)
        numbers = training.update(batch)
        seconds.append(round(time.monotonic() - start, 1))
    losses = [value for name, value in numbers.items() if name != "gradient_norm"]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    measured = {"step_seconds": seconds, "peak_process_bytes": peak, "loss": sum(losses)}
    print(json.dumps({"model": name, **measured, **machine(recipe, torch.device("cpu"))}))


@pytest.mark.evidence
@pytest.mark.parametrize("name", MODELS)
def test_a_training_step_fits_in_24_gb(name, results):
    done = subprocess.run([sys.executable, __file__, name], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout)
    results("paper-models", name, measured)
    assert measured["peak_process_bytes"] < 24e9
    assert torch.isfinite(torch.tensor(measured["loss"]))


if __name__ == "__main__":
    steps_of(sys.argv[1])
