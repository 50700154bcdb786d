"""The ledger: where the bytes of one training step are, and when.

The outputs of every operator are recorded, and a storage (the memory behind a tensor and its views) is counted once,
from its allocation until it is freed. The same count works on a CPU, whose allocator keeps none, on CUDA, and on
torch's fake tensors, which have sizes and no memory. What a kernel allocates for itself while it runs is not seen; on
CUDA the allocator's own peak, which includes that, is reported.

Each storage belongs to one category, known when the step is over:

- ``parameters``: of the whole model, frozen or not, and its buffers;
- ``gradients``: what is some parameter's ``.grad`` at the end of the backward pass;
- ``optimizer``: the optimizer's state;
- ``activations``: what else was made in the forward pass and is still there at its end, for the backward pass;
- ``temporaries``: everything else: intermediate results, gradients on their way, and the batch itself.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..errors import InputError
from .model_state import restored

CATEGORIES = ("parameters", "gradients", "optimizer", "activations", "temporaries")
PHASES = ("forward", "backward", "optimizer")
CURVE_POINTS = 200  # of a curve as plain numbers: the most bytes in each of so many equal parts of the step's events
WARMUP = 2  # steps on CUDA before the one that counts: libraries choose kernels and take workspaces in them


@dataclass(frozen=True)
class Ledger:
    """Bytes of one training step.

    Attributes:
        curve: Per category the live bytes after every event, (events,) each: a storage is allocated or freed.
        ends: Per phase the number of events until its end.
        by_module: Per module (``""`` is the model itself) the activations at the end of the forward pass; a storage
            counts for the innermost module that was running when an operator kept it for the first time, or, where
            none did in autograd's eyes (gradient checkpointing keeps inputs itself), when it was made.
        tensors: Every storage of the step, integers (storages, 4): bytes, the category's place in ``CATEGORIES``, the
            event that allocates it, and the event that frees it, or the number of events where none does. From the
            first of the two on, until before the second, it is part of the curve.
        running: Per event the module that is running, in the backward pass the one that the gradient has reached.
        allocated: On CUDA, the allocator's peak during the step, else None.
        reserved: On CUDA, what the allocator had taken from the device, else None.
    """

    curve: dict[str, np.ndarray]
    ends: dict[str, int]
    by_module: dict[str, int]
    tensors: np.ndarray
    running: list[str]
    allocated: int | None = None
    reserved: int | None = None

    @property
    def total(self) -> np.ndarray:
        """All live bytes after every event, (events,)."""
        return sum(self.curve.values())

    @property
    def at_peak(self) -> dict[str, int]:
        """Bytes per category when there were most in all; they add up to :attr:`peak`.

        On CUDA the allocator has seen more than the count: the difference is with the temporaries.
        """
        most = int(self.total.argmax())
        bytes_ = {name: int(values[most]) for name, values in self.curve.items()}
        if self.allocated is not None:
            bytes_["temporaries"] += self.allocated - sum(bytes_.values())
        return bytes_

    @property
    def peak(self) -> int:
        """The most bytes at any time of the step."""
        return sum(self.at_peak.values())

    @property
    def largest(self) -> dict[str, int]:
        """The most bytes of each category, each at its own time."""
        return {name: int(values.max()) for name, values in self.curve.items()}

    def as_row(self) -> dict:
        """The ledger as plain numbers, bytes: categories at the peak, ``peak``, ``largest``, ``by_module`` in order of
        size, ``curve``, and ``ends``: where in the curve the phases end, as fractions."""
        parts = np.array_split(self.total, min(CURVE_POINTS, len(self.total)))
        return {
            **self.at_peak,
            "peak": self.peak,
            "largest": self.largest,
            "by_module": dict(sorted(self.by_module.items(), key=lambda item: -item[1])),
            "curve": [int(part.max()) for part in parts],
            "ends": {phase: round(end / len(self.total), 4) for phase, end in self.ends.items()},
        }


class LiveBytes(TorchDispatchMode):
    """Records when every storage is allocated and freed while the mode is on.

    Attributes:
        sizes: Bytes of the storages in the order of allocation; ``born`` and ``died``: the event's number, -1 while it
            exists; ``made``: the module that was running then.
        kept: By a storage's number the module that was running when autograd kept it for the first time.
        running: The module that was running at every birth and death so far.
        module: The module that is running.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sizes, self.born, self.died, self.made = [], [], [], []
        self.kept: dict[int, str] = {}
        self.running: list[str] = []
        self.module = ""
        self._number: dict[int, int] = {}  # of the living, by the storage's address
        self._finalizers: list[weakref.finalize] = []

    @property
    def events(self) -> int:
        """The number of births and deaths so far."""
        return len(self.running)

    def add(self, tensor: Tensor) -> int:
        """The number of a tensor's storage; a new one is allocated now."""
        storage = tensor.untyped_storage()
        address = storage._cdata
        if (number := self._number.get(address)) is None:
            number = self._number[address] = len(self.sizes)
            self.sizes.append(storage.nbytes())
            self.born.append(self.events)
            self.died.append(-1)
            self.made.append(self.module)
            self.running.append(self.module)
            self._finalizers.append(weakref.finalize(storage, self._remove, address, number))
        return number

    def _remove(self, address: int, number: int) -> None:
        del self._number[address]
        self.died[number] = self.events
        self.running.append(self.module)

    def pack(self, tensor: Tensor) -> Tensor:
        """Note that autograd saves this tensor for the backward pass; a pack hook of ``saved_tensors_hooks``.

        The tensor itself would be kept alive for ever by the node that made it and saves it: a cycle that Python's
        garbage collector does not see. A detached one shares its memory and knows no node.
        """
        self.kept.setdefault(self.add(tensor), self.module)
        return tensor.detach()

    def alive(self) -> list[int]:
        """The numbers of the storages that exist now."""
        return list(self._number.values())

    def close(self) -> None:
        """Stop recording when storages are freed."""
        for finalizer in self._finalizers:
            finalizer.detach()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in (result,) if isinstance(result, Tensor) else tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.add(leaf)
        return result


