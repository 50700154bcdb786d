"""Which images a training step sees, and with which random numbers they are augmented.

Both depend on the seed and the step alone, not on what ran before or on the process. That is why a run that was
interrupted continues exactly as if it had not been, with any number of workers.
"""

import itertools
import random
import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from ..errors import InputError
from ..transfer import send
from .distributed import rank, world

Batch = tuple[list[Tensor], list[dict]]


class StepSampler(Sampler):
    """An endless sequence of batches: epoch after epoch, each in a new random order.

    Step ``s`` takes the next ``batch * accumulate * world`` images of the sequence. The processes share them out, so
    that two processes together see the images that one would see with twice the batch.

    Args:
        length: Images in the dataset.
        batch: Images per process and backward pass.
        accumulate: Backward passes per step.
        seed: Of the random orders.
        first: The step to begin with.
    """

    def __init__(self, length: int, batch: int, accumulate: int, seed: int, first: int = 0) -> None:
        self.length, self.batch, self.accumulate, self.seed, self.first = length, batch, accumulate, seed, first
        self.order = lru_cache(maxsize=2)(self._order)

    def _order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng((self.seed, epoch)).permutation(self.length)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for number in itertools.count(self.first * self.accumulate):
            start = (number * world() + rank()) * self.batch
            places = (divmod(place, self.length) for place in range(start, start + self.batch))
            yield [(epoch, int(self.order(epoch)[i])) for epoch, i in places]


class _Items(Dataset):
    """A dataset indexed by (epoch, index), whose random numbers are seeded by both.

    An item has numpy arrays, which travel as bytes: a tensor out of a worker holds a file as long as it lives. An
    :class:`InputError` is returned as an item, since a worker process would wrap it in a traceback.
    """

    def __init__(self, dataset: Dataset, seed: int) -> None:
        self.dataset, self.seed = dataset, seed

    def __getitem__(self, key: tuple[int, int]) -> tuple[np.ndarray, dict] | InputError:
        try:
            with seeded(self.seed, *key):
                image, target = self.dataset[key[1]]
            return image.numpy(), {k: v.numpy() if isinstance(v, Tensor) else v for k, v in target.items()}
        except InputError as error:
            return error


def loader(dataset: Dataset, batches: Iterable, seed: int, workers: int) -> Iterator[Batch]:
    """Read and augment the images of ``batches``, lists of (epoch, index).

    Raises:
        InputError: For an image or annotation that cannot be used.
    """
    own = torch.Generator()  # what the loader draws for its workers is drawn from nobody else's numbers
    for items in DataLoader(
        _Items(dataset, seed),
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=list,
        generator=own,
        worker_init_fn=_start_worker,
    ):
        for item in items:
            if isinstance(item, InputError):
                raise item
        images, targets = zip(*items, strict=True)
        targets = [{k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for k, v in t.items()} for t in targets]
        yield [torch.from_numpy(image) for image in images], targets


def _start_worker(_: int) -> None:
    """Ctrl-C reaches every process of a terminal: the workers go on until the training has ended its step."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextmanager
def seeded(*key: int) -> Iterator[None]:
    """Seed the random numbers of Python, NumPy and PyTorch (CPU) with the key, and restore their states afterwards."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    words = [int(word) for word in np.random.SeedSequence(key).generate_state(3)]
    random.seed(words[0])
    np.random.seed(words[1])
    torch.default_generator.manual_seed(words[2])
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Move the tensors of images and targets to the device."""
    images, targets = batch
    moved = [{k: send(v, device) if isinstance(v, Tensor) else v for k, v in target.items()} for target in targets]
    return [send(image, device) for image in images], moved
