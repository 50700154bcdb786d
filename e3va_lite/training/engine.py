"""Training and evaluation: one loop for all tasks, on one device or several."""

import contextlib
import math
import platform
import re
import time
from collections.abc import Callable, Iterator
from itertools import islice

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset

from ..backbones.base import is_neck
from ..errors import InputError
from ..methods.registry import build_backbone
from ..recipes.schema import Recipe
from ..tasks.registry import predict_image, task_module
from .distributed import gather, mean, progress, rank, world
from .sampling import Batch, StepSampler, loader, to_device


def build_model(recipe: Recipe, num_classes: int) -> nn.Module:
    """A new detector or segmenter as the recipe describes it, on the CPU, with the same weights on every process."""
    torch.manual_seed(recipe.seed)
    backbone = build_backbone(
        recipe.method,
        recipe.backbone,
        recipe.pretrained and recipe.weights is None,
        recipe.weights,
        stages=tuple(recipe.stages),
        drop_path_rate=recipe.drop_path_rate,
        **recipe.options,
    )
    return task_module(recipe.task).model(recipe, backbone, num_classes)


#: Position parameters and extra tokens: Swin's and Swin V2's tables, a ViT's position embedding, class and registers.
POSITIONS = re.compile(r"relative_position_bias_table|cpb_mlp|logit_scale|pos_embed|cls_token|reg_token")


