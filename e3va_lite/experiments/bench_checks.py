"""The checks of :mod:`e3va_lite.experiments.bench`: does a device compute what the equations and the CPU say?"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from ..analysis.cost import with_method
from ..analysis.isolation import IsolationError, assert_isolated, random_functional
from ..analysis.training_step import Step, build_step
from ..methods.registry import build_backbone
from ..recipes.schema import load_recipe


def checks(device: torch.device) -> Iterator[tuple[str, dict[str, float], Callable[[], dict]]]:
    """A name, bounds of relative errors, and what finds the errors; the worst of all tensors counts."""
    for backbone in ("swin_nano", "vit_tiny_patch16_224"):
        for mode in ("reference", "store", "compress", "recompute"):
            exact = {"maps": 1e-4, "gradients": 0.02 if mode == "compress" else 1e-4}
            rounded = {"maps": 0.05, "gradients": 0.15}
            for precision, bounds in (("float32", exact), ("bfloat16", rounded)):
                name = (
                    f"highway, {backbone}, memory={mode}, {precision}: against literal equations in float64 on the CPU"
                )
                yield name, bounds, partial(_highway_errors, backbone, mode, precision, device)
    for spec in ("e3va:memory=store", "e3va", "e3va:memory=recompute", "e3va:memory=reference", "lst", "losa"):
        yield f"isolation, {spec}: five proofs", {}, partial(_isolation, spec, True, device)
    yield "isolation, adapter: the proofs find its gradient", {}, partial(_isolation, "adapter", False, device)
    for spec in ("full", "e3va:start=random", "e3va:start=random,memory=recompute"):
        bounds = {"loss": 1e-4, "gradients": 0.02 if spec == "e3va:start=random" else 1e-3}  # taps in 8 bits
        yield f"training step, {spec}: against the CPU's", bounds, partial(_step_errors, spec, device)


def _highway_errors(backbone: str, mode: str, precision: str, device: torch.device) -> dict[str, float]:
    torch.manual_seed(0)
    model = build_backbone("e3va", backbone, start="random", memory="reference")
    images = torch.randn(2, 3, 96, 128)
    exact = _maps_and_gradients(copy.deepcopy(model).double(), images.double(), "float32")
    model.memory = mode
    found = _maps_and_gradients(model.to(device), images.to(device), precision)
    return {key: worst_error(a, b) for key, a, b in zip(("maps", "gradients"), found, exact, strict=True)}


def _maps_and_gradients(model: nn.Module, images: Tensor, precision: str) -> tuple[list[Tensor], list[Tensor]]:
    with torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
        maps = model(images)
    random_functional(maps).backward()
    return maps, [p.grad for p in model.parameters() if p.grad is not None]


def _isolation(spec: str, isolated: bool, device: torch.device) -> dict:
    torch.manual_seed(0)
    recipe = with_method(load_recipe("voc-nano"), spec)
    model = build_backbone(recipe.method, "swin_nano", **recipe.options).to(device)
    try:
        assert_isolated(model, torch.randn(1, 3, 64, 96, device=device))
    except IsolationError:
        if isolated:
            raise
    else:
        if not isolated:
            raise IsolationError("the proofs do not find the gradient of an adapter inside the backbone")
    return {}


def _step_errors(spec: str, device: torch.device) -> dict[str, float]:
    recipe = with_method(load_recipe("voc-nano"), spec)
    here = build_step(replace(recipe, batch=2), (96, 128), torch.device("cpu"))
    targets = [{key: value.to(device) for key, value in target.items()} for target in here.targets]
    images = [image.to(device) for image in here.images]
    there = Step(recipe, copy.deepcopy(here.model).to(device), images, targets)
    found = []
    for step in (there, here):
        loss = step.forward()
        step.backward(loss)
        found.append(([loss.detach()], [p.grad for p in step.model.parameters() if p.grad is not None]))
    return {key: worst_error(a, b) for key, a, b in zip(("loss", "gradients"), *found, strict=True)}


def worst_error(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest relative error, in the Euclidean norm, of all tensors; infinite where one is missing or no number."""
    if len(found) != len(expected):
        return float("inf")
    pairs = [(a.detach().cpu().double(), b.detach().cpu().double()) for a, b in zip(found, expected, strict=True)]
    errors = [float((a - b).norm() / b.norm().clamp(min=1e-12)) for a, b in pairs]
    return float("inf") if any(error != error for error in errors) else float(f"{max(errors):.3g}")


@contextmanager
def full_float32() -> Iterator[None]:
    """Inside, products of float32 on a GPU are not rounded to TF32."""
    matmul, cudnn = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(matmul)
        torch.backends.cudnn.allow_tf32 = cudnn
