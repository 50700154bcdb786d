"""Pretrained weights from a local file, for a Swin in any of the namings they are passed around in, checked before use.

One architecture, three key namings. They differ in names, in which stage owns the patch merging ("downsample"), and in
the order in which the merging lays out the four tokens of a 2x2 patch, (dh, dw) being a token's row and column:

    timm (ours)     layers.1.downsample   first step of stage 1   channels ordered (dw, dh, C)
    Microsoft       layers.0.downsample   last step of stage 0    channels ordered (dw, dh, C)
    mmsegmentation  stages.0.downsample   last step of stage 0    channels ordered (C, dh, dw), as nn.Unfold does

Old timm files use Microsoft's naming, mmpretrain and mmdetection use mmsegmentation's. Swin V2 goes by the first two,
plain ViTs by timm's alone.

A file is data: nothing in it is ever executed, and nothing is copied into the model before all of it has been checked.
"""

import hashlib
import re
import warnings
import zipfile
from collections import Counter
from collections.abc import Iterable, Mapping
from math import isqrt
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ..errors import InputError

PICKLED_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt")

#: Entries of a training checkpoint that hold the weights, in the order in which they are tried.
NESTINGS = ("model", "state_dict", "model_state_dict", "module")

#: mmsegmentation's parts of a key and timm's.
MMSEG_NAMES = {
    "stages.": "layers.",
    "patch_embed.projection.": "patch_embed.proj.",
    ".attn.w_msa.": ".attn.",
    ".ffn.layers.0.0.": ".mlp.fc1.",
    ".ffn.layers.1.": ".mlp.fc2.",
}

#: Classifier, final norm, a detector's norms norm0..norm3, what only pretraining masks with, and buffers that follow
#: from the window size.
IGNORED = re.compile(
    r"^(head|fc_norm|norm\d*)\.|^mask_token$|(^|\.)(relative_position_index|relative_coords_table|attn_mask|k_bias)$"
)


def load_weights(backbone: nn.Module, path: str | Path) -> None:
    """Fill timm's model with the weights in a local file; float16 and bfloat16 become the model's own type.

    Understands timm's, Microsoft's and mmsegmentation's key namings, bare, inside a training checkpoint
    (``{"model": ...}``, ``{"state_dict": ...}``) or inside a larger model (``module.``, ``backbone.`` and the like).
    The larger model's other parts are left out, as are classifier head, final norm, FPN norms and buffers.

    Args:
        backbone: timm's model, its ``norm`` and ``head`` replaced by ``nn.Identity()``. Changed in place; left exactly
            as it was if anything is wrong.
        path: A ``.safetensors``, ``.pth``, ``.pt``, ``.bin`` or ``.ckpt`` file.

    Raises:
        InputError: If the file is missing, damaged or needs pickled code, or if one weight is missing, unexpected, of
            another shape than the model's, or not finite.
    """
    path = Path(path)
    found = _innermost_backbone(_read(path), path)  # the file's keys, prefix off
    is_mmseg = any(key.startswith("stages.") for key in found)
    merges_last = is_mmseg or any(key.startswith("layers.0.downsample.") for key in found)

    weights, file_keys = {}, {}  # both by timm's key
    for file_key, tensor in found.items():
        if not IGNORED.search(file_key):
            key = _timm_key(file_key, is_mmseg, merges_last)
            weights[key], file_keys[key] = tensor, file_key
    _check(weights, file_keys, backbone.state_dict(), path)

    if is_mmseg:
        weights = {key: _from_unfold(tensor) if ".downsample." in key else tensor for key, tensor in weights.items()}
    backbone.load_state_dict(weights)


def fingerprint(backbone: nn.Module) -> str:
    """SHA-256 of a model's pretrained weights, as 64 hexadecimal digits.

    Depends on names and float32 values only, not on the file that the weights came from, nor on device or order.
    Adapters store it, so that they are never put beside weights that they were not trained with.
    """
    digest = hashlib.sha256()
    for key, tensor in sorted(backbone.state_dict().items()):
        digest.update(key.encode())
        digest.update(tensor.detach().to("cpu", torch.float32).contiguous().numpy())
    return digest.hexdigest()


