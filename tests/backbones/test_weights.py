"""Weights in: every naming arrives at the same model, and a bad file changes nothing."""

import importlib.util
import os
import pickle
import re

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.models.swin_transformer import SwinTransformer
from torch import nn

from e3va_lite.backbones.weights import fingerprint, load_weights
from e3va_lite.datasets.mmseg_import import import_mmseg
from e3va_lite.errors import InputError

SMALL = {"embed_dim": 16, "depths": (2, 2, 2, 2), "num_heads": (1, 2, 4, 8), "window_size": 7}


def small_swin(seed, **changes):
    """A Swin in which no two values agree, norms and biases included, so that nothing can be swapped unseen."""
    swin = SwinTransformer(**{**SMALL, **changes}, num_classes=0, strict_img_size=False, always_partition=True)
    swin.norm, swin.head = nn.Identity(), nn.Identity()
    return randomised(swin, seed)


def randomised(model, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.1, 0.1, generator=generator)
    model.eval()  # mmsegmentation's returns None
    return model


def microsoft_naming(swin):
    """What Microsoft's classification code writes: merging at the end of the stage before, buffers, norm and head."""
    written = {}
    for key, tensor in swin.state_dict().items():
        parts = key.split(".")
        if parts[2] == "downsample":
            parts[1] = {"1": "0", "2": "1", "3": "2"}[parts[1]]
        written[".".join(parts)] = tensor
        if key.endswith("relative_position_bias_table"):
            written[key.replace("bias_table", "index")] = torch.zeros(49, 49, dtype=torch.int64)
    written["layers.0.blocks.1.attn_mask"] = torch.zeros(64, 49, 49)
    written |= {"norm.weight": torch.ones(128), "norm.bias": torch.zeros(128)}
    return written | {"head.weight": torch.zeros(21841, 128), "head.bias": torch.zeros(21841)}


def assert_loads(source, path):
    target = small_swin(seed=99)
    assert fingerprint(target) != fingerprint(source)
    load_weights(target, path)
    for key, tensor in source.state_dict().items():
        assert torch.equal(target.state_dict()[key], tensor), key


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".PT"])
def test_timm_naming(tmp_path, suffix):
    source, path = small_swin(seed=1), tmp_path / f"swin{suffix}"
    tensors = source.state_dict() | {"norm.weight": torch.ones(128), "head.fc.weight": torch.zeros(1000, 128)}
    save_file(tensors, path) if suffix == ".safetensors" else torch.save(tensors, path)
    assert_loads(source, str(path) if suffix == ".pth" else path)


def test_microsoft_naming(tmp_path):
    source, path = small_swin(seed=1), tmp_path / "swin.pth"
    torch.save({"model": microsoft_naming(source), "epoch": 299}, path)
    assert_loads(source, path)


def test_legacy_file_format(tmp_path):
    source, path = small_swin(seed=1), tmp_path / "swin.pth"
    torch.save({"model": microsoft_naming(source)}, path, _use_new_zipfile_serialization=False)
    assert_loads(source, path)


@pytest.mark.parametrize("prefix", ["module.", "backbone.", "module.backbone."])
def test_inside_a_detector(tmp_path, prefix):
    source, path = small_swin(seed=1), tmp_path / "detector.pth"
    backbone = {key: tensor for key, tensor in microsoft_naming(source).items() if not key.startswith(("norm", "head"))}
    backbone |= {f"norm{level}.weight": torch.ones(16 * 2**level) for level in range(4)}
    detector = {prefix + key: tensor for key, tensor in backbone.items()}
    if "backbone" in prefix:
        detector |= {"neck.fpn_convs.0.conv.weight": torch.zeros(3), "decode_head.norm.weight": torch.zeros(3)}
    torch.save({"meta": {"epoch": 36}, "state_dict": detector, "optimizer": {"state": {}}}, path)
    assert_loads(source, path)


def test_timm_merges_in_microsofts_order():
    """The loader moves Microsoft's merging weights as they are; timm's channel order is a detail of its code."""
    merging, x = small_swin(seed=1).layers[1].downsample, torch.randn(2, 6, 8, 16)
    merged = torch.cat([x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]], dim=-1)
    torch.testing.assert_close(merging(x), merging.reduction(merging.norm(merged)))


