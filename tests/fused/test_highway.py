"""The fast highway computes what the equations say: values, and gradients in every memory mode."""

import copy
import json

import pytest
import torch
from click.testing import CliRunner
from torch import nn

from e3va_lite import InputError, build_backbone
from e3va_lite.adapters import LowRankAdapter
from e3va_lite.analysis.isolation import random_functional
from e3va_lite.analysis.memory import ledger
from e3va_lite.backbones.swin import create_swin, embed, f_p1, f_p2
from e3va_lite.cli import cli
from e3va_lite.fused import frozen_stream, highway
from e3va_lite.fused.int8 import BLOCK, block_of, pack, unpack
from e3va_lite.highway import MEMORY

EXACT = ("store", "recompute")
OPTIONS = [
    {},
    {"rank": 3},
    {"rank": 2, "middle": 7},
    {"adapter": "standard"},
    {"adapter": "standard", "middle": 5, "fpn_input": "e+l"},
    {"reduction": "trainable"},
    {"fpn_norm": "fixed"},
    {"fpn_input": "e+l", "reduction": "trainable"},
    {"stages": (2, 3, 4)},
    {"stages": (1, 3), "fpn_input": "e+l"},
    {"stages": (2,)},
]


@pytest.fixture(autouse=True)
def few_rows(monkeypatch):
    """A map goes through in several pieces, as large ones do."""
    monkeypatch.setattr(frozen_stream, "ROWS", {"cpu": 100, "gpu": 100})
    frozen_stream._window_indices.cache_clear()


def trained_for_a_while(memory, **options):
    """A highway in double precision whose adapters and norms are no longer what they were when new."""
    torch.manual_seed(0)
    backbone = build_backbone("e3va", "swin_nano", memory=memory, **options).double().train()
    for name, p in backbone.named_parameters():
        if not name.startswith("backbone."):
            p.data += 0.2 * torch.randn_like(p)
    return backbone


def gradients(backbone, images):
    maps = backbone(images)
    backbone.zero_grad()
    random_functional(maps).backward()
    return maps, {name: p.grad for name, p in backbone.named_parameters() if p.grad is not None}


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize(("tokens", "together"), [(1000, [4, 4, 4]), (500, [8, 4]), (10, [12]), (1025, [1] * 12)])
def test_adapters_on_small_maps_share_a_product(monkeypatch, tokens, together):
    monkeypatch.setattr(frozen_stream, "ROWS", {"cpu": 4096, "gpu": 4096})
    adapters = [LowRankAdapter(8, rank=1) for _ in range(12)]
    layout = highway._layout(adapters, torch.empty(tokens, 8))
    assert [some.stop - some.start for some, _ in layout] == together
    adapters[3] = LowRankAdapter(8, rank=2)  # it cannot be stacked with the others
    assert len(highway._layout(adapters, torch.empty(tokens, 8))) == 12


@pytest.mark.parametrize("memory", EXACT)
@pytest.mark.parametrize("rows", [100, 1000, 4096])
@pytest.mark.parametrize("adapter", ["low_rank", "standard"])
def test_the_size_of_slices_and_groups_makes_no_difference(monkeypatch, adapter, rows, memory):
    monkeypatch.setattr(frozen_stream, "ROWS", {"cpu": rows, "gpu": rows})
    backbone = build_backbone("e3va", "swin_nano_deep", adapter=adapter, memory=memory).double()
    for p in backbone.adapters.parameters():
        p.data += 0.2 * torch.randn_like(p)
    images = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    maps, found = gradients(backbone, images)
    backbone.memory = "reference"
    expected_maps, expected = gradients(backbone, images)
    assert all(relative(a, b) < 1e-10 for a, b in zip(maps, expected_maps, strict=True))
    assert found.keys() == expected.keys()
    assert all(relative(found[name], expected[name]) < 1e-10 for name in found)


@pytest.mark.parametrize("memory", EXACT)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_values_and_gradients_are_those_of_the_equations(options, memory):
    images = torch.randn(2, 3, 72, 100, dtype=torch.float64)  # windows to fill up, seams in both directions
    backbone = trained_for_a_while(memory, **options)
    maps, found = gradients(backbone, images)
    backbone.memory = "reference"
    expected_maps, expected = gradients(backbone, images)
    assert found.keys() == expected.keys() and len(found) > 30
    assert all(relative(a, b) < 1e-12 for a, b in zip(maps, expected_maps, strict=True))
    assert max(relative(found[name], expected[name]) for name in expected) < 1e-10


