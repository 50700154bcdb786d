"""Ladder side-tuning and low-rank side adaptation: what makes them what they are."""

import pytest
import torch
from torch import nn

from e3va_lite import assert_isolated, build_backbone, trace
from e3va_lite.analysis.cost import memory_of, with_method
from e3va_lite.analysis.isolation import random_functional
from e3va_lite.methods.losa import WINDOW, TokenMixer
from e3va_lite.methods.lst import TEMPERATURE, Rung
from e3va_lite.recipes.schema import load_recipe
from tests.analysis.test_isolation import caught

SPECS = ("lst:narrower=20", "losa:rank=18")


def moved(method, **options):
    """One whose trained parameters are no longer what they were when new."""
    model = build_backbone(method, "swin_nano", pretrained=True, **options)
    for name, p in model.named_parameters():
        if not name.startswith("backbone."):
            p.data += 0.1 * torch.randn_like(p)
    return model


@pytest.mark.parametrize(("method", "options"), [("lst", {"narrower": 20}), ("losa", {"rank": 18})])
@pytest.mark.parametrize("stages", [(1, 2, 3, 4), (2, 3, 4), (1, 3)])
def test_isolation_and_a_start_at_the_frozen_model(method, options, stages):
    images = torch.randn(1, 3, 75, 101)
    new, frozen = (build_backbone(m, "swin_nano", pretrained=True, stages=stages, **o).eval()
                   for m, o in ((method, options), ("fixed", {})))  # fmt: skip
    for a, b in zip(new(images), frozen(images), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    assert_isolated(new, images)
    assert_isolated(moved(method, stages=stages, **options), images)


@pytest.mark.parametrize(("method", "options"), [("lst", {"narrower": 20}), ("losa", {"rank": 18})])
def test_what_is_trained_has_an_effect(method, options):
    """On every map, and not only through the norms."""
    images = torch.randn(1, 3, 64, 96)
    model, frozen = moved(method, **options).eval(), build_backbone("fixed", "swin_nano", pretrained=True).eval()
    frozen.norms.load_state_dict(model.norms.state_dict())
    assert all((a - b).abs().max() > 0.1 for a, b in zip(model(images), frozen(images), strict=True))


def test_a_gate_stands_half_open_and_decides_what_a_side_block_sees():
    rung, l, s = Rung(8, 4), torch.randn(2, 3, 3, 8), torch.randn(2, 3, 3, 4)
    torch.testing.assert_close(rung(l, s), (rung.down(l) + s) / 2)
    rung.a.data.fill_(TEMPERATURE)
    mu = torch.sigmoid(torch.tensor(1.0))  # of a / T
    torch.testing.assert_close(rung(l, s), mu * rung.down(l) + (1 - mu) * s)


def test_a_ladder_without_rungs_sees_only_the_start():
    """With all gates shut nothing of the backbone's blocks comes in but what the neck adds."""
    model, images = moved("lst", narrower=20).eval(), torch.randn(1, 3, 64, 96)
    for stage in model.rungs:
        for rung in stage:
            rung.a.data.fill_(-100.0)
    before = [x.detach() for x in model(images)]
    for stage in model.rungs:
        for rung in stage:
            nn.init.normal_(rung.down.weight)
    assert all(a.equal(b) for a, b in zip(model(images), before, strict=True))


def test_the_side_is_a_narrow_backbone():
    model = build_backbone("lst", "swin_nano", narrower=10)
    for stage, blocks in zip(model.backbone.layers, model.blocks, strict=True):
        for block, small in zip(stage.blocks, blocks, strict=True):
            assert small.attn.qkv.in_features * 10 == block.dim
            assert (small.window_size, small.shift_size) == (block.window_size, block.shift_size)
            assert small.attn.num_heads == block.attn.num_heads


def test_tokens_are_mixed_inside_their_window():
    mixer = TokenMixer(6, rank=5).double()
    nn.init.normal_(mixer.up.weight)
    x = torch.randn(1, 9, 16, 6, dtype=torch.float64, requires_grad=True)  # two windows down, three across, cut off
    y = mixer(x)
    assert y.shape == x.shape
    (gradient,) = torch.autograd.grad(y[0, 1, 8].sum(), x)
    reached = gradient.abs().sum(-1)[0] > 0
    expected = torch.zeros(9, 16, dtype=torch.bool)
    expected[:WINDOW, WINDOW : 2 * WINDOW] = True
    assert reached.equal(expected)


def test_their_own_path_is_long():
    """Both cut the gradient off from the backbone; neither has a highway: their blocks and mixers are a chain."""
    images = torch.randn(1, 3, 64, 96)
    found = {
        spec: trace(build_backbone(method, "swin_nano", **options), images)
        for spec, method, options in (
            ("e3va", "e3va", {"rank": 2, "memory": "reference"}),
            ("lst", "lst", {"narrower": 20}),
            ("losa", "losa", {"rank": 18}),
            ("adapter", "adapter", {"middle": 16}),
        )
    }
    assert all(found[spec].backbone_parameters_reached == 0 for spec in ("e3va", "lst", "losa"))
    assert found["lst"].backbone_activations_reached == 0 < found["adapter"].backbone_activations_reached
    assert (
        found["e3va"].longest_path < found["losa"].longest_path
        and found["e3va"].longest_path < found["lst"].longest_path
    )


@pytest.mark.parametrize("method", ["e3va", "lst", "losa"])
def test_a_leak_is_found(method):
    """A trained parameter let into the frozen stream, and no ``no_grad`` to stop it."""
    options = {"e3va": {"memory": "reference"}, "lst": {"narrower": 20}, "losa": {}}[method]
    model = build_backbone(method, "swin_nano", **options)
    trained = next(p for name, p in model.named_parameters() if p.requires_grad and name.startswith("norms."))
    block = model.backbone.layers[2].blocks[0]
    block.mlp.register_forward_pre_hook(lambda module, args: (args[0] + 0 * trained.sum(),))
    assert_isolated(model, torch.randn(1, 3, 64, 96))  # so far the stream has no graph to let it in
    caught(WithGraph(model), torch.randn(1, 3, 64, 96), "backbone.layers.2.blocks.0.mlp")


class WithGraph(nn.Module):
    """The model as it would be if its stream were not run without a graph."""

    def __init__(self, model):
        super().__init__()
        self.model, self.backbone = model, model.backbone

    def forward(self, images):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "no_grad", torch.enable_grad)
            return random_functional(self.model(images))


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("recipe", ["voc-nano", "ade20k-nano", "coco-nano"])
def test_a_dry_run_says_what_a_real_one_does(recipe, spec):
    recipe = with_method(load_recipe(recipe, {"batch": 2}), spec)
    real, dry = (memory_of(recipe, (64, 96), torch.device("cpu"), dry_run) for dry_run in (False, True))
    assert dry.peak == pytest.approx(real.peak, rel=0.03)
    for name in real.at_peak:
        assert dry.at_peak[name] == pytest.approx(real.at_peak[name], rel=0.05, abs=1e-3 * real.peak), name
