"""Train, keep and evaluate a detector."""

import csv
import json
import math
import platform
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from .datasets.voc import VOCDetection
from .errors import InputError
from .methods import build_backbone
from .metrics import AveragePrecision, average_precision
from .recipe import Recipe, load_recipe, save_recipe
from .tasks.detection import build_retinanet
from .weights import fingerprint

MODEL_FILE, RECIPE_FILE, RUN_FILE = "model.safetensors", "recipe.yaml", "run.json"


def build_detector(recipe: Recipe, num_classes: int) -> nn.Module:
    """The recipe's RetinaNet, new, on the CPU."""
    torch.manual_seed(recipe.seed)
    backbone = build_backbone(
        recipe.method,
        recipe.backbone,
        recipe.pretrained and recipe.weights is None,
        recipe.weights,
        stages=tuple(recipe.stages),
        **recipe.options,
    )
    return build_retinanet(
        backbone,
        num_classes,
        min_size=recipe.min_size,
        max_size=recipe.max_size,
        fpn_channels=recipe.fpn_channels,
        anchor_base=recipe.anchor_base,
    )


def build_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW on what is trainable; no decay on norms and relative-position tables, as is usual for Swin."""
    norms = {id(p) for m in model.modules() if isinstance(m, nn.LayerNorm) for p in m.parameters(recurse=False)}
    groups: dict[bool, list[Tensor]] = {True: [], False: []}
    for name, p in model.named_parameters():
        if p.requires_grad:
            groups[id(p) not in norms and "relative_position_bias_table" not in name].append(p)
    return torch.optim.AdamW(
        [{"params": groups[True]}, {"params": groups[False], "weight_decay": 0.0}],
        lr=recipe.lr,
        betas=tuple(recipe.betas),
        weight_decay=recipe.weight_decay,
    )


def rate(recipe: Recipe, step: int, steps_per_epoch: int) -> float:
    """What the learning rate is multiplied by at a step (from 0): linear warm-up times the schedule."""
    warm = min(1.0, (step + 1) / (recipe.warmup + 1))
    if recipe.schedule == "cosine":
        return warm * (0.5 + 0.5 * math.cos(math.pi * step / (recipe.epochs * steps_per_epoch)))
    return warm * 0.1 ** sum(step >= milestone * steps_per_epoch for milestone in recipe.milestones)


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, images, targets, clip: float | None) -> Tensor:
    """Forward, backward and update; returns the loss, a scalar without graph."""
    loss = sum(model(images, targets).values())
    optimizer.zero_grad()
    loss.backward()
    if clip is not None:
        nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], clip)
    optimizer.step()
    return loss.detach()


def batches(dataset: Dataset, recipe: Recipe, device: torch.device) -> Iterator[tuple[list[Tensor], list[dict]]]:
    """One pass in random order, half of the images mirrored; the order follows from torch's random state."""
    loader = DataLoader(
        dataset, recipe.batch, shuffle=True, drop_last=len(dataset) > recipe.batch, num_workers=recipe.workers,
        collate_fn=list,
    )  # fmt: skip
    for items in loader:
        mirrored = [mirror(*item) if torch.rand(()) < 0.5 else item for item in items]
        yield [image.to(device) for image, _ in mirrored], [_to(_clear(target), device) for _, target in mirrored]


def _clear(target: dict) -> dict:
    """Without the ``difficult`` objects: the metric does not ask for them, and training does not teach them."""
    keep = ~target["difficult"]
    return {**target, **{key: target[key][keep] for key in ("boxes", "labels", "difficult")}}


def mirror(image: Tensor, target: dict) -> tuple[Tensor, dict]:
    """Left and right exchanged: image (3, H, W) and boxes (N, 4)."""
    width = image.shape[-1]
    boxes = target["boxes"]
    return image.flip(-1), {
        **target,
        "boxes": torch.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], 1),
    }