@pytest.mark.parametrize("whole_model", [False, True])
def test_mmseg_naming(tmp_path, whole_model):
    """mmsegmentation's own module is the judge: after loading, both compute the same four maps.

    At 224x224 nothing is padded, so timm's forward will do; other sizes are tested in test_swin.py.
    """
    pytest.importorskip("cv2", exc_type=ImportError)
    if not importlib.util.find_spec("mmseg"):
        pytest.skip("mmsegmentation is not installed")
    swins = import_mmseg().models.backbones
    shape = {"embed_dims": 16, "depths": (2, 2, 2, 2), "num_heads": (1, 2, 4, 8), "window_size": 7}
    source, path = randomised(swins.SwinTransformer(pretrain_img_size=224, **shape), seed=1), tmp_path / "swin.pth"
    tensors = source.state_dict()
    if whole_model:
        tensors = {f"backbone.{key}": tensor for key, tensor in tensors.items()}
        tensors |= {"decode_head.conv_seg.weight": torch.zeros(150, 512, 1, 1)}
        tensors = {"state_dict": tensors, "meta": {"dataset_meta": {"classes": ["wall"]}}}
    torch.save(tensors, path)

    target = small_swin(seed=99)
    load_weights(target, path)
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        x = target.patch_embed(images)
        for level, expected in enumerate(source(images)):
            x, norm = target.layers[level](x), getattr(source, f"norm{level}")
            ours = F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias)
            torch.testing.assert_close(ours.permute(0, 3, 1, 2), expected, atol=1e-4, rtol=0)


def test_float16_becomes_float32(tmp_path):
    source, target, path = small_swin(seed=1), small_swin(seed=99), tmp_path / "half.safetensors"
    save_file({key: tensor.half() for key, tensor in source.state_dict().items()}, path)
    load_weights(target, path)
    assert all(parameter.dtype == torch.float32 for parameter in target.parameters())
    assert fingerprint(target) == fingerprint(source.half())


TABLE = "layers.3.blocks.1.attn.relative_position_bias_table"
LAST = "layers.3.blocks.1.mlp.fc2.bias"  # where a copy that checks as it goes would have copied all the rest


def one_nan(tensors):
    tensors[LAST] = tensors[LAST].clone()
    tensors[LAST][5] = torch.nan


