import itertools

import pytest
import torch
from torch.optim import SGD

from e3va_lite import METHODS, InputError, build_backbone
from e3va_lite.analysis.isolation import random_functional
from e3va_lite.backbones.base import trainable_parameters
from e3va_lite.backbones.swin import create_swin
from e3va_lite.methods.registry import OTHERS

SIZES = [(224, 224), (256, 320), (200, 336), (333, 517)]
VALUES = (("parallel", "stacked", "chained"), ("low_rank", "standard"), ("inherited", "trainable"))
E3VA_VARIANTS = [{"structure": s, "adapter": a, "reduction": r} for s, a, r in itertools.product(*VALUES)]
FAMILY = [*E3VA_VARIANTS, {"fpn_norm": "fixed"}, {"fpn_input": "e+l"}, {"middle": 24}, {"rank": 2}]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file of random pretrained weights, none of them zero: default biases would hide mistakes."""
    from safetensors.torch import save_file

    torch.manual_seed(1)
    swin = create_swin("swin_nano")
    for name, p in swin.named_parameters():
        torch.nn.init.normal_(p, mean=1.0 if "norm" in name and "weight" in name else 0.0, std=0.1)
    path = tmp_path_factory.mktemp("weights") / "random.safetensors"
    save_file(swin.state_dict(), path)
    return path


@pytest.mark.parametrize("size", SIZES)
@torch.no_grad()
def test_the_highway_starts_as_the_frozen_model(size, weights, device):
    images = torch.randn(1, 3, *size, device=device)
    expected = build_backbone("fixed", "swin_nano", weights=weights).to(device)(images)
    got = build_backbone("e3va", "swin_nano", weights=weights).to(device)(images)
    for stride, a, b in zip((4, 8, 16, 32), expected, got, strict=True):
        assert a.shape[-2:] == (-(-size[0] // stride), -(-size[1] // stride))
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


@pytest.mark.parametrize("options", E3VA_VARIANTS, ids=lambda o: "-".join(o.values()))
@torch.no_grad()
def test_every_variant_starts_as_the_frozen_model(options, weights):
    images = torch.randn(1, 3, 64, 80)
    expected = build_backbone("fixed", "swin_nano", weights=weights)(images)
    for a, b in zip(expected, build_backbone("e3va", "swin_nano", weights=weights, **options)(images), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


@pytest.mark.filterwarnings("ignore:rank=")
@pytest.mark.parametrize("method", METHODS)
def test_the_contract(method, weights, device):
    backbone = build_backbone(method, "swin_nano", weights=weights, stages=(2, 3, 4)).to(device).eval()
    images = torch.randn(2, 3, 72, 100, device=device)
    features = backbone(images)
    assert [f.shape[1] for f in features] == backbone.out_channels == [80, 160, 320]
    assert backbone.strides == [8, 16, 32]
    for f, stride in zip(features, backbone.strides, strict=True):
        assert f.shape == (2, f.shape[1], -(-72 // stride), -(-100 // stride)) and f.is_contiguous()
    frozen = build_backbone("fixed", "swin_nano", weights=weights, stages=(2, 3, 4)).to(device)(images)
    for a, b in zip(frozen, features, strict=True):  # when new, every method is the frozen model
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
    assert list(backbone.norms) == ["2", "3", "4"]


@pytest.mark.filterwarnings("ignore:rank=")
@pytest.mark.parametrize("method", METHODS)
def test_exactly_what_is_trainable_moves(method, weights):
    backbone = build_backbone(method, "swin_nano", weights=weights, stages=(2, 3)).train()
    trainable = {name for name, p in backbone.named_parameters() if p.requires_grad}
    if method == "fixed":
        assert not trainable
        return
    before = {name: p.detach().clone() for name, p in backbone.named_parameters()}
    optimizer = SGD(backbone.parameters(), lr=0.1)
    images = torch.randn(1, 3, 64, 64)
    for _ in range(3):
        optimizer.zero_grad()
        random_functional(backbone(images)).backward()
        optimizer.step()
    moved = {name for name, p in backbone.named_parameters() if not torch.equal(p, before[name])}
    assert moved == trainable and not any(name.startswith("backbone.layers.3") for name in moved)


@pytest.mark.filterwarnings("ignore:rank=")
@pytest.mark.parametrize("stages", [(1,), (1, 2), (2, 4)], ids=str)
@pytest.mark.parametrize("method", [*METHODS, *OTHERS])
def test_every_trainable_parameter_gets_a_gradient(method, stages):
    """Stages that are not run hold nothing trainable: DistributedDataParallel would wait for its gradient."""
    if method == "peft_lora":
        pytest.importorskip("peft")
    backbone = build_backbone(method, "swin_nano", stages=stages, **({"narrower": 20} if method == "lst" else {}))
    trainable = {name: p for name, p in backbone.train().named_parameters() if p.requires_grad}
    if trainable:
        random_functional(backbone(torch.randn(1, 3, 64, 64))).backward()
    assert [name for name, p in trainable.items() if p.grad is None] == []
    assert (len(trainable) == 0) == (method == "fixed")


def test_what_is_not_run_is_not_counted():
    whole, half = (build_backbone("full", "swin_nano", stages=stages) for stages in ((1, 2, 3, 4), (1, 2)))
    stages = {
        number: sum(p.numel() for p in stage.parameters()) for number, stage in enumerate(half.backbone.layers, 1)
    }
    norms = 2 * (160 + 320)
    assert trainable_parameters(whole) - trainable_parameters(half) == stages[3] + stages[4] + norms


@pytest.mark.filterwarnings("ignore:rank=")
@pytest.mark.parametrize("method", METHODS)
def test_one_set_of_weights_fits_every_method(method):
    reference = {f"backbone.{key}" for key in create_swin("swin_nano").state_dict()}
    keys = set(build_backbone(method, "swin_nano").state_dict())
    assert {key for key in keys if key.startswith("backbone.")} == reference


def test_an_inherited_reduction_follows_weights_loaded_later(weights):
    backbone = build_backbone("e3va", "swin_nano")
    backbone.backbone.load_state_dict(build_backbone("fixed", "swin_nano", weights=weights).backbone.state_dict())
    images = torch.randn(1, 3, 64, 64)
    for a, b in zip(build_backbone("fixed", "swin_nano", weights=weights)(images), backbone(images), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


def test_a_trainable_reduction_is_a_copy(weights):
    backbone = build_backbone("e3va", "swin_nano", weights=weights, reduction="trainable")
    own = {p.data_ptr() for p in backbone.reductions.parameters()}
    assert own.isdisjoint(p.data_ptr() for p in backbone.backbone.parameters())
    assert all(p.requires_grad for p in backbone.reductions.parameters())
    assert backbone.passed_by_design == []


def test_within_a_stage_every_adapter_gets_the_same_gradient(weights):
    """FACTS of equation (8): e - l is a sum, so dL/d(adapter output) is one tensor for all adapters of a stage."""
    backbone = build_backbone("e3va", "swin_nano", weights=weights, memory="reference").train()
    grads = {0: [], 1: [], 2: [], 3: []}
    for stage, adapters in enumerate(backbone.adapters):
        for adapter in itertools.chain(*adapters):
            adapter.register_forward_hook(
                lambda m, args, out, stage=stage: out.register_hook(lambda g: grads[stage].append(g)) and None
            )
    random_functional(backbone(torch.randn(1, 3, 64, 64))).backward()
    for stage in grads:
        assert len(grads[stage]) == 4
        for g in grads[stage][1:]:
            torch.testing.assert_close(g, grads[stage][0])
    assert grads[0][0].abs().max() > 0


def test_the_deviation_is_the_sum_over_the_taps(weights):
    """Equations (7) and (8) by hand, one stage: e - l after it equals the sum of what the adapters add."""
    from e3va_lite.backbones.swin import embed, f_p1, f_p2

    backbone = build_backbone("e3va", "swin_nano", weights=weights, stages=(1,))
    for p in backbone.adapters.parameters():
        torch.nn.init.normal_(p, std=0.05)
    images = torch.randn(1, 3, 60, 52)
    with torch.no_grad():
        l = start = embed(backbone.backbone, images)
        added = torch.zeros_like(l)
        for block, (a1, a2) in zip(backbone.backbone.layers[0].blocks, backbone.adapters[0], strict=True):
            f1 = f_p1(block, l)
            f2 = f_p2(block, l + f1)
            added += (a1(f1) - f1) + (a2(f2) - f2)
            l = l + f1 + f2
        expected = backbone.norms["1"](l + added).permute(0, 3, 1, 2)
        assert added.abs().mean() > 0.01 and not torch.equal(l, start)
        torch.testing.assert_close(backbone(images)[0], expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("method", ["full", "adapter", "lora", "adaptformer", "lorand", "bitfit", "norm", "partial1"])
def test_checkpointing_changes_nothing_but_memory(method, weights):
    plain = build_backbone(method, "swin_nano", weights=weights, stages=(1, 2)).train()
    for name, p in plain.named_parameters():
        if p.requires_grad and not name.startswith("backbone."):
            torch.nn.init.normal_(p, std=0.05)
    saving = build_backbone(method, "swin_nano", weights=weights, stages=(1, 2), checkpointing=True).train()
    saving.load_state_dict(plain.state_dict())
    images = torch.randn(1, 3, 64, 64)
    kept = []
    for backbone in (plain, saving):
        count = [0]
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, c=count: c.__setitem__(0, c[0] + t.nbytes) or t, lambda t: t
        ):
            loss = random_functional(backbone(images))
        if loss.requires_grad:
            loss.backward()
        kept.append(count[0])
    for (name, a), (_, b) in zip(plain.named_parameters(), saving.named_parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, msg=name)
    assert kept[1] < kept[0] or method == "partial1"  # the last block of stage 2 is small


def test_frozen_is_a_mode_and_a_flag():
    for method in ("fixed", "adapter", "e3va", "lora"):
        backbone = build_backbone(method, "swin_nano", drop_path_rate=0.5)
        parent = torch.nn.Sequential(backbone)
        parent.train()
        assert not any(m.training for m in backbone.backbone.modules()), method
        assert not any(p.requires_grad for p in backbone.backbone.parameters()), method
        images = torch.randn(1, 3, 64, 64)
        for a, b in zip(backbone(images), backbone(images), strict=True):
            assert torch.equal(a, b)
    full = build_backbone("full", "swin_nano", drop_path_rate=0.5).train()
    assert full.backbone.layers[3].blocks[1].drop_path1.training
    assert not torch.equal(full(images)[3], full(images)[3])


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "swin_s3_tiny_224", "swin_base_patch4_window12_384"])
def test_every_size_of_timm_builds_and_runs(name):
    """On the meta device: shapes without the weights' memory."""
    with torch.device("meta"):
        backbone = build_backbone("e3va", name)
        features = backbone(torch.empty(1, 3, 200, 336))
    assert [tuple(f.shape[-2:]) for f in features] == [(50, 84), (25, 42), (13, 21), (7, 11)]


