"""timm: a classifier in timm's own pipeline (data, optimiser, loss, schedule), with its EMA."""

import copy

import pytest
import timm
import torch
from PIL import Image
from timm.data import create_dataset, create_loader, resolve_data_config
from timm.loss import LabelSmoothingCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3

import e3va_lite


@pytest.fixture
def folder(tmp_path):
    """An image folder with two classes, red and blue."""
    for name, colour in (("red", (200, 30, 30)), ("blue", (30, 30, 200))):
        (tmp_path / "train" / name).mkdir(parents=True)
        for i in range(4):
            Image.new("RGB", (80 + i, 90), colour).save(tmp_path / "train" / name / f"{i}.png")
    return tmp_path


def classifier():
    return timm.create_model(  # with pretrained=True for timm's weights
        "swin_tiny_patch4_window7_224", img_size=64, window_size=4, num_classes=2, embed_dim=16, depths=(2, 2, 2, 2),
        num_heads=(1, 2, 4, 8),
    )  # fmt: skip


def test_image_classification(folder):
    model = classifier()

    tuning = e3va_lite.tune(model, rank=2)
    config = resolve_data_config({"input_size": (3, 64, 64), "batch_size": 4}, model=model)
    data = create_dataset("", root=folder, split="train", is_training=True)
    loader = create_loader(
        data, config["input_size"], batch_size=4, is_training=True, use_prefetcher=False, num_workers=0,
        mean=config["mean"], std=config["std"], interpolation=config["interpolation"], device=torch.device("cpu"),
    )  # fmt: skip
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-2, weight_decay=0.05)
    schedule = CosineLRScheduler(optimizer, t_initial=4)
    loss_of, ema = LabelSmoothingCrossEntropy(), ModelEmaV3(model, decay=0.5)
    losses = []
    for epoch in range(4):
        for images, labels in loader:
            loss = loss_of(model.train()(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            ema.update(model)
            losses.append(loss.item())
        schedule.step(epoch + 1)

    assert min(losses[-2:]) < losses[0]
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(
        [p for p in model.parameters() if p.requires_grad]
    )
    assert all(p.grad is None for p in tuning.tuned.backbone.parameters())


def test_an_ema_averages_the_adapters_and_leaves_the_backbone(tmp_path):
    torch.manual_seed(0)
    model = classifier()
    tuning = e3va_lite.tune(model, rank=2)
    start = copy.deepcopy(model.state_dict())
    ema = ModelEmaV3(model, decay=0.75)
    with torch.no_grad():
        for p in (p for p in model.parameters() if p.requires_grad):
            p += 1
    ema.update(model)
    averaged = e3va_lite.Tuning(ema.module)  # the same handle for the copy
    assert all(
        torch.allclose(p, start[f"tuned.{name}"] + 0.25) for name, p in averaged.tuned.named_parameters()
        if name in tuning.bank.names
    )  # fmt: skip
    assert all(
        torch.equal(a, b)
        for a, b in zip(averaged.tuned.backbone.parameters(), tuning.tuned.backbone.parameters(), strict=True)
    )

    averaged.save_pretrained(tmp_path)
    torch.manual_seed(0)
    again, images = classifier(), torch.randn(1, 3, 64, 64)
    e3va_lite.from_pretrained(again, tmp_path)
    assert torch.equal(again.eval()(images), ema.module.eval()(images))
