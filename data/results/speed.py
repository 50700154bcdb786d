"""Measures what a highway costs beside a frozen backbone, the least that is possible; models take turns.

Writes speed-stream.json, speed-backbone.json, compress-gradients.json, growth.json and growth.png beside this file:

    python data/results/speed.py [stream] [backbone] [gradients] [growth]
"""

import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import seaborn as sns
import timm
import torch
from matplotlib.figure import Figure

from e3va_lite import build_backbone
from e3va_lite.analysis.cost import time_table
from e3va_lite.analysis.plots import colour
from e3va_lite.backbones import swin
from e3va_lite.datasets.shapes import write_scenes
from e3va_lite.recipes.schema import load_recipe
from e3va_lite.tasks import voc
from e3va_lite.training.engine import build_model, fit, machine

ROUNDS = 12
CPU = torch.device("cpu")
SWIN_T, SWIN_B = "swin_tiny_patch4_window7_224", "swin_base_patch4_window7_224"
GROWTH = {
    "blocks in stage 3": [2, 6, 12, 18, 24],
    "image side, pixels": [96, 160, 224, 288, 352],
    "images": [1, 2, 4, 6, 8],
}


def shares(calls: dict, of: str) -> dict:
    """Median seconds of each call, and median and quartiles of its share of another's, round by round.

    Every round begins with another call, and the first round does not count.
    """
    names, seconds = list(calls), {name: [] for name in calls}
    for number in range(ROUNDS + 1):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            start = time.perf_counter()
            calls[name]()
            seconds[name].append(time.perf_counter() - start)
    ratios = {name: np.divide(values[1:], seconds[of][1:]) for name, values in seconds.items()}
    return {
        name: {
            "seconds": round(float(np.median(seconds[name][1:])), 4),
            f"of_{of}": round(float(np.median(values)), 4),
            "quartiles": [round(float(q), 4) for q in np.quantile(values, (0.25, 0.75))],
        }
        for name, values in ratios.items()
    }


def stream() -> dict:
    """The frozen forward pass, four maps for a neck, against timm's own; both without gradients."""
    found = {}
    for name in (SWIN_T, SWIN_B):
        for batch, size in ((4, 224), (1, 512)):
            ours = build_backbone("fixed", name).eval()
            theirs = timm.create_model(name, features_only=True, img_size=size, out_indices=(0, 1, 2, 3)).eval()
            images = torch.randn(batch, 3, size, size)
            with torch.no_grad():
                rows = shares(
                    {"timm": lambda m=theirs, x=images: m(x), "stream": lambda m=ours, x=images: m(x)}, "timm"
                )
            found[f"{name}, {batch} x {size}x{size}"] = {**rows, "rounds": ROUNDS, **machine(load_recipe("voc"), CPU)}
    return {"speed-stream": found}


def backbone() -> dict:
    """Swin-T at 224x224, batch 4: forward pass, and backward pass of a given gradient where there is one."""
    images = torch.randn(4, 3, 224, 224)
    models = {method: build_backbone(method, SWIN_T).train() for method in ("full", "fixed")}
    for memory in ("store", "compress", "recompute", "reference"):
        models[f"e3va:memory={memory}"] = build_backbone("e3va", SWIN_T, memory=memory).train()
    gradients = [torch.randn_like(m) for m in models["fixed"](images)]

    def step(model: torch.nn.Module) -> None:
        maps = model(images)
        if maps[0].requires_grad:
            torch.autograd.backward(maps, gradients)
            model.zero_grad()

    rows = shares({method: lambda model=model: step(model) for method, model in models.items()}, "fixed")
    return {
        "speed-backbone": {f"{SWIN_T}, 4 x 224x224": {**rows, "rounds": ROUNDS, **machine(load_recipe("voc"), CPU)}}
    }


