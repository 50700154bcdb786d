"""No gradient reaches the backbone: the proofs hold where they must, fail where they must, and catch planted leaks."""

import collections
import contextlib
import dataclasses
import types

import pytest
import torch
from torch import nn

from e3va_lite import InputError, IsolationError, assert_isolated, build_backbone, trace
from e3va_lite.analysis.isolation import parameters_with_grad, random_functional, reached_by_graph
from e3va_lite.backbones.swin import embed, f_p1, f_p2
from tests.methods.test_registry import FAMILY


@pytest.fixture
def images(device):
    return torch.randn(2, 3, 64, 64, device=device)


@pytest.mark.filterwarnings("ignore:rank=")
@pytest.mark.parametrize("options", FAMILY, ids=lambda o: "-".join(map(str, o.values())))
def test_e3va_is_isolated(options, images, device):
    assert_isolated(build_backbone("e3va", "swin_nano", **options).to(device), images)


@pytest.mark.parametrize("memory", ["store", "compress", "recompute", "reference"])
@pytest.mark.parametrize(
    "options", [{}, {"reduction": "trainable", "adapter": "standard"}, {"stages": (2, 4)}], ids=str
)
def test_every_way_with_memory_is_isolated(memory, options, images, device):
    assert_isolated(build_backbone("e3va", "swin_nano", memory=memory, **options).to(device), images)


@pytest.mark.filterwarnings("ignore:rank=")
@pytest.mark.parametrize("method", ["e3va+", "e3va++"])
def test_larger_ranks_are_isolated(method, images, device):
    assert_isolated(build_backbone(method, "swin_nano").to(device), images)


def test_fixed_with_trained_norms_is_isolated(images, device):
    assert_isolated(build_backbone("fixed", "swin_nano", fpn_norm="trainable").to(device), images)


@pytest.mark.parametrize(
    ("method", "evidence"),
    [
        ("full", "parameter backbone.layers.2.blocks.0.attn.qkv.weight got a gradient"),
        ("adapter", "the graph passes module backbone.layers.2.blocks.0.mlp.fc1"),
        ("lora", "the graph passes module backbone.layers.2.blocks.0.attn.qkv"),
        ("bitfit", "parameter backbone.layers.2.blocks.0.mlp.fc1.bias was moved by the optimizer"),
    ],
)
def test_methods_that_run_through_the_backbone_fail(method, evidence, images, device):
    with pytest.raises(IsolationError) as error:
        assert_isolated(build_backbone(method, "swin_nano").to(device), images)
    assert evidence in str(error.value)


def test_the_model_is_put_back(images, device):
    backbone = build_backbone("e3va", "swin_nano").to(device).eval()
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    random_state = torch.get_rng_state()
    assert_isolated(backbone, images)
    assert all(torch.equal(value, before[key]) for key, value in backbone.state_dict().items())
    assert not backbone.training and torch.equal(torch.get_rng_state(), random_state)
    assert all(p.grad is None for p in backbone.parameters())


def test_the_default_loss_is_not_blind():
    """The mean square of a LayerNorm's output is constant: as a loss it moves nothing and proves anything."""
    norm = nn.LayerNorm(64)
    x = torch.randn(8, 64, requires_grad=True)
    norm(x).square().mean().backward()
    blind, x.grad = x.grad.abs().max(), None
    random_functional(norm(x)).backward()
    assert x.grad.abs().max() > 1e3 * blind


# Planted leaks. Each changes one thing in the highway's forward pass or set-up; each really leaks; each is caught.


def leaky(model, guard=True, taps_of_e=False, into_stream=False):
    """The E3VA forward pass again, with a hole where asked for."""

    def forward(self, images):
        no_grad = torch.no_grad if guard else contextlib.nullcontext
        with no_grad():
            l = embed(self.backbone, images)
        e, maps = l, {}
        for number, (stage, adapters) in enumerate(zip(self.backbone.layers, self.adapters, strict=True), start=1):
            e = stage.downsample(e)
            with no_grad():
                l = stage.downsample(l)
            for block, (a1, a2) in zip(stage.blocks, adapters, strict=True):
                with torch.enable_grad() if taps_of_e else no_grad():
                    source = e if taps_of_e else l
                    f1 = f_p1(block, source)
                    f2 = f_p2(block, source + f1)
                    l = l + f1 + f2
                e = e + a1(f1) + a2(f2)
                if into_stream:
                    l = l + (a1(f1) - f1)
            maps[number] = e
        return self.norms(maps)

    model.forward = types.MethodType(forward, model)
    return model