@pytest.mark.parametrize("memory", EXACT)
@pytest.mark.parametrize(
    "options", [{"rank": 2}, {"adapter": "standard", "middle": 4, "reduction": "trainable"}], ids=str
)
def test_gradcheck(options, memory):
    """Against differences of the forward pass alone, whatever the reference says."""
    backbone = trained_for_a_while(memory, stages=(1, 2), **options)
    images = torch.randn(1, 3, 36, 40, dtype=torch.float64)
    trained = [p for p in backbone.parameters() if p.requires_grad]
    assert torch.autograd.gradcheck(lambda *_: tuple(backbone(images)), trained, fast_mode=True)


def test_a_new_highway_is_the_frozen_stream_bit_for_bit():
    images = torch.randn(1, 3, 72, 100)
    torch.manual_seed(0)
    fixed = build_backbone("fixed", "swin_nano")
    for memory in ("store", "compress", "recompute"):
        highway = build_backbone("e3va", "swin_nano", memory=memory, stages=(1,))
        highway.backbone.load_state_dict(fixed.backbone.state_dict())
        assert torch.equal(highway(images)[0], fixed(images)[0])


@pytest.mark.parametrize("size", [(32, 32), (56, 56), (64, 96), (72, 100), (33, 230)], ids=str)
@pytest.mark.parametrize("batch", [1, 3])
def test_the_stream_is_equation_7(size, batch):
    swin = create_swin("swin_nano").double().eval()
    for block in (block for stage in swin.layers for block in stage.blocks):
        nn.init.normal_(block.attn.relative_position_bias_table)  # new ones are all but zero
    with torch.no_grad():
        l = fast = embed(swin, torch.randn(batch, 3, *size, dtype=torch.float64))
        for stage in swin.layers:
            l, fast = stage.downsample(l), stage.downsample(fast.clone())
            taps = [torch.full_like(fast.flatten(0, 2), torch.nan) for _ in range(2 * len(stage.blocks))]
            for block, rows, pair in frozen_stream.run(stage, fast):
                for place, tap in enumerate(pair):
                    assert taps[2 * block + place][rows].isnan().all()  # every token once
                    taps[2 * block + place][rows] = tap
            for block, f1, f2 in zip(stage.blocks, taps[::2], taps[1::2], strict=True):
                expected1 = f_p1(block, l)
                expected2 = f_p2(block, l + expected1)
                l = l + expected1 + expected2
                torch.testing.assert_close(f1.view_as(l), expected1, rtol=1e-10, atol=1e-12)
                torch.testing.assert_close(f2.view_as(l), expected2, rtol=1e-10, atol=1e-12)
            torch.testing.assert_close(fast, l, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "swin_s3_tiny_224", "swin_base_patch4_window12_384"])