def gradients() -> dict:
    """RetinaNet after 60 steps of training: the gradient of every tensor, with exact taps and with packed ones."""
    recipe = load_recipe("shapes", {"steps": 60, "options": {"memory": "store"}, "workers": 0})
    with tempfile.TemporaryDirectory() as folder:
        write_scenes(Path(folder), "voc", train=40, val=1, seed=0, size=160)
        train_set = voc.dataset(recipe, Path(folder), recipe.train_split, recipe.classes, train=True)
        model = build_model(recipe, len(train_set.classes))
        fit(model, train_set, recipe, CPU)
        images, targets = zip(*(train_set[i] for i in range(8)), strict=True)
    model.train()
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
    summary = {
        "median": float(np.median(list(errors.values()))),
        "largest": max(errors.values()),
        "tensors": len(errors),
    }
    summary |= {"by_tensor": errors, **machine(recipe, CPU)}
    return {"compress-gradients": {"relative error per tensor": summary}}


def growth() -> dict:
    """RetinaNet on a Swin of Swin-T's widths: time and peak over depth, image size and batch."""
    methods = ["full", "fixed", "adapter", "e3va:memory=store", "e3va:memory=recompute"]
    keys = ("method", "step", "quartiles", "peak", "of_full", "of_fixed")
    found = {}
    for axis, values in GROWTH.items():
        rows = []
        for value in values:
            setting = {"blocks in stage 3": 6, "image side, pixels": 160, "images": 2, axis: value}
            depths = (2, 2, setting["blocks in stage 3"], 2)
            shape = {"embed_dim": 96, "depths": depths, "num_heads": (3, 6, 12, 24), "window_size": 7}
            swin.MINIATURES["swin_nano"] = shape | {"weight_init": "jax"}
            recipe = load_recipe("voc-nano", {"pretrained": False, "batch": setting["images"]})
            side = setting["image side, pixels"]
            table = time_table(recipe, methods, (side, side), CPU, rounds=6)
            rows += [{axis: value, **{key: row[key] for key in keys}} for row in table["rows"]]
        found[axis] = {"rows": rows, "others": setting, **machine(recipe, CPU)}
    with sns.axes_style("white"), sns.plotting_context("notebook", font_scale=0.9):
        growth_figure(found).savefig(Path(__file__).with_name("growth.png"))
    return {"growth": found}


def growth_figure(measured: dict) -> Figure:
    """Peak and time of a training step over what grows."""
    panels = (("peak", "peak, MiB", 2**20), ("step", "seconds per step", 1))
    figure = Figure(figsize=(4.2 * len(measured), 6.4), dpi=150)
    axes = figure.subplots(2, len(measured), squeeze=False)
    for column, (label, table) in zip(axes.T, measured.items(), strict=True):
        names = [row["method"] for row in table["rows"]]
        styles = {"hue": names, "style": names, "palette": {name: colour(name) for name in names}, "markers": True}
        for axis, (key, title, unit) in zip(column, panels, strict=True):
            x, y = ([row[of] / by for row in table["rows"]] for of, by in ((label, 1), (key, unit)))
            sns.lineplot(x=x, y=y, **styles, legend=axis is axes[0, 0], ax=axis)
            axis.set(xticks=sorted(set(x)), ylabel=title)
            axis.set_ylim(0)
            sns.despine(ax=axis)
        column[1].set_xlabel(label)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    axes[0, 0].get_legend().remove()
    figure.legend(handles, labels, loc="upper center", ncols=len(labels), frameon=False)
    figure.text(0.01, 0.01, f"{table['device']}, {table['precision']}, {table['date']}.", fontsize=8, color="0.4")
    figure.tight_layout(rect=(0, 0.02, 1, 0.95))
    return figure


if __name__ == "__main__":
    parts = {function.__name__: function for function in (stream, backbone, gradients, growth)}
    for part in sys.argv[1:] or parts:
        torch.manual_seed(0)
        for name, rows in parts[part]().items():
            file = Path(__file__).with_name(f"{name}.json")
            file.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
