"""Backbones in other hands: pickled, copied, sent to another process, exported, traced and watched by hooks."""

import copy
import io
import pickle

import pytest
import torch

from e3va_lite import METHODS, build_backbone
from e3va_lite.highway import MEMORY, STRUCTURES

OPTIONS = {"lst": {"narrower": 20}, "losa": {"rank": 4}, "e3va+": {"rank": 4}, "e3va++": {"rank": 4}}
EVERY = [*METHODS, "lst", "losa", "peft_lora"]


def moved(method, **options):
    """A backbone in eval mode whose trained parameters have left their initial values."""
    if method == "peft_lora":
        pytest.importorskip("peft")
    backbone = build_backbone(method, "swin_nano", pretrained=True, **OPTIONS.get(method, {}) | options).eval()
    with torch.no_grad():
        for p in backbone.parameters():
            if p.requires_grad:
                p += 0.05 * torch.randn_like(p)
    return backbone


def assert_same_maps(a, b, images, **tolerances):
    """Two backbones compute the same maps; to the bit, if no tolerances are given."""
    with torch.no_grad():
        for x, y in zip(a(images), b(images), strict=True):
            torch.testing.assert_close(x, y, **tolerances or {"atol": 0, "rtol": 0})


def saved_and_loaded(backbone):
    file = io.BytesIO()
    torch.save(backbone, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {"pickle": lambda x: pickle.loads(pickle.dumps(x)), "torch.save": saved_and_loaded, "deepcopy": copy.deepcopy}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("method", EVERY)
def test_a_copy_computes_the_same(method, how):
    backbone = moved(method)
    copied = COPIES[how](backbone)
    assert_same_maps(backbone, copied, torch.randn(1, 3, 64, 96))
    before = {name: p.clone() for name, p in backbone.named_parameters()}
    with torch.no_grad():
        for p in copied.parameters():
            p.zero_()
    assert all(torch.equal(p, before[name]) for name, p in backbone.named_parameters())


@pytest.mark.parametrize("options", [{"structure": s, "memory": "reference"} for s in STRUCTURES], ids=str)
def test_every_structure_can_be_pickled(options):
    backbone = moved("e3va", **options)
    copied = pickle.loads(pickle.dumps(backbone))
    assert copied.join is backbone.join is STRUCTURES[options["structure"]]
    assert_same_maps(backbone, copied, torch.randn(1, 3, 64, 64))


def maps_of(backbone, images):
    with torch.no_grad():
        return backbone(images)


@pytest.mark.parametrize("start", ["spawn", "forkserver"])
def test_a_backbone_goes_to_another_process(start):
    backbone, images = moved("e3va"), torch.randn(1, 3, 64, 64)
    with torch.multiprocessing.get_context(start).Pool(1) as pool:
        there = pool.apply(maps_of, (backbone, images))
    for a, b in zip(there, maps_of(backbone, images), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("method", "options"), [("fixed", {}), ("e3va", {}), ("e3va", {"memory": "reference"})])
def test_torch_export(method, options):
    """In eval mode and without gradients; with a dynamic batch in tests/integrations."""
    backbone, images = moved(method, **options), torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        exported = torch.export.export(backbone, (images,)).module()
    assert_same_maps(exported, backbone, torch.randn(1, 3, 64, 96), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("method", "options"), [("full", {}), ("fixed", {}), *(("e3va", {"memory": mode}) for mode in MEMORY)]
)
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_torchscript_traces_the_reference(method, options):
    backbone, images = moved(method, **options), torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        traced = torch.jit.trace(backbone, images, check_trace=False)
    assert_same_maps(traced, backbone, torch.randn(1, 3, 64, 96), atol=1e-4, rtol=1e-4)


def test_lora_can_be_merged():
    backbone, images = moved("lora", rank=4), torch.randn(2, 3, 64, 96)
    before = maps_of(backbone, images)
    pretrained = backbone.backbone.layers[0].blocks[0].attn.qkv.weight.clone()
    backbone.merge()
    after = maps_of(backbone, images)
    for a, b in zip(after, before, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    weight = backbone.backbone.layers[0].blocks[0].attn.qkv.weight
    assert torch.equal(weight[40:80], pretrained[40:80]) and not torch.equal(weight[:40], pretrained[:40])
    assert not any(p.requires_grad for p in backbone.parameters()) and not any(
        "updates" in k for k in backbone.state_dict()
    )


def fired(backbone):
    """Names of the backbone's blocks, attentions and MLPs on which a forward hook fires, and how often."""
    calls = {name: 0 for name, m in backbone.backbone.named_modules() if name.endswith((".attn", ".mlp", "blocks.0"))}
    for name in calls:
        module = backbone.backbone.get_submodule(name)
        module.register_forward_hook(lambda *_, name=name: calls.__setitem__(name, calls[name] + 1))
    maps_of(backbone, torch.randn(1, 3, 64, 96))
    return calls


@pytest.mark.parametrize("method", ["fixed", "e3va"])
def test_hooks_fire_in_the_reference_only(method):
    """As the docstrings of E3VA's ``memory``, ThroughBackbone's ``frozen`` and ``frozen_stream.run`` say."""
    fused, literal = moved(method), moved(method)
    setattr(literal, *(("memory", "reference") if method == "e3va" else ("frozen", False)))
    calls = fired(fused)
    assert not any(count for name, count in calls.items() if name.endswith(".attn")) and len(calls) == 20
    calls = fired(literal)
    assert all(count == (not name.endswith("blocks.0")) for name, count in calls.items())  # f_P1 and f_P2 are called


def test_a_hook_that_changes_a_tap_changes_the_reference():
    backbone, images = moved("e3va", memory="reference"), torch.randn(1, 3, 64, 96)
    before = maps_of(backbone, images)
    backbone.backbone.layers[3].blocks[1].register_forward_pre_hook(lambda *_: pytest.fail("blocks are never called"))
    backbone.backbone.layers[3].blocks[1].mlp.register_forward_hook(lambda module, args, output: output + 1)
    after = maps_of(backbone, images)
    assert all(torch.equal(a, b) for a, b in zip(before[:3], after[:3], strict=True))
    assert not torch.allclose(before[3], after[3])
