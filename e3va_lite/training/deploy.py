"""Graphs for deployment: a run's model as one ONNX or ``torch.export`` file, compared with the model when written.

Inference keeps nothing for a backward pass: a graph is one frozen forward pass and the low-rank sums.

    file      input                                              outputs
    maps      images, float (B, 3, H, W), normalised by you      stride4, stride8, ...: (B, C, H/s, W/s), rounded up
    voc       images, float (1, 3, H, W), RGB in 0..1            boxes (N, 4) in pixels, scores (N,), labels (N,): 1..K
    ade20k    images, float (1, 3, H, W), RGB in 0..1            logits (K, H, W), mask (H, W): 0..K-1

``maps`` is what ``backbone_only`` gives: of RGB in 0..1, subtract ``mean`` and divide by ``std`` before. The other two
normalise, resize and pad inside, as the model does; boxes are decoded and have passed the non-maximum suppression.
Mean, standard deviation, classes and the like are in the file as JSON: the metadata property ``e3va_lite`` of an ONNX
file, the extra file ``e3va_lite.json`` of a ``torch.export`` file.
"""

import io
import json
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from ..datasets.shapes import scene
from ..errors import InputError, unknown
from ..files import check_place, replacing
from ..tasks.detection import IMAGE_MEAN, IMAGE_STD
from .export import open_trained
from .graphs import OUTPUTS, Graph, detection, frozen_linears, maps, merged, recordable, segmentation, to_int8
from .trained_model import Trained

SUFFIXES = {"onnx": ".onnx", "torch-export": ".pt2"}
ABOUT = "e3va_lite"  # the name of the description in a file
BOUND = 1e-3  # of an output's largest value: a file that differs from the model by more is an error
RECORDED, COMPARED = (192, 256), ((224, 288), (250, 190))  # sizes with which a file for any size is made, and compared


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
    """Write a run's model as a graph, read the file back and compare it with the model on two generated scenes.

    Args:
        run: A folder that ``e3va train`` wrote, or a file that ``e3va export`` wrote.
        path: A new file.
        format: ``onnx`` or ``torch-export``.
        backbone_only: Images to maps, without neck and head, for a batch of any size.
        int8: Keep the frozen weights of linear layers in 8 bits, see :class:`.graphs.Int8Linear`.
        size: Height and width of all images. Default: any, which only ``onnx`` has.
        best: Take the best checkpoint, not the last one.
        weights: See :func:`e3va_lite.training.trained_model.open_run`.

    Returns:
        ``bytes``, and ``differences``: per output the largest absolute difference between file and model, and that
        divided by the output's largest value. For a detector ``objects``, how many were compared. With ``int8`` also
        ``bytes_float32`` and ``map_errors``: what 8 bits change in each map, relative to the map (root mean squares).

    Raises:
        InputError: For a format, model or size that cannot be written, a missing package, a file that exists, or one
            that computes something else than the model, which is removed.
    """
    if format not in SUFFIXES:
        raise unknown("format", format, SUFFIXES)
    if path.suffix != SUFFIXES[format]:
        raise InputError(f"'{path}' must end in {SUFFIXES[format]}.")
    if missing := [name for name in ("onnx", "onnxruntime") if format == "onnx" and find_spec(name) is None]:
        raise InputError(f"--format onnx needs {' and '.join(missing)}: pip install onnx onnxruntime")
    if format == "torch-export" and size is None:
        raise InputError(
            "--format torch-export needs --size HEIGHTxWIDTH: torch.export's arithmetic of open sizes does not come to "
            "an end with Swin's padding to whole windows; --format onnx makes files for any size."
        )
    check_place(path, overwrite=None)
    trained = open_trained(run, best, weights)
    if trained.recipe.task == "coco" and not backbone_only:
        raise InputError(
            "a Cascade Mask R-CNN cannot be recorded, since it loops over the objects that it finds: take "
            "--backbone-only, whose file has the maps."
        )
    if format == "onnx" and getattr(trained.model.backbone.body.backbone, "pos_embed", None) is not None:
        raise InputError(
            f"{trained.recipe.backbone} resizes its position embedding with antialiasing, which ONNX does not have: "
            "take --format torch-export."
        )
    model, report = trained.model.eval(), {}
    graph = recordable(merged(model), format)
    if int8:
        layers = frozen_linears(graph, trained.recipe.method)
        saved, model = to_int8(layers, graph, rounded := merged(model)), rounded
        report["map_errors"] = map_errors(trained.model, rounded)
    outputs = maps if backbone_only else segmentation if trained.recipe.task == "ade20k" else detection
    names = [f"stride{s}" for s in model.backbone.body.strides] if backbone_only else OUTPUTS[outputs]
    graph, eager = (Graph(x.backbone.body if backbone_only else x, outputs) for x in (graph, model))
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as unfinished:
        try:
            WRITERS[format](graph, names, unfinished, about(trained, names, backbone_only, int8, size), size)
        except OSError as error:
            raise InputError(f"'{path}' cannot be written ({error}): make room, or choose another --out.") from error
        except Exception as error:  # exporters raise every kind
            what = f"{trained.recipe.method} on {trained.recipe.backbone}"
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise InputError(f"{what} cannot be recorded with --format {format} ({reason}): take the other.") from error
        report["bytes"] = unfinished.stat().st_size
        report |= compare(READERS[format](unfinished, names), eager, names, size, path)
    return report | ({"bytes_float32": report["bytes"] + saved} if int8 else {})


