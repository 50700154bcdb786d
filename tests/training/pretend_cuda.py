"""CUDA without a card: CPU tensors that say they are on ``cuda:0``, and a record of where a card would be waited for.

A :class:`PretendTensor` has the device ``cuda:0`` and computes with a CPU tensor inside. Autocast treats it as CUDA's:
its lists say which operators run in float16 and which in float32. Autograd's engine treats it as a CPU's, since it
would ask a driver for streams. Inside :func:`pretend_cuda` operators refuse tensors of two devices as CUDA's kernels
do, an operator without a kernel on CUDA is an error, and every place where the program would have to wait for the card
is counted with its line.

What this does not know: in which order kernels run, how long they take, and which types of numbers they refuse.

PyTorch is changed for the life of the process, so everything here runs in one of its own: :func:`own_process`.
"""

import os
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from multiprocessing import get_context
from unittest import mock

import torch
import torchvision  # noqa: F401  its operators
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
aten = torch.ops.aten

#: The size of the result depends on numbers: the program waits for them.
SIZED_BY_NUMBERS = {
    aten.nonzero.default, aten.masked_select.default, aten._unique2.default, aten.unique_dim.default,
    aten.unique_consecutive.default, aten.bincount.default, torch.ops.torchvision.nms.default,
}  # fmt: skip
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
COPIES = {aten._to_copy.default, aten.copy_.default}
ONE_DEVICE = {  # these take no CPU scalar beside CUDA tensors
    aten.cat.default, aten.stack.default, aten.gather.default, aten.scatter.src, aten.index_select.default,
    aten.index_copy_.default, aten.index_copy.default,
}  # fmt: skip
SOFTMAX = {aten._softmax.default, aten._log_softmax.default}
SOFTMAX_BACKWARD = {aten._softmax_backward_data.default, aten._log_softmax_backward_data.default}
KERNELS = (
    "CUDA", "CompositeExplicitAutograd", "CompositeExplicitAutogradNonFunctional", "CompositeImplicitAutograd",
)  # fmt: skip


class WrongDevice(RuntimeError):
    """What CUDA would raise for tensors of two devices."""


