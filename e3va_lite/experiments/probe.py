"""What a backbone's frozen maps know about photographs: 1-nearest-neighbour classification and linear probes.

Nothing is trained but, in the linear probe, one linear layer. An image is described by the mean of a stage's map, after
a LayerNorm without parameters, as a detector's neck would get it.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..analysis.text_table import text_table
from ..datasets.photographs import Photographs, read_photographs
from ..errors import InputError
from .pretrain_photographs import Teacher, normalise

BATCH = 100
PIXELS = 16  # images are reduced to this many pixels per side where pixels themselves are the description


@torch.no_grad()
def describe(model: nn.Module, pixels: Tensor, device: torch.device) -> dict[int | str, Tensor]:
    """Vectors of images: uint8 (N, 3, S, S) -> float (N, C) by name, on the CPU.

    A backbone's are the means of its maps, by the number of the stage; a teacher's are its class token and the mean of
    its patch tokens.
    """
    model = model.to(device).eval()
    batches = []
    for batch in pixels.split(BATCH):
        maps = model(normalise(batch.to(device).float() / 255))
        if isinstance(model, Teacher):
            tokens, class_token = maps
            vectors = {"class token": class_token, "patch tokens": tokens.mean(dim=(2, 3))}
        else:
            vectors = {stage: x.mean(dim=(2, 3)) for stage, x in enumerate(maps, start=1)}
        batches.append({name: x.cpu() for name, x in vectors.items()})
    return {name: torch.cat([vectors[name] for vectors in batches]) for name in batches[0]}


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


def probe(
    folder: str | Path,
    backbones: Mapping[str, nn.Module],
    known: int,
    named: int,
    every: int,
    size: int,
    linear: bool,
    device: torch.device,
    teacher: Teacher | None = None,
    cache: Path | None = None,
) -> dict:
    """Compare backbones, and pixels, on one folder of photographs.

    Args:
        folder: Photographs, a folder per class.
        backbones: Each with frozen maps, by the name under which it is reported.
        known: Images of a class whose labels are known.
        named: At most so many further images of a class are named.
        every: Every ``every``-th class takes part; 1 for all.
        size: Pixels per side of an image.
        linear: Train a linear classifier instead of looking for the nearest neighbour.
        teacher: Compared, too, where there is one.
        cache: A folder for decoded photographs.

    Returns:
        The protocol, and per description of an image the share that is named rightly.

    Raises:
        InputError: If the photographs cannot be read or a class has too few.
    """
    photographs = read_photographs(folder, size, cache)
    split = balanced_split(photographs, known, named, every)
    used = torch.cat(split)
    pixels, labels = photographs.pixels[used], photographs.labels[used]
    first, second = torch.arange(len(split[0])), torch.arange(len(split[0]), len(used))
    score = linear_probe if linear else nearest_neighbour
    rows = [{"backbone": "pixels", "stage": None, "accuracy": score(describe_by_pixels(pixels), labels, first, second)}]
    for name, model in (*backbones.items(), *([(teacher.name, teacher)] if teacher is not None else [])):
        for stage, vectors in describe(model, pixels, device).items():
            rows.append({"backbone": name, "stage": stage, "accuracy": score(vectors, labels, first, second)})
    return {
        "protocol": "linear probe" if linear else "1-nearest-neighbour, cosine",
        "source": photographs.about() | {"folder": photographs.root.name},
        "classes": len(labels.unique()),
        "known": len(first),
        "named": len(second),
        "pixels": size,
        "rows": [row | {"accuracy": round(row["accuracy"], 4)} for row in rows],
    }


def as_text(result: dict) -> str:
    """The result of :func:`probe` as a table for a terminal."""
    rows = [[row["backbone"], str(row["stage"] or ""), f"{row['accuracy']:.3f}"] for row in result["rows"]]
    head = (
        f"{result['protocol']}: {result['classes']} classes of {result['source']['name']}, {result['known']} images "
        f"known, {result['named']} named, {result['pixels']} pixels"
    )
    return f"{head}\n{text_table(['description', 'stage', 'right'], rows)}"
