"""RetinaNet on a stand-in backbone: levels, anchors, labels, losses, coordinates and what is refused."""

import math

import pytest
import torch
from torch import nn
from torchvision.ops import box_iou

from e3va_lite.errors import InputError
from e3va_lite.tasks.detection import IMAGE_MEAN, IMAGE_STD, Anchors
from e3va_lite.tasks.retinanet import build_retinanet


class Patches(nn.Module):
    """The contract of a backbone and no more: one convolution per map."""

    def __init__(self, out_channels=(8, 12, 16), strides=(8, 16, 32)):
        super().__init__()
        self.out_channels, self.strides = list(out_channels), list(strides)
        self.convs = nn.ModuleList(nn.Conv2d(3, c, s, s) for c, s in zip(out_channels, strides, strict=True))

    def forward(self, images):
        def whole(s):  # pad to whole patches: ceil(H / s), as the contract has it
            return nn.functional.pad(images, (0, -images.shape[-1] % s, 0, -images.shape[-2] % s))

        return [conv(whole(s)) for conv, s in zip(self.convs, self.strides, strict=True)]


def tiny(num_classes=3, size=64, **options):
    torch.manual_seed(0)
    options = {"min_size": size, "max_size": size, "fpn_channels": 16, **options}
    return build_retinanet(options.pop("backbone", None) or Patches(), num_classes, **options)


def target(*boxes, labels=None):
    return {
        "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        "labels": torch.tensor(labels or [1] * len(boxes), dtype=torch.int64),
    }


def levels_and_anchors(model, images):
    batch, _ = model.transform(images)
    maps = list(model.backbone(batch.tensors).values())
    anchors = model.anchor_generator(batch, maps)
    counts = [9 * x.shape[-2] * x.shape[-1] for x in maps]
    return maps, [a.split(counts) for a in anchors]


# What is built -------------------------------------------------------------------------------------------------------


def test_the_papers_detector_has_five_levels_of_nine_anchors():
    model = build_retinanet(Patches(), 20, min_size=600, max_size=1000).eval()
    # 600 x 1000 is padded to 608 x 1024; 608 / 64 is not whole, so that strides must not be guessed from sizes.
    maps, anchors = levels_and_anchors(model, [torch.rand(3, 600, 1000)] * 2)
    assert [tuple(x.shape) for x in maps] == [
        (2, 256, math.ceil(608 / s), math.ceil(1024 / s)) for s in (8, 16, 32, 64, 128)
    ]
    assert len(anchors) == 2
    for stride, x, boxes in zip((8, 16, 32, 64, 128), maps, anchors[0], strict=True):
        places = boxes.view(*x.shape[-2:], 9, 4)
        centres, sides = (places[..., :2] + places[..., 2:]) / 2, places[..., 2:] - places[..., :2]
        assert torch.equal(centres[-1, -1], torch.tensor([x.shape[-1] - 1.0, x.shape[-2] - 1]).mul(stride).expand(9, 2))
        expected = [
            (4 * stride * 2 ** (k / 3) / math.sqrt(ratio), 4 * stride * 2 ** (k / 3) * math.sqrt(ratio))
            for ratio in (0.5, 1, 2)
            for k in range(3)
        ]
        # Torchvision rounds each half side to a whole pixel.
        torch.testing.assert_close(sides[0, 0], torch.tensor(expected), atol=1.01, rtol=0)


def test_smaller_anchors_for_smaller_objects():
    _, anchors = levels_and_anchors(tiny(anchor_base=2), [torch.rand(3, 64, 64)])
    assert (anchors[0][0][3] == torch.tensor([-8.0, -8, 8, 8])).all()  # the square one of 2 * stride 8


def test_every_map_is_used_whatever_their_number():
    model = tiny(backbone=Patches((4, 8, 12, 16), (4, 8, 16, 32)))
    maps, _ = levels_and_anchors(model, [torch.rand(3, 64, 64)])
    assert [x.shape[-1] for x in maps] == [16, 8, 4, 2, 1, 1]


