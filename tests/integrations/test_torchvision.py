"""torchvision: Faster R-CNN on a Swin with its feature pyramid, and a plain segmentation head."""

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.rpn import AnchorGenerator
from torchvision.models.swin_transformer import SwinTransformer

import e3va_lite


class ToNCHW(nn.Module):
    """torchvision's Swin returns its maps as NHWC, and its pyramid wants NCHW."""

    def forward(self, maps):
        return OrderedDict((name, x.permute(0, 3, 1, 2)) for name, x in maps.items())


def faster_rcnn():
    swin = SwinTransformer(  # or swin_t(weights="DEFAULT"), with 96, 192, 384 and 768 channels
        patch_size=[4, 4], embed_dim=16, depths=[2, 2, 2, 2], num_heads=[1, 2, 4, 8], window_size=[7, 7]
    )
    layers = {"1": "0", "3": "1", "5": "2", "7": "3"}
    backbone = BackboneWithFPN(swin.features, layers, [16, 32, 64, 128], out_channels=32)
    backbone.body = nn.Sequential(backbone.body, ToNCHW())
    anchors = AnchorGenerator(tuple((size,) for size in (16, 32, 64, 128, 256)), ((0.5, 1.0, 2.0),) * 5)
    return FasterRCNN(backbone, num_classes=3, min_size=96, max_size=128, rpn_anchor_generator=anchors)


def scenes():
    """Two images, each with one bright square."""
    images, targets = [], []
    for x in (8, 40):
        image = torch.rand(3, 96, 128) / 4
        image[:, 20:60, x : x + 40] = 1
        images.append(image)
        targets.append({"boxes": torch.tensor([[x, 20.0, x + 40, 60]]), "labels": torch.tensor([1])})
    return images, targets


def test_faster_rcnn(tmp_path):
    model, (images, targets) = faster_rcnn(), scenes()

    tuning = e3va_lite.tune(model, rank=2)
    tuning.print_trainable_parameters()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    first = None
    for _ in range(3):
        losses = model.train()(images, targets)
        loss = sum(losses.values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        first = first or loss.item()
    tuning.save_pretrained(tmp_path / "boats")

    assert loss.item() < first
    assert all(p.grad is None for p in tuning.tuned.backbone.parameters())
    assert all(p.grad is not None for p in tuning.tuned.adapters.parameters())
    e3va_lite.assert_isolated(model.backbone, torch.stack(images))

    found = model.eval()(images)
    assert set(found[0]) == {"boxes", "labels", "scores"}


def test_faster_rcnn_comes_back_from_its_folder(tmp_path):
    images, _ = scenes()
    torch.manual_seed(0)
    model = faster_rcnn()
    e3va_lite.tune(model, rank=2)
    with torch.no_grad():
        for p in (p for p in model.parameters() if p.requires_grad):
            p += 0.01 * torch.randn_like(p)
    e3va_lite.Tuning(model).save_pretrained(tmp_path)

    torch.manual_seed(0)  # stands for the same pretrained weights
    again = faster_rcnn()
    e3va_lite.from_pretrained(again, tmp_path)
    for a, b in zip(model.eval()(images), again.eval()(images), strict=True):
        assert all(torch.equal(a[key], b[key]) for key in a)


class Segmenter(nn.Module):
    """The simplest head: one classifier of the finest map, enlarged to the image."""

    def __init__(self, swin, classes):
        super().__init__()
        self.backbone, self.head = swin, nn.Conv2d(16, classes, 1)

    def forward(self, images):
        maps = self.backbone(images)["fine"].permute(0, 3, 1, 2)
        return F.interpolate(self.head(maps), images.shape[-2:], mode="bilinear")


def test_a_plain_segmentation_head():
    from torchvision.models._utils import IntermediateLayerGetter

    swin = SwinTransformer(patch_size=[4, 4], embed_dim=16, depths=[2, 2], num_heads=[1, 2], window_size=[7, 7])
    model = Segmenter(IntermediateLayerGetter(swin.features, {"1": "fine"}), classes=2)
    images, targets = scenes()
    images = torch.stack(images)
    labels = torch.zeros(2, 96, 128, dtype=torch.int64)
    for label, target in zip(labels, targets, strict=True):
        x1, y1, x2, y2 = target["boxes"][0].int().tolist()
        label[y1:y2, x1:x2] = 1

    tuning = e3va_lite.tune(model, rank=2)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        losses.append(F.cross_entropy(model.train()(images), labels))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()

    assert losses[-1] < 0.8 * losses[0]
    assert tuning.host is model.backbone
    e3va_lite.assert_isolated(model, images)
