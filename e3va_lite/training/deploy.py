"""Graphs for deployment: a run's model as one ONNX or ``torch.export`` file, compared with the model when written.

Inference needs no highway beside an autograd tape: a graph has one frozen forward pass and the low-rank sums.

    file      input                                              outputs
    maps      images, float (B, 3, H, W), normalised by you      stride4, stride8, ...: (B, C, H/s, W/s), rounded up
    voc       images, float (1, 3, H, W), RGB in 0..1            boxes (N, 4) in pixels, scores (N,), labels (N,): 1..K
    ade20k    images, float (1, 3, H, W), RGB in 0..1            logits (K, H, W), mask (H, W): 0..K-1

``maps`` is what ``backbone_only`` gives: of RGB in 0..1, subtract ``mean`` and divide by ``std`` before. The other two
normalise, resize and pad inside, as the model does, and detections are decoded and have passed the non-maximum
suppression. Mean, standard deviation, classes and the like are in the file as JSON: the metadata property ``e3va_lite``
of an ONNX file, the extra file ``e3va_lite.json`` of a ``torch.export`` file.
"""

import copy
import io
import json
import warnings
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..datasets.shapes import scene
from ..errors import InputError, unknown
from ..files import check_place, replacing
from ..tasks.detection import IMAGE_MEAN, IMAGE_STD
from .export import open_trained
from .trained_model import Trained

SUFFIXES = {"onnx": ".onnx", "torch-export": ".pt2"}
ABOUT = "e3va_lite"  # the name of the description in a file
BOUND = 1e-3  # difference between file and model, relative to an output's largest value, that makes a file an error
SIZES = ((224, 288), (256, 192))  # on which a file for any size is compared; neither is the one it is recorded with
RECORDED = (192, 256)


def deploy(
    run: Path,
    path: Path,
    format: str,
    backbone_only: bool = False,
    int8: bool = False,
    size: tuple[int, int] | None = None,
    best: bool = False,
    weights: str | None = None,
) -> dict:
    """Write a run's model as a graph, read the file back and compare it with the model.

    Args:
        run: A folder that ``e3va train`` wrote, or a file that ``e3va export`` wrote.
        path: A new file.
        format: ``onnx`` or ``torch-export``.
        backbone_only: The backbone's maps, without neck and head; a batch of any size.
        int8: Keep the frozen weights of linear layers in 8 bits, see :class:`Int8Linear`.
        size: Height and width of all images. Default: any, which only ``onnx`` has.
        best: Take the best checkpoint, not the last one.
        weights: See :func:`e3va_lite.training.trained_model.open_run`.

    Returns:
        ``bytes``, and ``differences``: per output the largest absolute difference between file and model, and that
        relative to the output's largest value. With ``int8`` also ``bytes_float32`` and ``map_errors``: per map, what
        the rounding of the weights changes, relative to the map (the root mean square of both).

    Raises:
        InputError: For a format, model or size that cannot be written, a missing package, a file that exists, or one
            that computes something else than the model; then there is none.
    """
    if format not in SUFFIXES:
        raise unknown("format", format, SUFFIXES)
    if path.suffix != SUFFIXES[format]:
        raise InputError(f"'{path}' must end in {SUFFIXES[format]}.")
    missing = [name for name in ("onnx", "onnxruntime") if format == "onnx" and find_spec(name) is None]
    if missing:
        raise InputError(f"--format onnx needs {' and '.join(missing)}: pip install onnx onnxruntime")
    if format == "torch-export" and size is None:
        raise InputError(
            "--format torch-export needs --size HEIGHTxWIDTH, because torch.export does not get through Swin's padding "
            "to whole windows where the size is open; --format onnx makes files for any size."
        )
    check_place(path, overwrite=None)
    trained = open_trained(run, best, weights)
    model, report = trained.model.eval(), {}
    whole = recordable(model)
    graph, names = as_graph(whole, trained, backbone_only, format)
    if int8:
        layers = frozen_linears(model, trained.recipe.method)
        report["float32_bytes_saved"] = to_int8(whole, layers)
        rounded = with_rounded_weights(model, layers)
        report["map_errors"] = map_errors(model, rounded)
        model = rounded
    eager, _ = as_graph(model, trained, backbone_only, format)
    about = described(trained, names, backbone_only, int8, size)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as unfinished:
        WRITERS[format](graph, names, unfinished, about, size, backbone_only)
        report["bytes"] = unfinished.stat().st_size
        report["differences"] = compare(READERS[format](unfinished, names), eager, names, size, path)
    return report