@pytest.fixture
def model(device):
    return build_backbone("e3va", "swin_nano", drop_path_rate=0.5, memory="reference").to(device)


@pytest.fixture(params=["store", "compress", "recompute"])
def fast(device, request):
    return build_backbone("e3va", "swin_nano", drop_path_rate=0.5, memory=request.param).to(device)


def caught(model, images, *evidence):
    with pytest.raises(IsolationError) as error:
        assert_isolated(model, images)
    for text in evidence:
        assert text in str(error.value)


def test_the_copied_forward_pass_has_no_leak_of_its_own(model, images):
    """Without a hole the copy equals the original and passes: what the next tests catch is the hole."""
    expected = model(images)
    for a, b in zip(expected, leaky(model)(images), strict=True):
        torch.testing.assert_close(a, b)
    assert_isolated(leaky(model, guard=False), images)  # flags alone do isolate, as long as all of them are off


def test_leak_flag_left_on_without_no_grad(model, images):
    model.backbone.layers[1].blocks[0].attn.qkv.weight.requires_grad_()
    assert_isolated(model, images)  # harmless behind no_grad
    caught(
        leaky(model, guard=False),
        images,
        "parameter backbone.layers.1.blocks.0.attn.qkv.weight got a gradient",
        "the graph ends in parameter backbone.layers.1.blocks.0.attn.qkv.weight",
        "parameter backbone.layers.1.blocks.0.attn.qkv.weight was moved",
    )


def test_leak_taps_of_the_highway_instead_of_the_stream(model, images):
    leaky(model, taps_of_e=True)
    assert not parameters_with_grad(model.train(), (images,), model.backbone, random_functional)  # flags do not see it
    caught(model, images, "the graph passes module backbone.layers.0.blocks.1.norm1")


def test_leak_adapter_output_added_to_the_stream(model, images):
    caught(
        leaky(model, guard=False, into_stream=True),
        images,
        "the graph passes module backbone.layers.0.blocks.1.attn.qkv",
    )


def test_leak_shared_reduction_made_trainable(model, images):
    model.backbone.layers[2].downsample.reduction.requires_grad_()
    caught(model, images, "parameter backbone.layers.2.downsample.reduction.weight got a gradient")


def test_leak_shared_norm_made_trainable(model, images):
    model.backbone.layers[3].blocks[0].norm1.requires_grad_()
    model.norms["4"] = model.backbone.layers[3].blocks[0].norm1
    caught(model, images, "backbone.layers.3.blocks.0.norm1.weight got a gradient")


def test_leak_stochastic_depth_alive_after_train(model, images):
    model.train = types.MethodType(nn.Module.train, model)  # what a class without its own train() would do
    model.train()
    assert not torch.equal(model(images)[3], model(images)[3])
    caught(model, images, "drop_path", "is not repeatable in train mode")


def test_leak_attention_dropout_alive_after_train(model, images):
    class Awake(nn.Dropout):
        def train(self, mode=True):  # deaf to eval()
            return super().train(True)

    model.backbone.layers[0].blocks[0].attn.attn_drop = Awake(0.3)
    caught(model, images, "attn_drop is not repeatable")


def test_leak_patch_embedding_outside_the_guard(model, images):
    model.backbone.patch_embed.proj.bias.requires_grad_()
    caught(leaky(model, guard=False), images, "the graph ends in parameter backbone.patch_embed.proj.bias")


def test_leak_weight_tied_between_adapter_and_backbone(model, images):
    adapter, block = model.adapters[0][0][0], model.backbone.layers[0].blocks[0]
    adapter.up.b = block.norm1.bias  # the same parameter in two places, trainable in both
    block.norm1.bias.requires_grad_()
    caught(model, images, "norm1.bias got a gradient")


def test_leak_batch_statistics_that_follow_the_data(images, device):
    """Somebody's own model: every flag is off, and the backbone changes all the same."""
    model = nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).requires_grad_(False), nn.Conv2d(8, 4, 1)
    )
    with pytest.raises(IsolationError, match=r"buffer 1\.running_mean of the backbone changed"):
        assert_isolated(model.to(device), images, backbone="0")


