"""Checkpoints: tensors and a JSON description in one safetensors file, never a pickle.

Under its own name there is always a whole file, see :func:`e3va_lite.files.replacing`.
"""

import json
import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..errors import InputError
from ..files import replacing

FORMAT = "e3va_lite 1"


def write(path: Path, tensors: dict[str, Tensor], about: dict) -> None:
    """Replace the file ``path`` by one with these tensors and this JSON-able description, or leave it as it is.

    Raises:
        InputError: If it cannot be written; what was there is still there.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    kept = "the one before it is still there" if path.exists() else "there was none before"
    try:
        with replacing(path) as unfinished:
            save_file(tensors, unfinished, {"format": FORMAT, "about": json.dumps(about)})
    except (OSError, SafetensorError) as error:
        raise InputError(f"'{path}' cannot be written ({error}); {kept}: make room and go on with --resume.") from error


def read(path: Path) -> tuple[dict[str, Tensor], dict]:
    """Tensors and description of a file that :func:`write` wrote.

    Raises:
        InputError: If it is missing, damaged, or anything else; nothing in it is ever executed.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {_present(name): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise InputError(f"there is no '{path}': check the path.") from None
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"'{path}' cannot be read as a safetensors file ({error}): it is damaged or of another kind."
        ) from error
    if metadata.get("format") != FORMAT:
        raise InputError(f"'{path}' was not written by this version of e3va_lite: give a file of a run.")
    return tensors, json.loads(metadata["about"])


def _present(name: str) -> str:
    """A tensor's name today; earlier files call the pretrained part of a tuned backbone its trunk."""
    return re.sub(r"(^|\.)trunk\.", r"\1backbone.", name)


def kept_names(model: nn.Module) -> list[str]:
    """Names of the state that training can change: all of the state dict but the frozen parameters."""
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    return [name for name in model.state_dict() if name not in frozen]


def kept_state(model: nn.Module) -> dict[str, Tensor]:
    """The part of the state dict that training can change."""
    state = model.state_dict()
    return {name: state[name] for name in kept_names(model)}


def restore(model: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    """Load what :func:`kept_state` returned into a model of the same recipe; all of it or, with an error, nothing."""
    tensors = without_optimizer(tensors)
    wanted, given = ({name: x.shape for name, x in state.items()} for state in (kept_state(model), tensors))
    if wrong := [name for name, _ in wanted.items() ^ given.items()]:
        raise InputError(f"'{path}' does not fit the model of its recipe, first at '{min(wrong)}': was one replaced?")
    model.load_state_dict(tensors, strict=False)


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """AdamW's state, named after the parameters."""
    return {
        f"optimizer/{key}/{name}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def without_optimizer(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The model's part of a checkpoint's tensors."""
    return {name: tensor for name, tensor in tensors.items() if not name.startswith("optimizer/")}


def restore_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Load what :func:`optimizer_tensors` returned into a new optimizer of the same model."""
    for name, parameter in model.named_parameters():
        for key in ("step", "exp_avg", "exp_avg_sq"):
            if (value := tensors.get(f"optimizer/{key}/{name}")) is not None:
                # The count of steps stays on the CPU, as AdamW itself keeps it.
                optimizer.state[parameter][key] = value if key == "step" else value.to(parameter.device)