def about(trained: Trained, names: list[str], backbone_only: bool, int8: bool, size: tuple | None) -> str:
    """The JSON that a file carries."""
    recipe = trained.recipe
    described = {
        "input": {
            "images": f"float32 ({'B' if backbone_only else 1}, 3, H, W), RGB in 0..1"
            + (", minus mean, divided by std" if backbone_only else ", normalised inside"),
            "mean": IMAGE_MEAN,
            "std": IMAGE_STD,
            "size": size or "any, both sides 32 or more",
        },
        "outputs": names,
        "classes": trained.classes,
        "category_ids": trained.category_ids,
        "made_from": {key: getattr(recipe, key) for key in ("task", "method", "options", "backbone", "stages")}
        | {"weights": trained.weights, "step": trained.step, "int8": int8},
    }
    return json.dumps(described)


@torch.no_grad()
def map_errors(model: nn.Module, other: nn.Module) -> list[float]:
    """What ``other`` changes in each map of a generated scene, relative to the map."""
    images = scene_image(*COMPARED[0], normalised=True)
    pairs = zip(other.backbone.body(images), model.backbone.body(images), strict=True)
    return [((a - b).norm() / b.norm()).item() for a, b in pairs]


# Formats --------------------------------------------------------------------------------------------------------------


def write_onnx(graph: Graph, names: list[str], path: Path, about: str, size: tuple[int, int] | None) -> None:
    """By torch's older exporter, which records shapes as operators; the newer one is :func:`torch.export.export`."""
    import onnx

    file = io.BytesIO()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # that it is the older one, and of numbers that are constants in any case
        torch.onnx.export(
            graph,
            (example(graph, size),),
            file,
            dynamo=False,
            opset_version=17,
            do_constant_folding=False,  # it would make 8 bits 32 again; runtimes fold when they open a file
            input_names=["images"],
            output_names=names,
            dynamic_axes={name: open_axes(name, graph.outputs is maps, size) for name in ["images", *names]},
        )
    written = onnx.load_from_string(file.getvalue())
    onnx.helper.set_model_props(written, {ABOUT: about})
    onnx.save(written, path)


def open_axes(name: str, batch: bool, size: tuple[int, int] | None) -> dict[int, str]:
    """The axes of an input or output that can have any length, and their names."""
    sides = {"logits": (1, 2), "mask": (0, 1), "images": (2, 3)}.get(name, (2, 3) if batch else ())
    axes = {0: "batch"} if batch else {} if sides else {0: "objects"}
    of = "" if name in ("logits", "mask", "images") else f"_{name}"
    return axes | ({} if size else dict(zip(sides, (f"height{of}", f"width{of}"), strict=False)))


def read_onnx(path: Path, names: list[str]) -> Callable[[Tensor], list[Tensor]]:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda images: [torch.from_numpy(x) for x in session.run(names, {"images": images.numpy()})]


def write_torch_export(graph: Graph, names: list[str], path: Path, about: str, size: tuple[int, int]) -> None:
    shapes = ({0: torch.export.Dim("batch")} if graph.outputs is maps else None,)
    with torch.no_grad():
        program = torch.export.export(graph, (example(graph, size),), dynamic_shapes=shapes)
    file = io.BytesIO()  # of a file, torch wants the name to end in .pt2
    torch.export.save(program, file, extra_files={f"{ABOUT}.json": about})
    path.write_bytes(file.getvalue())


