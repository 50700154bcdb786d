"""One training step of a whole model on an artificial batch: what the ledger, the clock and `e3va fit` measure.

Nothing here reads a dataset. How much work a detector's heads have depends on what is in the images and on what the
detector has learnt. Here it is fixed, at the most that training can ask for, so that runs are comparable and later
steps of a training need no more memory than this one:

- every image has ``OBJECTS`` objects, on a grid; their masks are noise;
- Cascade Mask R-CNN's proposals are not the network's but fixed: every object's box many times over, and at half its
  size as background. Each of its three stages trains on all the boxes per image that the recipe allows (512), and a
  quarter of them (128) have an object.

A dry run builds the model out of torch's fake tensors, which have shapes and no numbers. What does not depend on the
network (anchors, objects, proposals, how they match) is computed as ever; the network moves no box.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from ..backbones.swin import MIN_SIZE
from ..errors import InputError
from ..recipes.schema import Recipe
from ..training.engine import autocast, build_model, build_optimizer
from .memory import Ledger, ledger

OBJECTS = 8  # per image
CLASSES = {"voc": 20, "coco": 80, "coco-boxes": 80, "ade20k": 150}  # of the datasets themselves


class Step:
    """A model, its optimizer and a batch, and the three parts of a training step.

    Attributes:
        model: In train mode.
        optimizer: Its learning rate is zero, so that a step may be repeated: it is measured, not trained.
        images: List of B float tensors (3, H, W) in 0..1; ``targets``: list of B dicts, as the task wants them.
    """

    def __init__(self, recipe: Recipe, model: nn.Module, images: list[Tensor], targets: list[dict]) -> None:
        self.recipe, self.model, self.images, self.targets = recipe, model.train(), images, targets
        self.optimizer = build_optimizer(model, replace(recipe, head_lr=None))
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0

    def forward(self) -> Tensor:
        """The sum of the losses, in the recipe's precision."""
        with autocast(self.recipe, self.images[0].device):
            return sum(self.model(self.images, self.targets).values())

    def backward(self, loss: Tensor) -> None:
        """Gradients of the loss."""
        loss.backward()

    def update(self) -> None:
        """The optimizer's part."""
        self.optimizer.step()
        self.optimizer.zero_grad()

    def ledger(self) -> Ledger:
        """The memory of this step, see :func:`e3va_lite.analysis.memory.ledger`."""
        tensors = [*self.images, *(x for target in self.targets for x in target.values() if isinstance(x, Tensor))]
        with _DryRun() if isinstance(self.images[0], FakeTensor) else nullcontext():
            return ledger(self.model, self.optimizer, self.forward, tensors)


def build_step(recipe: Recipe, size: tuple[int, int], device: torch.device, dry_run: bool = False) -> Step:
    """A training step of the recipe's model on ``recipe.batch`` images of one size.

    The backbone's weights are random: what a step costs does not depend on them.

    Args:
        recipe: Says everything but the images. Detectors do not resize them.
        size: Height and width in pixels.
        device: Where to run; for a dry run, what to imitate.
        dry_run: Allocate no weights and compute nothing.

    Raises:
        InputError: For a size that the model cannot take.
    """
    if min(size) < MIN_SIZE:
        raise InputError(f"size {size[0]}x{size[1]} is too small: take sides of {MIN_SIZE} pixels or more.")
    recipe = replace(recipe, pretrained=False, weights=None)
    if recipe.task != "ade20k":
        recipe = replace(recipe, min_size=min(size), max_size=max(size))
    if recipe.task == "coco":
        recipe = replace(recipe, min_sizes=[min(size)], crop=False)
    classes = len(recipe.classes or ()) or CLASSES[recipe.task]
    if dry_run:
        with torch.device("meta"):
            model = build_model(recipe, classes)
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        _fake(model, mode, device)
    else:
        mode, model = nullcontext(), build_model(recipe, classes).to(device)
    targets = [_objects(size, classes, device) if recipe.task != "ade20k" else {} for _ in range(recipe.batch)]
    with mode:
        images = [torch.rand(3, *size, device=device) for _ in range(recipe.batch)]
        for target in targets:
            target |= _masks(recipe.task, size, classes, device)
    if recipe.task == "coco":
        model.rpn.filter_proposals = _FixedProposals(targets, recipe.samples)
        for stage in model.roi_heads.stages if dry_run else ():
            stage.offsets.register_forward_hook(lambda module, args, output: _Zeros.apply(output))
    return Step(recipe, model, images, targets)


