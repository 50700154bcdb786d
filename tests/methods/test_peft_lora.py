"""PEFT's LoRA, the neighbour that everything is compared with, does what it is said to do."""

import sys

import pytest
import torch

from e3va_lite import InputError, IsolationError, assert_isolated, build_backbone
from e3va_lite.analysis.isolation import random_functional
from tests.methods.test_registry import weights  # noqa: F401, a fixture


@pytest.fixture
def peft_lora():
    pytest.importorskip("peft")
    return lambda **options: build_backbone("peft_lora", "swin_nano", **options)


def test_a_new_one_is_the_frozen_model(peft_lora, weights):  # noqa: F811
    images = torch.randn(1, 3, 224, 224)  # where timm's order of operations and the official one agree
    for a, b in zip(
        peft_lora(weights=weights)(images), build_backbone("fixed", "swin_nano", weights=weights)(images), strict=True
    ):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)


def test_only_the_updates_are_trained_and_the_gradient_runs_through_the_backbone(peft_lora):
    backbone, images = peft_lora(rank=4), torch.randn(1, 3, 64, 64)
    trained = {name: p for name, p in backbone.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 8 and all(".attn.qkv.lora_" in name for name in trained)
    assert sum(p.numel() for p in trained.values()) == sum(2 * 4 * (dim + 3 * dim) for dim in (40, 80, 160, 320))
    with pytest.raises(IsolationError, match="the graph passes module backbone"):
        assert_isolated(backbone, images)


def test_checkpointing_changes_no_gradient(peft_lora):
    images, found = torch.randn(1, 3, 64, 64), []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        backbone = peft_lora(checkpointing=checkpointing)
        random_functional(backbone(images)).backward()
        found.append([p.grad for p in backbone.parameters() if p.grad is not None])
    assert len(found[0]) == len(found[1]) == 16
    assert all(torch.allclose(a, b) for a, b in zip(*found, strict=True))


def test_without_peft_one_is_told_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(InputError, match=r'pip install "e3va_lite\[peft\]"'):
        build_backbone("peft_lora", "swin_nano")
