"""Lengths of gradient paths: counted by hand where that can be done, and as properties of every method."""

import types

import pytest
import torch
import torch.nn.functional as F
from timm.models.swin_transformer import SwinTransformer
from torch import nn
from torch.utils.checkpoint import checkpoint

from e3va_lite import METHODS, InputError, build_backbone
from e3va_lite.analysis.gradient_path import changes, longest_links, trace
from e3va_lite.analysis.isolation import random_functional, walk
from e3va_lite.backbones.swin import NANO, embed, f_p1, f_p2
from e3va_lite.highway import STRUCTURES
from tests.analysis.test_isolation import leaky
from tests.methods.test_registry import FAMILY

LOSS = 2  # links of the random functional: a product and a scale
NORM = 1  # before the neck
REDUCTION = 2  # norm and projection
BLOCK = 7 + 4  # norm, qkv, scale, q k, softmax, times v, projection; norm, fc1, GeLU, fc2
ADAPTERS = {"adapter": 3, "adaptformer": 4, "lorand": 7}  # links of one adapter
LOW_RANK = 5  # U and D of two factors each, and a GeLU


@pytest.fixture
def images(device):
    return torch.randn(1, 3, 64, 64, device=device)


def meta(method, depths=NANO["depths"], stages=(1, 2, 3, 4), **options):
    """A backbone without memory, with as many blocks as wanted, and an image for it."""
    shape = NANO | {"depths": depths, "drop_path_rate": 0.0}  # stochastic depth scales a map: it would be a link
    with torch.device("meta"):
        swin = SwinTransformer(**shape, strict_img_size=False, always_partition=True)
        return METHODS[method](swin, stages, **options), torch.empty(1, 3, 32, 32)


def path(y):
    return max(longest_links(y.grad_fn).values())


# What is a link?

X = torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(2, 3, 4)
HAND_ON = {
    "add": lambda x: x + x,
    "sum": lambda x: x.sum(1),
    "view": lambda x: x.view(6, 4),
    "reshape": lambda x: x.transpose(0, 1).reshape(-1),
    "permute": lambda x: x.permute(2, 0, 1),
    "t": lambda x: x[0].t(),
    "squeeze": lambda x: x[:1].squeeze(0),
    "unsqueeze": lambda x: x.unsqueeze(1),
    "expand": lambda x: x[:1].expand(5, -1, -1),
    "repeat": lambda x: x.repeat(2, 1, 1),
    "clone": lambda x: x.transpose(0, 1).contiguous(),
    "cast": lambda x: x.to(torch.float32).to(torch.float64),
    "copy": lambda x: torch.zeros_like(x).copy_(x),
    "roll": lambda x: torch.roll(x, 1, 2),
    "flip": lambda x: x.flip(0),
    "pad": lambda x: F.pad(x, (1, 2)),
    "slice": lambda x: x[:, 1:],
    "select": lambda x: x[0, 1],
    "index": lambda x: x[:, torch.tensor([2, 0, 0])],
    "unbind": lambda x: x.unbind(1)[1],
    "split": lambda x: x.split(2, dim=2)[0],
    "chunk": lambda x: x.chunk(2, dim=2)[1],
    "cat": lambda x: torch.cat([x, x], 1),
    "stack": lambda x: torch.stack([x, x]),
}
CHANGE = {
    "scaled add": lambda x: torch.add(x, x, alpha=2),
    "sub": lambda x: 1 - x,
    "mul": lambda x: x * 3,
    "div": lambda x: x / 2,
    "mean": lambda x: x.mean(1),
    "relu": lambda x: x.relu(),
    "gelu": lambda x: F.gelu(x),
    "softmax": lambda x: x.softmax(-1),
    "max": lambda x: x.max(1).values,
    "matmul": lambda x: x @ X[0].T,
    "linear": lambda x: F.linear(x, X[0], X[0, :, 0]),
    "layer norm": lambda x: F.layer_norm(x, (4,)),
    "dropout": lambda x: F.dropout(x, 0.5),
}


@pytest.mark.parametrize("name", HAND_ON)
def test_what_hands_a_gradient_on_is_no_link(name):
    """None of its nodes counts, and none may: the Jacobian is made of zeros and ones and is the same everywhere."""
    x = X.clone().requires_grad_()
    assert not any(changes(node) for node in walk(HAND_ON[name](x).grad_fn))
    first, second = (torch.autograd.functional.jacobian(HAND_ON[name], point) for point in (X, X.sin()))
    scale = 2 if name == "add" else 1  # x + x
    assert torch.equal(first, second) and set((first / scale).unique().tolist()) <= {0.0, 1.0}


