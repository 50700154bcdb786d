"""Pretraining of the small Swins: one loop for photographs and generated images, resumable to the step, and the card.

What is learned from is an *objective*, a module that joins a backbone with heads that are thrown away afterwards:

    objective.backbone                                    what is pretrained
    objective.batches(start, steps, batch, seed, device)  what the steps from ``start`` on are trained on
    objective.losses(*batch)                              its losses by name, which are added up
    objective.accuracy(seed, device)                      on images held out: one number, and entries for the card
    objective.card()                                      entries for the card: what was learned from

There are two, :class:`~.pretrain_photographs.PhotographObjective` and :class:`~.pretrain_shapes.GeneratedObjective`.
What stays is the backbone, saved as float16 with a card beside it.
"""

import json
import platform
import time
from pathlib import Path

import timm
import torch
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm

from ..backbones.weights import fingerprint
from ..datasets.photographs import read_photographs
from ..errors import InputError
from ..files import replacing
from ..methods.registry import build_backbone
from .pretrain_photographs import PhotographObjective, Teacher
from .pretrain_shapes import GeneratedObjective

SAVE_SECONDS = 60  # a state is written this often, and when the run is interrupted
EMA_DECAY = 0.999


def build_objective(settings: dict, cache: Path | None = None, workers: int = 0) -> nn.Module:
    """The objective that a run's settings ask for.

    Args:
        settings: See :func:`pretrain`.
        cache: A folder for decoded photographs.
        workers: Processes that draw generated images.

    Raises:
        InputError: If there is nothing to learn from, or photographs, teacher or backbone cannot be had.
    """
    if settings["generated"] == bool(settings["images"]):
        raise InputError(
            "pretraining needs something to learn from, and one kind of it: pass --images FOLDER for photographs, or "
            "--generated for generated silhouettes."
        )
    if settings["generated"] and settings["teacher"]:
        raise InputError("--teacher goes with photographs: pass --images FOLDER instead of --generated.")
    if settings["teacher_weights"] and not settings["teacher"]:
        raise InputError("--teacher-weights needs --teacher NAME: name the ViT that the weights are of.")
    torch.manual_seed(settings["seed"])
    backbone = build_backbone("full", settings["backbone"])
    if settings["generated"]:
        return GeneratedObjective(backbone, workers)
    teacher = Teacher(settings["teacher"], settings["teacher_weights"]) if settings["teacher"] else None
    sources = [read_photographs(folder, cache=cache) for folder in settings["images"]]
    return PhotographObjective(backbone, sources, settings["size"], teacher)