def test_leak_gradient_through_a_frozen_layer_of_somebodys_own_model(images, device):
    prompt = nn.Conv2d(3, 3, 1)
    model = nn.Sequential(prompt, nn.Conv2d(3, 8, 3).requires_grad_(False), nn.Conv2d(8, 4, 1)).to(device)
    with pytest.raises(IsolationError, match="the graph passes module 1"):
        assert_isolated(model, images, backbone=model[1])


def test_a_trainable_parameter_that_cannot_move_is_reported(model, images):
    with torch.no_grad():  # the saddle: both factors of U zero
        model.adapters[0][0][0].up.t.zero_()
    caught(model, images, "no gradient reaches", "parameter adapters.0.0.0.up.t did not move in 3 steps: its gradient")


# Other people's models: heads that are not used, keyword arguments, outputs in structures.


@dataclasses.dataclass
class Output:
    maps: dict
    loss: torch.Tensor | None = None


class Classifier(nn.Module):
    """A frozen encoder and a head, called by keyword; ``leak`` trains a layer before the encoder."""

    def __init__(self, output, leak=False, unused=False):
        super().__init__()
        self.first = nn.Linear(6, 6).requires_grad_(leak)
        self.encoder, self.head = nn.Linear(6, 6).requires_grad_(False), nn.Linear(6, 2)
        self.unused = nn.Linear(6, 2) if unused else None
        self.output = output

    def forward(self, *, pixels, scale=1.0):
        return self.output(self.head(self.encoder(self.first(scale * pixels))))


OUTPUTS = {
    "dict": lambda x: {"logits": x},
    "mapping": lambda x: collections.UserDict(logits=x),
    "dataclass": lambda x: Output({"last": [x]}),
    "named tuple": lambda x: collections.namedtuple("Pair", "logits attention")(x, None),
}


@pytest.mark.parametrize("output", OUTPUTS)
def test_keyword_arguments_and_structured_outputs(output):
    model, pixels = Classifier(OUTPUTS[output]), torch.randn(3, 6)
    assert_isolated(model, pixels=pixels, scale=2.0, backbone="encoder")
    assert trace(model, pixels=pixels, scale=2.0, backbone="encoder").longest_path == 3  # the head's, the loss's two
    with pytest.raises(IsolationError, match=r"may pass in an attribute `passed_by_design`\):\n  the graph passes"):
        assert_isolated(Classifier(OUTPUTS[output], leak=True), pixels=pixels, backbone="encoder")


def test_an_unused_parameter_is_called_that():
    model = Classifier(OUTPUTS["dict"], unused=True)
    with pytest.raises(IsolationError) as error:
        assert_isolated(model, pixels=torch.randn(3, 6), backbone="encoder")
    assert str(error.value).splitlines() == [
        "no gradient reaches the backbone, but not all of the rest is trained (freeze what is not used):",
        "  trainable parameter unused.weight did not move in 3 steps: the loss does not depend on it",
        "  trainable parameter unused.bias did not move in 3 steps: the loss does not depend on it",
    ]
    model.unused.requires_grad_(False)
    assert_isolated(model, pixels=torch.randn(3, 6), backbone="encoder")


@pytest.mark.parametrize(
    ("output", "options", "sentence"),
    [
        (lambda x: object(), {}, "no float tensor was found in the output, a object: pass loss="),
        (
            lambda x: x,
            {"loss": lambda x: x},
            r"the loss \(Tensor \(3, 2\)\) does not require a gradient, or is no single",
        ),
        (lambda x: x.detach(), {}, "does not require a gradient"),
    ],
)
def test_what_cannot_be_a_loss_is_one_sentence(output, options, sentence):
    with pytest.raises(InputError, match=sentence):
        assert_isolated(Classifier(output), pixels=torch.randn(3, 6), backbone="encoder", **options)


# The fast highway is one node of the graph: what its backward pass does is watched operator by operator.


class Hidden(torch.autograd.Function):
    """A backward pass that goes through a frozen module without autograd's outer graph knowing of it."""

    @staticmethod
    def forward(ctx, module, x):
        ctx.module = module
        ctx.save_for_backward(x)
        return module(x)

    @staticmethod
    def backward(ctx, gradient):
        with torch.enable_grad():
            x = ctx.saved_tensors[0].detach().requires_grad_()
            y = ctx.module(x)
        return None, *torch.autograd.grad(y, x, gradient)


