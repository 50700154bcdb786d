"""tune: a new model computes what it computed, only adapters are trained, and they come back from their folder."""

import copy
import json
import pickle

import pytest
import timm
import torch
from timm.models._features import FeatureGetterNet
from torch import nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformer, SwinTransformerBlockV2

import e3va_lite
from e3va_lite import InputError, Tuning, assert_isolated, from_pretrained, tune

SWIN = {"embed_dim": 16, "depths": (2, 2, 2), "num_heads": (1, 2, 4), "window_size": 4}
VIT = {"embed_dim": 24, "depth": 4, "num_heads": 3}
TORCHVISION = {"patch_size": [4, 4], "embed_dim": 16, "depths": [2, 2, 2], "num_heads": [1, 2, 4]}


def timm_swin(**options):
    return timm.create_model("swin_tiny_patch4_window7_224", strict_img_size=False, **SWIN, **options)


def timm_vit(name="vit_tiny_patch16_224", **options):
    return timm.create_model(name, **VIT, **options)


def torchvision_v2():
    v2 = {"block": SwinTransformerBlockV2, "downsample_layer": PatchMergingV2}
    return SwinTransformer(**TORCHVISION, window_size=[4, 4], num_classes=5, **v2)


def hugging_face(kind, **options):
    transformers = pytest.importorskip("transformers")
    if kind == "Dinov2Backbone":
        options = {"reshape_hidden_states": True, **options}
        shape = {"hidden_size": 24, "num_hidden_layers": 4, "num_attention_heads": 3, "image_size": 56}
        config = transformers.Dinov2Config(**shape, patch_size=14, out_features=["stage2", "stage4"], **options)
    else:
        shape = {"embed_dim": 16, "depths": [2, 2, 2], "num_heads": [1, 2, 4], "window_size": 4, "image_size": 64}
        config = transformers.SwinConfig(**shape, out_features=["stage1", "stage3"])
    return getattr(transformers, kind)(config)


#: Every kind of host: how to make one, and a size of images; where it can be, one that fits neither patch nor window.
HOSTS = {
    "timm-features": (lambda: timm_swin(features_only=True, out_indices=(0, 2)), (76, 100)),
    "timm-features-dict": (lambda: timm_swin(features_only=True, out_indices=(1,), feature_cls="dict"), (76, 100)),
    "timm-fixed-size": (lambda: timm.create_model("swin_tiny_patch4_window7_224", img_size=64, **SWIN), (64, 64)),
    "timm-v2-features": (
        lambda: timm.create_model(
            "swinv2_tiny_window8_256", features_only=True, out_indices=(0, 2), strict_img_size=False, **SWIN
        ),
        (76, 100),
    ),
    "timm-swin": (lambda: timm_swin(num_classes=5), (76, 100)),
    "timm-v2": (lambda: timm.create_model("swinv2_tiny_window8_256", img_size=64, num_classes=5, **SWIN), (64, 64)),
    "vit-features": (lambda: timm_vit(features_only=True, out_indices=(1, 3), img_size=64), (64, 64)),
    "vit-features-normed": (
        lambda: FeatureGetterNet(timm_vit(dynamic_img_size=True), (1, 2), norm=True, output_fmt="NLC"),
        (64, 96),
    ),
    "vit": (lambda: timm_vit(num_classes=5, img_size=64), (64, 64)),
    "dinov2": (lambda: timm_vit("vit_small_patch14_dinov2", img_size=56, global_pool="avg", num_classes=5), (56, 56)),
    "dinov3-features": (lambda: timm_vit("vit_small_patch16_dinov3", features_only=True, out_indices=(1, 3)), (64, 96)),
    "dinov3": (lambda: timm_vit("vit_small_patch16_dinov3", num_classes=5), (64, 96)),
    "torchvision": (lambda: SwinTransformer(**TORCHVISION, window_size=[4, 4], num_classes=5), (75, 101)),
    "torchvision-v2": (torchvision_v2, (75, 101)),
    "torchvision-getter": (
        lambda: IntermediateLayerGetter(
            SwinTransformer(**TORCHVISION, window_size=[4, 4]).features, {"1": "fine", "5": "coarse"}
        ),
        (75, 101),
    ),
    "hf-swin-backbone": (lambda: hugging_face("SwinBackbone"), (75, 101)),
    "hf-swin": (lambda: hugging_face("SwinModel"), (75, 101)),
    "hf-swin-one-window": (lambda: hugging_face("SwinModel"), (64, 64)),
    "hf-dinov2": (lambda: hugging_face("Dinov2Backbone"), (60, 100)),
    "hf-dinov2-tokens": (lambda: hugging_face("Dinov2Backbone", reshape_hidden_states=False), (56, 56)),
}


