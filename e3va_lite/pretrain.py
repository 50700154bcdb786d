"""How ``swin_nano`` learns to see: dense supervision on generated images of many classes.

Every pixel of an image is asked two questions, which outline it belongs to and which texture it has, through a head
that is thrown away afterwards. Classifying whole images teaches such a small model nothing in the same time; a question
per pixel does. What stays is the Swin, saved as float16 with its accuracy and its recipe in a card beside it.
"""

import json
import math
import platform
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from .datasets.silhouettes import OUTLINES, TEXTURES, fill, place, texture
from .errors import InputError
from .methods import build_backbone

SIZE = 112  # pixels; multiples of 112 waste little window padding in the four stages
LABEL_STRIDE = 4
PRETRAIN_OUTLINES = tuple(OUTLINES)[:16]  # the last four are kept for the downstream scenes
IGNORE = -1
HELD_OUT = 2000  # images on which the accuracy is taken
SAVE_EVERY = 500  # steps


class DenseShapes(Dataset):
    """Large crisp objects; item ``i`` is the same in every run with the same seed.

    An item is an image, float (3, 112, 112) in 0..1, and two label maps, int64 (28, 28): outline (0 is background) and
    texture (ignored on the background).
    """

    def __init__(self, length: int, seed: int) -> None:
        self.length, self.seed = length, seed

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        rng = np.random.default_rng((self.seed, index))
        image = _background(rng)
        outlines = np.zeros((SIZE, SIZE), np.int64)
        textures = np.full((SIZE, SIZE), IGNORE, np.int64)
        for _ in range(rng.integers(1, 5)):
            which, pattern = rng.integers(len(PRETRAIN_OUTLINES)), rng.integers(len(TEXTURES))
            polygon = place(
                OUTLINES[PRETRAIN_OUTLINES[which]],
                centre=tuple(rng.uniform(0.12 * SIZE, 0.88 * SIZE, 2)),
                radius=SIZE * rng.uniform(0.13, 0.36),
                turn=rng.uniform(-np.pi / 5, np.pi / 5),
                squeeze=rng.uniform(0.75, 1.0),
            )
            box, mask = fill(polygon, SIZE, SIZE)
            blend = texture(TEXTURES[pattern], *mask.shape, rng.uniform(7, 14), rng)[mask][:, None]
            first, second = _two_colours(rng)
            image[box][mask] = first * (1 - blend) + second * blend
            outlines[box][mask], textures[box][mask] = which + 1, pattern
        noise = rng.standard_normal(image.shape, dtype=np.float32) * np.float32(rng.uniform(0, 0.06))
        image = np.clip(image + noise, 0, 1)
        middle = slice(LABEL_STRIDE // 2, None, LABEL_STRIDE)
        return (
            torch.from_numpy(image.transpose(2, 0, 1).copy()),
            torch.from_numpy(outlines[middle, middle].copy()),
            torch.from_numpy(textures[middle, middle].copy()),
        )


def _background(rng: np.random.Generator) -> np.ndarray:
    """A smooth blend of two colours, (112, 112, 3)."""
    corners = rng.random((2, 2, 3), dtype=np.float32)
    ramp = np.linspace(0, 1, SIZE, dtype=np.float32)
    blend = np.stack([1 - ramp, ramp], axis=1)  # (112, 2)
    return np.einsum("ya,xb,abc->yxc", blend, blend, corners, optimize=True)


def _two_colours(rng: np.random.Generator) -> np.ndarray:
    """Two colours that can be told apart, (2, 3)."""
    while True:
        pair = rng.random((2, 3), dtype=np.float32)
        if np.abs(pair[0] - pair[1]).max() > 0.35:
            return pair


class DenseModel(nn.Module):
    """A backbone and the throw-away head: all four maps projected, upsampled and added, from coarse to fine."""

    def __init__(self, backbone: nn.Module, channels: int = 64) -> None:
        super().__init__()
        self.backbone = backbone
        self.projections = nn.ModuleList(nn.Conv2d(width, channels, 1) for width in backbone.out_channels)
        self.outlines = nn.Conv2d(channels, len(PRETRAIN_OUTLINES) + 1, 1)
        self.textures = nn.Conv2d(channels, len(TEXTURES), 1)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        finest, *coarser = [project(x) for project, x in zip(self.projections, self.backbone(images), strict=True)]
        x = coarser.pop()
        for finer in [*reversed(coarser), finest]:
            x = finer + F.interpolate(x, finer.shape[-2:], mode="bilinear")
        x = F.gelu(x)  # (B, channels, H/4, W/4)
        return self.outlines(x), self.textures(x)


def dense_loss(model: nn.Module, images: Tensor, outlines: Tensor, textures: Tensor) -> Tensor:
    outline_logits, texture_logits = model(normalise(images))
    return F.cross_entropy(outline_logits, outlines) + F.cross_entropy(texture_logits, textures, ignore_index=IGNORE)


def normalise(images: Tensor) -> Tensor:
    """ImageNet's statistics, as for every other Swin: what is fed downstream must be fed here."""
    from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

    mean, std = (torch.tensor(values, device=images.device) for values in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    return (images - mean[:, None, None]) / std[:, None, None]


@torch.no_grad()
def dense_accuracy(model: nn.Module, loader: DataLoader, device: torch.device) -> dict[str, float]:
    """Share of object pixels whose outline and whose texture is named rightly, and of all pixels for the outline."""
    model.eval()
    right = {"outline": 0, "texture": 0, "outline_with_background": 0}
    objects = pixels = 0
    for images, outlines, textures in loader:
        outline_logits, texture_logits = model(normalise(images.to(device)))
        outline, texture_ = outline_logits.argmax(1).cpu(), texture_logits.argmax(1).cpu()
        inside = outlines > 0
        right["outline"] += ((outline == outlines) & inside).sum().item()
        right["texture"] += ((texture_ == textures) & inside).sum().item()
        right["outline_with_background"] += (outline == outlines).sum().item()
        objects += inside.sum().item()
        pixels += inside.numel()
    return {
        "outline": right["outline"] / objects,
        "texture": right["texture"] / objects,
        "outline_with_background": right["outline_with_background"] / pixels,
    }


def pretrain(
    out: Path, steps: int, batch: int, lr: float, seed: int, workers: int, device: str, overwrite: bool
) -> dict:
    """Train ``swin_nano`` and write ``out`` (``.safetensors``, float16) and its card ``out`` with ``.json``.

    A run that was cut off goes on from ``out`` with ``.partial``, which is written every ``SAVE_EVERY`` steps.

    Raises:
        InputError: When ``out`` exists and ``overwrite`` is not set.
    """
    if out.exists() and not overwrite:
        raise InputError(f"'{out}' exists: choose another --out or pass --overwrite.")
    out.parent.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    model = DenseModel(build_backbone("full", "swin_nano")).to(device)
    decay = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}], lr=lr
    )
    warmup = min(300, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / max(warmup, 1), 0.5 + 0.5 * math.cos(math.pi * step / steps))
    )
    start, seconds = 0, 0.0
    partial = out.with_suffix(".partial")
    if partial.exists():
        state = torch.load(partial, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        start, seconds = state["step"], state["seconds"]
    images = DenseShapes(steps * batch, seed=seed)
    images = torch.utils.data.Subset(images, range(start * batch, steps * batch))
    bar = tqdm(DataLoader(images, batch, num_workers=workers), desc="pretrain", initial=start, total=steps)
    began = time.monotonic()
    model.train()
    for step, items in enumerate(bar, start=start + 1):
        loss = dense_loss(model, *(item.to(device) for item in items))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")
        if step % SAVE_EVERY == 0 and step < steps:
            state = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "schedule": schedule.state_dict(),
            }
            state |= {"step": step, "seconds": seconds + time.monotonic() - began}
            torch.save(state, partial.with_suffix(".tmp"))
            partial.with_suffix(".tmp").replace(partial)
    seconds += time.monotonic() - began
    held_out = DataLoader(DenseShapes(HELD_OUT, seed=seed + 1_000_000), 50, num_workers=workers)
    accuracy = dense_accuracy(model, held_out, torch.device(device))
    swin = {key: value.half().contiguous() for key, value in model.backbone.swin.state_dict().items()}
    save_file({key: value.cpu() for key, value in swin.items()}, out)
    card = {
        "what": "swin_nano, pretrained densely on generated images",
        "remake": f"e3va pretrain --steps {steps} --batch {batch} --lr {lr} --seed {seed} --out {out.name}",
        "images": steps * batch,
        "outlines": list(PRETRAIN_OUTLINES),
        "textures": list(TEXTURES),
        f"accuracy_on_{HELD_OUT}_held_out_images": {key: round(value, 4) for key, value in accuracy.items()},
        "chance": {"outline": round(1 / len(PRETRAIN_OUTLINES), 4), "texture": round(1 / len(TEXTURES), 4)},
        "parameters": sum(p.numel() for p in model.backbone.swin.parameters()),
        "seconds": round(seconds),
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else f"{platform.machine()} CPU",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "date": time.strftime("%Y-%m-%d"),
    }
    out.with_suffix(".json").write_text(json.dumps(card, indent=2) + "\n")
    partial.unlink(missing_ok=True)
    return card