class PretendTensor(Tensor):
    """A tensor on ``cuda:0``, which is a CPU tensor inside."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    is_cuda = True
    device = property(lambda self: CUDA)

    @staticmethod
    def __new__(cls, inner: Tensor) -> "PretendTensor":
        tensor = Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=CPU,  # its kernels are the CPU's ...
            dispatch_device=True,  # ... but what it says is __torch_dispatch__'s to decide
            _extra_dispatch_keys=torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCUDA),
        )
        tensor.inner = inner
        return tensor

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.prim.device.default:
            return _device()
        raise RuntimeError(f"{func} met a pretended tensor outside of pretend_cuda")

    def new_tensor(self, data: object, dtype: torch.dtype | None = None) -> Tensor:
        return torch.tensor(data, dtype=dtype or self.dtype, device=CUDA)

    def tolist(self) -> list:
        _watching[-1].wait("copy to the CPU")
        return self.inner.tolist()

    def numpy(self, *_: object, **__: object) -> None:
        raise WrongDevice("numpy() of a tensor on CUDA")

    __array__ = numpy


_watching: list["Waits"] = []
_inside: list[str] = []  # "autocast" or "engine": which of the two was entered last


def _device() -> torch.device:
    """For PyTorch's C++: CUDA, but for autograd's engine, which would ask the driver for streams."""
    return CPU if _inside and _inside[-1] == "engine" else CUDA


class Waits(TorchDispatchMode):
    """Computes with pretended tensors, and counts where the program waits for the card.

    Attributes:
        lines: How often, by (line, what). A line is ``file:number``, the innermost of this package, torchvision, timm
            or mmsegmentation; an operator of the backward pass has the line of its operator in the forward pass.
    """

    def __init__(self) -> None:
        super().__init__()
        self.lines: Counter[tuple[str, str]] = Counter()
        self._pinned: dict[int, Tensor] = {}  # by the storage's address
        self._forward: dict[int, str] = {}  # line by autograd's number of the operator

    def wait(self, what: str, times: int = 1) -> None:
        """The program waits for the card here."""
        node = torch._C._current_autograd_node()
        cpp = _is_backward_in_cpp(node)
        line = self._forward.get(node._sequence_nr(), f"backward of {node.name()}") if cpp else _line()
        self.lines[line, what] += times

    def pin(self, tensor: Tensor) -> Tensor:
        """Stands for :meth:`torch.Tensor.pin_memory`."""
        if isinstance(tensor, PretendTensor):
            raise RuntimeError("only tensors on the CPU can be pinned")
        pinned = tensor.clone()
        self._pinned[pinned.untyped_storage()._cdata] = pinned
        return pinned

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:
            return _device()
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        outer = {id(x.inner): x for x in tensors if isinstance(x, PretendTensor)}
        device = kwargs.get("device") or (CUDA if outer else CPU)
        if outer and _is_backward_in_cpp(torch._C._current_autograd_node()):
            device = CUDA  # where it says CPU, the engine was asked
        if not outer and device.type != "cuda":
            return func(*args, **kwargs)
        if not _has_kernel(func):
            raise NotImplementedError(f"{func} has no kernel on CUDA")
        if func in COPIES:
            self._copied(func, args, kwargs, device)
        else:
            self._checked(func, args, [x for x in tensors if not isinstance(x, PretendTensor)], bool(outer))
        if "device" in kwargs:
            kwargs = {**kwargs, "device": CPU}
        inner_args, inner_kwargs = tree_map_only(PretendTensor, lambda x: x.inner, (args, kwargs))
        result = _on_cpu(func, inner_args, inner_kwargs)
        if device.type != "cuda" or (func is aten.copy_.default and not isinstance(args[0], PretendTensor)):
            return result
        return tree_map_only(Tensor, lambda x: outer[id(x)] if id(x) in outer else PretendTensor(x), result)

    def _copied(self, func, args: tuple, kwargs: dict, device: torch.device) -> None:
        """A copy between the devices, if it is one."""
        if func is aten.copy_.default:
            target, source = args[:2]
            to_card, free = isinstance(target, PretendTensor), bool(args[2:] and args[2]) or kwargs.get("non_blocking")
        else:
            source, to_card, free = args[0], device.type == "cuda", kwargs.get("non_blocking")
        if isinstance(source, PretendTensor) == to_card:
            return
        if not (to_card and free and source.untyped_storage()._cdata in self._pinned):
            self.wait("copy to the card" if to_card else "copy to the CPU")

    def _checked(self, func, args: tuple, on_cpu: list[Tensor], on_card: bool) -> None:
        """Refuse tensors of two devices; note a wait."""
        indices = [x for x in args[1] if x is not None] if func in INDEXING else []
        for x in on_cpu if on_card else ():
            index = any(x is y for y in indices)
            if not index and (x.ndim or func in ONE_DEVICE):
                raise WrongDevice(f"{func} of tensors on cuda:0 and a tensor {tuple(x.shape)} on the cpu, at {_line()}")
        if indices:
            self._forward[torch.autograd._get_sequence_nr() - 1] = _line()
            filling = "index_put" in str(func) and args[2].numel() == 1 and not isinstance(args[2], PretendTensor)
            self._noted("copy of an index to the card", sum(not isinstance(x, PretendTensor) for x in indices))
            self._noted("boolean mask", sum(x.dtype == torch.bool for x in indices if not filling))
        elif func is aten._local_scalar_dense.default and on_card:
            self.wait("number")
        elif func in SIZED_BY_NUMBERS or (func is aten.repeat_interleave.Tensor and len(args) < 2):
            self.wait(str(func).removeprefix("aten.").removesuffix(".default"))

    def _noted(self, what: str, times: int) -> None:
        if times:
            self.wait(what, times)


def _on_cpu(func, args: tuple, kwargs: dict) -> object:
    """Call an operator; a softmax that takes float16 and returns float32 at once is CUDA's alone."""
    if func in SOFTMAX and args[2]:
        args = (args[0].float(), args[1], False)
    elif func in SOFTMAX_BACKWARD and args[0].dtype != args[3]:
        return func(*args[:3], args[0].dtype).to(args[3])
    return func(*args, **kwargs)