@pytest.mark.parametrize("width", [16, 24])
def test_p6_comes_from_the_backbones_last_map(width):
    # Width 16 is that of the backbone's last map, where torchvision left to itself would take P5.
    model = tiny(fpn_channels=width)
    seen = []
    model.backbone.fpn.extra_blocks.p6.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    images = torch.rand(1, 3, 64, 64)
    levels = list(model.backbone(images).values())
    assert torch.equal(seen[0], model.backbone.body(images)[-1])
    assert torch.equal(levels[4], model.backbone.fpn.extra_blocks.p7(levels[3].relu()))


def test_the_head_starts_at_one_percent():
    model = tiny(num_classes=5)
    x = [torch.zeros(1, 16, 2, 2)]
    scores = model.head(x)["cls_logits"].sigmoid()
    assert scores.shape == (1, 36, 5)  # one output per class and none for the background
    torch.testing.assert_close(scores, torch.full_like(scores, 0.01))


# Images in, boxes out ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(96, 96), (64, 96), (96, 41)])
@pytest.mark.parametrize("training", [True, False])
def test_images_of_the_asked_size_are_not_resampled(shape, training):
    model = tiny(size=96).train(training)
    image = torch.rand(3, *shape)
    batch, targets = model.transform([image], [target((1, 2, 30, 40))])
    plain = (image - torch.tensor(IMAGE_MEAN).view(3, 1, 1)) / torch.tensor(IMAGE_STD).view(3, 1, 1)
    assert batch.image_sizes == [shape]
    assert torch.equal(batch.tensors[0, :, : shape[0], : shape[1]], plain)
    assert all(side % 32 == 0 for side in batch.tensors.shape[-2:])
    assert batch.tensors[0, :, :, shape[1] :].count_nonzero() == 0  # padded after normalisation, with zeros
    assert torch.equal(targets[0]["boxes"], torch.tensor([[1.0, 2, 30, 40]]))


@pytest.mark.parametrize(("shape", "resized"), [((300, 400), (600, 800)), ((500, 1200), (416, 1000))])
def test_images_are_resized_to_1000_by_600_keeping_their_ratio(shape, resized):
    model = tiny(min_size=600, max_size=1000)
    batch, _ = model.transform([torch.rand(3, *shape)])
    assert batch.image_sizes == [resized]


def rig(model, label, score=0.9):
    """Make the head answer its anchors everywhere, with one class at one score."""
    for layer in (model.head.classification_head.cls_logits, model.head.regression_head.bbox_reg):
        nn.init.zeros_(layer.weight)
    nn.init.zeros_(model.head.regression_head.bbox_reg.bias)
    bias = torch.full((9, model.head.classification_head.num_classes), -10.0)
    bias[:, label - 1] = math.log(score / (1 - score))
    model.head.classification_head.cls_logits.bias.data = bias.flatten()


@pytest.mark.parametrize("label", [1, 2, 3])
def test_boxes_come_back_in_the_images_own_pixels_with_labels_from_one(label):
    model = tiny(size=128).eval()
    rig(model, label)
    images = [torch.rand(3, 40, 50), torch.rand(3, 300, 200), torch.rand(3, 128, 128)]
    with torch.no_grad():
        results = model(images)
    for image, result in zip(images, results, strict=True):
        height, width = image.shape[-2:]
        x1, y1, x2, y2 = result["boxes"].unbind(1)
        assert 0 < len(result["boxes"]) <= 100
        assert x1.min() >= 0 and y1.min() >= 0 and x2.max() <= width + 1e-3 and y2.max() <= height + 1e-3
        assert x2.max() > 0.99 * width and y2.max() > 0.99 * height  # and they do reach the far edges
        assert (result["labels"] == label).all()
        torch.testing.assert_close(result["scores"], torch.full_like(result["scores"], 0.9))


def test_an_untrained_detector_returns_empty_results_of_the_right_shape():
    with torch.no_grad():
        (result,) = tiny().eval()([torch.rand(3, 64, 64)])
    assert (result["boxes"].shape, result["scores"].shape, result["labels"].shape) == ((0, 4), (0,), (0,))


