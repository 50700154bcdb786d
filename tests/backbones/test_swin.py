"""The frozen stream is the official dense-prediction Swin: mmsegmentation's, with the same weights, at any size."""

import importlib.util

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("cv2", reason="OpenCV, which mmsegmentation needs, does not import", exc_type=ImportError)
if not importlib.util.find_spec("mmseg"):
    pytest.skip("mmsegmentation is not installed (the extra 'segmentation')", allow_module_level=True)

from e3va_lite import build_backbone
from e3va_lite.backbones.swin import NANO, create_swin
from e3va_lite.datasets import mmseg_import
from e3va_lite.errors import InputError

SIZES = [(224, 224), (256, 320), (200, 336), (333, 517)]
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def official():
    """mmsegmentation's Swin of swin_nano's size, with random values everywhere.

    New modules have zero biases and tables, and unit norms; with those, a map padded before its norm looks just like
    one padded after it. The norms behind the stages stay as they are, since ours are new and not loaded.
    """
    shape = {name: value for name, value in NANO.items() if name != "weight_init"}  # the start does not matter here
    backbones = mmseg_import.import_mmseg().models.backbones
    swin = backbones.SwinTransformer(pretrain_img_size=224, embed_dims=shape.pop("embed_dim"), **shape)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in swin.named_parameters():
            if not name.startswith("norm"):
                is_scale = parameter.ndim == 1 and name.endswith("weight")
                parameter.normal_(1.0 if is_scale else 0.0, 0.1, generator=generator)
    swin.eval()  # its train and eval return None
    return swin


@pytest.fixture(scope="module")
def weights(official, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "official.pth"
    torch.save(official.state_dict(), path)
    return path


def furthest(ours, expected):
    """The largest difference between two lists of maps."""
    assert [tuple(a.shape) for a in ours] == [tuple(b.shape) for b in expected]
    return max((a - b).abs().max().item() for a, b in zip(ours, expected, strict=True))


def images_of(size):
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("size", SIZES, ids=lambda size: "x".join(map(str, size)))
@torch.no_grad()
def test_the_frozen_stream_is_mmsegmentations(official, weights, size):
    images = images_of(size)
    ours = build_backbone("fixed", "swin_nano", weights=weights, stages=(1, 2, 3, 4))(images)
    expected = official(images)
    assert all(level.std(dim=(2, 3)).mean() > 0.1 for level in expected)  # places differ, so that shifting them shows
    assert furthest(ours, expected) < TOLERANCE


@pytest.mark.parametrize(("size", "agrees"), [((224, 224), True), ((256, 320), False)], ids=["224x224", "256x320"])
@torch.no_grad()
def test_timms_own_forward_is_not(official, weights, size, agrees):
    """What makes the test above worth having: roll-then-pad, same weights, agrees only where nothing is padded."""
    swin = create_swin("swin_nano", weights=weights).eval()
    x, maps = swin.patch_embed(images_of(size)), []
    for stage in swin.layers:
        x = stage(x)
        maps.append(F.layer_norm(x, x.shape[-1:]).permute(0, 3, 1, 2))
    difference = furthest(maps, official(images_of(size)))
    assert difference < TOLERANCE if agrees else difference > 0.1


def test_the_stand_ins_operators_say_what_is_wrong():
    mmseg_import.import_mmseg()
    from mmcv import _ext

    if getattr(_ext, "__file__", None):
        pytest.skip("mmcv was compiled here; there is no stand-in")
    with pytest.raises(NotImplementedError, match=r"'nms'.*mmcv-lite"):
        _ext.nms(torch.zeros(1, 4), torch.zeros(1))


ABSENT = {
    "extra": (ModuleNotFoundError("No module named 'mmseg'", name="mmseg"), r"\.\[segmentation\]"),
    "libGL": (ImportError("libGL.so.1: cannot open shared object file: No such file"), "libGL.so.1.*install libgl1"),
    "version": (AssertionError("MMCV==2.2.0 is used but incompatible"), r"2\.2\.0.*\.\[segmentation\]"),
}


@pytest.mark.parametrize("case", ABSENT)
def test_what_is_missing_is_named(monkeypatch, case):
    error, expected = ABSENT[case]

    def refuse(name):
        raise error

    monkeypatch.setattr(mmseg_import, "import_module", refuse)
    with pytest.raises(InputError, match=expected):
        mmseg_import.import_mmseg()
