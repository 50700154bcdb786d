"""Adapters saved without a run come back, with the method that the file names."""

import pytest
import torch

from e3va_lite import InputError, build_backbone, load_adapters, load_backbone, save_adapters
from e3va_lite.training import checkpoint


def moved(method="e3va", **options):
    backbone = build_backbone(method, "swin_nano", pretrained=True, **options).eval()
    with torch.no_grad():
        for p in (p for p in backbone.parameters() if p.requires_grad):
            p += 0.05 * torch.randn_like(p)
    return backbone


@pytest.mark.parametrize(
    ("method", "options"),
    [("e3va", {"rank": 3, "stages": (2, 3), "memory": "recompute"}), ("lora", {"rank": 2}), ("lst", {"narrower": 20})],
)
def test_a_backbone_is_built_from_its_file(tmp_path, method, options):
    backbone, path, images = moved(method, **options), tmp_path / "x.safetensors", torch.randn(1, 3, 64, 64)
    size = save_adapters(backbone, path)
    assert size == path.stat().st_size
    again = load_backbone(path).eval()
    assert again.built_with == backbone.built_with and again.name == backbone.name
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(again(images), backbone(images), strict=True))
    filled = build_backbone(method, "swin_nano", pretrained=True, **options).eval()
    load_adapters(filled, path)
    assert all(torch.equal(a, b) for a, b in zip(filled.parameters(), backbone.parameters(), strict=True))


def test_a_file_of_a_run_is_read_the_same_way(tmp_path):
    """``e3va export --backbone-only`` writes the recipe instead."""
    backbone, path = moved(rank=3, stages=(2, 3)), tmp_path / "x.safetensors"
    save_adapters(backbone, path)
    tensors, about = checkpoint.read(path)
    recipe = {"method": about.pop("method"), "stages": about.pop("stages"), "options": about.pop("options")}
    checkpoint.write(path, tensors, about | {"recipe": recipe})
    assert load_backbone(path).built_with == backbone.built_with


def test_what_cannot_be_saved_or_loaded(tmp_path):
    path = tmp_path / "x.safetensors"
    for backbone, said in (
        (torch.nn.Linear(2, 2), "for a model of your own there is tune"),
        (build_backbone("fixed", "swin_nano"), "method fixed trains nothing"),
        (build_backbone("bitfit", "swin_nano"), "bitfit trains the pretrained weights themselves"),
    ):
        with pytest.raises(InputError, match=said):
            save_adapters(backbone, path)
    with pytest.raises(InputError, match=r"must end in .safetensors"):
        save_adapters(moved(), tmp_path / "x.bin")
    save_adapters(moved(), path)
    with pytest.raises(InputError, match="exists"):
        save_adapters(moved(), path)
    with pytest.raises(InputError, match="other pretrained weights of swin_nano"):
        load_backbone(path, pretrained=False)
    checkpoint.write(path, {}, {})
    with pytest.raises(InputError, match="holds no adapters"):
        load_backbone(path)