def fit(
    model: nn.Module, dataset: Dataset, recipe: Recipe, device: torch.device, log: Path | None = None
) -> list[float]:
    """Train for the recipe's epochs; the losses of all steps, and a line per step in the CSV file ``log``.

    Raises:
        InputError: When a loss is not finite.
    """
    torch.manual_seed(recipe.seed)
    model.to(device).train()
    optimizer = build_optimizer(model, recipe)
    steps_per_epoch = max(1, len(dataset) // recipe.batch)
    losses: list[float] = []
    with tqdm(total=recipe.epochs * steps_per_epoch, desc=f"train {recipe.method}", unit="step") as bar:
        for _ in range(recipe.epochs):
            for images, targets in batches(dataset, recipe, device):
                factor = rate(recipe, len(losses), steps_per_epoch)
                for group in optimizer.param_groups:
                    group["lr"] = recipe.lr * factor
                loss = train_step(model, optimizer, images, targets, recipe.clip).item()
                if not math.isfinite(loss):
                    names = ", ".join(target["image_id"] for target in targets)
                    raise InputError(
                        f"the loss is {loss} at step {len(losses) + 1} (images {names}): lower lr={recipe.lr}."
                    )
                losses.append(loss)
                bar.update()
                bar.set_postfix(loss=f"{sum(losses[-20:]) / len(losses[-20:]):.3f}")
    if log is not None:
        with log.open("w", newline="") as file:
            csv.writer(file).writerows([("step", "loss"), *enumerate(losses, start=1)])
    return losses


@torch.inference_mode()
def evaluate(model: nn.Module, dataset: Dataset, recipe: Recipe, device: torch.device) -> AveragePrecision:
    """AP at IoU .5 of a trained detector on a dataset."""
    model.to(device).eval()
    loader = DataLoader(dataset, recipe.batch, num_workers=recipe.workers, collate_fn=list)
    predictions, truths = [], []
    for items in tqdm(loader, desc=f"eval {recipe.method}", unit="batch"):
        results = model([image.to(device) for image, _ in items])
        predictions += [_to(result, torch.device("cpu")) for result in results]
        truths += [target for _, target in items]
    return average_precision(predictions, truths, len(dataset.classes))


def train_voc(root: Path, recipe: Recipe, run: Path, device: torch.device, strict: bool, overwrite: bool) -> dict:
    """Train on a VOC-shaped folder, evaluate, and keep model, recipe, losses and result in the folder ``run``.

    Raises:
        InputError: For anything wrong with the data, the recipe or the folder, before training starts where it can be
            known then.
    """
    _free(run, overwrite)
    train_set = VOCDetection(root, recipe.train_split, recipe.classes, strict=strict)
    eval_set = VOCDetection(root, recipe.eval_split, train_set.classes, strict=strict)
    model = build_detector(recipe, len(train_set.classes))
    weights = fingerprint(model.backbone.body.swin)
    run.mkdir(parents=True, exist_ok=True)
    save_recipe(recipe, run / RECIPE_FILE)
    start = time.monotonic()
    fit(model, train_set, recipe, device, run / "losses.csv")
    seconds = time.monotonic() - start
    save_model(model, run / MODEL_FILE)
    result = {
        "root": str(root),
        "classes": list(train_set.classes),
        "weights": weights,
        "images": {recipe.train_split: len(train_set), recipe.eval_split: len(eval_set)},
        "train_seconds": round(seconds, 1),
        "ap": describe(evaluate(model, eval_set, recipe, device), train_set.classes, recipe.eval_split),
        "recipe": asdict(recipe),
        **machine(device),
    }
    (run / RUN_FILE).write_text(json.dumps(result, indent=2) + "\n")
    return result


def eval_voc(run: Path, root: Path | None, split: str | None, device: torch.device, strict: bool) -> dict:
    """Evaluate the model of a run, on its own data or another VOC-shaped folder with the same classes.

    Raises:
        InputError: For a folder that is no run, or a model that does not fit its recipe.
    """
    for name in (MODEL_FILE, RECIPE_FILE, RUN_FILE):
        if not (run / name).is_file():
            raise InputError(
                f"'{run}' is not a finished run, it has no {name}: give the folder that 'e3va train' wrote."
            )
    recipe = load_recipe(str(run / RECIPE_FILE))
    trained = json.loads((run / RUN_FILE).read_text())
    split = split or recipe.eval_split
    dataset = VOCDetection(root or Path(trained["root"]), split, trained["classes"], strict=strict)
    model = build_detector(recipe, len(trained["classes"]))
    if fingerprint(model.backbone.body.swin) != trained["weights"]:
        raise InputError(f"the pretrained weights of {recipe.backbone} are not those that '{run}' was trained with.")
    load_model(model, run / MODEL_FILE)
    return {"run": str(run), "ap": describe(evaluate(model, dataset, recipe, device), trained["classes"], split)}


def save_model(model: nn.Module, path: Path) -> None:
    """Keep what training can change: all of the state but the frozen parameters."""
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    state = {name: t.detach().cpu().contiguous() for name, t in model.state_dict().items() if name not in frozen}
    temporary = path.with_suffix(".tmp")
    save_file(state, temporary)
    temporary.replace(path)  # never a half-written model under the final name


def load_model(model: nn.Module, path: Path) -> None:
    """Put what :func:`save_model` kept into a new model with the same pretrained weights."""
    try:
        with safe_open(path, "pt") as file:
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise InputError(f"'{path}' cannot be read ({error}): the file is damaged.") from error
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    wanted = {name: t.shape for name, t in model.state_dict().items() if name not in frozen}
    wrong = [name for name in {*wanted, *state} if name not in state or wanted.get(name) != state[name].shape]
    if wrong:
        raise InputError(
            f"'{path}' does not fit its recipe, first at '{min(wrong)}': was one of the two files replaced?"
        )
    model.load_state_dict(state, strict=False)


def describe(ap: AveragePrecision, classes: list[str], split: str) -> dict:
    """AP at IoU .5 as plain numbers; null for a class that the split does not show."""

    def plain(values) -> dict:
        return {name: None if math.isnan(x) else round(float(x), 4) for name, x in zip(classes, values, strict=True)}

    return {
        "split": split,
        "ap50_11_point": round(ap.mean_eleven_point, 4),
        "ap50_all_point": round(ap.mean_all_point, 4),
        "by_class_11_point": plain(ap.eleven_point),
        "by_class_all_point": plain(ap.all_point),
    }


def machine(device: torch.device) -> dict:
    """Where and when a number was measured."""
    import timm
    import torchvision

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU"
    return {
        "device": name if device.type == "cuda" else f"{name}, {torch.get_num_threads()} threads",
        "precision": "float32",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "timm": timm.__version__,
        },
        "date": time.strftime("%Y-%m-%d"),
    }


def _free(folder: Path, overwrite: bool) -> None:
    """Make sure that a run's folder can be written: it is new, or its replacement was asked for."""
    if folder.exists():
        if not overwrite:
            raise InputError(f"'{folder}' exists: choose another --out or pass --overwrite.")
        if any(folder.iterdir()) and not (folder / RECIPE_FILE).is_file():
            raise InputError(f"'{folder}' is not a run and will not be overwritten: choose another --out.")
        shutil.rmtree(folder)


def _to(target: dict, device: torch.device) -> dict:
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in target.items()}