# Bad input


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("e3vaa", "swin_nano"), {}, "unknown method 'e3vaa': did you mean e3va"),
        (("e3va", "swin_nan"), {}, "unknown backbone 'swin_nan': did you mean swin_nano"),
        (("e3va", "swin_large"), {}, "unknown backbone 'swin_large': did you mean swin_large_patch4_window7_224 or"),
        (("e3va", "resnet50"), {}, r"unknown backbone 'resnet50': choose swin_nano or one .{,200}$"),
        (
            ("e3va", "swin_base_patch4_window7_224.ms_in23k"),
            {"pretrained": True},
            "pretraining tag 'ms_in23k'.*ms_in22k",
        ),
        (("e3va", "swin_nano"), {"rank": 0}, "rank=0"),
        (("e3va", "swin_nano"), {"rnak": 4}, "unknown option of method e3va 'rnak': did you mean rank"),
        (("e3va+", "swin_nano"), {"structure": "serial"}, "unknown structure 'serial'"),
        (("full", "swin_nano"), {"fpn_norm": "frozen"}, "unknown fpn_norm 'frozen'"),
        (("full", "swin_nano"), {"stages": (0, 1)}, "stages="),
        (("full", "swin_nano"), {"stages": ()}, "stages="),
        (("full", "swin_nano"), {"weights": "no/such/file.safetensors"}, "no/such/file.safetensors"),
    ],
)
def test_bad_input_is_one_clear_error(arguments, options, message):
    with pytest.raises(InputError, match=message):
        build_backbone(*arguments, **options)