def pretrain(objective: nn.Module, settings: dict, out: Path, device: torch.device, overwrite: bool = False) -> dict:
    """Pretrain the objective's backbone; write ``out`` (``.safetensors``, float16) and its card beside it (``.json``).

    A run that was cut off goes on from ``out`` with ``.partial``.

    Args:
        objective: See :func:`build_objective`.
        settings: ``backbone``, ``steps``, ``batch``, ``lr``, ``seed`` and ``ema``: whether to keep an exponential
            moving average of the weights, too, and to write that where it answers better on held-out images. A run
            that was cut off goes on only with the settings, and the images, that it was begun with.

    Returns:
        The card.

    Raises:
        InputError: When ``out`` exists and ``overwrite`` is not set, or a run of other settings was cut off there.
    """
    own = {key: settings[key] for key in ("backbone", "steps", "batch", "lr", "seed", "ema")}
    name, steps, batch, lr, seed, ema = own.values()
    begun_with = {**objective.card(), "settings": own}
    if out.exists() and not overwrite:
        raise InputError(f"'{out}' exists: choose another --out or pass --overwrite.")
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_suffix(".partial")
    torch.manual_seed(seed)
    objective = objective.to(device)
    weights = {key: value for key, value in objective.named_parameters() if value.requires_grad}
    state = _read_state(partial, begun_with, weights) if partial.exists() else {"step": 0, "seconds": 0.0}
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in weights.values() if p.ndim > 1], "weight_decay": 0.05},
            {"params": [p for p in weights.values() if p.ndim <= 1], "weight_decay": 0.0},
        ],
        lr=lr,
    )
    warmup, cooldown = max(1, min(500, steps // 10)), max(1, steps // 3)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, 1, (steps - step) / cooldown)
    )
    average = {key: value.detach().clone() for key, value in weights.items()}
    if "weights" in state:
        objective.load_state_dict(state["weights"], strict=False)
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        average = {key: value.to(device) for key, value in state["average"].items()}
    start, began = state["step"], time.monotonic()

    def write_state(step: int) -> None:
        written = {"weights": weights, "average": average, "begun_with": begun_with, "step": step}
        written |= {"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
        with replacing(partial) as unfinished:
            torch.save(written | {"seconds": state["seconds"] + time.monotonic() - began}, unfinished)

    saved, done = time.monotonic(), start
    objective.train()
    bar = tqdm(objective.batches(start, steps, batch, seed, device), desc="pretrain", initial=start, total=steps)
    try:
        for items in bar:
            losses = objective.losses(*items)
            optimizer.zero_grad()
            sum(losses.values()).backward()
            nn.utils.clip_grad_norm_(weights.values(), 1.0)
            optimizer.step()
            schedule.step()
            done += 1
            with torch.no_grad():
                decay = min(EMA_DECAY, done / (done + 10))  # the first steps are soon forgotten
                torch._foreach_lerp_([*average.values()], [*weights.values()], 1 - decay)
            if done % 20 == 0:
                bar.set_postfix_str(", ".join(f"{key} {value.item():.3f}" for key, value in losses.items()))
            if time.monotonic() - saved > SAVE_SECONDS and done < steps:
                write_state(done)
                saved = time.monotonic()
    except KeyboardInterrupt:
        write_state(done)
        raise
    seconds = state["seconds"] + time.monotonic() - began

    candidates = [{key: value.detach().clone() for key, value in weights.items()}, *([average] if ema else [])]
    answers = []
    for candidate in candidates:
        objective.load_state_dict(candidate, strict=False)
        answers.append(objective.accuracy(seed, device))
    best = max(range(len(candidates)), key=lambda i: answers[i][0])  # of equals the first
    objective.load_state_dict(candidates[best], strict=False)
    backbone = objective.backbone.backbone
    save_file({key: value.half().contiguous().cpu() for key, value in backbone.state_dict().items()}, out)
    card = {
        "what": f"{name}, pretrained by e3va_lite",
        **begun_with,
        "images_seen": steps * batch,
        **answers[best][1],
        "weights_are_a_moving_average": best == 1,
        "parameters": sum(p.numel() for p in backbone.parameters()),
        "fingerprint": fingerprint(backbone.half().float()),
        "seconds": round(seconds),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()} CPU",
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "timm": timm.__version__},
        "date": time.strftime("%Y-%m-%d"),
    }
    out.with_suffix(".json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    partial.unlink(missing_ok=True)
    return card


def _read_state(partial: Path, wanted: dict, weights: dict) -> dict:
    """The state of a run that was cut off.

    Raises:
        InputError: If the file is damaged or is of a run with other settings, images or weights.
    """
    try:
        state = torch.load(partial, map_location="cpu", weights_only=True)
        begun, trained = state["begun_with"], state["weights"].keys()
    except Exception as error:  # arbitrary bytes make the reader raise nearly anything
        raise InputError(
            f"'{partial}', the state of a run that was cut off, cannot be read ({type(error).__name__}): remove it to "
            "start anew."
        ) from error
    begun, wanted = ({**x, **x["settings"]} for x in (begun, wanted))
    other = [
        f"{key} {begun.get(key)} instead of {wanted.get(key)}"
        for key in dict.fromkeys([*begun, *wanted])
        if key != "settings" and begun.get(key) != wanted.get(key)
    ]
    if trained != weights.keys():
        other.append("weights of another version of this package")
    if other:
        raise InputError(
            f"'{partial}' was begun with other settings ({'; '.join(other)}): repeat them to go on, remove the file to "
            "start anew, or choose another --out."
        )
    return state
