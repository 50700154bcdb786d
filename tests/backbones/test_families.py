"""Backbones beyond Swin: their taps are theirs, and every method does on them what it says."""

import copy
import pickle
import warnings

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models.eva import Eva
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from e3va_lite import InputError, assert_isolated, build_backbone, trace
from e3va_lite.analysis.cost import memory_of, with_method
from e3va_lite.analysis.isolation import random_functional
from e3va_lite.backbones import dinov3, swin_v2, vit
from e3va_lite.backbones.base import embed, f_p1, f_p2, is_neck, trainable_parameters
from e3va_lite.backbones.registry import FAMILIES, backbone_names, create_backbone
from e3va_lite.fused.frozen_stream import run
from e3va_lite.methods.registry import METHODS, OTHERS
from e3va_lite.recipes.schema import load_recipe
from e3va_lite.training.engine import build_optimizer
from tests.analysis.test_isolation import caught
from tests.fused.test_highway import gradients, relative
from tests.methods.test_neighbours import WithGraph

SMALL = {
    "swin_v2": (
        SwinTransformerV2,
        swin_v2,
        {"embed_dim": 24, "depths": (1, 2, 2, 1), "num_heads": (2, 2, 4, 4), "window_size": 8, "img_size": 256},
        {"strict_img_size": False, "always_partition": True},
    ),
    "dinov2": (
        VisionTransformer,
        vit,
        {"img_size": 56, "patch_size": 14, "embed_dim": 32, "depth": 3, "num_heads": 2, "reg_tokens": 4},
        {"init_values": 0.5, "dynamic_img_size": True},
    ),
    "dinov3": (
        Eva,
        dinov3,
        {"img_size": 64, "patch_size": 16, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_reg_tokens": 4},
        {"qkv_bias": True, "init_values": 0.5, "dynamic_img_size": True, "use_abs_pos_emb": False}
        | {"rope_type": "dinov3", "use_rot_pos_emb": True, "rope_rotate_half": True},
    ),
}
EVERY = [*METHODS, "lst", "losa"]
INSIDE = ("full", "bitfit", "norm", "partial1", "adapter", "lora", "adaptformer", "lorand")  # the gradient goes there
OPTIONS = {
    "lst": {"narrower": 2},
    "losa": {"rank": 4},
    "e3va+": {"rank": 3},
    "e3va++": {"rank": 4},
    "e3va": {"rank": 2},
}


def timms(family):
    """timm's model as it is, with weights that are not what they were when new (V2's norms begin at zero)."""
    cls, _, sizes, options = SMALL[family]
    torch.manual_seed(0)
    model = cls(**sizes, **options, num_classes=0).eval()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)
    return model


@pytest.fixture(params=SMALL)
def family(request, monkeypatch):
    """A family whose models are small ones."""
    _, module, _, _ = SMALL[request.param]
    monkeypatch.setattr(module, "from_timm", lambda *arguments: timms(request.param))
    return request.param


NAMES = {
    "swin_v2": "swinv2_tiny_window8_256",
    "dinov2": "vit_small_patch14_reg4_dinov2",
    "dinov3": "vit_small_patch16_dinov3",
}