# What is written ------------------------------------------------------------------------------------------------------


class Maps(nn.Module):
    """A backbone with a tuple of maps."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.body(images))


class Detector(nn.Module):
    """A RetinaNet for one image."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        (found,) = self.model([images[0]])
        return found["boxes"], found["scores"], found["labels"]


class Segmenter(nn.Module):
    """A UPerNet for one image."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        logits = self.model.logits(images[0])
        return logits, logits.argmax(0)


def as_graph(model: nn.Module, trained: Trained, backbone_only: bool, format: str) -> tuple[nn.Module, list[str]]:
    """The module that is recorded, from images to tensors, and the names of its outputs."""
    if backbone_only:
        body = model.backbone.body
        return Maps(body).eval(), [f"stride{stride}" for stride in body.strides]
    if trained.recipe.task == "coco":
        raise InputError(
            "a Cascade Mask R-CNN cannot be recorded, since it loops over the objects it finds: take --backbone-only."
        )
    if trained.recipe.task != "ade20k" and format == "torch-export":
        raise InputError(
            "torch.export does not get through a RetinaNet's choice of boxes: take --format onnx, or --backbone-only."
        )
    if trained.recipe.task == "ade20k":
        return Segmenter(model).eval(), ["logits", "mask"]
    return Detector(model).eval(), ["boxes", "scores", "labels"]


def recordable(model: nn.Module) -> nn.Module:
    """A copy with LoRA's updates in the weights and poolings that can be recorded for any size."""
    model = copy.deepcopy(model)
    if hasattr(model.backbone.body, "merge"):
        model.backbone.body.merge()
    for pool in [m for m in model.modules() if isinstance(m, nn.AdaptiveAvgPool2d)]:
        pool.__class__ = AveragePool
    return model


class AveragePool(nn.AdaptiveAvgPool2d):
    """The same as two matrix products, which ONNX has for maps of any size."""

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = (means(length, self.output_size, x) for length in x.shape[-2:])
        return rows @ x @ columns.transpose(0, 1)


def means(length: int, cells: int, like: Tensor) -> Tensor:
    """(cells, length): each row takes the mean of one cell's places."""
    place, cell = torch.arange(length, device=like.device), torch.arange(cells, device=like.device)[:, None]
    begin, end = cell * length // cells, ((cell + 1) * length + cells - 1) // cells
    return ((begin <= place) & (place < end)).to(like.dtype) / (end - begin).to(like.dtype)


def described(trained: Trained, names: list[str], backbone_only: bool, int8: bool, size: tuple | None) -> str:
    """The JSON that a file carries."""
    return json.dumps(
        {
            "input": "images",
            "layout": f"float32 ({'B' if backbone_only else 1}, 3, H, W), RGB",
            "range": "0..1, then minus mean, divided by std" if backbone_only else "0..1",
            "mean": IMAGE_MEAN,
            "std": IMAGE_STD,
            "normalised": "outside" if backbone_only else "inside",
            "size": size or "any of 32 or more",
            "outputs": names,
            "task": trained.recipe.task,
            "classes": trained.classes,
            "category_ids": trained.category_ids,
            "method": trained.recipe.method,
            "backbone": trained.recipe.backbone,
            "weights": trained.weights,
            "step": trained.step,
            "int8": int8,
        }
    )


# Eight bits -----------------------------------------------------------------------------------------------------------


