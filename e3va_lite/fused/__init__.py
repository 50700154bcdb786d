"""The equations of the highway and of the frozen stream, computed fast."""

import torch


def is_recorded() -> bool:
    """Whether operators are written down or transformed now, so that the equations have to be computed literally.

    That is so inside :func:`torch.export.export`, :func:`torch.jit.trace` (the older ONNX exporter) and the transforms
    of :mod:`torch.func`; inside :func:`torch.compile` where no gradient is wanted: what is compiled for training calls
    the fused form, which the compiler leaves as it is.
    """
    if torch.compiler.is_exporting():
        return True
    if torch.compiler.is_compiling():
        return not torch.is_grad_enabled()
    return torch.jit.is_tracing() or torch._C._are_functorch_transforms_active()
