"""mmsegmentation: a configuration of its own names our backbone."""

import warnings

import pytest
import torch

import e3va_lite
from e3va_lite.datasets.mmseg_import import import_mmseg

pytest.importorskip("cv2", exc_type=ImportError)
pytest.importorskip("mmengine")

CONFIG = """
default_scope = "mmseg"
custom_imports = dict(imports=["e3va_lite.tasks.mmseg_backbone"])
model = dict(
    type="EncoderDecoder",
    data_preprocessor=dict(type="SegDataPreProcessor", size=(64, 64)),
    backbone=dict(type="E3VABackbone", method="e3va", name="swin_nano", pretrained=True, stages=[2, 3], rank=4),
    decode_head=dict(
        type="FCNHead", in_channels=[80, 160], in_index=[0, 1], input_transform="resize_concat", channels=16,
        num_classes=3, norm_cfg=dict(type="BN"),
    ),
    train_cfg=dict(),
    test_cfg=dict(mode="whole"),
)
optim_wrapper = dict(type="OptimWrapper", optimizer=dict(type="AdamW", lr=1e-3))
"""


def test_a_configuration(tmp_path):
    mmseg = import_mmseg()
    from mmengine.config import Config
    from mmengine.optim import build_optim_wrapper
    from mmengine.registry import init_default_scope
    from mmengine.structures import PixelData

    (tmp_path / "config.py").write_text(CONFIG, encoding="utf-8")
    config = Config.fromfile(tmp_path / "config.py")
    init_default_scope(config.default_scope)  # as mmengine's Runner does
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # mmsegmentation's own
        model = mmseg.registry.MODELS.build(config.model).train()
    optimizer = build_optim_wrapper(model, config.optim_wrapper)
    mask = PixelData(data=torch.randint(3, (1, 64, 64)))
    data = {"inputs": [torch.randint(255, (3, 64, 64))], "data_samples": [mmseg.structures.SegDataSample()]}
    data["data_samples"][0].gt_sem_seg = mask
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for _ in range(2):
        losses = model.train_step(data, optimizer)

    assert losses["decode.loss_ce"] > 0
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert any("adapters" in name for name in moved) and not any(".body.backbone." in name for name in moved)
    e3va_lite.save_adapters(model.backbone.body, tmp_path / "adapters.safetensors")
    again = e3va_lite.load_backbone(tmp_path / "adapters.safetensors")
    images = torch.randn(1, 3, 64, 64)
    assert all(torch.equal(a, b) for a, b in zip(again.eval()(images), model.eval().backbone(images), strict=True))