@pytest.mark.parametrize("name", CHANGE)
def test_everything_else_is_a_link(name):
    x = X.clone().requires_grad_()
    assert path(CHANGE[name](x)) == 1


def test_an_unknown_function_is_a_link_whatever_its_name():
    class View(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 3 * x

        @staticmethod
        def backward(ctx, gradient):
            return 3 * gradient

    assert path(View.apply(X.clone().requires_grad_())) == 1


@pytest.mark.parametrize("long_way_first", [True, False])
def test_a_path_counted_by_hand(long_way_first):
    x, w, v = (torch.randn(4, 4, requires_grad=True) for _ in range(3))
    product = x @ w  # 4
    hidden = product.reshape(2, 8).view(4, 4)
    exponential = hidden.exp()  # 3
    sine = exponential.sin()  # 2
    y = sine * v + hidden if long_way_first else hidden + sine * v  # 1, and a way around; the long one counts
    loss = (y.t().clone() + 1).sum()
    links = longest_links(loss.grad_fn)
    ends = {id(node.variable): count for node, count in links.items() if hasattr(node, "variable")}
    assert ends == {id(x): 4, id(w): 4, id(v): 1} and max(links.values()) == 4
    tensors = (loss, y, sine, exponential, hidden, product)  # a tensor's own operation is not between it and the loss
    assert [links[tensor.grad_fn] for tensor in tensors] == [0, 0, 1, 2, 3, 3]
    assert max(longest_links(loss.grad_fn, frozenset({product.grad_fn})).values()) == 3  # the product lies behind


def test_deep_graphs_with_very_many_paths():
    y = torch.ones(2, requires_grad=True)
    for _ in range(3000):  # 2 ** 3000 paths, far deeper than Python's stack
        y = y.sin() + y
    assert path(y) == 3000


# What is reached?


@pytest.mark.filterwarnings("ignore:rank=")
@pytest.mark.parametrize(
    ("method", "options"), [*(("e3va", o) for o in FAMILY), ("e3va+", {}), ("e3va++", {})], ids=lambda v: str(v)
)
def test_e3va_reaches_nothing_of_the_backbone(method, options, images, device):
    backbone = build_backbone(method, "swin_nano", **options).to(device)
    found = trace(backbone, images)
    assert found.backbone_parameters_reached == found.backbone_activations_reached == 0
    assert not any(block.stream_reached for block in found.blocks)
    trainable = {name for name, p in backbone.named_parameters() if p.requires_grad}
    assert set(found.parameters) == trainable  # nothing that is trained is missed


@pytest.mark.parametrize(
    ("method", "parameters"), [("full", 117), ("bitfit", 61), ("adapter", 0), ("lora", 0), ("lorand", 0)]
)
def test_other_methods_run_through_the_backbone(method, parameters, images, device):
    found = trace(build_backbone(method, "swin_nano").to(device), images)
    assert found.backbone_parameters_reached == parameters
    assert found.backbone_activations_reached > 70  # nine outputs in each of eight blocks, and more
    assert {"backbone.layers.2.blocks.1.attn", "backbone.layers.2.blocks.1.mlp.fc1"} <= set(found.modules)
    assert all(block.stream_reached for block in found.blocks[1:])


def test_a_leak_is_found(images, device):
    model = build_backbone("e3va", "swin_nano").to(device)
    assert trace(leaky(model, guard=False), images).backbone_activations_reached == 0
    model.backbone.layers[2].blocks[0].attn.qkv.weight.requires_grad_()
    found = trace(model, images)
    assert found.backbone_parameters_reached == 1 and found.backbone_activations_reached > 10
    assert trace(leaky(model, taps_of_e=True), images).backbone_activations_reached > 50


def test_inherited_reductions_are_passed_by_design(images, device, monkeypatch):
    backbone = build_backbone("e3va", "swin_nano").to(device)
    assert "backbone.layers.1.downsample" in trace(backbone, images).modules
    monkeypatch.setattr(type(backbone), "passed_by_design", [])
    assert trace(backbone, images).backbone_activations_reached == 3 * 2  # norm and projection, three times


def test_nothing_is_trained(images, device):
    found = trace(build_backbone("fixed", "swin_nano").to(device), images)
    assert found.nodes == found.longest_path == found.bytes_on_path == 0
    assert found.longest_path_per_stage == (0, 0, 0, 0) and found.parameters == found.modules == ()
    assert len(found.blocks) == 8 and {block.links_from_loss for block in found.blocks} == {None}
    with_norms = trace(build_backbone("fixed", "swin_nano", fpn_norm="trainable").to(device), images)
    assert with_norms.longest_path == LOSS + NORM and with_norms.longest_path_per_stage == (0, 0, 0, 0)


# How long is the way?


def test_the_whole_way_of_full_fine_tuning():
    found = trace(*meta("full"))
    embedding = 2  # convolution and norm
    assert found.longest_path == LOSS + NORM + 8 * BLOCK + 3 * REDUCTION + embedding
    assert found.longest_path_per_stage == (2 * BLOCK,) * 4
    last = [block.links_from_loss for block in found.blocks if block.block == 2]
    assert last == [LOSS + NORM + (4 - stage) * (2 * BLOCK + REDUCTION) for stage in (1, 2, 3, 4)]


@pytest.mark.parametrize("adapter", ["low_rank", "standard"])
def test_within_a_stage_the_highway_has_one_length(adapter):
    """Parallel: the same for any number of blocks, and for every block. Stacked: the same, and twice as long."""
    links = {"low_rank": LOW_RANK, "standard": 3}[adapter]
    for structure, times in (("parallel", 1), ("stacked", 2)):
        for blocks in (2, 4, 6):
            found = trace(*meta("e3va", (2, 2, blocks, 2), structure=structure, adapter=adapter))
            assert found.longest_path_per_stage == (times * links,) * 4
            assert found.longest_path == LOSS + NORM + 3 * REDUCTION + times * links
            for block in found.blocks:
                assert block.links_from_loss == LOSS + NORM + (4 - block.stage) * REDUCTION
                assert block.m == ((0, 0) if structure == "parallel" else (links, 0))


@pytest.mark.parametrize(
    ("method", "options", "per_block", "m"),
    [
        ("full", {}, BLOCK, ()),
        ("lora", {}, BLOCK + 1, ()),  # two links of the update beside one of qkv
        ("adapter", {}, BLOCK + 2 * ADAPTERS["adapter"], (4 + ADAPTERS["adapter"], 0)),
        ("lorand", {}, BLOCK + 2 * ADAPTERS["lorand"], (4 + ADAPTERS["lorand"], 0)),
        ("adaptformer", {}, BLOCK, (4, 0)),  # beside attention and MLP, and no longer than these
        ("e3va", {"structure": "chained"}, 2 * LOW_RANK, (LOW_RANK, 0)),
    ],
    ids=lambda v: str(v),
)
def test_elsewhere_the_length_grows_with_every_block(method, options, per_block, m):
    lengths = {}
    for blocks in (2, 4, 6):
        found = trace(*meta(method, (2, 2, blocks, 2), **options))
        lengths[blocks] = found.longest_path_per_stage[2]
        assert {block.m for block in found.blocks} == {m}
        third = [block.links_from_loss for block in found.blocks if block.stage == 3]
        assert third == [third[-1] + per_block * i for i in reversed(range(blocks))]
    assert lengths == {blocks: per_block * blocks for blocks in (2, 4, 6)}


def test_partial_tuning_ends_early():
    found = trace(*meta("partial1"))
    assert found.longest_path_per_stage == (0, 0, 0, BLOCK)
    assert [block.links_from_loss for block in found.blocks] == [None] * 7 + [LOSS + NORM]


def test_fewer_stages():
    found = trace(*meta("e3va", stages=(2, 3)))
    assert found.longest_path_per_stage == (LOW_RANK,) * 3  # stage 1 runs, although the task does not consume it
    assert found.longest_path == LOSS + NORM + 2 * REDUCTION + LOW_RANK


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "swin_large_patch4_window7_224"])
def test_larger_swins(name):
    """The highway's way is as long as in miniature; every other one grows with the depth."""
    lengths = {}
    for method in ("full", "adapter", "e3va"):
        with torch.device("meta"):
            lengths[method] = trace(build_backbone(method, name), torch.empty(1, 3, 64, 64)).longest_path
    blocks = 12 if "tiny" in name else 24
    assert lengths["e3va"] == 14 and lengths["full"] == 11 + 11 * blocks and lengths["adapter"] == 2 + 17 * blocks


