"""Evidence of what a highway costs beside the floor, a frozen backbone: measured in turn, run by hand.

pytest -m evidence tests/analysis/test_speed.py --results data/results
"""

import json
import time
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

from e3va_lite import build_backbone
from e3va_lite.analysis.cost import time_table
from e3va_lite.analysis.plots import growth_figure
from e3va_lite.backbones import swin
from e3va_lite.datasets.shapes import write_scenes
from e3va_lite.recipes.schema import load_recipe
from e3va_lite.tasks import voc
from e3va_lite.training.engine import build_model, fit, machine

pytestmark = pytest.mark.evidence

ROUNDS = 12
CPU = torch.device("cpu")
SETTING = {"rounds": ROUNDS, **machine(load_recipe("voc"), CPU)}
WAYS = {
    "full": ("full", {}),
    "fixed": ("fixed", {}),
    **{
        f"e3va:memory={memory}": ("e3va", {"memory": memory})
        for memory in ("store", "compress", "recompute", "reference")
    },
}


def in_turn(calls, rounds=ROUNDS):
    """Seconds by name, (rounds,); every round begins one further, and the first does not count."""
    names, seconds = list(calls), {name: [] for name in calls}
    for number in range(rounds + 1):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            start = time.perf_counter()
            calls[name]()
            seconds[name].append(time.perf_counter() - start)
    return {name: np.array(values[1:]) for name, values in seconds.items()}


def shares(seconds, of):
    """Medians and quartiles of the shares, round by round."""
    ratios = {name: values / seconds[of] for name, values in seconds.items()}
    return {
        name: {
            "seconds": round(float(np.median(seconds[name])), 4),
            f"of_{of}": round(float(np.median(values)), 4),
            "quartiles": [round(float(q), 4) for q in np.quantile(values, (0.25, 0.75))],
        }
        for name, values in ratios.items()
    }


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "swin_base_patch4_window7_224"])
@pytest.mark.parametrize(("batch", "size"), [(4, 224), (1, 512)])
def test_the_frozen_forward_pass(name, batch, size, results):
    """Four maps for a neck: the stream against timm's own forward pass, both without gradients."""
    ours = build_backbone("fixed", name).eval()
    theirs = timm.create_model(name, features_only=True, img_size=size, out_indices=(0, 1, 2, 3)).eval()
    images = torch.randn(batch, 3, size, size)
    with torch.no_grad():
        found = shares(in_turn({"timm": lambda: theirs(images), "stream": lambda: ours(images)}), "timm")
    results("speed-stream", f"{name}, {batch} x {size}x{size}", {**found, **SETTING})
    assert found["stream"]["of_timm"] < 0.95


def test_a_backbone_alone(results):
    """Swin-T at 224x224, batch 4: forward pass, and backward pass of a given gradient where there is one."""
    images = torch.randn(4, 3, 224, 224)
    name = "swin_tiny_patch4_window7_224"
    models = {way: build_backbone(method, name, **options).train() for way, (method, options) in WAYS.items()}
    gradients = [torch.randn_like(m) for m in models["fixed"](images)]

    def step(model):
        maps = model(images)
        if maps[0].requires_grad:
            torch.autograd.backward(maps, gradients)
            model.zero_grad()

    found = shares(in_turn({way: lambda model=model: step(model) for way, model in models.items()}), "fixed")
    results("speed-backbone", f"{name}, 4 x 224x224", {**found, **SETTING})


def test_what_eight_bits_do_to_gradients(results, tmp_path):
    """RetinaNet after 60 steps of training: the gradient of every tensor, with exact taps and with packed ones."""
    write_scenes(tmp_path, "voc", train=40, val=1, seed=0, size=160)
    recipe = load_recipe("shapes", {"steps": 60, "options": {"memory": "store"}, "workers": 0})
    train_set = voc.dataset(recipe, tmp_path, recipe.train_split, recipe.classes, train=True)
    model = build_model(recipe, len(train_set.classes))
    fit(model, train_set, recipe, CPU)
    model.train()
    images, targets = zip(*(train_set[i] for i in range(8)), strict=True)
    found = {}
    for memory in ("store", "compress"):
        model.backbone.body.memory = memory
        model.zero_grad()
        sum(model(list(images), list(targets)).values()).backward()
        found[memory] = {n: p.grad.clone() for n, p in model.backbone.named_parameters() if p.grad is not None}
    errors = {
        name.removeprefix("body."): float((found["compress"][name] - exact).norm() / exact.norm())
        for name, exact in found["store"].items()
        if name.startswith("body.")
    }
    values = list(errors.values())
    summary = {"median": float(np.median(values)), "largest": max(values), "tensors": len(values)}
    results("compress-gradients", "relative error per tensor", {**summary, "by_tensor": errors, **machine(recipe, CPU)})
    assert max(values) < 0.05


GROWTH = {
    "blocks in stage 3": [2, 6, 12, 18, 24],
    "image side, pixels": [96, 160, 224, 288, 352],
    "images": [1, 2, 4, 6, 8],
}
METHODS = ["full", "fixed", "adapter", "e3va:memory=store", "e3va:memory=recompute"]


@pytest.mark.parametrize("axis", GROWTH)
def test_growth(axis, results, request, monkeypatch):
    """RetinaNet on a Swin of Swin-T's widths: time and peak over depth, image size and batch."""
    rows = []
    for value in GROWTH[axis]:
        setting = {"blocks in stage 3": 6, "image side, pixels": 160, "images": 2, axis: value}
        depths = (2, 2, setting["blocks in stage 3"], 2)
        shape = {"embed_dim": 96, "depths": depths, "num_heads": (3, 6, 12, 24), "window_size": 7, "weight_init": "jax"}
        monkeypatch.setitem(swin.MINIATURES, "swin_nano", shape)
        recipe = load_recipe("voc-nano", {"pretrained": False, "batch": setting["images"]})
        side = setting["image side, pixels"]
        table = time_table(recipe, METHODS, (side, side), CPU, rounds=6)
        keys = ("method", "step", "quartiles", "peak", "of_full", "of_fixed")
        rows += [{axis: value, **{key: row[key] for key in keys}} for row in table["rows"]]
    results("growth", axis, {"rows": rows, "others": setting, **machine(recipe, CPU)})
    if folder := request.config.getoption("--results"):
        growth_figure(json.loads(Path(folder, "growth.json").read_text())).savefig(Path(folder, "growth.png"))