def test_an_image_that_is_too_small_is_refused():
    with pytest.raises(InputError, match="31x200"):
        build_backbone("e3va", "swin_nano")(torch.zeros(1, 3, 31, 200))
    build_backbone("e3va", "swin_nano")(torch.zeros(1, 3, 32, 33))


def test_nhwc_images_are_refused():
    with pytest.raises(InputError, match=r"\(B, 3, H, W\)"):
        build_backbone("e3va", "swin_nano")(torch.zeros(1, 64, 64, 3))


def test_a_rank_that_is_not_low_is_a_warning():
    with pytest.warns(UserWarning, match="rank=16 is no longer low"):
        build_backbone("e3va+", "swin_nano")


def test_a_hub_out_of_reach_is_one_clear_error(monkeypatch):
    import timm

    def offline(*args, **kwargs):
        raise FileNotFoundError("cannot reach the hub")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(InputError, match=r"could not be fetched.*name the file as the weights"):
        build_backbone("e3va", "swin_base_patch4_window7_224", pretrained=True)


def test_plain_names_of_the_papers_sizes_mean_imagenet_22k(monkeypatch):
    import timm

    asked = []
    monkeypatch.setattr(timm, "create_model", lambda name, **kw: asked.append(name) or create_swin("swin_nano"))
    for name in ("swin_base_patch4_window7_224", "swin_large_patch4_window7_224.ms_in22k_ft_in1k"):
        create_swin(name, pretrained=True)
    assert asked == ["swin_base_patch4_window7_224.ms_in22k", "swin_large_patch4_window7_224.ms_in22k_ft_in1k"]