class Int8Linear(nn.Module):
    """A linear layer whose weight is kept in 8 bits, with one scale per output channel; it computes in float.

    ONNX Runtime turns the weight into float when it opens a file: the file is smaller, inference takes as long.
    """

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        scale = layer.weight.detach().abs().amax(1, keepdim=True).clamp(min=1e-12) / 127  # (out, 1)
        self.register_buffer("scale", scale)
        self.register_buffer("codes", (layer.weight.detach() / scale).round().to(torch.int8))  # (out, in)
        self.bias = layer.bias

    @property
    def weight(self) -> Tensor:
        return self.codes.to(self.scale.dtype) * self.scale

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


def frozen_linears(model: nn.Module, method: str) -> list[str]:
    """Names of the linear layers of the pretrained part that training cannot change."""
    start = "backbone.body.backbone."
    found = [
        name
        for name, module in model.named_modules()
        if name.startswith(start) and isinstance(module, nn.Linear) and not module.weight.requires_grad
    ]
    if not found:
        raise InputError(f"--int8 is for frozen weights, and {method} trains those of the backbone: leave it out.")
    return found


def to_int8(model: nn.Module, names: list[str]) -> int:
    """Replace the layers of these names by :class:`Int8Linear`; return the bytes that this saves."""
    saved = 0
    for name in names:
        layer = Int8Linear(model.get_submodule(name))
        model.set_submodule(name, layer)
        saved += 3 * layer.codes.numel() - 4 * layer.scale.numel()
    return saved


def with_rounded_weights(model: nn.Module, names: list[str]) -> nn.Module:
    """A copy that computes in float what :class:`Int8Linear` computes."""
    model = recordable(model)
    for layer in map(model.get_submodule, names):
        layer.weight.data = Int8Linear(layer).weight
    return model


@torch.no_grad()
def map_errors(model: nn.Module, other: nn.Module) -> list[float]:
    """What ``other`` changes in each map of a generated scene, relative to the map."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGE_MEAN, IMAGE_STD))
    images = (scene_image(*SIZES[0]) - mean) / std
    pairs = zip(other.backbone.body(images), model.backbone.body(images), strict=True)
    return [((a - b).norm() / b.norm()).item() for a, b in pairs]


# Formats --------------------------------------------------------------------------------------------------------------


def write_onnx(graph: nn.Module, names: list[str], path: Path, about: str, size: tuple | None, batch: bool) -> None:
    """By torch's older exporter, which records shapes as operators; the newer one goes through ``torch.export``."""
    import onnx

    axes = {"images": ({0: "batch"} if batch else {}) | ({} if size else {2: "height", 3: "width"})}
    for name in names:
        if name in ("boxes", "scores", "labels"):
            axes[name] = {0: "objects"}
        elif name in ("logits", "mask"):
            axes[name] = (
                {} if size else dict(zip((1, 2) if name == "logits" else (0, 1), ("height", "width"), strict=True))
            )
        else:
            axes[name] = {0: "batch"} | ({} if size else {2: f"height_{name}", 3: f"width_{name}"})
    file = io.BytesIO()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of deprecation, and of Python numbers that are constants in any case
        torch.onnx.export(
            graph, (torch.rand(1 + batch, 3, *(size or RECORDED)),), file, dynamo=False, opset_version=17,
            input_names=["images"], output_names=names, dynamic_axes=axes, do_constant_folding=False,
        )  # fmt: skip
    written = onnx.load_from_string(file.getvalue())
    onnx.helper.set_model_props(written, {ABOUT: about})
    onnx.save(written, path)


def read_onnx(path: Path, names: list[str]):
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda images: [torch.from_numpy(x) for x in session.run(names, {"images": images.numpy()})]