def _is_backward_in_cpp(node: object) -> bool:
    return node is not None and not isinstance(node, BackwardCFunction)


@cache
def _has_kernel(func) -> bool:
    """Whether CUDA has the operator; only a build of PyTorch for CUDA can say no."""
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    return torch.version.cuda is None or any(has(func.name(), key) for key in KERNELS)


def _line() -> str:
    """The innermost line of this package, or of a library that it calls."""
    frame = sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename
        for name, folder in _folders().items():
            if path.startswith(folder):
                return f"{name}/{path.removeprefix(folder)}:{frame.f_lineno}"
        frame = frame.f_back
    return "elsewhere"


@cache
def _folders() -> dict[str, str]:
    """Where the packages whose lines are named are installed."""
    specs = {name: find_spec(name) for name in ("e3va_lite", "torchvision", "timm", "mmseg")}
    return {name: spec.submodule_search_locations[0] + os.sep for name, spec in specs.items() if spec is not None}


def own_process() -> ProcessPoolExecutor:
    """A process in which :func:`pretend_cuda` can be used; what it raises is raised here, with its traceback."""
    return ProcessPoolExecutor(1, get_context("spawn"), _prepare)


def _prepare() -> None:
    torch.set_num_threads(1)
    torch._C._ensureCUDADeviceGuardSet()  # one that does nothing, as for torch's fake tensors
    # With another accelerator the engine does not look for CUDA's streams.
    _setup_privateuseone_for_python_backend("another")


@contextmanager
def pretend_cuda() -> Iterator[Waits]:
    """Inside, ``torch.device("cuda", 0)`` can be computed on."""
    waits = Waits()
    autocast, engine = torch.autocast, torch.autograd._engine_run_backward

    def entered(self, enter=autocast.__enter__) -> object:
        _inside.append("autocast")
        return enter(self)

    def left(self, *error, leave=autocast.__exit__) -> object:
        _inside.pop()
        return leave(self, *error)

    def to(self, *args, to=nn.Module.to, **kwargs) -> nn.Module:
        there = args == (CUDA,) and all(p.is_cuda for p in self.parameters())
        return self if there else to(self, *args, **kwargs)

    def run_backward(*args, **kwargs) -> object:
        _inside.append("engine")
        try:
            return engine(*args, **kwargs)
        finally:
            _inside.pop()

    foreach = torch.utils._foreach_utils
    with (
        mock.patch.object(torch.cuda, "_lazy_init", lambda: None),
        mock.patch.object(torch.cuda, "is_bf16_supported", lambda *_, **__: True),
        mock.patch.object(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
        mock.patch.object(torch.inference_mode, "__enter__", lambda self: torch.no_grad.__enter__(self)),
        mock.patch.object(torch.inference_mode, "__exit__", lambda self, *error: torch.no_grad.__exit__(self, *error)),
        torch.backends.cudnn.flags(enabled=False),
        mock.patch.object(foreach, "_foreach_supported_types", [*foreach._foreach_supported_types, PretendTensor]),
        mock.patch.object(torch.__future__, "get_overwrite_module_params_on_conversion", lambda: True),
        mock.patch.object(nn.Module, "to", to),
        mock.patch.object(autocast, "__enter__", entered),
        mock.patch.object(autocast, "__exit__", left),
        mock.patch.object(torch.autograd, "_engine_run_backward", run_backward),
        mock.patch.object(Tensor, "pin_memory", lambda tensor: waits.pin(tensor)),
        waits,
    ):
        _watching.append(waits)
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(...) makes a tensor on the CPU and copies it
        try:
            yield waits
        finally:
            torch._C._set_only_lift_cpu_tensors(False)
            _watching.pop()
