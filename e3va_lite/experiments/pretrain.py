"""How the Swins in miniature learn to see: dense supervision on generated images of many classes.

Every pixel of an image is asked which outline it belongs to, which texture it has and how far it is to the sides of its
object, through a head that is thrown away afterwards. Classifying whole images teaches such a small model nothing in
the same time; a question per pixel does. Of the three, the distances are what makes it see shapes at all: without them
textures are learned and outlines are not. What stays is the Swin, saved as float16 with its accuracy and its
recipe in a card beside it.
"""

import json
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

from ..datasets.silhouettes import OUTLINES, TEXTURES, fill, place, texture
from ..errors import InputError
from ..methods.registry import build_backbone

SIZE = 112  # pixels; multiples of 112 waste little window padding in the four stages
LABEL_STRIDE = 4
PRETRAIN_OUTLINES = tuple(OUTLINES)[:16]  # the last four are kept for the downstream scenes
IGNORE = -1
RAYS = 8
BACKGROUND_WEIGHT = 0.1  # most pixels are background: an easy answer that drowns the others
DISTANCES = 4 + RAYS  # to the sides of the box, and along rays to the outline
HELD_OUT = 2000  # images on which the accuracy is taken
SAVE_EVERY = 500  # steps


class DenseShapes(Dataset):
    """One or two large crisp objects; item ``i`` is the same in every run with the same seed.

    An item is an image, float (3, 112, 112) in 0..1, two label maps, int64 (28, 28): outline (0 is background) and
    texture (ignored on the background), and the distances of :func:`_distances`, float (12, 28, 28), 0 on the
    background.
    """

    def __init__(self, length: int, seed: int) -> None:
        self.length, self.seed = length, seed

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        if not 0 <= index < self.length:
            raise IndexError(index)  # what ends a for loop
        rng = np.random.default_rng((self.seed, index))
        image = _background(rng)
        outlines = np.zeros((SIZE, SIZE), np.int64)
        textures = np.full((SIZE, SIZE), IGNORE, np.int64)
        distances = np.zeros((DISTANCES, SIZE // LABEL_STRIDE, SIZE // LABEL_STRIDE), np.float32)
        labelled = slice(LABEL_STRIDE // 2, None, LABEL_STRIDE)
        for _ in range(rng.integers(1, 3)):
            which, pattern = rng.integers(len(PRETRAIN_OUTLINES)), rng.integers(len(TEXTURES))
            polygon = place(
                OUTLINES[PRETRAIN_OUTLINES[which]],
                centre=tuple(rng.uniform(0.2 * SIZE, 0.8 * SIZE, 2)),
                radius=SIZE * rng.uniform(0.2, 0.42),
                turn=rng.uniform(-np.pi / 8, np.pi / 8),
                squeeze=rng.uniform(0.75, 1.0),
            )
            box, mask = fill(polygon, SIZE, SIZE)
            blend = texture(TEXTURES[pattern], *mask.shape, rng.uniform(7, 14), rng)[mask][:, None]
            first, second = _two_colours(rng)
            image[box][mask] = first * (1 - blend) + second * blend
            outlines[box][mask], textures[box][mask] = which + 1, pattern
            whole = np.zeros((SIZE, SIZE), bool)
            whole[box] = mask
            inside = whole[labelled, labelled]
            distances[:, inside] = _distances(whole, *(LABEL_STRIDE * np.nonzero(inside)[i] + 2 for i in (0, 1)))
        noise = rng.standard_normal(image.shape, dtype=np.float32) * np.float32(rng.uniform(0, 0.06))
        image = np.clip(image + noise, 0, 1)
        return (
            torch.from_numpy(image.transpose(2, 0, 1).copy()),
            torch.from_numpy(outlines[labelled, labelled].copy()),
            torch.from_numpy(textures[labelled, labelled].copy()),
            torch.from_numpy(distances),
        )


def _distances(mask: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """How far n pixels of an object are from its ends: float32 (12, n), in quarters of the image's side.

    The first four are the distances to the sides of its box (left, top, right, bottom), the other eight those to its
    outline along rays every 45 degrees ("Cell Detection with Star-convex Polygons", Schmidt et al. 2018). The image's
    edge ends both.

    Args:
        mask: All of the object, hidden parts too; bool (112, 112).
        y, x: The pixels, inside the mask.
    """
    columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
    box = [x - columns[0], y - rows[0], columns[-1] - x, rows[-1] - y]
    reach = np.arange(2, SIZE, 2)
    turns = 2 * np.pi * np.arange(RAYS)[:, None, None] / RAYS
    framed = np.pad(mask, SIZE)  # so that no ray leaves the array
    along = framed[
        np.rint(SIZE + y[:, None] + reach * np.sin(turns)).astype(int),
        np.rint(SIZE + x[:, None] + reach * np.cos(turns)).astype(int),
    ]  # (8, n, steps): still inside?
    rays = 2 * np.logical_and.accumulate(along, axis=-1).sum(axis=-1)
    return np.concatenate([box, rays]).astype(np.float32) * np.float32(4 / SIZE)


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
        self.distances = nn.Conv2d(channels, DISTANCES, 1)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        finest, *coarser = [project(x) for project, x in zip(self.projections, self.backbone(images), strict=True)]
        x = coarser.pop()
        for finer in [*reversed(coarser), finest]:
            x = finer + F.interpolate(x, finer.shape[-2:], mode="bilinear")
        x = F.gelu(x)  # (B, channels, H/4, W/4)
        return self.outlines(x), self.textures(x), self.distances(x)


def dense_loss(
    model: nn.Module, images: Tensor, outlines: Tensor, textures: Tensor, distances: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The losses of the three questions: outline, texture, distances."""
    outline_logits, texture_logits, guesses = model(normalise(images))
    weight = torch.ones(outline_logits.shape[1], device=images.device)
    weight[0] = BACKGROUND_WEIGHT
    off = (guesses - distances).abs().mean(dim=1)[outlines > 0]
    return (
        F.cross_entropy(outline_logits, outlines, weight=weight),
        F.cross_entropy(texture_logits, textures, ignore_index=IGNORE),
        4 * off.mean(),
    )


def normalise(images: Tensor) -> Tensor:
    """ImageNet's statistics, as for every other Swin: what is fed downstream must be fed here."""
    from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

    mean, std = (torch.tensor(values, device=images.device) for values in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    return (images - mean[:, None, None]) / std[:, None, None]


@torch.no_grad()
def dense_accuracy(
    model: nn.Module, loader: DataLoader, device: torch.device
) -> tuple[dict[str, float], dict[str, float]]:
    """How well the three questions are answered on objects' pixels.

    Returns:
        Shares of pixels whose outline and texture are named rightly, and the distances' mean error in pixels. Then what
        the two shares would be if the answer were always the commonest one: large outlines have more pixels.
    """
    model.eval()
    totals = {"outline": 0.0, "texture": 0.0, "distance_error_px": 0.0}
    counts = {"outline": torch.zeros(len(PRETRAIN_OUTLINES)), "texture": torch.zeros(len(TEXTURES))}
    objects = 0
    for images, outlines, textures, distances in loader:
        outline_logits, texture_logits, guesses = (x.cpu() for x in model(normalise(images.to(device))))
        inside = outlines > 0
        totals["outline"] += ((outline_logits[:, 1:].argmax(1) + 1 == outlines) & inside).sum().item()
        totals["texture"] += ((texture_logits.argmax(1) == textures) & inside).sum().item()
        totals["distance_error_px"] += SIZE / 4 * (guesses - distances).abs().mean(dim=1)[inside].sum().item()
        counts["outline"] += torch.bincount(outlines[inside] - 1, minlength=len(PRETRAIN_OUTLINES))
        counts["texture"] += torch.bincount(textures[inside], minlength=len(TEXTURES))
        objects += inside.sum().item()
    commonest = {name: count.max().item() / objects for name, count in counts.items()}
    return {name: total / objects for name, total in totals.items()}, commonest


def pretrain(
    backbone: str, out: Path, steps: int, batch: int, lr: float, seed: int, workers: int, device: str, overwrite: bool
) -> dict:
    """Train a Swin, by name, and write ``out`` (``.safetensors``, float16) and its card ``out`` with ``.json``.

    A run that was cut off goes on from ``out`` with ``.partial``, which is written every ``SAVE_EVERY`` steps.

    Raises:
        InputError: When ``out`` exists and ``overwrite`` is not set.
    """
    if out.exists() and not overwrite:
        raise InputError(f"'{out}' exists: choose another --out or pass --overwrite.")
    out.parent.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    model = DenseModel(build_backbone("full", backbone)).to(device)
    decay = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}], lr=lr
    )
    warmup, cooldown = max(1, min(100, steps // 10)), max(1, steps // 3)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, 1, (steps - step) / cooldown)
    )
    start, seconds, running = 0, 0.0, []
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
        losses = dense_loss(model, *(item.to(device) for item in items))
        optimizer.zero_grad()
        sum(losses).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        now = [loss.item() for loss in losses]
        running = [0.98 * old + 0.02 * new for old, new in zip(running or now, now, strict=True)]
        bar.set_postfix_str("outline {:.3f}, texture {:.3f}, distances {:.3f}".format(*running))
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
    accuracy, commonest = dense_accuracy(model, held_out, torch.device(device))
    swin = {key: value.half().contiguous() for key, value in model.backbone.trunk.state_dict().items()}
    save_file({key: value.cpu() for key, value in swin.items()}, out)
    card = {
        "what": f"{backbone}, pretrained densely on generated images",
        "remake": f"e3va pretrain {backbone} --steps {steps} --batch {batch} --lr {lr} --seed {seed} --out {out.name}",
        "images": steps * batch,
        "outlines": list(PRETRAIN_OUTLINES),
        "textures": list(TEXTURES),
        f"accuracy_on_{HELD_OUT}_held_out_images": {key: round(value, 4) for key, value in accuracy.items()},
        "always_the_commonest_answer": {key: round(value, 4) for key, value in commonest.items()},
        "parameters": sum(p.numel() for p in model.backbone.trunk.parameters()),
        "seconds": round(seconds),
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else f"{platform.machine()} CPU",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "date": time.strftime("%Y-%m-%d"),
    }
    out.with_suffix(".json").write_text(json.dumps(card, indent=2) + "\n")
    partial.unlink(missing_ok=True)
    return card
