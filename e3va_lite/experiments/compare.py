"""The main job: one small detection task, fine-tuned with several methods, in one table.

Accuracy comes from training each method with the same recipe. Memory and time come from one and the same batch
afterwards; the steps of all methods are timed in turn, so that their ratios survive a noisy machine.
"""

import statistics
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch.utils.data import Dataset

from ..analysis.cost import interleaved_seconds, median_share, share, with_method
from ..analysis.text_table import text_table
from ..analysis.training_step import Step
from ..backbones.base import trainable_parameters
from ..backbones.weights import fingerprint
from ..datasets.shapes import VERSION, write_scenes
from ..recipes.schema import Recipe
from ..tasks import voc
from ..training.engine import build_model, evaluate, fit, machine
from ..training.sampling import StepSampler, loader, to_device
from .jsonl import append_line, read_lines
from .significance import difference, noise

METHODS = ("fixed", "adapter", "e3va", "full")
TRAIN_IMAGES, VAL_IMAGES, DATA_SEED = 520, 160, 0
ROUNDS = 8  # timed steps per method


def compare(
    recipe: Recipe,
    methods: tuple[str, ...],
    seeds: int,
    root: Path | None,
    data: Path,
    partial: Path,
    device: torch.device,
) -> dict:
    """Train every method on one detection task and measure what it costs.

    Every finished run becomes a line of the file ``partial``. A comparison that was cut off goes on from there: runs of
    the same recipe on the same data, from the same weights, are not repeated.

    Args:
        recipe: Everything but the method.
        methods: Names, each with options if wanted: ``"e3va"``, ``"fixed:fpn_norm=trainable"``.
        seeds: How many training seeds; the data stay the same.
        root: A VOC-shaped folder, its splits and classes as the recipe says. Without: generated scenes.
        data: Folder for the generated scenes; made where missing.
        partial: JSON lines of finished runs; to be removed when the result is safe.
        device: Where to run.

    Returns:
        ``{"rows": [{"method", "ap50", "ap50_by_seed", "trainable", "peak_bytes", "step_seconds", ...}, ...], ...}``;
        shares are relative to ``full`` where it is among the methods. ``differences`` holds, for more than one seed,
        the mean AP of the last method minus each other's, paired by seed, with its 95 % interval; the noise is that of
        all methods, see :func:`.significance.noise`.

    Raises:
        InputError: For anything wrong with methods, options or data.
    """
    recipes = {spec: with_method(recipe, spec) for spec in methods}
    for spec_recipe in recipes.values():
        build_model(spec_recipe, num_classes=1)  # a wrong option is known now, not in minutes
    source = root.resolve().name if root else f"generated scenes, version {VERSION}, seed {DATA_SEED}"
    if root is None:
        write_scenes(data, "voc", TRAIN_IMAGES, VAL_IMAGES, seed=DATA_SEED, size=recipe.max_size)
    train_set = voc.dataset(recipe, root or data, recipe.train_split, recipe.classes, train=True)
    val_set = voc.dataset(recipe, root or data, recipe.eval_split, train_set.classes)
    num_classes = len(train_set.classes)
    task = f"{source}: {len(train_set)} images for training, {len(val_set)} to evaluate, AP at IoU .5 over all points"
    ap: dict[str, list[float]] = {spec: [] for spec in methods}
    known = read_lines(partial)
    for seed in range(recipe.seed, recipe.seed + seeds):
        for spec in methods:  # methods inside seeds: after each seed all of them stand side by side
            seeded = replace(recipes[spec], seed=seed)
            model = build_model(seeded, num_classes)
            weights = fingerprint(model.backbone.body.backbone)
            run = {"task": task, "recipe": asdict(seeded), "weights": weights}
            done = next((line["ap50"] for line in known if line.items() >= run.items()), None)
            if done is None:
                fit(model, train_set, seeded, device)
                done = evaluate(model, val_set, seeded, device)["ap50_all_point"]
                append_line(partial, {**run, "ap50": done})
            ap[spec].append(done)
    models = {spec: build_model(recipes[spec], num_classes).to(device) for spec in methods}
    cost = _cost(models, recipes, train_set, device)
    rows = []
    for spec in methods:
        row = {"method": spec, "ap50": round(statistics.fmean(ap[spec]), 4)}
        row |= {"ap50_by_seed": [round(x, 4) for x in ap[spec]]}
        rows.append(row | {"trainable": trainable_parameters(models[spec].backbone.body)} | cost[spec])
    if "full" in methods:
        for key in ("ap50", "trainable", "peak_bytes"):
            share(rows, key, f"{key}_of_full")
        whole = rows[methods.index("full")]["step_seconds_by_round"]
        for row in rows:
            row["step_seconds_of_full"] = median_share(row["step_seconds_by_round"], whole)
    differences = [] if seeds == 1 else [_difference(ap, methods[-1], other) for other in methods[:-1]]
    about = {"recipe": asdict(recipe), **machine(recipe, device)}
    return {"task": task, "rows": rows, "differences": differences, **about}


def _cost(models: dict, recipes: dict, dataset: Dataset, device: torch.device) -> dict[str, dict]:
    """Peak bytes and seconds of one training step of each model, on the same batch."""
    recipe = next(iter(recipes.values()))
    batches = loader(dataset, StepSampler(len(dataset), recipe.batch, 1, recipe.seed, 0), recipe.seed, workers=0)
    images, targets = to_device(next(batches), device)
    steps = {spec: Step(recipes[spec], model, images, targets) for spec, model in models.items()}
    cost = {spec: {"peak_bytes": step.ledger().peak} for spec, step in steps.items()}
    for spec, phases in interleaved_seconds(steps, ROUNDS, device).items():
        cost[spec]["step_seconds"] = round(float(statistics.median(phases["step"])), 4)
        cost[spec]["step_seconds_by_round"] = [round(float(x), 4) for x in phases["step"]]
    return cost


def _difference(ap: dict[str, list[float]], method: str, other: str) -> dict:
    shared = noise({str(n): score for n, score in enumerate(scores)} for scores in ap.values())
    found = difference(ap[method], ap[other], shared)
    mean, *interval = (round(x, 4) for x in (found.mean, found.low, found.high))
    return {"method": method, "minus": other, "mean": mean, "interval95": interval}


def as_text(result: dict) -> str:
    """The table for a terminal."""

    def cell(row: dict, key: str, form: str, unit: int = 1) -> str:
        share = row.get(f"{key}_of_full")
        return format(row[key] / unit, form) + ("" if share is None else f" ({100 * share:.0f}%)")

    header = ["method", "AP at IoU .5", "trainable parameters", "peak memory, MiB", "seconds per step"]
    columns = (("ap50", ".3f"), ("trainable", ",.0f"), ("peak_bytes", ".0f", 2**20), ("step_seconds", ".3f"))
    rows = [[row["method"], *(cell(row, *column) for column in columns)] for row in result["rows"]]
    lines = [text_table(header, rows)]
    if "ap50_of_full" in result["rows"][0]:
        lines.append(
            "in brackets: share of full fine-tuning; trainable parameters of the backbone, neck and head not counted"
        )
    for d in result["differences"]:
        low, high = d["interval95"]
        lines.append(f"{d['method']} minus {d['minus']}: {d['mean']:+.3f} AP, 95% interval {low:+.3f} to {high:+.3f}")
    return "\n".join(lines)