@pytest.mark.parametrize("method", ["full", "adapter", "lora", "lorand", "e3va"])
def test_a_model_without_memory_has_the_same_graph(method, device):
    image = torch.zeros(1, 3, 72, 72, device=device)
    real = trace(build_backbone(method, "swin_nano").to(device), image)
    assert real == trace(build_backbone(method, "swin_nano").to("meta"), image.to("meta"))


def test_lengths_do_not_depend_on_the_image(images):
    backbone = build_backbone("adapter", "swin_nano")
    small, large = trace(backbone, torch.zeros(1, 3, 64, 64)), trace(backbone, torch.zeros(2, 3, 224, 160))
    assert small.longest_path_per_stage == large.longest_path_per_stage and small.longest_path == large.longest_path
    assert large.bytes_on_path > 10 * small.bytes_on_path


# What is kept?


def test_bytes_counted_by_hand():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = nn.Linear(4, 8, bias=False)

        def forward(self, x):
            hidden = self.backbone(x).exp()  # keeps x, for the weight's gradient, and exp's result
            return hidden.view(-1).sin().view(2, 8) + hidden.cos()  # both keep hidden: one storage, once

    for device in ("cpu", "meta"):
        found = trace(Model().to(device), torch.ones(2, 4, device=device))
        assert found.bytes_on_path == 4 * (2 * 4 + 2 * 8)