def _read(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by name, training state around them taken off."""
    suffix = path.suffix.lower()
    if suffix not in (".safetensors", *PICKLED_SUFFIXES):
        known = ", ".join((".safetensors", *PICKLED_SUFFIXES))
        raise InputError(f"weights '{path}' end in '{path.suffix}': pass a file that ends in one of {known}.")
    if not path.is_file():
        raise InputError(f"there is no weights file '{path}': check the path.")
    try:
        content = load_file(path) if suffix == ".safetensors" else _unpickle(path)
    except InputError:
        raise
    except Exception as error:  # arbitrary bytes make the readers raise nearly anything
        raise InputError(
            f"weights '{path}' cannot be read as a {suffix} file ({type(error).__name__}): the file is damaged, cut "
            "short or of another kind; fetch it again."
        ) from error
    for _ in range(3):  # nested at most so deep; a loop with an end, since a file can hold a dict that holds itself
        for name in NESTINGS:
            if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
                content = content[name]
                break
    if not isinstance(content, Mapping):
        raise InputError(f"weights '{path}' hold a {type(content).__name__}: pass a file that holds a state dict.")
    return {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, Tensor)}


def _unpickle(path: Path) -> object:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on pickle protocols, in torch's words and with torch's line numbers
            # Mapping a file into memory reads only what is used: not the optimiser, not a head of 22K classes.
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:
        code = re.search(r"\bGLOBAL (\S+)", str(error))
        if code is None:
            raise
        raise InputError(
            f"weights '{path}' hold more than tensors and would have to run pickled code ({code[1]}), which is "
            "refused: save the state dict alone, as .safetensors, on a machine where you trust the file."
        ) from error


def _innermost_backbone(tensors: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Only the backbone's tensors, without the prefix that a larger model gave their names."""
    # Every backbone has exactly one patch embedding; what stands before its name stands before all the others.
    anchor = re.compile(r"^(|.*\.)patch_embed\.proj(?:ection)?\.weight$")
    prefixes = [match[1] for key in tensors if (match := anchor.match(key))]
    if not prefixes:
        raise InputError(
            f"weights '{path}' hold no backbone (no 'patch_embed.proj.weight' among {_listed(tensors)}): pass a "
            "file in timm's, Microsoft's or mmsegmentation's key naming."
        )
    if len(prefixes) > 1:
        raise InputError(
            f"weights '{path}' hold several backbones (under {_listed(prefixes)}): save the one you mean in a "
            "file of its own."
        )
    prefix = prefixes[0]
    return {key[len(prefix) :]: tensor for key, tensor in tensors.items() if key.startswith(prefix)}


def _timm_key(key: str, is_mmseg: bool, merges_last: bool) -> str:
    if is_mmseg:
        for theirs, ours in MMSEG_NAMES.items():
            key = key.replace(theirs, ours)
    if merges_last:
        key = re.sub(r"^layers\.(\d+)\.downsample\.", lambda stage: f"layers.{int(stage[1]) + 1}.downsample.", key)
    return key


def _from_unfold(tensor: Tensor) -> Tensor:
    """Input channels of a patch merging, (..., C * dh * dw) as nn.Unfold orders them -> (..., dw * dh * C)."""
    return tensor.unflatten(-1, (-1, 2, 2)).transpose(-1, -3).flatten(-3)


def _check(weights: dict[str, Tensor], file_keys: dict[str, str], model: dict[str, Tensor], path: Path) -> None:
    """Raise unless the weights have the model's names and shapes and finite values."""
    problems = [
        f"'{file_keys[key]}' is {tuple(weights[key].shape)} in the file and {tuple(model[key].shape)} in the model"
        for key in model
        if key in weights and weights[key].shape != model[key].shape
    ][:1]
    if unexpected := [file_keys[key] for key in weights if key not in model]:
        problems.append(f"the model has no {_listed(unexpected)}")
    if missing := [key for key in model if key not in weights]:
        problems.append(f"the file has no {_listed(missing)}")
    if problems:
        raise InputError(
            f"weights '{path}' do not fit this backbone: {'; '.join(problems)}; choose the --backbone that they were "
            f"made for{_described(weights)}."
        )
    for key, tensor in weights.items():
        # Sparse, quantised and integer tensors have no business here, and not every check below is defined on them.
        if tensor.layout != torch.strided or tensor.is_meta or not tensor.is_floating_point():
            raise InputError(
                f"'{file_keys[key]}' in weights '{path}' is no ordinary floating-point tensor ({tensor.dtype}): pass "
                "weights saved as float32 or float16."
            )
        # In the model's type, so that a number too large for it counts, too.
        if not tensor.to(model[key].dtype).isfinite().all():
            raise InputError(
                f"'{file_keys[key]}' in weights '{path}' is not finite (NaN or infinity): the training that wrote it "
                "diverged or the file is damaged; use another file."
            )


def _described(weights: dict[str, Tensor]) -> str:
    """Which Swin a file holds, for somebody who has to find its name; empty where the names do not tell."""
    blocks = {match.groups() for key in weights if (match := re.match(r"layers\.(\d+)\.blocks\.(\d+)\.", key))}
    depths = sorted(Counter(stage for stage, _ in blocks).items())
    table = weights.get("layers.0.blocks.0.attn.relative_position_bias_table")
    if not depths or table is None or table.ndim != 2:
        return ""
    width = weights["patch_embed.proj.weight"].shape[0]
    window = (isqrt(table.shape[0]) + 1) // 2  # the table has (2 * window - 1)^2 rows
    return f" (width {width}, depths {'-'.join(str(depth) for _, depth in depths)}, window {window})"


def _listed(names: Iterable[str], limit: int = 3) -> str:
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(f"'{name}'" for name in names[:limit]) + more