# Training ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objects", [(2, 0), (0, 0), (1, 1)])
def test_images_without_objects_train(objects):
    model = tiny().train()
    boxes = [(4, 6, 40, 44), (20, 20, 60, 60)]
    losses = model([torch.rand(3, 64, 64), torch.rand(3, 50, 64)], [target(*boxes[:n]) for n in objects])
    assert set(losses) == {"classification", "bbox_regression"}
    assert (losses["bbox_regression"] > 0) == any(objects)
    sum(losses.values()).backward()
    # Every parameter, so that processes which draw no object stay in step with the others.
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert all(conv.weight.grad.any() for conv in model.backbone.body.convs)


def test_losses_worked_by_hand():
    """One box that is its anchor, shifted by an eighth: L1 on the four offsets, focal loss with .25 and 2."""
    model = tiny(num_classes=2).train()
    nn.init.zeros_(model.head.classification_head.cls_logits.weight)
    nn.init.zeros_(model.head.regression_head.bbox_reg.weight)
    box = torch.tensor([[20.0, 16, 52, 48]])  # the anchor 16, 16, 48, 48 of level P3, 4 pixels to the right
    images = [torch.rand(3, 64, 64)]
    losses = model(images, [target(*box.tolist(), labels=[2])])

    _, anchors = levels_and_anchors(model, images)
    anchors = torch.cat(anchors[0])
    overlap = box_iou(box, anchors)[0]
    positive, negative = overlap >= 0.5, overlap < 0.4  # between the two an anchor is left out
    centres, sides = (anchors[:, :2] + anchors[:, 2:]) / 2, anchors[:, 2:] - anchors[:, :2]
    offsets = torch.cat([(torch.tensor([36.0, 32]) - centres) / sides, (32 / sides).log()], dim=1)
    assert offsets[positive].abs().sum(1).min() == pytest.approx(4 / 32)
    expected = offsets[positive].abs().sum() / positive.sum()
    torch.testing.assert_close(losses["bbox_regression"], expected)

    hit = 0.25 * 0.99**2 * -math.log(0.01)
    miss = 0.75 * 0.01**2 * -math.log(0.99)
    count = int(positive.sum())
    expected = (count * (hit + miss) + int(negative.sum()) * 2 * miss) / count  # two classes
    assert losses["classification"].item() == pytest.approx(expected, rel=1e-4)


def test_every_positive_anchor_of_a_batch_counts_the_same():
    """Beside a full image an empty one adds its share, where divided by its own number (none) it would drown it."""
    torch.manual_seed(0)
    model = tiny().train()
    images = [torch.rand(3, 64, 64), torch.rand(3, 64, 64)]
    boxes = [target((4, 6, 40, 44), (20, 20, 60, 60)), target()]
    _, anchors = levels_and_anchors(model, images)
    positive = int((box_iou(boxes[0]["boxes"], torch.cat(anchors[0])).max(dim=0).values >= 0.5).sum())
    full, empty = (model([image], [box])["classification"].item() for image, box in zip(images, boxes, strict=True))
    both = model(images, boxes)["classification"].item()
    assert positive > 5
    assert both == pytest.approx(full + empty / positive, rel=1e-4)