def test_frozen_weights_are_not_counted():
    frozen = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4).requires_grad_(False))
    assert trace(frozen, torch.ones(2, 4), backbone="1").bytes_on_path == 4 * 2 * 4  # the first one's input alone


def test_blocks_keep_what_the_model_keeps(images, device):
    for method in ("full", "adapter", "e3va"):
        found = trace(build_backbone(method, "swin_nano").to(device), images)
        assert 0.8 * found.bytes_on_path < sum(block.bytes_on_path for block in found.blocks) < found.bytes_on_path


def leak_into_stage_4(highway):
    """The literal equations, but the stream of stage 4 starts from the highway."""

    def reference(self, images):
        l = e = embed(self.backbone, images)
        maps = {}
        for index, (stage, adapters) in enumerate(zip(self.backbone.layers, self.adapters, strict=True)):
            e, l = stage.downsample(e), stage.downsample(l)
            for block, (a1, a2) in zip(stage.blocks, adapters, strict=True):
                f1 = f_p1(block, l)
                f2 = f_p2(block, l + f1)
                l = l + f1 + f2
                e = self.join(e, f1, f2, a1, a2)
            l = e if index == 2 else l
            maps[index + 1] = e
        return self.norms(maps)

    highway.reference = types.MethodType(reference, highway)
    return highway


@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_leak_keeps_what_the_pretrained_blocks_keep(structure, images, device):
    """Its bytes are counted although the pretrained block runs before the highway does anything, and the way that the
    gradient takes through the stream is known: the last block's output is used by nobody."""
    plain = build_backbone("e3va", "swin_nano", structure=structure).to(device)
    tight, leak = trace(plain, images), trace(leak_into_stage_4(plain), images)
    assert not any(block.output_reached for block in tight.blocks)
    assert [block.output_reached for block in leak.blocks] == [False] * 6 + [True, False]
    assert [block.bytes_on_path for block in leak.blocks[:6]] == [block.bytes_on_path for block in tight.blocks[:6]]
    kept = sum(block.bytes_on_path for block in leak.blocks) - sum(block.bytes_on_path for block in tight.blocks)
    assert 0.9 * kept < leak.bytes_on_path - tight.bytes_on_path < 1.1 * kept  # a reduction of the stream, too
    assert leak.blocks[-1].bytes_on_path > 4 * tight.blocks[-1].bytes_on_path


def test_the_output_of_a_block_inside_the_backbone_is_the_blocks_own(images, device):
    found = trace(build_backbone("partial1", "swin_nano").to(device), images)
    assert [block.output_reached for block in found.blocks] == [False] * 7 + [True]


def test_checkpointing_keeps_less_of_the_same_graph(images, device):
    plain, less = (
        trace(build_backbone("adapter", "swin_nano", checkpointing=c).to(device), images) for c in (False, True)
    )
    assert less.longest_path == plain.longest_path and less.nodes == plain.nodes
    assert [block.m for block in less.blocks] == [block.m for block in plain.blocks]
    assert less.bytes_on_path < plain.bytes_on_path / 4


# Anybody's model, and what is put back


class Head(nn.Module):
    """A model around a backbone, as the tasks' models are."""

    def __init__(self, method, device):
        super().__init__()
        self.body = build_backbone(method, "swin_nano").to(device)
        self.head = nn.Conv2d(320, 2, 1).to(device)

    def forward(self, images):
        return {"loss": self.head(self.body(images)[-1]).square().mean()}


def test_a_model_around_a_backbone(images, device):
    found = trace(Head("e3va", device), images, loss=lambda output: output["loss"])
    assert found.backbone_activations_reached == 0
    assert found.longest_path == 2 + 1 + NORM + 3 * REDUCTION + LOW_RANK  # square, mean; the head
    assert found.blocks[-1].adapters == ("body.adapters.3.1.0", "body.adapters.3.1.1")
    assert "head.weight" in found.parameters and "body.norms.4.bias" in found.parameters
    frozen = trace(Head("fixed", device), images, loss=lambda output: output["loss"])
    assert frozen.longest_path == 3 and frozen.longest_path_per_stage == (0, 0, 0, 0)


