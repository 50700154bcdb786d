"""Pretraining on generated images: dense supervision on silhouettes, for machines without photographs.

Every pixel of an image is asked which outline it belongs to, which texture it has and how far it is to the sides of its
object, through a head that is thrown away afterwards. Classifying whole images teaches such a small model nothing in
the same time; a question per pixel does. Of the three, the distances are what makes it see shapes at all: without them
textures are learned and outlines are not.
"""

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from ..datasets.silhouettes import OUTLINES, TEXTURES, fill, place, texture
from .pretrain_photographs import normalise

SIZE = 112  # pixels; multiples of 112 waste little window padding in the four stages
LABEL_STRIDE = 4
PRETRAIN_OUTLINES = tuple(OUTLINES)[:16]  # the last four are kept for the downstream scenes
IGNORE = -1
RAYS = 8
BACKGROUND_WEIGHT = 0.1  # most pixels are background: an easy answer that drowns the others
DISTANCES = 4 + RAYS  # to the sides of the box, and along rays to the outline
HELD_OUT = 2000  # images on which the accuracy is taken


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


class GeneratedObjective(nn.Module):
    """Pretraining on :class:`DenseShapes`; :mod:`~e3va_lite.experiments.pretrain` says what an objective offers.

    The throw-away head projects all four maps, upsamples them and adds them up, from coarse to fine.
    """

    size = SIZE

    def __init__(self, backbone: nn.Module, workers: int = 0, channels: int = 64) -> None:
        super().__init__()
        self.backbone, self.workers = backbone, workers
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

    def batches(self, start: int, steps: int, batch: int, seed: int, device: torch.device) -> Iterator[list[Tensor]]:
        images = Subset(DenseShapes(steps * batch, seed), range(start * batch, steps * batch))
        for items in DataLoader(images, batch, num_workers=self.workers):
            yield [item.to(device) for item in items]

    def losses(self, images: Tensor, outlines: Tensor, textures: Tensor, distances: Tensor) -> dict[str, Tensor]:
        outline_logits, texture_logits, guesses = self(normalise(images))
        weight = torch.ones(outline_logits.shape[1], device=images.device)
        weight[0] = BACKGROUND_WEIGHT
        return {
            "outline": F.cross_entropy(outline_logits, outlines, weight=weight),
            "texture": F.cross_entropy(texture_logits, textures, ignore_index=IGNORE),
            "distances": 4 * (guesses - distances).abs().mean(dim=1)[outlines > 0].mean(),
        }

    def accuracy(self, seed: int, device: torch.device) -> tuple[float, dict[str, object]]:
        loader = DataLoader(DenseShapes(HELD_OUT, seed=seed + 1_000_000), 50, num_workers=self.workers)
        accuracy, commonest = dense_accuracy(self, loader, device)
        return accuracy["outline"] + accuracy["texture"], {
            f"accuracy_on_{HELD_OUT}_held_out_images": {key: round(value, 4) for key, value in accuracy.items()},
            "always_the_commonest_answer": {key: round(value, 4) for key, value in commonest.items()},
        }

    def card(self) -> dict[str, object]:
        return {"source": "generated images", "outlines": list(PRETRAIN_OUTLINES), "textures": list(TEXTURES)}