def test_one_image_is_learnt_with_labels_from_one_to_k():
    model = tiny(num_classes=3, size=64, fpn_channels=32).train()
    image = torch.full((3, 64, 64), 0.5)
    image[:, 6:34, 4:36], image[0, 30:58, 34:62] = 0.0, 1.0
    truth = target((4, 6, 36, 34), (34, 30, 62, 58), labels=[3, 1])
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(100):
        optimizer.zero_grad()
        sum(model([image], [truth]).values()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    with torch.no_grad():
        (result,) = model.eval()([image])
    for n, label in enumerate([3, 1]):
        best = (result["labels"] == label).nonzero()[0, 0]  # results come best score first
        assert result["scores"][best] > 0.5
        assert box_iou(result["boxes"][best : best + 1], truth["boxes"][n : n + 1]) > 0.7
    assert truth["labels"].tolist() == [3, 1]  # the caller's targets stay as they were


def test_mixed_precision_keeps_coordinates_exact():
    # bfloat16 has steps of 4 pixels at 1000: boxes and anchors have to stay out of it.
    model = tiny(size=1024).eval()
    rig(model, 1)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        (mixed,) = model([torch.zeros(3, 96, 1000)])
    with torch.no_grad():
        (exact,) = model([torch.zeros(3, 96, 1000)])
    assert mixed["boxes"].dtype == torch.float32
    torch.testing.assert_close(mixed["boxes"], exact["boxes"])


def test_double_precision_stays_double():
    model = tiny().double().train()
    losses = model([torch.rand(3, 64, 64).double()], [target((4, 6, 40, 44))])
    assert all(loss.dtype == torch.float64 for loss in losses.values())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_it_trains_and_detects_on_a_gpu():
    model = tiny().cuda().train()
    images = [torch.rand(3, 64, 64, device="cuda"), torch.rand(3, 50, 64, device="cuda")]
    targets = [{k: v.cuda() for k, v in t.items()} for t in (target((4, 6, 40, 44)), target())]
    sum(model(images, targets).values()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    rig(model, 2)
    with torch.no_grad():
        results = model.cuda().eval()(images)
    assert all(r["boxes"].is_cuda and (r["labels"] == 2).all() and len(r["labels"]) for r in results)


# What is refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_classes": 0}, "num_classes is 0"),
        ({"min_size": 800, "max_size": 600}, "min_size is 800 and max_size 600"),
        ({"min_size": 0}, "min_size is 0"),
        ({"fpn_channels": 0}, "fpn_channels is 0"),
        ({"anchor_base": 1.25}, "anchor_base is 1.25"),
        ({"backbone": nn.Conv2d(3, 8, 3)}, "Conv2d needs out_channels and strides"),
    ],
)
def test_settings_that_cannot_work_are_refused(options, words):
    with pytest.raises(InputError, match=words):
        tiny(**options)


@pytest.mark.parametrize(("base", "covered"), [(1.0, False), (1.26, True)])
def test_the_smallest_anchors_allowed_still_touch_the_last_pixel(base, covered):
    # The reason for the limit: a box that no anchor touches turns all anchors without a box into positive ones.
    model = tiny(size=128)
    model.anchor_generator = Anchors([8, 16, 32, 64, 128], base)
    _, anchors = levels_and_anchors(model, [torch.rand(3, 128, 128)])
    anchors = torch.cat(anchors[0])
    overlap = box_iou(target((127, 127, 128, 128))["boxes"], anchors)
    matched = int((model.proposal_matcher(overlap) >= 0).sum())
    assert matched == 1 if covered else matched == len(anchors)


def test_maps_that_are_not_nchw_are_refused():
    class ChannelsLast(Patches):
        def forward(self, images):
            return [x.permute(0, 2, 3, 1) for x in super().forward(images)]

    with pytest.raises(InputError, match="NCHW"):
        tiny(backbone=ChannelsLast())([torch.rand(3, 64, 64)], [target((4, 6, 40, 44))])


def test_training_images_on_a_canvas():
    """A square of its own size, whatever else is in the batch; for an evaluation an image is padded as ever."""
    model, images = tiny(size=64, canvas=80), [torch.rand(3, 64, 48), torch.rand(3, 32, 64)]
    together = model.train().transform(images)[0].tensors
    assert together.shape == (2, 3, 96, 96)  # a multiple of 32
    assert torch.equal(model.transform(images[1:])[0].tensors, together[1:])
    assert model.eval().transform(images[1:])[0].tensors.shape == (1, 3, 32, 64)
    with pytest.raises(InputError, match="canvas=63 is smaller than images of max_size=64"):
        tiny(size=64, canvas=63)
