"""What :mod:`.deploy` records: a model as a function from images to tensors, in operators that can be recorded."""

import copy
from collections.abc import Callable
from types import MethodType

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection import RetinaNet
from torchvision.ops import clip_boxes_to_image, nms

from ..errors import InputError


class Graph(nn.Module):
    """A model as a function from images to a tuple of tensors."""

    def __init__(self, model: nn.Module, outputs: Callable) -> None:
        super().__init__()
        self.model, self.outputs = model, outputs

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return self.outputs(self.model, images)


def maps(backbone: nn.Module, images: Tensor) -> tuple[Tensor, ...]:
    return tuple(backbone(images))


def detection(model: nn.Module, images: Tensor) -> tuple[Tensor, ...]:
    (found,) = model([images[0]])
    return found["boxes"], found["scores"], found["labels"]


def segmentation(model: nn.Module, images: Tensor) -> tuple[Tensor, ...]:
    logits = model.logits(images[0])
    return logits, logits.argmax(0)


OUTPUTS = {detection: ["boxes", "scores", "labels"], segmentation: ["logits", "mask"]}


def merged(model: nn.Module) -> nn.Module:
    """A copy with LoRA's updates in the weights, and without the stages that are never run."""
    model = copy.deepcopy(model)
    body = model.backbone.body
    if hasattr(body, "merge"):
        body.merge()
    body.backbone.layers = body.backbone.layers[: body.last_stage]
    return model


def recordable(model: nn.Module, format: str) -> nn.Module:
    """Exchange in place what cannot be recorded as it is, for the same in other operators."""
    for pool in [m for m in model.modules() if isinstance(m, nn.AdaptiveAvgPool2d)]:
        pool.__class__ = AveragePool
    if isinstance(model, RetinaNet) and format == "torch-export":
        model.postprocess_detections = MethodType(choose_boxes, model)
    if hasattr(model, "auxiliary_head"):
        model.auxiliary_head = None  # for training only
    return model


class AveragePool(nn.AdaptiveAvgPool2d):
    """As two matrix products, which ONNX has for maps of any size."""

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = (self.means(length, x) for length in x.shape[-2:])
        return rows @ x @ columns.transpose(0, 1)

    def means(self, length: int, x: Tensor) -> Tensor:
        """(cells, length): each row takes the mean of one cell's places."""
        cells = self.output_size
        place, cell = torch.arange(length, device=x.device), torch.arange(cells, device=x.device)[:, None]
        # Rounded up without a negative number, of which ONNX's division rounds towards zero.
        begin, end = cell * length // cells, ((cell + 1) * length + cells - 1) // cells
        return ((begin <= place) & (place < end)).to(x.dtype) / (end - begin).to(x.dtype)


def choose_boxes(self: RetinaNet, outputs: dict, anchors: list, sizes: list[tuple[int, int]]) -> list[dict]:
    """Torchvision's ``postprocess_detections`` for one image, with shapes that do not depend on scores until the end.

    Torchvision drops low scores first. Here they come last in the suppression, where they suppress nothing higher.
    """
    candidates = []
    for logits, offsets, places in zip(outputs["cls_logits"], outputs["bbox_regression"], anchors[0], strict=True):
        scores = logits[0].sigmoid().flatten()
        scores, index = scores.topk(min(self.topk_candidates, len(scores)))
        place, label = index // logits.shape[-1], index % logits.shape[-1]
        boxes = self.box_coder.decode_single(offsets[0][place], places[place])
        candidates.append((clip_boxes_to_image(boxes, sizes[0]), scores, label))
    boxes, scores, labels = map(torch.cat, zip(*candidates, strict=True))
    apart = (labels * (boxes.max() + 1))[:, None]  # classes do not suppress each other
    kept = nms(boxes + apart, scores, self.nms_thresh)
    kept = kept[scores[kept] > self.score_thresh][: self.detections_per_img]
    return [{"boxes": boxes[kept], "scores": scores[kept], "labels": labels[kept]}]


# Eight bits -----------------------------------------------------------------------------------------------------------


class Int8Linear(nn.Module):
    """A linear layer whose weight is kept in 8 bits, with one scale per output channel; it computes in float.

    The file is smaller; inference takes as long, since ONNX Runtime makes the weights float when it opens the file.
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
    """Names of the linear layers of the pretrained part that training did not change, of a :func:`merged` model."""
    start = "backbone.body.backbone."
    found = [
        name
        for name, module in model.named_modules()
        if name.startswith(start) and isinstance(module, nn.Linear) and not module.weight.requires_grad
    ]
    if not found:
        raise InputError(f"--int8 is for frozen weights, and {method} trains those of the backbone: leave it out.")
    return found


def to_int8(names: list[str], graph: nn.Module, rounded: nn.Module) -> int:
    """Replace these layers in ``graph``, round their weights in ``rounded``; return the bytes that a file saves."""
    saved = 0
    for name in names:
        layer = Int8Linear(rounded.get_submodule(name))
        graph.set_submodule(name, layer)
        rounded.get_submodule(name).weight.data = layer.weight
        saved += 3 * layer.codes.numel() - 4 * layer.scale.numel()
    return saved