def small(family, method="fixed", **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of ranks that are not low
        return build_backbone(method, NAMES[family], **OPTIONS.get(method, {}), **options)


def test_the_blocks_are_timms(family):
    """By timm's own forward pass, at a size where it pads nothing."""
    model, backbone = timms(family), create_backbone(NAMES[family])
    images = torch.randn(2, 3, 256, 256) if family == "swin_v2" else torch.randn(2, 3, 112, 224)
    with torch.no_grad():
        x = embed(backbone, images)
        for stage in backbone.layers:
            x = stage.downsample(x)
            for block in stage.blocks:
                x = x + f_p1(block, x)
                x = x + f_p2(block, x)
        if family == "swin_v2":
            expected = model.layers(model.patch_embed(images))
        else:
            expected = model.forward_intermediates(images, indices=[2], intermediates_only=True)[0].permute(0, 2, 3, 1)
            x = x[:, vit.rows_of(backbone.num_prefix_tokens, x.shape[2]) :]
    assert expected.std() > 0.1
    torch.testing.assert_close(x, expected, atol=1e-5, rtol=1e-5)


def test_tokens_survive_the_map():
    for prefix, width in ((0, 4), (1, 4), (5, 4), (5, 5), (8, 3)):
        tokens = torch.randn(2, prefix + 3 * width, 6)
        as_map = vit.to_map(tokens, prefix, width)
        assert as_map.shape == (2, vit.rows_of(prefix, width) + 3, width, 6)
        assert vit.to_tokens(as_map, prefix).equal(tokens)


@pytest.mark.parametrize("method", EVERY)
def test_a_new_one_is_the_frozen_model(family, method):
    images = torch.randn(2, 3, 75, 101)  # nothing of it is a multiple of anything
    frozen, new = small(family).eval(), small(family, method).eval()
    new.norms.load_state_dict(frozen.norms.state_dict())
    with torch.no_grad():
        maps = new(images)
        for a, b in zip(maps, frozen(images), strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    sides = [[-(-side // stride) for side in (75, 101)] for stride in new.strides]
    assert [list(x.shape) for x in maps] == [[2, c, *map(int, s)] for c, s in zip(new.out_channels, sides, strict=True)]


@pytest.mark.parametrize("method", [m for m in EVERY if m not in (*INSIDE, "fixed")])
@pytest.mark.parametrize("memory", [None, "store", "recompute", "reference"])
def test_no_gradient_reaches_the_backbone(family, method, memory):
    if memory and not method.startswith("e3va"):
        pytest.skip("only a highway has memory modes")
    assert_isolated(small(family, method, **({"memory": memory} if memory else {})), torch.randn(1, 3, 64, 96))


@pytest.mark.parametrize("method", INSIDE)
def test_where_the_gradient_goes_inside_it_is_said(family, method):
    caught(small(family, method), torch.randn(1, 3, 64, 96), "backbone.layers.")


@pytest.mark.parametrize("structure", ["stacked", "chained"])
def test_other_structures(family, structure):
    assert_isolated(small(family, "e3va", structure=structure), torch.randn(1, 3, 64, 96))


@pytest.mark.parametrize("memory", ["store", "recompute"])
def test_the_fast_highway_computes_what_the_equations_say(family, memory):
    images = torch.randn(2, 3, 75, 101, dtype=torch.float64)
    highway = small(family, "e3va", memory=memory).double().train()
    for name, p in highway.named_parameters():
        if not name.startswith("backbone."):
            p.data += 0.2 * torch.randn_like(p)
    maps, found = gradients(highway, images)
    highway.memory = "reference"
    expected_maps, expected = gradients(highway, images)
    assert found.keys() == expected.keys() and len(found) > 10
    assert all(relative(a, b) < 1e-10 for a, b in zip(maps, expected_maps, strict=True))
    assert max(relative(found[name], expected[name]) for name in expected) < 1e-9


def test_the_frozen_stream_is_the_blocks(family):
    backbone = create_backbone(NAMES[family])
    with torch.no_grad():
        x = fast = backbone.layers[0].downsample(embed(backbone, torch.randn(2, 3, 75, 101)))
        for block in backbone.layers[0].blocks:
            x = x + f_p1(block, x)
            x = x + f_p2(block, x)
        fast = fast.clone().contiguous()
        pieces = list(run(backbone.layers[0], fast))
    torch.testing.assert_close(fast, x, atol=1e-5, rtol=1e-5)
    assert len(pieces) == len(backbone.layers[0].blocks)


def test_lora_changes_what_the_attention_computes(family):
    """Some of timm's attentions take qkv's weight and never call it: what hangs on the call would do nothing."""
    model, images = small(family, "lora", rank=3), torch.randn(1, 3, 64, 96)
    before = [x.detach() for x in model(images)]
    for update in model.updates:
        nn.init.normal_(update.b)
    assert all((a - b).abs().max() > 0.01 for a, b in zip(model(images), before, strict=True))


def test_the_pyramid_is_neck(family):
    """It learns at the rate of neck and heads, and is no parameter of the method."""
    body = small(family)
    assert trainable_parameters(body) == 0
    model = nn.Module()
    model.backbone = nn.Module()
    model.backbone.body = small(family, "e3va")
    groups = build_optimizer(model, load_recipe("voc", {"lr": 1e-4, "head_lr": 1e-2})).param_groups
    at_head = {id(p) for group in groups if group["lr"] == 1e-2 for p in group["params"]}
    pyramid = getattr(model.backbone.body.norms, "pyramid", nn.Identity())
    assert at_head == {id(p) for p in pyramid.parameters()}
    assert bool(at_head) == (family != "swin_v2")


@pytest.mark.parametrize("method", EVERY)
def test_every_trainable_parameter_gets_a_gradient(family, method):
    """The pyramid's in every method; nothing of what is not run."""
    backbone = small(family, method, stages=(1, 2)).train()
    trainable = {name: p for name, p in backbone.named_parameters() if p.requires_grad}
    if trainable:
        random_functional(backbone(torch.randn(1, 3, 64, 96))).backward()
    assert [name for name, p in trainable.items() if p.grad is None] == []
    pyramid = {name for name, _ in backbone.named_parameters() if is_neck(name)}
    assert pyramid <= trainable.keys() and bool(pyramid) == (family != "swin_v2")


def test_paths_are_counted(family):
    highway, adapter = (
        trace(small(family, method, **({"memory": "reference"} if method == "e3va" else {})), torch.randn(1, 3, 64, 96))
        for method in ("e3va", "adapter")
    )
    assert highway.backbone_activations_reached == 0 < adapter.backbone_activations_reached
    assert highway.longest_path < adapter.longest_path


@pytest.mark.parametrize("method", ["fixed", "full", "lora", "adapter", "e3va", "lst", "losa"])
def test_a_dry_run_says_what_a_real_one_does(family, method):
    options = ",".join(f"{key}={value}" for key, value in OPTIONS.get(method, {}).items())
    recipe = with_method(load_recipe("voc-nano", {"backbone": NAMES[family], "batch": 2}), f"{method}:{options}")
    real, dry = (memory_of(recipe, (64, 96), torch.device("cpu"), dry_run) for dry_run in (False, True))
    assert dry.peak == pytest.approx(real.peak, rel=0.03)
    for category in real.at_peak:
        assert dry.at_peak[category] == pytest.approx(real.at_peak[category], rel=0.05, abs=1e-3 * real.peak), category


def test_weights_come_from_a_file(family, tmp_path):
    other = timms(family)
    with torch.no_grad():
        for p in other.parameters():
            p += 1
    path = tmp_path / "w.safetensors"
    save_file({f"backbone.{key}": value for key, value in other.state_dict().items()}, path)
    backbone = create_backbone(NAMES[family], weights=path)
    torch.testing.assert_close(backbone.patch_embed.proj.weight, other.patch_embed.proj.weight)
    last = backbone.layers[-1].blocks[-1].mlp.fc2.weight
    theirs = other.layers[-1].blocks[-1] if family == "swin_v2" else other.blocks[-1]
    torch.testing.assert_close(last, theirs.mlp.fc2.weight)


@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_has_its_own_parts(family, copy_of):
    """Nothing of a backbone depends on another's modules, RoPE's tables included."""
    model = small(family, "e3va")
    images = torch.randn(1, 3, 64, 96)
    copied, before = copy_of(model).eval(), model.eval()(images)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_floating_point():
                setattr(module, name, buffer * 0)
    for a, b in zip(copied(images), before, strict=True):
        assert a.equal(b)


def test_names():
    names = backbone_names()
    assert len(names) == len(set(names)) and {"swin_nano", *NAMES.values()} <= set(names)
    assert all(name in timm.list_models() for of_family, _ in FAMILIES for name in of_family() if "nano" not in name)


@pytest.mark.parametrize(
    ("method", "name", "options", "message"),
    [
        ("e3va", "swinv3_tiny", {}, "did you mean swin"),
        ("peft_lora", "dinov2", {}, "use a swin_* backbone, or lora"),
        ("lst", "dinov2", {"narrower": 3}, "narrower=3 does not divide the 16 channels of an attention head"),
        ("lst", "dinov2", {"narrower": 0}, "narrower=0"),
        ("losa", "dinov2", {"rank": 0}, "rank=0"),
        ("losa", "dinov2", {"middle": 4}, "unknown option of method losa 'middle'"),
        ("e3vb", "dinov2", {}, "did you mean e3va"),
    ],
)
def test_what_is_not_supported_is_said(method, name, options, message, monkeypatch):
    monkeypatch.setattr(vit, "from_timm", lambda *arguments: timms("dinov2"))
    with pytest.raises(InputError) as error:
        build_backbone(method, NAMES.get(name, name), **options)
    assert message in str(error.value)


def test_every_other_method_is_tried():
    assert {*EVERY, "peft_lora"} == {*METHODS, *OTHERS}


@pytest.mark.parametrize("method", ["e3va", "lst", "losa"])
def test_a_planted_leak_is_found(family, method):
    """A trained parameter let into the stream."""
    model = small(family, method, **({"memory": "reference"} if method == "e3va" else {}))
    trained = next(p for name, p in model.named_parameters() if p.requires_grad and name.startswith("norms."))
    block = model.backbone.layers[-1].blocks[-1]
    block.mlp.register_forward_pre_hook(lambda module, args: (args[0] + 0 * trained.sum(),))
    caught(WithGraph(model), torch.randn(1, 3, 64, 96), "mlp")
