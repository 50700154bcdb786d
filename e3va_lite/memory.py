"""What a training step costs: the peak of live tensor bytes, and seconds.

On CUDA the allocator keeps the count. On a CPU nobody does, so we watch every operator's outputs and count a storage
from its birth to its death. Both numbers include parameters, gradients and optimiser state, and nothing that is not a
tensor; both are in bytes.
"""

import time
import weakref
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WARMUP = 2  # steps before a measurement: the optimiser's state and cached buffers come to life in them


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensor storages that are alive, and remembers the peak.

    Args:
        known: Tensors that live already when counting starts.
    """

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: set[int] = set()
        for tensor in known:
            self._add(tensor)

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata  # the storage itself: views share it
        if key in self._alive:
            return
        self._alive.add(key)
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self._alive.discard(key)
        self.now -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._add(leaf)
        return result


def peak_bytes(step: Callable[[], object], known: Callable[[], list[Tensor]], device: torch.device) -> int:
    """The peak of live tensor bytes during one training step, after warm-up.

    Args:
        step: Runs one whole training step, from images to updated parameters.
        known: Lists what lives between steps: parameters, buffers, gradients, optimiser state, the batch. What else
            lives on the device is not counted.
        device: Where the step runs.
    """
    for _ in range(WARMUP):
        step()
    if device.type == "cuda":
        own = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in known() if t.is_cuda}
        others = torch.cuda.memory_allocated(device) - sum(own.values())  # further models that wait for their turn
        torch.cuda.reset_peak_memory_stats(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - others
    with LiveBytes(known()) as live:
        step()
    return live.peak


def interleaved_seconds(
    steps: dict[str, Callable[[], object]], rounds: int, device: torch.device
) -> dict[str, np.ndarray]:
    """Seconds of each step, measured in turn, so that a slow moment of the machine hits all of them alike.

    Args:
        steps: One training step per name.
        rounds: How often each is run; one more round, not counted, comes first.
        device: Where the steps run.

    Returns:
        Per name an array (rounds,). Divide two of them to get a ratio per round.
    """
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds[name].append(time.perf_counter() - start)
    return {name: np.array(values[1:]) for name, values in seconds.items()}