def write_torch_export(
    graph: nn.Module, names: list[str], path: Path, about: str, size: tuple | None, batch: bool
) -> None:
    """By :func:`torch.export.export`, with a batch of any size for maps."""
    shapes = ({0: torch.export.Dim("batch")} if batch else None,)
    with torch.no_grad():
        program = torch.export.export(graph, (torch.rand(1 + batch, 3, *size),), dynamic_shapes=shapes)
    file = io.BytesIO()  # torch wants the name to end in .pt2
    torch.export.save(program, file, extra_files={f"{ABOUT}.json": about})
    path.write_bytes(file.getvalue())


def read_torch_export(path: Path, names: list[str]):
    return torch.export.load(io.BytesIO(path.read_bytes())).module()


WRITERS = {"onnx": write_onnx, "torch-export": write_torch_export}
READERS = {"onnx": read_onnx, "torch-export": read_torch_export}


# Comparison -----------------------------------------------------------------------------------------------------------


def scene_image(height: int, width: int, index: int = 1) -> Tensor:
    """A generated scene, float (1, 3, H, W) in 0..1."""
    image = scene(0, index, max(64, height, width)).image[:height, :width]
    return torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None].float() / 255


@torch.no_grad()
def compare(run_file, eager: nn.Module, names: list[str], size: tuple | None, path: Path) -> dict[str, list[float]]:
    """Largest absolute and relative difference of every output on two scenes, see :func:`deploy`."""
    worst = {name: [0.0, 0.0] for name in names if name not in ("labels", "mask")}
    for index, (height, width) in enumerate((size, size) if size else SIZES, start=1):
        images = scene_image(height, width, index)
        found, wanted = (dict(zip(names, model(images), strict=True)) for model in (run_file, eager))
        if "boxes" in names:
            found, wanted = paired(found, wanted, path)
        for name, differences in worst.items():
            if found[name].shape != wanted[name].shape:
                raise InputError(f"'{path}' was not written: {name} of {height}x{width} has another shape there.")
            if wanted[name].numel():
                absolute = (found[name] - wanted[name]).abs().max().item()
                relative = absolute / max(wanted[name].abs().max().item(), 1e-12)
                worst[name] = [max(differences[0], absolute), max(differences[1], relative)]
    for name, (absolute, relative) in worst.items():
        if not relative <= BOUND:
            raise InputError(
                f"'{path}' was not written: its {name} differ from the model's by {absolute:.2g}, {relative:.2g} of "
                f"the largest value where {BOUND:g} is the limit; try the other --format, or --backbone-only."
            )
    return worst


def paired(found: dict, wanted: dict, path: Path) -> tuple[dict, dict]:
    """Detections of file and model in one order; at most one in fifty may have no partner, at a threshold."""
    side = wanted["boxes"].abs().amax() if len(wanted["boxes"]) else 1.0
    a, b = (torch.cat([x["boxes"] / side, x["scores"][:, None], x["labels"][:, None]], 1) for x in (wanted, found))
    near = torch.cdist(a, b, p=torch.inf)  # (wanted, found)
    both = (near.amin(1) < 0.02).nonzero()[:, 0] if near.numel() else torch.zeros(0, dtype=torch.int64)
    if max(len(a), len(b)) - len(both) > max(len(a), len(b)) / 50:
        raise InputError(f"'{path}' was not written: it finds {len(b)} objects, the model {len(a)}, {len(both)} alike.")
    partner = near[both].argmin(1) if len(both) else both
    return {k: x[partner] for k, x in found.items()}, {k: x[both] for k, x in wanted.items()}


def as_text(report: dict) -> str:
    """What the command prints below the name and size of the file."""
    lines = [
        f"{name}: differs from the model by {absolute:.1e}, {relative:.1e} of the largest value"
        for name, (absolute, relative) in report["differences"].items()
    ]
    if "map_errors" in report:
        before = (report["bytes"] + report["float32_bytes_saved"]) / 1e6
        errors = ", ".join(f"{100 * error:.2f} %" for error in report["map_errors"])
        lines += [f"8-bit weights: {before:.2f} MB in float32; the maps of a generated scene change by {errors}"]
    return "\n".join(lines)
