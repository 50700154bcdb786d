"""Graphs for deployment compute what the model computes, at sizes that they were not recorded with."""

import json
from dataclasses import asdict

import pytest
import torch

from e3va_lite.backbones.weights import fingerprint
from e3va_lite.recipes.schema import load_recipe
from e3va_lite.training import checkpoint, deploy
from e3va_lite.training.engine import build_model

SMALL = {
    "voc": ("voc-nano", {"fpn_channels": 16, "min_size": 128, "max_size": 160}),
    "coco": ("coco-nano", {"fpn_channels": 16, "head_channels": 32}),
    "ade20k": ("ade20k-nano", {"head_channels": 16, "scale": [160, 128]}),
}


def a_run(folder, task="voc", method="e3va", **changes):
    """The folder of a run whose trained parameters are random, as if it had been trained."""
    if task == "ade20k":
        pytest.importorskip("cv2", exc_type=ImportError)
    name, small = SMALL[task]
    recipe = load_recipe(name, {**small, "method": method, **changes})
    model = build_model(recipe, 6)
    with torch.no_grad():
        for parameter_name, p in model.named_parameters():
            if p.requires_grad and parameter_name.startswith("backbone.body."):
                p += 0.02 * torch.randn_like(p)
        if task == "voc":  # scores that differ, some above the threshold
            torch.nn.init.normal_(model.head.classification_head.cls_logits.weight, std=0.02)
    about = {
        "classes": list("abcdef"),
        "category_ids": None,
        "weights": fingerprint(model.backbone.body.backbone),
    }
    folder.mkdir()
    (folder / "recipe.yaml").write_text(json.dumps(asdict(recipe)))
    checkpoint.write(folder / "last.safetensors", checkpoint.kept_state(model), {"about": about, "step": 7})
    return folder


@pytest.mark.parametrize(("task", "backbone_only"), [("voc", True), ("voc", False), ("ade20k", False)])
def test_onnx_for_any_size(tmp_path, task, backbone_only):
    """The command compares at two sizes with the model; the file was recorded with a third."""
    pytest.importorskip("onnxruntime")
    run = a_run(tmp_path / "run", task)
    report = deploy.deploy(run, tmp_path / "x.onnx", "onnx", backbone_only)
    assert all(relative < 1e-4 for _, relative in report["differences"].values())
    assert report["bytes"] == (tmp_path / "x.onnx").stat().st_size


def test_torch_export(tmp_path):
    run = a_run(tmp_path / "run")
    report = deploy.deploy(run, tmp_path / "x.pt2", "torch-export", True, size=(64, 96))
    assert all(relative < 1e-4 for _, relative in report["differences"].values())