def test_the_stream_of_other_swins(name):
    """Windows of several sizes, and of other sizes in other stages."""
    fixed = build_backbone("fixed", name)
    images = torch.randn(1, 3, 100, 68)
    fast = fixed(images)
    fixed.frozen = False
    for a, b in zip(fast, fixed(images), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_compress_changes_gradients_a_little_and_values_not_at_all():
    images = torch.randn(2, 3, 72, 100, dtype=torch.float64)
    backbone = trained_for_a_while("compress")
    maps, found = gradients(backbone, images)
    backbone.memory = "store"
    exact_maps, exact = gradients(backbone, images)
    assert all(torch.equal(a, b) for a, b in zip(maps, exact_maps, strict=True))
    errors = {name: relative(found[name], exact[name]) for name in exact}
    assert 1e-4 < max(errors.values()) < 0.02
    shared = {
        name: error for name, error in errors.items() if name.endswith("up.b")
    }  # only norms and reductions on the path
    assert len(shared) == 16 and max(shared.values()) < 2e-3


def test_codes_and_scales():
    x = torch.randn(50, 96) * torch.logspace(-20, 15, 50)[:, None]
    x[3], x[4, 7] = 0.0, 1e30
    codes, scales = pack(x)
    assert codes.dtype == torch.int8 and codes.shape == x.shape and scales.shape == (50, 2)
    back = unpack(codes, scales, x.dtype)
    largest = x.unflatten(-1, (2, 48)).abs().amax(-1, keepdim=True)
    assert ((back - x).unflatten(-1, (2, 48)).abs() <= 0.52 / 127 * largest + 1e-37).all()
    assert (back[3] == 0).all() and back[4, 48:].equal(unpack(*pack(x[4, 48:]), x.dtype))
    assert [block_of(c) for c in (40, 96, 128, 192, 320, 1536, 67)] == [40, 48, 64, 64, 64, 64, 1]
    assert max(map(block_of, range(1, 500))) == BLOCK


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_packed_too(dtype):
    x = torch.randn(7, 64).to(dtype)
    back = unpack(*pack(x), dtype)
    assert back.dtype == dtype and relative(back.double(), x.double()) < 0.02


def activations(memory, size=(96, 128)):
    backbone = build_backbone("e3va", "swin_nano", memory=memory).train()
    optimizer = torch.optim.SGD([p for p in backbone.parameters() if p.requires_grad], lr=0.0)
    images = torch.randn(2, 3, *size)
    return ledger(backbone, optimizer, lambda: random_functional(backbone(images)), [images]).largest["activations"]


def test_what_is_kept():
    """In bytes, by hand: taps as they are, in one byte and a scale of two for 40 or 64 of them, or not at all."""
    kept = {memory: activations(memory) for memory in MEMORY}
    tokens = [2 * (96 // s) * (128 // s) for s in (4, 8, 16, 32)]
    maps = [tokens * dim for tokens, dim in zip(tokens, (40, 80, 160, 320), strict=True)]  # numbers in the four maps
    scales = [count / block for count, block in zip(maps, (40, 40, 40, 64), strict=True)]
    # Four a stage, and a row for the padding in every block of the stages whose taps are not stacked.
    taps = 4 * 4 * sum(maps) + 2 * 4 * (40 + 80 + 160)
    assert kept["store"] - kept["recompute"] == taps
    packed = sum(maps) + 2 * sum(scales)
    assert kept["store"] - kept["compress"] == taps - 4 * packed + 4 * sum(maps) - packed  # and the highway's own maps
    assert kept["recompute"] < kept["compress"] < kept["store"] < 0.6 * kept["reference"]


def test_nothing_is_kept_without_gradients():
    backbone, images = build_backbone("e3va", "swin_nano"), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert all(m.grad_fn is None for m in backbone(images))
    for p in backbone.parameters():
        p.requires_grad_(False)
    assert all(m.grad_fn is None for m in backbone(images))


@pytest.mark.parametrize("memory", ["store", "compress", "recompute"])
class TestAutogradsManners:
    """What autograd promises of any node holds for this one."""

    def test_two_backward_passes(self, memory):
        backbone, images = trained_for_a_while(memory), torch.randn(1, 3, 64, 64, dtype=torch.float64)
        loss = random_functional(backbone(images))
        loss.backward(retain_graph=True)
        once = {name: p.grad.clone() for name, p in backbone.named_parameters() if p.grad is not None}
        loss.backward()
        for name, p in backbone.named_parameters():
            assert name not in once or torch.equal(p.grad, 2 * once[name])
        with pytest.raises(RuntimeError, match="second time"):
            loss.backward()

    def test_a_parameter_that_was_changed_in_between_is_an_error(self, memory):
        backbone = trained_for_a_while(memory)
        loss = random_functional(backbone(torch.randn(1, 3, 64, 64, dtype=torch.float64)))
        with torch.no_grad():
            backbone.adapters[0][0][0].down.t.add_(1.0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()

    def test_gradients_are_tensors_of_their_own(self, memory):
        backbone = trained_for_a_while(memory)
        gradients(backbone, torch.randn(1, 3, 64, 64, dtype=torch.float64))
        trained = [p for p in backbone.parameters() if p.grad is not None]
        assert len({p.grad.untyped_storage().data_ptr() for p in trained}) == len(trained)
        assert all(p.grad.is_contiguous() and p.grad.untyped_storage().nbytes() == 8 * p.numel() for p in trained)

    def test_some_of_it_may_be_frozen(self, memory):
        images = torch.randn(1, 3, 64, 64, dtype=torch.float64)
        whole = trained_for_a_while(memory)
        some = copy.deepcopy(whole)
        some.adapters[1].requires_grad_(False)
        some.adapters[2][0][1].up.requires_grad_(False)
        some.norms["2"].requires_grad_(False)
        expected, found = gradients(whole, images)[1], gradients(some, images)[1]
        assert found.keys() == {name for name, p in some.named_parameters() if p.requires_grad}
        assert all(relative(found[name], expected[name]) < 1e-10 for name in found)

    def test_a_map_that_nobody_uses(self, memory):
        images = torch.randn(1, 3, 64, 64, dtype=torch.float64)
        backbone = trained_for_a_while(memory)
        results = []
        for backbone.memory in (memory, "reference"):
            backbone.zero_grad()
            random_functional(backbone(images)[1]).backward()
            results.append({n: p.grad for n, p in backbone.named_parameters() if p.grad is not None})
        fast, literal = results
        assert max(relative(fast[name], literal[name]) for name in literal) < (0.02 if memory == "compress" else 1e-10)
        assert all((fast[name] == 0).all() for name in fast.keys() - literal.keys())

    def test_bfloat16(self, memory):
        backbone, images = trained_for_a_while(memory).float(), torch.randn(2, 3, 64, 96)
        exact = gradients(backbone, images)[1]
        with torch.autocast("cpu", torch.bfloat16):
            maps = backbone(images)
        backbone.zero_grad()
        random_functional(maps).backward()  # outside of autocast, as training does it
        found = {name: p.grad for name, p in backbone.named_parameters() if p.grad is not None}
        backbone.memory = "reference"
        backbone.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            maps = backbone(images)
        random_functional(maps).backward()
        literal = {name: p.grad for name, p in backbone.named_parameters() if p.grad is not None}
        assert all(g.dtype == torch.float32 for g in found.values())
        error, usual = (
            torch.tensor([relative(some[name], exact[name]) for name in exact]).median() for some in (found, literal)
        )
        assert error < 1.5 * usual + 0.005 < 0.1

    def test_a_backward_pass_inside_autocast(self, memory):
        """Its cache holds casts of adapters that were made without a graph."""
        backbone, images = trained_for_a_while(memory).float(), torch.randn(2, 3, 64, 96)
        found = []
        for inside in (False, True):
            backbone.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = random_functional(backbone(images))
                if inside:
                    loss.backward()
            if not inside:
                loss.backward()
            found.append({name: p.grad for name, p in backbone.named_parameters() if p.grad is not None})
        assert found[0].keys() == found[1].keys()
        assert all(relative(found[1][name], found[0][name]) < 0.05 for name in found[0])

    def test_dry_and_on_meta(self, memory):
        with torch.device("meta"):
            backbone = build_backbone("e3va", "swin_nano", memory=memory)
            maps = backbone(torch.empty(1, 3, 64, 96))
            random_functional(maps).backward()
        assert all(p.grad.is_meta for name, p in backbone.named_parameters() if not name.startswith("backbone."))


def test_state_dicts_are_the_same_in_every_memory_mode():
    states = [build_backbone("e3va", "swin_nano", memory=memory).state_dict() for memory in MEMORY]
    assert all(list(state) == list(states[0]) for state in states)


def test_the_memory_mode_has_a_default():
    assert build_backbone("e3va", "swin_nano").memory == "compress"
    assert build_backbone("e3va", "swin_nano", structure="chained").memory == "reference"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory": "stroe"}, "did you mean store"),
        ({"memory": "store", "structure": "stacked"}, "structure=stacked only memory=reference"),
        ({"memory": "recompute", "structure": "chained"}, "structure=chained only memory=reference"),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(InputError) as error:
        build_backbone("e3va", "swin_nano", **options)
    assert message in str(error.value)


def test_the_command_line_has_the_option():
    nano = ["--recipe", "voc-nano", "--size", "64x64", "--batch-size", "1", "--dry-run", "--methods", "fixed,e3va"]
    peaks = []
    for mode in ("reference", "recompute"):
        rows = json.loads(CliRunner().invoke(cli, ["memory", *nano, "--memory", mode, "--json"]).stdout)["rows"]
        assert [row["method"] for row in rows] == ["fixed", f"e3va:memory={mode}"]
        peaks.append(rows[1]["largest"]["activations"])
    assert peaks[1] < peaks[0]
    refused = CliRunner().invoke(cli, ["train", "voc", "--root", "x", "--memory", "nothing"])
    assert refused.exit_code == 2 and ", ".join(map(repr, MEMORY)) in refused.output
