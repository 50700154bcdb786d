"""Leaving a model as it was: what a measurement changes is saved before it and restored after it."""

import copy
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor


@contextmanager
def restored(
    model: nn.Module, optimizer: torch.optim.Optimizer | None = None, parameters: bool = True
) -> Iterator[None]:
    """Leave a model as it was before the ``with`` statement, also when its body raises.

    Parameters, buffers, gradients, train and eval modes and the random state (of the CPU and of the CUDA devices that
    hold parameters) are restored, and so are the parameters and the state of the optimizer. Inside, gradients start as
    None. Copies of parameters and buffers are held in the CPU's memory, not in the device's.

    Args:
        model: Its tensors without numbers (on the meta device, or fake) are not copied.
        optimizer: An optimizer that the body steps; its parameters need not all be the model's.
        parameters: False if the body cannot change a parameter, which saves the copies.
    """
    owned = list(model.parameters())
    if optimizer is not None:
        owned += [p for group in optimizer.param_groups for p in group["params"]]
        state = optimizer.state
        optimizer.state = defaultdict(dict, {p: copy.deepcopy(values) for p, values in state.items()})
    buffers = [(module, name, buffer) for module in model.modules() for name, buffer in module._buffers.items()]
    copied = [t for t in (*(owned if parameters else ()), *(b for *_, b in buffers)) if _has_numbers(t)]
    copies = {t: t.detach().to("cpu", copy=True) for t in copied}
    grads = {p: p.grad for p in owned}
    modes = {module: module.training for module in model.modules()}
    for p in owned:
        p.grad = None
    try:
        with torch.random.fork_rng(devices={p.device for p in owned if p.device.type == "cuda"}):
            yield
    finally:
        for module, name, buffer in buffers:
            module._buffers[name] = buffer
        with torch.no_grad():
            for t, before in copies.items():
                before = before.to(t.device)
                if not t.equal(before):  # any write, even of the same numbers, would spoil a pending graph
                    t.copy_(before)
        for p, grad in grads.items():
            p.grad = grad
        for module, mode in modes.items():
            module.training = mode
        if optimizer is not None:
            optimizer.state = state


def _has_numbers(t: Tensor | None) -> bool:
    return t is not None and not t.is_meta and not isinstance(t, FakeTensor)