class BesideIt(nn.Module):
    """Trains one layer; the gradient passes a frozen one, hidden in a custom function or not."""

    def __init__(self, copy_weights=False):
        super().__init__()
        self.trained, self.backbone = nn.Linear(3, 3), nn.Linear(3, 3).requires_grad_(False)
        self.copy_weights = copy_weights

    def forward(self, x):
        frozen = self.backbone
        if self.copy_weights:
            weight, bias = self.backbone.weight, self.backbone.bias
            return Hidden.apply(lambda x: nn.functional.linear(x, weight.t().contiguous().t(), bias), self.trained(x))
        return Hidden.apply(frozen, self.trained(x))


@pytest.mark.parametrize("copy_weights", [False, True])
def test_leak_inside_a_custom_backward_pass(copy_weights, device):
    model, x = BesideIt(copy_weights).to(device), torch.randn(4, 3, device=device)
    assert not reached_by_graph(model, (x,), model.backbone, random_functional)  # a walk of the graph does not see it
    assert not parameters_with_grad(model, (x,), model.backbone, random_functional)
    with pytest.raises(IsolationError) as error:
        assert_isolated(model, x)
    assert "a gradient meets parameter backbone.weight in the backward pass" in str(error.value)
    assert len(str(error.value).splitlines()) == 2  # no other proof sees it


def test_leak_of_a_fast_highway_that_trains_through_the_stream(fast, images, monkeypatch):
    """Its backward pass sends the shared gradient through a frozen block as well."""
    from e3va_lite.fused import highway as module

    honest = module._shared_gradients

    def leaky(highway, *args):
        shared = honest(highway, *args)
        block = highway.backbone.layers[0].blocks[0]
        with torch.enable_grad():
            x = torch.zeros_like(shared[0]).requires_grad_()
            y = block.mlp(x)
        shared[0] = shared[0] + torch.autograd.grad(y, x, shared[0])[0]
        return shared

    monkeypatch.setattr(module, "_shared_gradients", leaky)
    caught(fast, images, "a gradient meets parameter backbone.layers.0.blocks.0.mlp.fc2.weight in the backward pass")


def test_a_fast_highway_gives_the_backbone_nothing_even_where_flags_ask_for_it(fast, images):
    fast.backbone.requires_grad_()
    assert_isolated(fast, images)


def test_a_fast_highway_runs_nothing_random(fast, images):
    fast.train = types.MethodType(nn.Module.train, fast)
    fast.train()
    assert torch.equal(fast(images)[3], fast(images)[3])


def test_reductions_that_are_passed_have_to_be_declared_in_the_backward_pass_too(fast, images, monkeypatch):
    from e3va_lite.analysis.isolation import met_in_backward

    assert not met_in_backward(fast.train(), (images,), fast.backbone, random_functional)
    monkeypatch.setattr(type(fast), "passed_by_design", [])
    findings = met_in_backward(fast.train(), (images,), fast.backbone, random_functional)
    assert findings == [
        f"a gradient meets parameter backbone.layers.{i}.downsample.{name} in the backward pass"
        for i in (1, 2, 3)
        for name in ("norm.bias", "norm.weight", "reduction.weight")  # torch hands the bias over, too, and uses it not
    ]


@pytest.mark.parametrize("backbone", ["no.such.module", None])
def test_no_backbone_is_an_error(backbone, images):
    with pytest.raises(ValueError, match="module"):
        assert_isolated(nn.Linear(3, 3), images, backbone=backbone)


def test_what_is_passed_by_design_has_to_be_declared(model, images, monkeypatch):
    """The highway runs through the stream's reductions; undeclared, the same graph is a finding."""
    assert not reached_by_graph(model.train(), (images,), model.backbone, random_functional)
    monkeypatch.setattr(type(model), "passed_by_design", [])
    findings = reached_by_graph(model.train(), (images,), model.backbone, random_functional)
    assert "the graph passes module backbone.layers.1.downsample" in findings
    with pytest.raises(IsolationError) as error:
        assert_isolated(model, images)
    assert len(str(error.value).splitlines()) == 17  # a headline, fifteen findings, and what to do about them
    model.passed_by_design = eval(str(error.value).split("self.passed_by_design = ")[1], {"self": model})
    assert_isolated(model, images)


def test_a_leak_is_no_reason_to_declare_anything(model, images):
    with pytest.raises(IsolationError) as error:
        assert_isolated(leaky(model, guard=False, into_stream=True), images)
    assert "self.passed_by_design" not in str(error.value)
