"""Import of mmsegmentation 1.2.2: everything here that uses it calls :func:`import_mmseg` first.

mmsegmentation imports mmcv's compiled operators, which UPerNet and Swin never call. They do not build against a current
torch, so mmcv-lite, the same code without them, is what gets installed. The import then wants a module ``mmcv._ext``;
a stand-in answers it, whose operators say what is wrong when they are called after all.

Our backbones in other people's configurations of mmsegmentation: see :mod:`e3va_lite.tasks.mmseg_backbone`.
"""

import sys
from collections.abc import Callable
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import NoReturn

from ..errors import InputError


def import_mmseg() -> ModuleType:
    """The module ``mmseg`` with all its parts, importable with mmcv-lite as well as with a compiled mmcv.

    Raises:
        InputError: If mmsegmentation or something that it needs is not installed, or a system library is missing.
    """
    try:
        # Threads are up to torch and its workers, one process each; OpenCV's own do not survive a fork.
        import_module("cv2").setNumThreads(0)
        import_module("mmcv")
        try:
            import_module("mmcv._ext")
        except ImportError:
            sys.modules["mmcv._ext"] = _stand_in()
        for part in ("models", "datasets", "evaluation", "registry"):
            import_module(f"mmseg.{part}")
        return import_module("mmseg")
    except (ImportError, AssertionError) as error:  # mmseg asserts which versions of mmcv it can live with
        raise _explained(error) from error


def _stand_in() -> ModuleType:
    """A module that has every operator one asks for; each raises when called."""

    def operator(name: str) -> Callable[..., NoReturn]:
        if name.startswith("__"):  # Python itself asks for __path__, __file__ and so on
            raise AttributeError(name)

        def call(*args: object, **kwargs: object) -> NoReturn:
            raise NotImplementedError(
                f"mmcv's compiled operator '{name}' was called, but mmcv-lite has none: use a model without it, or "
                "install a compiled mmcv."
            )

        return call

    module = ModuleType("mmcv._ext", "Stand-in for mmcv's compiled operators.")
    module.__spec__ = ModuleSpec("mmcv._ext", loader=None)
    module.__getattr__ = operator
    return module


def _explained(error: Exception) -> InputError:
    if "cannot open shared object file" in str(error):  # opencv on a bare container
        library = str(error).split(":")[0]
        return InputError(
            f"OpenCV, which mmsegmentation needs, does not find the system library {library}: install it, on Debian "
            "and Ubuntu with `apt-get install libgl1 libglib2.0-0`."
        )
    return InputError(
        f'segmentation needs mmsegmentation, and its import failed ({error}): run `pip install -e ".[segmentation]"`.'
    )