def test_somebodys_own_model_has_no_stages():
    found = trace(nn.Sequential(nn.Linear(3, 3), nn.GELU(), nn.Linear(3, 3)), torch.ones(1, 3), backbone="0")
    assert (found.longest_path, found.backbone_parameters_reached, found.backbone_activations_reached) == (5, 2, 1)
    assert found.longest_path_per_stage == found.blocks == ()


def test_a_loss_without_gradient_is_an_error(images, device):
    with pytest.raises(InputError, match="does not require a gradient"):
        trace(nn.Linear(3, 3).requires_grad_(False), torch.ones(1, 3), backbone="")
    backbone = build_backbone("e3va", "swin_nano").to(device)
    for loss in (lambda maps: maps[0].detach().sum(), lambda maps: maps):
        with pytest.raises(InputError, match="does not require a gradient"):
            trace(backbone, images, loss=loss)
    with pytest.raises(InputError, match="name the frozen part"):
        trace(nn.Linear(3, 3), torch.ones(1, 3))


def test_a_graph_that_hides_is_an_error():
    class Reentrant(nn.Module):
        def __init__(self, reentrant):
            super().__init__()
            self.backbone, self.reentrant = nn.Linear(3, 3), reentrant

        def forward(self, x):
            return checkpoint(self.backbone, x, use_reentrant=self.reentrant)

    x = torch.ones(1, 3, requires_grad=True)
    assert trace(Reentrant(False), x).longest_path == LOSS + 1
    with pytest.raises(InputError, match="use_reentrant=False"):
        trace(Reentrant(True), x)


@pytest.mark.parametrize("method", ["full", "adapter", "e3va", "lora"])
def test_the_model_is_put_back(method, images, device):
    backbone = build_backbone(method, "swin_nano", drop_path_rate=0.3).to(device).eval()
    parameter = next(p for p in backbone.parameters() if p.requires_grad)
    parameter.grad = torch.ones_like(parameter)
    modes = [module.training for module in backbone.modules()]
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in backbone.modules()]
    seam = getattr(backbone, "join", None) or backbone.run_block
    random_state = torch.get_rng_state()
    pending = random_functional(backbone(images))

    def failing(maps):
        raise RuntimeError("loss failed")

    trace(backbone, images)
    with torch.no_grad():
        trace(backbone, images)  # whoever calls it from there
    for wrong in ({"loss": failing}, {"backbone": "backbone"}):
        with pytest.raises((RuntimeError, InputError)):
            trace(backbone, images if "loss" in wrong else images[..., :8], **wrong)  # the loss, the forward pass
    assert [module.training for module in backbone.modules()] == modes
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in backbone.modules()] == hooks
    assert (getattr(backbone, "join", None) or backbone.run_block) is seam
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.equal(parameter.grad, torch.ones_like(parameter))
    assert sum(p.grad is not None for p in backbone.parameters()) == 1
    pending.backward()  # a graph that was there before can still be used


def test_batch_statistics_are_put_back():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    trace(model, torch.randn(2, 3, 8, 8), backbone="0")
    assert model[1].num_batches_tracked == 0 and torch.equal(model[1].running_mean, torch.zeros(4))


# Equation (11)


@pytest.mark.parametrize("inside", [True, False])
def test_the_derivative_is_a_sum_over_paths(inside):
    """An adapter's output inside the backbone has two ways to the block's output, on the highway one, the identity."""
    torch.manual_seed(0)
    p2, a2 = (nn.Sequential(nn.Linear(5, 5), nn.GELU(), nn.Linear(5, 5)).double() for _ in range(2))
    before, f_a1 = torch.randn(5, dtype=torch.float64), torch.randn(5, dtype=torch.float64)

    def block(f_a1):
        if inside:
            return before + f_a1 + a2(p2(before + f_a1))  # equation (6)
        return before + f_a1 + a2(p2(before))  # equation (8), with before for the taps

    derivative = torch.autograd.functional.jacobian(block, f_a1)
    middle = before + f_a1
    product = torch.autograd.functional.jacobian(a2, p2(middle)) @ torch.autograd.functional.jacobian(p2, middle)
    identity = torch.eye(5, dtype=torch.float64)
    torch.testing.assert_close(derivative, identity + product if inside else identity)
    assert not torch.allclose(derivative, product)  # what (11) says as printed