def build_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW on the trainable parameters; layer norms and position parameters have no weight decay, as is usual.

    It is the fused one, which updates all parameters in one kernel: adapters have many small parameters.

    Args:
        model: Its neck and heads learn at the recipe's ``head_lr``, where there is one, everything else at ``lr``.
        recipe: Learning rates, weight decay and betas.
    """
    norms = {id(p) for m in model.modules() if isinstance(m, nn.LayerNorm) for p in m.parameters(recurse=False)}
    groups: dict[tuple[float, float], list[Tensor]] = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            decays = id(p) not in norms and not POSITIONS.search(name)
            head = recipe.head_lr is not None and (is_neck(name) or not name.startswith("backbone.body."))
            kind = recipe.head_lr if head else recipe.lr, recipe.weight_decay if decays else 0.0
            groups.setdefault(kind, []).append(p)
    return torch.optim.AdamW(
        [{"params": params, "lr": lr, "weight_decay": decay} for (lr, decay), params in groups.items()],
        betas=tuple(recipe.betas),
        fused=True,
    )


def steps_per_unit(recipe: Recipe, length: int) -> float:
    """Steps in one unit of ``milestones`` and ``eval_every``: one pass over ``length`` images, or one step."""
    return length / (recipe.batch * recipe.accumulate * world()) if recipe.steps is None else 1.0


def total_steps(recipe: Recipe, length: int) -> int:
    """Steps of the whole training on a dataset of ``length`` images."""
    return max(1, round((recipe.epochs or recipe.steps) * steps_per_unit(recipe, length)))


def rate(recipe: Recipe, step: int, total: int, unit: float) -> float:
    """Factor of the learning rate at a step (from 0): linear warm-up times the schedule."""
    warm = min(1.0, (step + 1) / (recipe.warmup + 1))
    if recipe.schedule == "cosine":
        return warm * (0.5 + 0.5 * math.cos(math.pi * step / total))
    if recipe.schedule == "poly":
        return warm * max(0.0, 1 - step / total) ** recipe.power
    return warm * 0.1 ** sum(step >= milestone * unit for milestone in recipe.milestones)


class Training:
    """The state of a training, and the two halves of a step: the gradients and the update.

    Attributes:
        step: Steps done so far; ``total``: steps of the whole training; ``unit``: see :func:`steps_per_unit`.
        between_steps: Whether the model is as the last complete step left it.
        model: The model itself, also where several processes train it.
    """

    def __init__(self, model: nn.Module, dataset: Dataset, recipe: Recipe, device: torch.device) -> None:
        several_gpus = world() > 1 and device.type == "cuda"
        self.model = (nn.SyncBatchNorm.convert_sync_batchnorm(model) if several_gpus else model).to(device).train()
        self.dataset, self.recipe, self.device = dataset, recipe, device
        self.unit = steps_per_unit(recipe, len(dataset))
        self.total = total_steps(recipe, len(dataset))
        self.step = 0
        self.losses: dict[str, Tensor] = {}  # of the step's batches, not read yet, ...
        self.totals: list[Tensor] = []  # ... and their sum in each
        self.between_steps = True
        self.optimizer = build_optimizer(self.model, recipe)
        self.rates = [group["lr"] for group in self.optimizer.param_groups]  # what the schedule multiplies
        self.scaler = torch.amp.GradScaler(device.type, enabled=recipe.precision == "float16")
        # Every process builds the same model, so nothing has to be broadcast at the start. Only the gradients of the
        # trainable parameters are communicated, never anything that is frozen.
        self.parallel = (
            DistributedDataParallel(self.model, init_sync=False, broadcast_buffers=False) if world() > 1 else self.model
        )

    def batches(self) -> Iterator[Batch]:
        """The endless iterator of batches, from the present step on."""
        recipe = self.recipe
        stream = StepSampler(len(self.dataset), recipe.batch, recipe.accumulate, recipe.seed, self.step)
        return loader(self.dataset, stream, recipe.seed, recipe.workers)

    def backward(self, batches: list[Batch]) -> dict[str, Tensor]:
        """Accumulate the gradients of one step's batches.

        Returns:
            The losses by name, averaged over the batches: scalars on the device. To read one is to wait for the device;
            :meth:`update` reads them all, and looks whether they are finite.
        """
        self.losses, self.totals = {}, []
        self.between_steps = False
        for part, batch in enumerate(batches):
            # The random numbers of the model, like those of the data, depend on the step alone.
            torch.manual_seed(_number(self.recipe.seed, self.step, part, rank()))
            images, targets = to_device(batch, self.device)
            with self.parallel.no_sync() if world() > 1 and part + 1 < len(batches) else contextlib.nullcontext():
                with autocast(self.recipe, self.device):
                    losses = self.parallel(images, targets)
                loss = sum(losses.values()) / len(batches)
                self.scaler.scale(loss).backward()
            self.totals.append(loss.detach())
            for name, value in losses.items():
                self.losses[name] = self.losses.get(name, 0.0) + value.detach().double() / len(batches)
        return self.losses

    def update(self, batches: list[Batch]) -> dict[str, float]:
        """Update the parameters and clear the gradients.

        Returns:
            The losses by name, averaged over the batches, and ``gradient_norm``, the norm that the gradients had.

        Raises:
            InputError: When a loss is not finite, or the gradients are not (in float16 such an update is skipped
                instead).
        """
        for group, highest in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = highest * rate(self.recipe, self.step, self.total, self.unit)
        self.scaler.unscale_(self.optimizer)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        # The only numbers of a step that the program waits for, in one transfer.
        numbers = torch.stack([x.double() for x in (*self.totals, *self.losses.values(), norm)]).tolist()
        for total, batch in zip(numbers, batches, strict=False):
            if not math.isfinite(total):
                raise self._diverged(f"the loss is {total}", [batch])
        if not math.isfinite(numbers[-1]) and not self.scaler.is_enabled():
            raise self._diverged("the gradient is not finite", batches)
        if self.recipe.clip is not None:
            nn.utils.clip_grads_with_norm_(parameters, self.recipe.clip, norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.step += 1
        self.between_steps = True
        return dict(zip([*self.losses, "gradient_norm"], numbers[len(batches) :], strict=True))

    def _diverged(self, what: str, batches: list[Batch]) -> InputError:
        files = ", ".join(str(target["file"]) for _, targets in batches for target in targets)
        heads = "" if self.recipe.head_lr is None else f" or head_lr={self.recipe.head_lr}"
        return InputError(f"{what} at step {self.step + 1} (images {files}): lower lr={self.recipe.lr}{heads}.")


def fit(
    model: nn.Module,
    dataset: Dataset,
    recipe: Recipe,
    device: torch.device,
    begin: Callable[[Training], None] | None = None,
    after: Callable[[Training, dict[str, float]], None] | None = None,
) -> list[float]:
    """Train as long as the recipe says; return the losses of the steps done here, averaged over all processes.

    Args:
        model: Changed in place.
        dataset: Of the recipe's task, made with ``train=True``.
        begin: Called once before the first step, to go on from an earlier state.
        after: Called after every step with the losses by name, ``loss`` (their sum) and ``gradient_norm``.

    Raises:
        InputError: When a loss or gradient is not finite, or an image cannot be used.
    """
    training = Training(model, dataset, recipe, device)
    if begin is not None:
        begin(training)
    losses: list[float] = []
    batches = training.batches()
    with progress(total=training.total, initial=training.step, desc=f"train {recipe.method}", unit="step") as bar:
        while training.step < training.total:
            step = list(islice(batches, recipe.accumulate))
            training.backward(step)
            parts = training.update(step)
            norm = parts.pop("gradient_norm")
            values = mean({"loss": sum(parts.values()), **parts})
            losses.append(values["loss"])
            bar.update()
            bar.set_postfix(loss=f"{sum(losses[-20:]) / len(losses[-20:]):.3f}")
            if after is not None:
                after(training, values | {"gradient_norm": norm})
    return losses


@torch.inference_mode()
def evaluate(model: nn.Module, dataset: Dataset, recipe: Recipe, device: torch.device) -> dict | None:
    """The task's metric of a trained model on a dataset, as plain numbers; None on all processes but the first.

    The model gets one image at a time: a detector pads a batch to its largest image, and so what it finds in one image
    would depend on the others, that is on ``recipe.batch`` and on the number of processes.
    """
    task = task_module(recipe.task)
    was_training = model.training
    model.to(device).eval()
    mine = range(rank(), len(dataset), world())
    batches = loader(dataset, [[(0, index)] for index in mine], recipe.seed, recipe.workers)
    records = []
    for (image,), (target,) in progress(batches, f"eval {recipe.method}", len(mine), unit="image"):
        records.append(task.record(predict_image(model, image, device, recipe.precision), target))
    model.train(was_training)
    every = gather(list(zip(mine, records, strict=True)))
    if every is None:
        return None
    every.sort(key=lambda pair: pair[0])
    return task.summary([record for _, record in every], dataset)


def autocast(recipe: Recipe, device: torch.device) -> torch.autocast:
    """Autocast to the recipe's precision; the weights themselves stay in float32."""
    return torch.autocast(device.type, getattr(torch, recipe.precision), enabled=recipe.precision != "float32")


def machine(recipe: Recipe, device: torch.device) -> dict:
    """Device, precision, versions and date, to be recorded beside a measured number."""
    import timm
    import torchvision

    threads = torch.get_num_threads()
    on_cpu = f"{platform.machine()} CPU, {threads} thread{'s' * (threads > 1)}"
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else on_cpu,
        "processes": world(),
        "precision": recipe.precision,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "timm": timm.__version__,
        },
        "date": time.strftime("%Y-%m-%d"),
    }


def _number(*key: int) -> int:
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)