def ledger(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    forward: Callable[[], Tensor],
    batch: Iterable[Tensor] = (),
) -> Ledger:
    """Record the memory of one training step: ``forward().backward()``, then ``optimizer.step()``.

    The step is really done, on CUDA after two others, and then undone: parameters, buffers, gradients, the optimizer's
    state and the random state are afterwards what they were before. The optimizer's state counts from the start, even
    if it is created in this very step: every later step has it from the start.

    Args:
        model: The model whose parameters and buffers are counted.
        optimizer: Of all parameters of the model or of some.
        forward: Computes the loss of a batch, a scalar.
        batch: Tensors that exist as long as the step: images and targets.

    Raises:
        InputError: If the loss is no scalar that a gradient can start from.
    """
    device = next(model.parameters()).device
    live = LiveBytes()
    with restored(model, optimizer), closing(live):
        for _ in range(WARMUP if device.type == "cuda" else 0):
            checked_loss(forward()).backward()
            optimizer.step()
            model.zero_grad()
        owned = {
            "parameters": [live.add(t) for t in (*model.parameters(), *model.buffers())],
            "optimizer": [live.add(t) for t in _state(optimizer)],
        }
        for tensor in batch:
            live.add(tensor)
        start = live.events - 1  # from here on something happens
        if device.type == "cuda":
            outside = torch.cuda.memory_allocated(device) - sum(live.sizes)
            torch.cuda.reset_peak_memory_stats(device)
        ends = {}
        with live, _named_modules(model, live):
            known = len(live.sizes)
            with torch.autograd.graph.saved_tensors_hooks(live.pack, lambda tensor: tensor):
                loss = checked_loss(forward())
            kept = [number for number in live.alive() if number >= known]
            ends["forward"] = live.events
            loss.backward()
            ends["backward"] = live.events
            live.module = ""
            owned["gradients"] = [live.add(p.grad) for p in model.parameters() if p.grad is not None]
            optimizer.step()
            owned["optimizer"] += [live.add(t) for t in _state(optimizer)]
            optimizer.zero_grad()
            model.zero_grad()  # the gradients that are not the optimizer's
            del loss
            ends["optimizer"] = live.events
        owned["activations"] = kept
        allocated = reserved = None
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            allocated = torch.cuda.max_memory_allocated(device) - outside
            reserved = torch.cuda.max_memory_reserved(device)
    return _closed(live, owned, ends, start, allocated, reserved)


def _closed(
    live: LiveBytes, owned: dict[str, list[int]], ends: dict[str, int], start: int, *cuda: int | None
) -> Ledger:
    category = np.full(len(live.sizes), CATEGORIES.index("temporaries"))
    for name in ("activations", "gradients", "optimizer", "parameters"):  # a later one takes precedence
        category[owned.get(name, [])] = CATEGORIES.index(name)
    sizes, born, died = (np.array(x) for x in (live.sizes, live.born, live.died))
    born[owned["optimizer"]] = np.minimum(born[owned["optimizer"]], start)
    change = np.zeros((len(CATEGORIES), live.events), dtype=np.int64)
    gone = died >= 0
    np.add.at(change, (category, born), sizes)
    np.subtract.at(change, (category[gone], died[gone]), sizes[gone])
    by_module: dict[str, int] = {}
    for number in np.flatnonzero(category == CATEGORIES.index("activations")).tolist():
        module = live.kept.get(number, live.made[number])
        by_module[module] = by_module.get(module, 0) + live.sizes[number]
    freed = np.where(gone, died, live.events)
    tensors = np.stack([sizes, category, np.maximum(born - start, 0), np.maximum(freed - start, 0)], axis=1)
    return Ledger(
        dict(zip(CATEGORIES, change.cumsum(axis=1)[:, start:], strict=True)),
        {phase: end - start for phase, end in ends.items()},
        by_module,
        tensors,
        live.running[start:],
        *cuda,
    )


def _state(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    return (value for values in optimizer.state.values() for value in values.values() if isinstance(value, Tensor))


def checked_loss(loss: object) -> Tensor:
    """The loss, if a gradient can start from it; otherwise an InputError."""
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
        what = f"{type(loss).__name__} {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise InputError(
            f"the loss ({what}) does not require a gradient, or is no single number: something in the model has to be "
            "trainable, and the loss has to depend on it."
        )
    return loss


@contextmanager
def _named_modules(model: nn.Module, live: LiveBytes) -> Iterator[None]:
    """Inside, ``live.module`` is the name of the module that runs forward, or whose output has got its gradient."""
    running: list[str] = []

    def enter(name: str, *_: object) -> None:
        running.append(live.module)
        live.module = name

    def reach(name: str, *_: object) -> None:
        live.module = name

    def leave(name: str, module: nn.Module, args: tuple, output: object) -> None:
        live.module = running.pop()
        for leaf in tree_leaves(output):
            node = leaf.grad_fn if isinstance(leaf, Tensor) else None
            if node is not None and "module" not in node.metadata:  # the innermost module's output, seen first
                node.metadata["module"] = name
                node.register_prehook(partial(reach, name))

    with ExitStack() as hooks:
        for name, module in model.named_modules():
            hooks.enter_context(module.register_forward_pre_hook(partial(enter, name)))
            hooks.enter_context(module.register_forward_hook(partial(leave, name), always_call=True))
        yield