DEFECTS = {  # what is done to the state dict, and what the message must say
    "missing": (lambda t: t.pop(LAST), [f"the file has no '{LAST}'"]),
    "several missing": (lambda t: [t.pop(key) for key in list(t) if "layers.3" in key], ["layers.3.", "and 26 more"]),
    "unexpected": (lambda t: t.update(absolute_pos_embed=torch.zeros(1, 9)), ["the model has no 'absolute_pos_embed'"]),
    "shape": (lambda t: t.update({TABLE: torch.zeros(529, 8)}), [f"'{TABLE}' is (529, 8) in the file and (169, 8) in"]),
    "nan": (one_nan, [LAST, "not finite"]),
    "too large": (lambda t: t.update({LAST: torch.full((128,), 1e300, dtype=torch.float64)}), [LAST, "not finite"]),
    "integers": (lambda t: t.update({LAST: torch.zeros(128, dtype=torch.int64)}), [LAST, "torch.int64"]),
    "sparse": (lambda t: t.update({LAST: torch.zeros(128).to_sparse()}), [LAST, "no ordinary"]),
    "no swin": (lambda t: t.pop("patch_embed.proj.weight"), ["no backbone", "patch_embed.norm.weight"]),
    "two swins": (lambda t: t.update({f"teacher.{key}": t[key] for key in list(t)}), ["several", "'teacher.'"]),
    "nothing": (lambda t: t.clear(), ["no backbone"]),
    "itself": (lambda t: (t.clear(), t.update(model=t)), ["no backbone"]),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_nothing_is_half_loaded(tmp_path, defect):
    spoil, expected = DEFECTS[defect]
    swin, path = small_swin(seed=1), tmp_path / "swin.pth"
    tensors = dict(small_swin(seed=2).state_dict())
    spoil(tensors)
    torch.save(tensors, path)
    before = fingerprint(swin)
    with pytest.raises(InputError) as caught:
        load_weights(swin, path)
    for part in (str(path), *expected):
        assert part in str(caught.value)
    assert fingerprint(swin) == before


@pytest.mark.parametrize("naming", [dict, microsoft_naming])
def test_another_backbones_weights_say_what_they_are(tmp_path, naming):
    swin, path = small_swin(seed=1), tmp_path / "swin.pth"
    other = small_swin(seed=2, embed_dim=32, depths=(2, 2, 6, 2), num_heads=(2, 4, 8, 16))
    torch.save(other.state_dict() if naming is dict else microsoft_naming(other), path)
    with pytest.raises(InputError, match="depths 2-2-6-2, window 7") as caught:
        load_weights(swin, path)
    assert "(32, 3, 4, 4) in the file and (16, 3, 4, 4) in the model" in str(caught.value)
    assert "width 32" in str(caught.value)


def cut_short(path, tensors):
    if path.suffix == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


UNREADABLE = {
    "missing.pth": (lambda path, _: None, "there is no weights file"),
    "folder.pth": (lambda path, _: path.mkdir(), "there is no weights file"),
    "swin.h5": (lambda path, _: path.write_bytes(b"x"), "end in '.h5'"),
    "empty.pth": (lambda path, _: path.touch(), "damaged"),
    "empty.safetensors": (lambda path, _: path.touch(), "damaged"),
    "page.pth": (lambda path, _: path.write_text("<html>404</html>"), "damaged"),
    "page.safetensors": (lambda path, _: path.write_text("<html>404</html>"), "damaged"),
    "cut.pth": (cut_short, "damaged"),
    "cut.safetensors": (cut_short, "damaged"),
    "list.pth": (lambda path, _: torch.save([torch.zeros(3)], path), "hold a list"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_unreadable_file(tmp_path, name):
    write, expected = UNREADABLE[name]
    swin, path = small_swin(seed=1), tmp_path / name
    write(path, small_swin(seed=2).state_dict())
    before = fingerprint(swin)
    with pytest.raises(InputError, match=expected) as caught:
        load_weights(swin, path)
    assert str(path) in str(caught.value)
    assert fingerprint(swin) == before


class Trap:
    """Unpickling it makes a folder."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("style", ["zip", "legacy", "plain pickle"])
def test_pickled_code_is_refused_and_does_not_run(tmp_path, style):
    swin, path, folder = small_swin(seed=1), tmp_path / "swin.pth", tmp_path / "sprung"
    trap = Trap(folder)
    if style == "plain pickle":
        path.write_bytes(pickle.dumps(trap, protocol=2))
    else:
        content = {"state_dict": small_swin(seed=2).state_dict(), "hook": trap}
        torch.save(content, path, _use_new_zipfile_serialization=style == "zip")
    before = fingerprint(swin)
    with pytest.raises(InputError, match=r"pickled code \(\w+\.mkdir\), which is refused") as caught:
        load_weights(swin, path)
    assert str(path) in str(caught.value)
    assert not folder.exists()
    assert fingerprint(swin) == before
    if style == "plain pickle":
        pickle.loads(path.read_bytes())
    else:
        torch.load(path, weights_only=False)
    assert folder.exists()  # the trap was a real one


def test_fingerprint_sees_every_value():
    swin = small_swin(seed=1)
    before = fingerprint(swin)
    assert re.fullmatch("[0-9a-f]{64}", before)
    assert fingerprint(small_swin(seed=1)) == before
    with torch.no_grad():
        for parameter in (swin.patch_embed.norm.bias, swin.layers[3].blocks[1].mlp.fc2.weight):
            old = parameter.flatten()[-1].clone()
            parameter.view(-1)[-1] += 1e-6
            assert fingerprint(swin) != before
            parameter.view(-1)[-1] = old
    assert fingerprint(swin) == before
