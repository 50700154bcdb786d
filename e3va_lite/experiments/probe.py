"""What a backbone's frozen maps know about photographs: 1-nearest-neighbour classification and linear probes.

Nothing is trained but, in the linear probe, one linear layer. An image is described by the mean of a stage's map, after
a LayerNorm without parameters, as a detector's neck would get it.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..datasets.photographs import Photographs
from ..errors import InputError
from .pretrain_photographs import normalise

BATCH = 100
PIXELS = 16  # images are reduced to this many pixels per side where pixels themselves are the description


@torch.no_grad()
def describe(backbone: nn.Module, pixels: Tensor, device: torch.device, size: int | None = None) -> dict[str, Tensor]:
    """One vector per image and stage: uint8 (N, 3, S, S) -> {"stage 1": float (N, C_1), ...}, on the CPU."""
    backbone = backbone.to(device).eval()
    stages: list[list[Tensor]] = []
    for batch in pixels.split(BATCH):
        images = batch.to(device).float() / 255
        if size is not None and size != images.shape[-1]:
            images = F.interpolate(images, (size, size), mode="bilinear", antialias=True)
        stages.append([x.mean(dim=(2, 3)).cpu() for x in backbone(normalise(images))])
    return {f"stage {i}": torch.cat(maps) for i, maps in enumerate(zip(*stages, strict=True), start=1)}


def describe_by_pixels(pixels: Tensor) -> Tensor:
    """Small images themselves, each with mean 0 and deviation 1: uint8 (N, 3, S, S) -> float (N, 3 * 16 * 16)."""
    small = torch.cat(
        [F.interpolate(x.float(), (PIXELS, PIXELS), mode="bilinear", antialias=True) for x in pixels.split(BATCH)]
    )
    return F.layer_norm(small.flatten(1), (small[0].numel(),))


def balanced_split(photographs: Photographs, known: int, named: int, every: int = 1) -> tuple[Tensor, Tensor]:
    """The first ``known`` images of every ``every``-th class, and up to ``named`` of those that follow; positions.

    Raises:
        InputError: If a class has too few images.
    """
    first, second = [], []
    for label in range(0, len(photographs.classes), every):
        positions = (photographs.labels == label).nonzero().flatten()
        if len(positions) <= known:
            raise InputError(
                f"class '{photographs.classes[label]}' of '{photographs.root}' has {len(positions)} images: pass a "
                f"--known below that, so that some are left to be named."
            )
        first.append(positions[:known])
        second.append(positions[known : known + named])
    return torch.cat(first), torch.cat(second)


def nearest_neighbour(vectors: Tensor, labels: Tensor, known: Tensor, named: Tensor) -> float:
    """Share of ``named`` whose most similar vector (cosine) among ``known`` is of the same class."""
    vectors = F.normalize(vectors.float(), dim=1)
    nearest = known[(vectors[named] @ vectors[known].T).argmax(dim=1)]
    return (labels[nearest] == labels[named]).float().mean().item()


def linear_probe(vectors: Tensor, labels: Tensor, known: Tensor, named: Tensor, steps: int = 60) -> float:
    """Share of ``named`` that a linear classifier, trained on ``known`` by L-BFGS, classifies rightly."""
    mean, deviation = vectors[known].mean(dim=0), vectors[known].std(dim=0) + 1e-6
    vectors = (vectors - mean) / deviation
    classifier = nn.Linear(vectors.shape[1], int(labels.max()) + 1)
    nn.init.zeros_(classifier.weight)
    optimizer = torch.optim.LBFGS(classifier.parameters(), max_iter=steps, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        decay = 1e-4 * classifier.weight.square().sum()
        loss = F.cross_entropy(classifier(vectors[known]), labels[known]) + decay
        loss.backward()
        return loss

    optimizer.step(closure)
    with torch.no_grad():
        return (classifier(vectors[named]).argmax(dim=1) == labels[named]).float().mean().item()


def accuracies(
    score: Callable[[Tensor, Tensor, Tensor, Tensor], float],
    described: dict[str, Tensor],
    labels: Tensor,
    splits: Sequence[tuple[Tensor, Tensor]],
) -> dict[str, list[float]]:
    """A score of every description, for every split: {"stage 1": [0.1, ...], ...}"""
    return {name: [round(score(x, labels, *split), 4) for split in splits] for name, x in described.items()}