def moved(model, by=0.05):
    """No value is special any more: not a zero of an initialisation, not a one of a norm."""
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += by * torch.randn_like(p)
    return model


def made(name):
    make, size = HOSTS[name]
    return moved(make()).eval(), torch.randn(2, 3, *size)


def outputs(model, images):
    """All tensors of an output, by name or number."""
    output = model(images)
    output = {"": output} if isinstance(output, torch.Tensor) else output
    output = dict(enumerate(output)) if isinstance(output, list) else dict(output)
    parts = {k: v if isinstance(v, tuple) else (v,) for k, v in output.items() if v is not None}
    return {(k, i): v for k, some in parts.items() for i, v in enumerate(some)}


def assert_same(found, expected, **tolerances):
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, **tolerances)


@pytest.mark.parametrize("memory", ["compress", "reference"])
@pytest.mark.parametrize("name", HOSTS)
def test_a_new_one_computes_what_the_model_computed(name, memory):
    model, images = made(name)
    kind = type(model)
    with torch.no_grad():
        before = outputs(copy.deepcopy(model), images)  # transformers' blocks keep the shift of the first call
        tune(model, rank=2, memory=memory)
        after = outputs(model, images)
    assert isinstance(model, kind)
    assert_same(after, before, atol=1e-5, rtol=1e-5)
    assert all(after[key].shape == value.shape and after[key].dtype == value.dtype for key, value in before.items())


@pytest.mark.parametrize("name", HOSTS)
def test_no_gradient_reaches_the_backbone(name):
    model, images = made(name)
    tune(model, rank=2)
    assert_isolated(model, images)