def training_size(recipe: Recipe) -> tuple[int, int]:
    """Height and width of the largest image that the recipe trains on, as padded for a detector."""
    if recipe.task == "ade20k":
        return recipe.crop, recipe.crop
    if (canvas := getattr(recipe, "canvas", None)) is not None:
        return canvas, canvas
    return -(-recipe.min_size // 32) * 32, -(-recipe.max_size // 32) * 32


def _fake(model: nn.Module, mode: FakeTensorMode, device: torch.device) -> None:
    """Replace a meta model's parameters and buffers by fake tensors."""
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                module._parameters[name] = nn.Parameter(FakeTensor(mode, p.detach(), device), p.requires_grad)
        for name, b in module._buffers.items():
            if b is not None:
                module._buffers[name] = FakeTensor(mode, b, device)


def _objects(size: tuple[int, int], classes: int, device: torch.device) -> dict[str, Tensor]:
    """The objects of an image: the middles of the cells of a grid four cells wide."""
    height, width = size
    grid = torch.cartesian_prod(torch.arange(4.0), torch.arange(OBJECTS / 4))  # (OBJECTS, 2)
    cell = torch.tensor([width / 4, height / (OBJECTS / 4)])
    boxes = torch.cat([(grid + 0.3) * cell, (grid + 0.7) * cell], dim=1)
    return {"boxes": boxes.to(device), "labels": (1 + torch.arange(OBJECTS) % classes).to(device)}


def _masks(task: str, size: tuple[int, int], classes: int, device: torch.device) -> dict[str, Tensor]:
    """Masks, fake in a dry run: nothing depends on their content."""
    if task == "ade20k":
        return {"mask": torch.randint(classes, size, device=device)}
    if task == "coco":
        return {"masks": torch.randint(2, (OBJECTS, *size), dtype=torch.uint8, device=device)}
    return {}


class _FixedProposals:
    """Replaces a proposal network's choice among its proposals by fixed boxes."""

    def __init__(self, targets: list[dict], samples: int) -> None:
        copies = -(-samples // OBJECTS)
        self.boxes = [torch.cat([b, _halved(b)]).repeat(copies, 1) for b in (target["boxes"] for target in targets)]

    def __call__(self, *args: object) -> tuple[list[Tensor], None]:
        return self.boxes, None


def _halved(boxes: Tensor) -> Tensor:
    """Half as wide and half as high about the same centre: an overlap of a quarter."""
    low, high = boxes[:, :2], boxes[:, 2:]
    return torch.cat([0.75 * low + 0.25 * high, 0.25 * low + 0.75 * high], dim=1)


class _Zeros(torch.autograd.Function):
    """Takes the box offsets of a dry run, which have no numbers, as zeros."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return torch.zeros(x.shape, dtype=x.dtype, device=x.device)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient


class _DryRun(TorchDispatchMode):
    """Does what fake tensors cannot do by themselves, or only slowly.

    Real masks pick from fake tensors: how many they pick is known, though not to the fake tensors. The commonest
    operators go to the kernels for shapes directly, which is several times as fast.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is aten._fused_adamw_.default and isinstance(args[0][0], FakeTensor):
            return None  # nothing has a number that could change
        if func in _IN_PLACE and isinstance(args[0], FakeTensor):
            return (kwargs or {}).get("out", args[0])
        fake = next((x for x in args if isinstance(x, FakeTensor)), None)
        if fake is None:
            return func(*args, **(kwargs or {}))
        if func is torch.ops.prim.device.default:
            return fake.fake_device
        if func in _PICKING:
            args = (args[0], list(_as_numbers(args[1])), *args[2:])
        elif func in _LIKE_FIRST and not any((kwargs or {}).get(key) for key in ("dtype", "device")):
            with in_kernel_invocation_manager(fake.fake_mode):
                return FakeTensor(fake.fake_mode, torch.empty_like(args[0]), fake.fake_device)
        elif func in _PLAIN and all(isinstance(x, FakeTensor) for x in args if isinstance(x, Tensor)):
            with in_kernel_invocation_manager(fake.fake_mode):
                result = func(*args, **(kwargs or {}))
            return tree_map_only(Tensor, lambda x: FakeTensor(fake.fake_mode, x, fake.fake_device), result)
        return func(*args, **(kwargs or {}))


aten = torch.ops.aten
_PICKING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
_IN_PLACE = {
    aten.add_.Tensor, aten.mul_.Tensor, aten.round_.default, aten.copy_.default, aten.index_copy_.default, aten.add.out,
}  # fmt: skip
_LIKE_FIRST = {  # one result, of the first argument's shape
    aten.gelu.default, aten.gelu_backward.default, aten._softmax.default, aten._softmax_backward_data.default,
    aten.zeros_like.default, aten.abs.default, aten.reciprocal.default, aten.clamp.default,
}  # fmt: skip
_PLAIN = {
    aten.view.default, aten._unsafe_view.default, aten.t.default, aten.transpose.int, aten.permute.default,
    aten.expand.default, aten.select.int, aten.squeeze.dim, aten.unsqueeze.default, aten.detach.default,
    aten.slice.Tensor, aten.clone.default, aten.add.Tensor, aten.mul.Tensor, aten.mm.default,
    aten.bmm.default, aten.addmm.default, aten.sum.dim_IntList, aten.amax.default,
    aten.native_layer_norm.default, aten.native_layer_norm_backward.default,
}  # fmt: skip


def _as_numbers(indices: list[Tensor | None]) -> Iterator[Tensor | None]:
    for index in indices:
        if index is not None and index.dtype == torch.bool and not isinstance(index, FakeTensor):
            yield from index.nonzero(as_tuple=True)
        else:
            yield index