def read_torch_export(path: Path, names: list[str]) -> Callable[[Tensor], tuple[Tensor, ...]]:
    return torch.export.load(io.BytesIO(path.read_bytes())).module()


WRITERS = {"onnx": write_onnx, "torch-export": write_torch_export}
READERS = {"onnx": read_onnx, "torch-export": read_torch_export}


# Comparison -----------------------------------------------------------------------------------------------------------


def scene_image(height: int, width: int, normalised: bool = False, index: int = 1) -> Tensor:
    """A generated scene, float (1, 3, H, W), in 0..1 or normalised."""
    image = torch.tensor(scene(0, index, max(64, height, width)).image[:height, :width]).permute(2, 0, 1) / 255
    mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGE_MEAN, IMAGE_STD))
    return ((image - mean) / std if normalised else image)[None]


def example(graph: Graph, size: tuple[int, int] | None) -> Tensor:
    """What a graph is recorded with: an axis of length 1 would be taken as fixed, so a batch has two images."""
    batch = graph.outputs is maps
    return scene_image(*(size or RECORDED), normalised=batch).repeat(1 + batch, 1, 1, 1)


@torch.no_grad()
def compare(run_file: Callable, eager: Graph, names: list[str], size: tuple | None, path: Path) -> dict:
    """``differences`` and, of a detector, ``objects``; see :func:`deploy`."""
    report = {"differences": {name: (0.0, 0.0) for name in names if name not in ("labels", "mask")}}
    for index, (height, width) in enumerate([size] * 2 if size else COMPARED, start=1):
        images = scene_image(height, width, eager.outputs is maps, index)
        found, wanted = (dict(zip(names, model(images), strict=True)) for model in (run_file, eager))
        if eager.outputs is detection:
            found, wanted = paired(found, wanted, path)
            report["objects"] = report.get("objects", 0) + len(wanted["scores"])
        for name, worst in report["differences"].items():
            a, b = found[name], wanted[name]
            absolute = relative = torch.inf
            if a.shape == b.shape:
                absolute = (a - b).abs().max().item() if b.numel() else 0.0
                relative = absolute / max(b.abs().max().item(), 1e-12) if b.numel() else 0.0
            if not relative <= BOUND:
                raise InputError(
                    f"'{path}' was not written: for {height}x{width} its {name} differ from the model's by "
                    f"{relative:.1e} of the largest value, where {BOUND:g} is the limit: take another --format."
                )
            report["differences"][name] = tuple(map(max, worst, (absolute, relative)))
    return report


def paired(found: dict, wanted: dict, path: Path) -> tuple[dict, dict]:
    """Detections of file and model in one order; one in fifty may have no partner, as scores lie at a threshold."""
    side = wanted["boxes"].amax() if len(wanted["boxes"]) else 1.0
    a, b = (torch.cat([x["boxes"] / side, x["scores"][:, None], x["labels"][:, None]], 1) for x in (wanted, found))
    distance = torch.cdist(a, b, p=torch.inf)  # (wanted, found)
    alike = [n for n, row in enumerate(distance) if len(row) and row.min() < 10 * BOUND]
    if max(len(a), len(b)) - len(alike) > max(len(a), len(b)) / 50:
        raise InputError(
            f"'{path}' was not written: in a scene it finds {len(b)} objects, the model {len(a)}, {len(alike)} alike."
        )
    partner = [distance[n].argmin().item() for n in alike]
    return {k: x[partner] for k, x in found.items()}, {k: x[alike] for k, x in wanted.items()}


def as_text(report: dict) -> list[str]:
    """The lines that the command prints below the file's name and size."""
    lines = [
        f"{name}: at most {absolute:.1e} from the model's, {relative:.1e} of the largest value"
        for name, (absolute, relative) in report["differences"].items()
    ]
    if "objects" in report:
        lines += [f"compared on {report['objects']} objects in two generated scenes"]
    if "map_errors" in report:
        errors = ", ".join(f"{100 * error:.2f} %" for error in report["map_errors"])
        lines += [
            f"8 bits: {report['bytes_float32'] / 1e6:.2f} MB without; a generated scene's maps change by {errors}"
        ]
    return lines
