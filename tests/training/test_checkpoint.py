"""Files of earlier versions can be read."""

import re

import pytest
import torch

from e3va_lite import build_backbone, load_adapters
from e3va_lite.backbones.weights import fingerprint
from e3va_lite.training import checkpoint


@pytest.mark.parametrize("method", ["full", "bitfit"])
def test_a_file_that_calls_the_backbone_a_trunk_is_loaded(tmp_path, method):
    path = tmp_path / "earlier.safetensors"
    trained = build_backbone(method, "swin_nano", pretrained=True)
    about = {"backbone": "swin_nano", "weights": fingerprint(trained.backbone)}
    with torch.no_grad():
        for p in trained.parameters():
            p.add_(p.requires_grad)
    state = checkpoint.kept_state(trained)
    earlier = {f"backbone.body.{re.sub('^backbone', 'trunk', name)}": x for name, x in state.items()}
    assert "backbone.body.trunk.patch_embed.norm.bias" in earlier
    checkpoint.write(path, earlier, about)

    new = build_backbone(method, "swin_nano", pretrained=True)
    load_adapters(new, path)
    assert all(torch.equal(new.state_dict()[name], x) for name, x in state.items())