@pytest.mark.parametrize("name", HOSTS)
def test_the_fused_form_is_the_literal_one_after_training_too(name):
    model, images = made(name)
    tuning = tune(model, rank=2)
    moved(tuning.tuned)
    fused = outputs(model, images)
    tuning.tuned.memory = "reference"
    assert_same(outputs(model, images), fused, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method", ["fixed", "bitfit", "norm", "partial1", "adapter", "lora", "lorand", "lst", "losa"])
@pytest.mark.parametrize("name", ["timm-features", "vit-features", "hf-swin-backbone", "torchvision"])
def test_other_methods(name, method):
    model, images = made(name)
    options = {"lst": {"narrower": 4}, "losa": {"rank": 2}, "lora": {"rank": 2}}.get(method, {})
    before = outputs(model, images)
    if method in ("lora", "lst") and not name.startswith(("timm", "vit")):
        with pytest.raises(InputError, match="is made for timm's own blocks"):
            tune(model, method, **options)
    else:
        tune(model, method, **options)
    assert_same(outputs(model, images), before, atol=1e-5, rtol=1e-5)


def segmenter(seed=0):
    """A model of a user's own: a backbone somewhere in it, and a head."""
    torch.manual_seed(seed)

    class Segmenter(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = nn.ModuleDict({"body": timm_swin(features_only=True, out_indices=(1, 2))})
            self.norm = nn.BatchNorm2d(64)
            self.head = nn.Conv2d(64, 3, 1)

        def forward(self, images):
            return self.head(self.norm(self.encoder["body"](images)[-1].permute(0, 3, 1, 2)))

    return moved(Segmenter())


def trained(model, steps=2, seed=1):
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        model.train()(torch.randn(2, 3, 64, 64)).square().mean().backward()
        optimizer.step()
    return model.eval()


def test_two_steps_move_the_adapters_and_the_head_only():
    model = segmenter()
    tuning = tune(model, rank=2)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trained(model)
    moved_ones = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    adapters = {f"encoder.body.tuned.{name}" for name in tuning.bank.names}
    assert all(".adapters." in name for name in adapters) and len(adapters) == 6 * 2 * 6
    assert moved_ones == adapters | {"norm.weight", "norm.bias", "head.weight", "head.bias"}


def test_it_says_what_it_did(capsys):
    model = segmenter()
    total = sum(p.numel() for p in model.parameters())
    backbone = sum(p.numel() for p in model.encoder.parameters())
    tuning = tune(model, rank=2)
    tuning.print_trainable_parameters()
    adapters = sum(p.numel() for p in tuning.tuned.adapters.parameters())
    said = capsys.readouterr().out
    assert said.startswith("e3va on timm.FeatureListNet 'encoder.body': ")
    assert f"{adapters:,} of {backbone + adapters:,} parameters are trained" in said
    assert f"{total - backbone:,} of the {total - backbone:,} around it" in said


def test_saved_and_loaded_it_is_equal_to_the_bit(tmp_path):
    model, images = segmenter(), torch.randn(2, 3, 64, 64)
    tuning = tune(model, rank=2, memory="recompute")
    tuning.save_pretrained(tmp_path / "before")
    trained(model)
    tuning.save_pretrained(tmp_path / "after")
    config = json.loads((tmp_path / "after" / "e3va_config.json").read_text(encoding="utf-8"))
    assert (config["method"], config["options"]) == ("e3va", {"rank": 2, "memory": "recompute"})
    other = segmenter()
    loaded = from_pretrained(other, tmp_path / "after")
    assert loaded.tuned.memory == "recompute"
    assert torch.equal(other.eval()(images), model(images))
    with loaded.disable():  # the loaded values are not taken for those of step 0
        assert not torch.equal(other(images), model(images))
    only_adapters = segmenter()
    from_pretrained(only_adapters, tmp_path / "after", rest=False)
    assert torch.equal(only_adapters.head.weight, segmenter().head.weight)
    assert all(
        torch.equal(a, b) for a, b in zip(only_adapters.encoder.parameters(), model.encoder.parameters(), strict=True)
    )


def test_other_pretrained_weights_are_refused_and_change_nothing(tmp_path):
    tune(model := segmenter(), rank=2).save_pretrained(tmp_path)
    other, images = segmenter(seed=5).eval(), torch.randn(1, 3, 64, 64)
    before, keys = other(images), list(other.state_dict())
    with pytest.raises(InputError, match="made with other pretrained weights"):
        from_pretrained(other, tmp_path)
    assert torch.equal(other(images), before) and list(other.state_dict()) == keys
    assert all(p.requires_grad for p in other.parameters())
    with pytest.raises(InputError, match=r"belongs to the stages \[2, 3\] of a timm.FeatureListNet"):
        from_pretrained(timm_swin(features_only=True, out_indices=(0, 2)), tmp_path)
    with pytest.raises(InputError, match="belongs to the stages"):
        from_pretrained(timm_vit(), tmp_path)
    model.head = nn.Conv2d(64, 7, 1)
    wider = segmenter()
    wider.head = nn.Conv2d(64, 7, 1)
    with pytest.raises(InputError, match=r"saved with another neck or head, first at 'head.bias'.*rest=False"):
        from_pretrained(wider, tmp_path)
    from_pretrained(wider, tmp_path, rest=False)


@pytest.mark.parametrize("method", ["bitfit", "lora", "adapter"])
def test_methods_inside_the_backbone_are_saved_too(tmp_path, method):
    model, images = segmenter(), torch.randn(1, 3, 64, 64)
    before = model.eval()(images)
    tuning = tune(model, method)
    trained(model)
    tuning.save_pretrained(tmp_path)
    other = segmenter()
    from_pretrained(other, tmp_path)
    assert torch.equal(other.eval()(images), model(images))
    assert not torch.equal(model(images), before)


def test_files_that_are_none(tmp_path):
    with pytest.raises(InputError, match=r"holds no e3va_config.json"):
        from_pretrained(segmenter(), tmp_path)
    (tmp_path / "e3va_config.json").write_text("{", encoding="utf-8")
    with pytest.raises(InputError, match="is no JSON file"):
        from_pretrained(segmenter(), tmp_path)
    (tmp_path / "e3va_config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(InputError, match="not written by this version"):
        from_pretrained(segmenter(), tmp_path)
    tune(segmenter(), rank=2).save_pretrained(tmp_path)
    (tmp_path / "e3va_adapters.safetensors").write_bytes(b"damaged")
    keys = list((model := segmenter()).state_dict())
    with pytest.raises(InputError, match="cannot be read as a safetensors file"):
        from_pretrained(model, tmp_path)
    assert list(model.state_dict()) == keys
    tune(model := segmenter(), "fixed")
    with pytest.raises(InputError, match="nothing of the backbone is trained"):
        Tuning(model).save_pretrained(tmp_path / "x")


def test_two_adapters_by_name(tmp_path):
    model, images = segmenter().eval(), torch.randn(1, 3, 64, 64)
    features = model.encoder["body"]
    tuning = tune(model, rank=2)

    def maps():
        with torch.no_grad():
            return torch.cat([m.flatten() for m in features(images)])

    frozen = maps()
    trained(model)
    first = maps()
    tuning.add_adapter("night")
    assert torch.equal(maps(), first) and tuning.adapters == ["default", "night"]
    tuning.set_adapter("night")
    assert torch.equal(maps(), frozen)
    trained(model, seed=2)
    night = maps()
    tuning.save_pretrained(tmp_path)
    assert not torch.equal(night, frozen) and not torch.equal(night, first)
    tuning.set_adapter("default")
    assert torch.equal(maps(), first)
    assert sum(p.requires_grad for p in tuning.bank.parameters()) == 0
    tuning.load_adapter(tmp_path, "again")
    tuning.set_adapter("again")
    assert torch.equal(maps(), night)
    for name in ("again", "default", "", "a.b"):
        with pytest.raises(InputError, match="cannot be called"):
            tuning.add_adapter(name)
    with pytest.raises(InputError, match="there are again, "):
        tuning.set_adapter("day")


def test_a_folder_of_another_rank_is_refused_beside(tmp_path):
    tune(segmenter(), rank=3).save_pretrained(tmp_path)
    tuning = tune(segmenter(), rank=2)
    with pytest.raises(InputError, match="tune a model of its own"):
        tuning.load_adapter(tmp_path, "other")
    assert tuning.adapters == ["default"]


def test_all_adapters_are_in_the_state_dict():
    model = segmenter()
    tune(model, rank=2).add_adapter("night")
    moved(model), moved(Tuning(model).bank.kept.requires_grad_())
    other = segmenter(seed=3)
    tune(other, rank=2).add_adapter("night")
    other.load_state_dict(model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize("method", ["e3va", "bitfit", "lora"])
def test_disable_gives_the_frozen_maps_until_its_end(method):
    model, images = segmenter().eval(), torch.randn(1, 3, 64, 64)
    features = model.encoder["body"]
    before = features(images)[-1]
    tuning = tune(model, method)
    start = features(images)[-1]
    trained(model)
    after = features(images)[-1].detach()
    assert not torch.allclose(after, before, atol=1e-4)
    with tuning.disable() as inside:
        assert inside is model
        assert torch.equal(features(images)[-1], start)
        with tuning.disable():
            assert torch.equal(features(images)[-1], start)
        assert torch.equal(features(images)[-1], start)
    torch.testing.assert_close(start, before, atol=1e-5, rtol=1e-5)
    assert torch.equal(features(images)[-1], after)
    with pytest.raises(ZeroDivisionError), tuning.disable():
        1 / 0  # noqa: B018
    assert torch.equal(features(images)[-1], after)


def test_a_frozen_reference_inside_a_training_step():
    """As in distillation: tuned and frozen maps in one loss."""
    model, images = segmenter(), torch.randn(1, 3, 64, 64)
    tuning = tune(moved(model), rank=2)
    moved(tuning.tuned)
    features = model.encoder["body"]
    maps = features(images)[-1]
    with tuning.disable():
        frozen = features(images)[-1]
    assert not frozen.requires_grad
    (maps - frozen).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in tuning.tuned.adapters.parameters())


def test_a_backward_pass_through_an_adapter_that_is_no_longer_there_is_an_error():
    model = segmenter()
    tuning = tune(model, rank=2)
    tuning.add_adapter("night")
    loss = model(torch.randn(1, 3, 64, 64)).sum()
    tuning.set_adapter("night")
    with pytest.raises(RuntimeError, match="exchanged"):
        loss.backward()


@pytest.mark.parametrize("how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("name", ["timm-features", "vit", "torchvision", "hf-swin-backbone"])
def test_a_copy_is_tuned_and_independent(name, how):
    model, images = made(name)
    tune(model, rank=2).add_adapter("night")
    copied = how(moved(model))
    assert_same(outputs(copied, images), outputs(model, images), atol=0, rtol=0)
    Tuning(copied).set_adapter("night")
    assert Tuning(model).adapters == ["default", "night"] and Tuning(copied).adapters == ["night", "default"]


@pytest.mark.parametrize("name", ["timm-features", "vit"])
def test_lora_can_be_merged(name):
    model, images = made(name)
    tuning = tune(model, "lora", rank=2)
    moved(tuning.tuned, by=0.3)
    before = outputs(model, images)
    copied = copy.deepcopy(model)
    for one in (copied, model):
        Tuning(one).merge()
        assert_same(outputs(one, images), before, atol=1e-5, rtol=1e-4)
        assert not any("updates" in key for key in one.state_dict())
    with pytest.raises(InputError, match="only lora can"):
        tune(made(name)[0], "e3va", rank=2).merge()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_adapters_take_the_type_of_the_backbone(dtype):
    model, images = made("timm-features")
    tune(model.to(dtype), rank=2)
    maps = model.train()(images.to(dtype))
    assert {m.dtype for m in maps} == {p.dtype for p in model.parameters()} == {dtype}
    sum(m.float().square().sum() for m in maps).backward()


def test_the_mode_and_the_flags_around_the_backbone_stay():
    model = segmenter().train()
    model.norm.eval()
    model.head.bias.requires_grad_(False)
    tune(model, rank=2)
    assert model.training and not model.norm.training and not model.head.bias.requires_grad
    assert not any(m.training for m in Tuning(model).tuned.backbone.modules())


def test_what_cannot_be_tuned_says_so_and_stays():
    with pytest.raises(InputError, match=r"no backbone that can be tuned was found; supported are timm's Swin.*Dinov2"):
        tune(nn.Sequential(nn.Conv2d(3, 4, 1)))
    with pytest.raises(InputError, match="several backbones: pass backbone=, one of '0', '1'"):
        tune(nn.Sequential(timm_vit(), timm_swin()))
    with pytest.raises(InputError, match=r"no module 'bckbone' \(its children are encoder, norm, head\)"):
        tune(segmenter(), backbone="bckbone")
    with pytest.raises(InputError, match=r"'encoder.body' is tuned already"):
        tune((model := segmenter(), tune(model))[0])
    with pytest.raises(InputError, match="but what Mine makes of them is not known"):

        class Mine(SwinTransformer):
            def forward(self, x):
                return self.features(x)

        tune(nn.Sequential(Mine(**TORCHVISION, window_size=[4, 4])))
    for options, said in (
        ({"rank": 0}, "rank=0 leaves the adapter no dimension"),
        ({"ranks": 4}, "did you mean rank"),
        ({"fpn_norm": "fixed"}, "norms behind the stages are the model's own"),
        ({"memory": "none"}, "unknown memory 'none'"),
    ):
        model = segmenter().train()
        keys = list(model.state_dict())
        with pytest.raises(InputError, match=said):
            tune(model, **options)
        assert list(model.state_dict()) == keys
        assert all(p.requires_grad for p in model.parameters()) and all(m.training for m in model.modules())
    with pytest.raises(InputError, match=r"call e3va_lite.tune"):
        Tuning(segmenter())


def test_a_backbone_that_one_already_holds():
    """``timm.create_model(...)`` itself: the very object is tuned, and its own methods go on working."""
    model, images = made("timm-swin")
    tune(model, rank=2)
    assert model(images).shape == (2, 5)
    model.reset_classifier(7)
    assert model(images).shape == (2, 7) and model.get_classifier().out_features == 7
    with pytest.raises(InputError, match="takes no mask"):
        vit, some = made("vit")
        tune(vit, rank=2)
        vit.forward_features(some, attn_mask=torch.ones(1))


def test_one_of_two_backbones():
    both = nn.ModuleDict({"left": timm_vit(img_size=64), "right": timm_swin()})
    tuning = tune(both, backbone="right", rank=2)
    assert tuning.name == "right" and all(p.requires_grad for p in both["left"].parameters())
    tune(both, backbone="left", rank=2)
    with pytest.raises(InputError, match="name one of 'left', 'right'"):
        Tuning(both)
    assert Tuning(both, "left").name == "left"


def test_the_public_name_is_the_function():

    assert e3va_lite.tune is tune and e3va_lite.from_pretrained is from_pretrained
