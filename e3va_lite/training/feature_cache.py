"""What a frozen backbone makes of the training images, computed once and kept on disk.

A backbone that nothing trains gives the same maps for the same pixels at every step, and so do the taps of a highway
beside it. Where an image can only look in two ways, as it is and mirrored, and is padded to the same canvas in every
batch, both are computed before the training begins. Then a training step reads maps where it would read and resize
images and run the backbone. Evaluation is not changed.

    DIR/KEY/cache.json                  what KEY stands for: weights, images, sizes, precision
    DIR/KEY/stage2-out.npy              (2 N, H, W, C): image i as it is at 2 i, mirrored at 2 i + 1
    DIR/KEY/stage2-in.npy               the map after the reduction, and
    DIR/KEY/stage2-block1-tap1.npy      the taps, for E3VA only

Each map has the type that the backbone gives it in the recipe's precision. NumPy has no bfloat16; its bits lie there as
int16.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor, nn
from torch.utils.data import Dataset

from ..backbones.base import TunedBackbone, embed
from ..backbones.weights import fingerprint
from ..datasets.augment import mirrored, mirrors_now
from ..datasets.detection import ObjectDataset
from ..errors import InputError
from ..fused import frozen_stream
from ..highway import E3VA
from ..recipes.schema import Recipe, VOCRecipe
from .distributed import progress, say
from .engine import autocast

TOGETHER = 8  # images that are computed at a time


class CachedImages(Dataset):
    """A training set whose images are not read: zeros of the same size, and targets as ever.

    A target has one more entry, ``cached``: which entry of a :class:`FeatureCache` stands for the image.
    """

    def __init__(self, dataset: ObjectDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, dict]:
        width, height = self.dataset.images[index].size
        image, target = torch.zeros(1).expand(3, height, width), self.dataset.target(index)
        mirror = mirrors_now()
        if mirror:
            image, target = mirrored(image, target)
        return image, {**target, "cached": 2 * index + mirror}


class FeatureCache:
    """The stored maps, in the place of a frozen stream: see :class:`e3va_lite.fused.frozen_stream.Stream`.

    Attributes:
        entries: Those that the present batch consists of; set before every training step.
    """

    def __init__(self, arrays: dict[str, np.ndarray], device: torch.device) -> None:
        self.arrays, self.device, self.entries = arrays, device, []

    def _read(self, name: str) -> Tensor:
        return self._tensor(self.arrays[name][self.entries])  # (B, H, W, C)

    def _tensor(self, array: np.ndarray) -> Tensor:
        x = torch.from_numpy(array).to(self.device)
        return x.view(torch.bfloat16) if x.dtype == torch.int16 else x

    def output(self, index: int) -> Tensor:
        """The map of a stage (from 0), (B, H, W, C)."""
        return self._read(_output(index))

    def start(self, images: Tensor) -> Tensor:
        """In the place of the patches, from which a highway takes a difference of zero to itself."""
        like = self.arrays[_output(0)]
        return self._tensor(np.zeros((len(images), *like.shape[1:]), like.dtype))

    def reduce(self, index: int, x: Tensor) -> Tensor:
        return self._read(_input(index)) if index else x

    def run(self, index: int, x: Tensor) -> frozen_stream.Taps:
        x.copy_(self.output(index))  # as the stream has it when the last tap is read
        blocks = sum(name.startswith(f"stage{index + 1}-block") for name in self.arrays) // 2
        for block in range(blocks):
            taps = [self._read(_tap(index, block, number)).flatten(0, 2) for number in (0, 1)]
            for rows in frozen_stream.slices(taps[0]):
                yield block, rows, (taps[0][rows], taps[1][rows])


def _output(index: int) -> str:
    return f"stage{index + 1}-out"


def _input(index: int) -> str:
    return f"stage{index + 1}-in"


def _tap(index: int, block: int, number: int) -> str:
    return f"stage{index + 1}-block{block + 1}-tap{number + 1}"


def can_be_cached(body: TunedBackbone) -> bool:
    """Whether the frozen part of a fine-tuning method can be read instead: a frozen backbone, a parallel highway."""
    if isinstance(body, E3VA):
        return body.memory in ("store", "compress")
    return getattr(body, "frozen", False)


@contextmanager
def cached(
    model: nn.Module, dataset: ObjectDataset, recipe: Recipe, folder: Path, device: torch.device
) -> Iterator[CachedImages]:
    """Inside, the model trains on stored maps of a training set, which are computed first where they are missing.

    Args:
        model: A RetinaNet with a backbone that nothing trains, or E3VA beside one.
        dataset: Made with ``train=True``, all of its images.
        folder: Of all caches. Each training set, size and backbone has a folder of its own there.

    Returns:
        The dataset to train on.

    Raises:
        InputError: Where what a backbone sees of an image differs from step to step, or the disk is too small.
    """
    if not isinstance(recipe, VOCRecipe):
        raise InputError(
            f"--cache is for RetinaNet: images of the task {recipe.task} are augmented at random sizes, so that a "
            "backbone sees other pixels at every step; leave out --cache."
        )
    if recipe.zoom:
        raise InputError("--cache needs images that look alike at every step: set zoom=false, or leave out --cache.")
    if recipe.canvas is None:
        raise InputError(
            "--cache needs images that are always padded alike, not to the largest one of their batch: "
            f"set canvas={recipe.max_size}, or leave out --cache."
        )
    body = model.backbone.body
    if not can_be_cached(body):
        raise InputError(
            f"--cache is for fixed and for parallel E3VA with memory=store or memory=compress, not for {recipe.method} "
            "as it is set here, which needs the backbone at every step: leave out --cache."
        )
    body.cache = FeatureCache(_arrays(model.to(device), dataset, recipe, folder, device), device)

    def choose_entries(_: nn.Module, inputs: tuple) -> None:
        if model.training:
            body.cache.entries = [target["cached"] for target in inputs[1]]

    hook = model.register_forward_pre_hook(choose_entries)
    try:
        yield CachedImages(dataset)
    finally:
        hook.remove()
        body.cache = None


def _arrays(
    model: nn.Module, dataset: ObjectDataset, recipe: VOCRecipe, folder: Path, device: torch.device
) -> dict[str, np.ndarray]:
    """The arrays that a method needs, read-only; they are written first where they are missing."""
    about = {
        "weights": fingerprint(model.backbone.body.backbone),
        "backbone": recipe.backbone,
        "sizes": [recipe.min_size, recipe.max_size, recipe.canvas],
        "precision": recipe.precision,
        "images": len(dataset),
        "files": hashlib.sha256("\n".join(f"{p.name} {p.stat().st_size}" for p in dataset.paths).encode()).hexdigest(),
    }
    place = folder / hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]
    place.mkdir(parents=True, exist_ok=True)
    with FileLock(place / ".lock"):  # another process may be writing the same
        sample = _maps(model, [_both(dataset, 0)[0]], recipe, device)
        missing = {name: x for name, x in sample.items() if not (place / f"{name}.npy").is_file()}
        if missing:
            _write(model, dataset, place, missing, recipe, device)
            (place / "cache.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    return {name: np.load(place / f"{name}.npy", mmap_mode="r") for name in sample}


def _write(
    model: nn.Module,
    dataset: ObjectDataset,
    place: Path,
    missing: dict[str, np.ndarray],
    recipe: VOCRecipe,
    device: torch.device,
) -> None:
    size = 2 * len(dataset) * sum(x[0].nbytes for x in missing.values())
    free = shutil.disk_usage(place).free
    say(f"cache: {size / 1e9:.1f} GB for {len(dataset)} images in '{place}'")
    if size > 0.95 * free:
        raise InputError(
            f"the cache needs {size / 1e9:.1f} GB and '{place}' has {free / 1e9:.1f}: choose another disk."
        )
    arrays = {
        name: np.lib.format.open_memmap(place / f"{name}.partial", "w+", x.dtype, (2 * len(dataset), *x.shape[1:]))
        for name, x in missing.items()
    }
    for start in progress(range(0, len(dataset), TOGETHER // 2), "cache", unit="batch"):
        indices = range(start, min(start + TOGETHER // 2, len(dataset)))
        maps = _maps(model, [image for i in indices for image in _both(dataset, i)], recipe, device)
        for name, array in arrays.items():
            array[2 * start : 2 * indices.stop] = maps[name]
    for name, array in arrays.items():
        array.flush()
        (place / f"{name}.partial").rename(place / f"{name}.npy")


def _both(dataset: ObjectDataset, index: int) -> tuple[Tensor, Tensor]:
    """An image as it is and mirrored."""
    image, target = dataset.as_stored(index)
    return image, mirrored(image, target)[0]


@torch.no_grad()
def _maps(model: nn.Module, images: list[Tensor], recipe: VOCRecipe, device: torch.device) -> dict[str, np.ndarray]:
    """What a method needs of a few images by name, (B, H, W, C) each."""
    body, was_training = model.backbone.body, model.training
    batch = model.train().transform([image.to(device) for image in images])[0].tensors  # (B, 3, H, W) on the canvas
    model.train(was_training)
    maps: dict[str, Tensor] = {}
    with autocast(recipe, device):
        x = embed(body.backbone, batch)
        for index, stage in enumerate(body.backbone.layers[: body.last_stage]):
            x = stage.downsample(x).clone()
            if isinstance(body, E3VA) and index:
                maps[_input(index)] = x.clone()
            for block, rows, taps in frozen_stream.run(stage, x):
                for number, tap in enumerate(taps if isinstance(body, E3VA) else ()):
                    whole = maps.setdefault(_tap(index, block, number), torch.empty_like(x, dtype=tap.dtype))
                    whole.view(-1, x.shape[-1])[rows] = tap
            if isinstance(body, E3VA) or index + 1 in body.norms.stages:
                maps[_output(index)] = x.clone()
    return {name: (x.view(torch.int16) if x.dtype == torch.bfloat16 else x).cpu().numpy() for name, x in maps.items()}
