"""Cascade Mask R-CNN on a stand-in backbone: stages, losses, boxes and masks, and what is refused."""

import math
from functools import partial

import pytest
import torch
from torch import nn
from torchvision.models.detection.roi_heads import paste_masks_in_image
from torchvision.ops import box_iou, generalized_box_iou_loss, roi_align

import e3va_lite
from e3va_lite.errors import InputError
from e3va_lite.tasks import cascade_mask_rcnn, region_proposals
from e3va_lite.tasks.cascade_mask_rcnn import build_cascade_mask_rcnn, paste, pool

LOSSES = {"rpn_objectness", "rpn_box"} | {f"stage{n}_{k}" for n in (1, 2, 3) for k in ("class", "box", "mask")}


class Patches(nn.Module):
    """The contract of a backbone and no more: one convolution per map."""

    def __init__(self, out_channels=(8, 8, 12, 16), strides=(4, 8, 16, 32)):
        super().__init__()
        self.out_channels, self.strides = list(out_channels), list(strides)
        self.convs = nn.ModuleList(nn.Conv2d(3, c, s, s) for c, s in zip(out_channels, strides, strict=True))

    def forward(self, images):  # sides are multiples of 32
        return [conv(images) for conv in self.convs]


def tiny(num_classes=3, size=64, **options):
    torch.manual_seed(0)
    sizes = {"min_sizes": [size], "min_size": size, "max_size": size}
    options = {"fpn_channels": 16, "head_channels": 32, "anchor_base": 4.0, "samples": 64, **sizes, **options}
    return build_cascade_mask_rcnn(options.pop("backbone", None) or Patches(), num_classes, **options)


def target(*boxes, labels=None, size=(64, 64)):
    """Objects that fill their boxes."""
    masks = torch.zeros(len(boxes), *size, dtype=torch.uint8)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes, strict=True):
        mask[int(y1) : int(y2), int(x1) : int(x2)] = 1
    return {
        "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        "labels": torch.tensor(labels or [1] * len(boxes), dtype=torch.int64),
        "masks": masks,
    }


def maps_of(model, images):
    batch, _ = model.transform(images)
    return list(model.backbone(batch.tensors).values())[:4]


def mute(*layers):
    """Make layers answer their bias, which is zero until a test sets it."""
    for layer in layers:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)


def rig(model):
    """Make all stages answer constants."""
    for stage in model.roi_heads.stages:
        mute(stage.scores, stage.offsets, stage.mask_head[1].mask_fcn_logits)
    return model


def sampling_all(model):
    """Sample all boxes and anchors, so that losses do not depend on a draw."""
    model.rpn.fg_bg_sampler = model.roi_heads.sampler = lambda labels: (
        [(x >= 1).byte() for x in labels],
        [(x == 0).byte() for x in labels],
    )
    return model


# What is built -------------------------------------------------------------------------------------------------------


def test_the_papers_detector_counted_by_hand():
    model = build_cascade_mask_rcnn(Patches(), 80, min_sizes=[480, 800], min_size=800, max_size=1333)
    conv = 256 * 256 * 9
    box_head = 4 * (conv + 2 * 256) + (256 * 49 + 1) * 1024  # convolutions with batch norm, one layer
    outputs = (1024 + 1) * (1 + 80) + (1024 + 1) * 4  # classes and background; one box for all classes
    mask_head = 4 * (conv + 256) + (256 * 4 * 256 + 256) + (256 + 1) * 80
    stages = model.roi_heads.stages
    assert [sum(p.numel() for p in stage.parameters()) for stage in stages] == [box_head + outputs + mask_head] * 3
    proposals = (conv + 256) + (256 + 1) * 3 + (256 + 1) * 3 * 4
    assert sum(p.numel() for p in model.rpn.parameters()) == proposals
    assert [(stage.min_iou, stage.weight) for stage in stages] == [(0.5, 1), (0.6, 0.5), (0.7, 0.25)]
    assert [s.coder.weights for s in stages] == [(10, 10, 5, 5), (20, 20, 10, 10), (30, 30, 15, 15)]
    assert (model.roi_heads.sampler.batch_size_per_image, model.roi_heads.sampler.positive_fraction) == (512, 0.25)
    counts = (model.rpn.train().pre_nms_top_n(), model.rpn.post_nms_top_n())
    assert counts == (2000, 2000)
    assert (model.rpn.eval().pre_nms_top_n(), model.rpn.post_nms_top_n()) == (1000, 1000)


def test_proposals_come_from_five_levels_of_three_anchors():
    model = tiny(size=160, anchor_base=8.0)  # 160 is 3 cells on the last level: strides must not be guessed from sizes
    batch, _ = model.transform([torch.rand(3, 160, 160)])
    maps = list(model.backbone(batch.tensors).values())
    assert [x.shape[-1] for x in maps] == [40, 20, 10, 5, 3]
    anchors = model.rpn.anchor_generator(batch, maps)[0].split([3 * x.shape[-1] ** 2 for x in maps])
    for stride, boxes, x in zip((4, 8, 16, 32, 64), anchors, maps, strict=True):
        square = 4 * stride
        assert boxes[1].tolist() == [-square, -square, square, square]  # 8 strides, between the wide and the tall one
        assert (boxes[-2, :2] + square).tolist() == [stride * (x.shape[-1] - 1)] * 2


@pytest.mark.parametrize("training", [True, False])
def test_sizes_of_training_and_of_evaluation(training):
    model = tiny(min_sizes=[64, 96], min_size=80, max_size=120).train(training)
    sizes, box = set(), target((0, 0, 20, 10), size=(40, 40))
    for _ in range(20):
        batch, (resized,) = model.transform([torch.rand(3, 40, 40)], [box])
        (side, _), *_ = batch.image_sizes
        sizes.add(side)
        assert resized["boxes"].tolist() == [[0, 0, side / 2, side / 4]]
        assert resized["masks"].sum() == side / 2 * side / 4
    assert sizes == ({64, 96} if training else {80})
    batch, _ = model.transform([torch.rand(3, 40, 80)])
    assert batch.image_sizes == [(60, 120)]  # the long side would exceed 120
    assert batch.tensors.shape[-2:] == (64, 128)


# What the heads see --------------------------------------------------------------------------------------------------


def test_a_box_is_cut_out_where_it_lies():
    """Maps that hold their own coordinates: each cell of the result has to hold the place of its own centre."""
    sizes = [64, 32, 16, 8]
    maps = [((torch.arange(n) + 0.5) * 256 / n).expand(1, 1, n, n) for n in sizes]
    box = torch.tensor([[40.0, 64, 61, 90], [33, 20, 180, 200]])  # of the first and of the second level
    cells = pool(maps, [4, 8, 16, 32], [box], 7)
    places = box[:, :1] + (torch.arange(7) + 0.5) / 7 * (box[:, 2:3] - box[:, :1])
    torch.testing.assert_close(cells[:, 0, 3], places)


@pytest.mark.parametrize(("side", "level"), [(3, 0), (111, 0), (112, 1), (223, 1), (224, 2), (448, 3), (2000, 3)])
def test_large_boxes_are_cut_out_of_coarse_maps(side, level):
    maps = [torch.full((2, 1, n, n), float(i)) for i, n in enumerate((256, 128, 64, 32))]
    cells = pool(maps, [4, 8, 16, 32], [torch.zeros(0, 4), torch.tensor([[0.0, 0, side, side]])], 7)
    assert cells.shape == (1, 1, 7, 7)
    assert cells[0, 0, 0, 0] == level


def test_each_image_is_cut_out_of_its_own_map():
    maps = [torch.stack([torch.full((1, n, n), 1.0), torch.full((1, n, n), 2.0)]) for n in (16, 8, 4, 2)]
    box = torch.tensor([[8.0, 8, 40, 40]])
    assert pool(maps, [4, 8, 16, 32], [box, torch.cat([box, box])], 1).flatten().tolist() == [1, 2, 2]


def test_a_box_that_is_not_a_number_is_cut_out_of_nothing():
    maps = [torch.ones(1, 1, n, n) for n in (16, 8, 4, 2)]
    box = torch.tensor([[8.0, 8, 40, 40]])
    assert pool(maps, [4, 8, 16, 32], [torch.cat([box * torch.nan, box])], 1).flatten().tolist() == [0, 1]


# The cascade ---------------------------------------------------------------------------------------------------------

TRUE, GOOD, FAIR, NONE = (0.0, 0, 20, 20), (0.0, 0, 20, 16), (2.0, 2, 22, 22), (40.0, 40, 60, 60)  # IoU .8, .68, 0


def test_losses_of_three_stages_worked_by_hand():
    model = rig(tiny(num_classes=3).train())
    images, truth = [torch.rand(3, 64, 64)], [target(TRUE, labels=[2])]
    losses = model.roi_heads.losses(maps_of(model, images), [torch.tensor([GOOD, FAIR, NONE])], [(64, 64)], truth)
    # GIoU is the overlap less the share of the hull that neither box fills.
    good, fair = 1 - 320 / 400, 1 - (324 / 476 - (484 - 476) / 484)
    weights = [1, 0.5, 0.25]
    # FAIR is an object's box where .5 and .6 are asked for and background where .7 is. The true box is sampled in each
    # stage once: it is a perfect fourth sample and does not come back refined.
    for n, (weight, off) in enumerate(zip(weights, (good + fair, good + fair, good), strict=True), start=1):
        assert losses[f"stage{n}_box"].item() == pytest.approx(weight * 10 * off / 4, rel=1e-4)
        assert losses[f"stage{n}_class"].item() == pytest.approx(weight * math.log(4))
        assert losses[f"stage{n}_mask"].item() == pytest.approx(weight * math.log(2))


def test_each_class_has_its_own_score_and_mask():
    model = rig(tiny(num_classes=3).train())
    stage = model.roi_heads.stages[0]
    stage.scores.bias.data = torch.tensor([0.0, 0, 3, 0])
    stage.mask_head[1].mask_fcn_logits.bias.data = torch.tensor([-9.0, 4, -9])
    images, truth = [torch.rand(3, 64, 64)], [target(TRUE, labels=[2])]
    losses = model.roi_heads.losses(maps_of(model, images), [torch.tensor([TRUE])], [(64, 64)], truth)
    assert losses["stage1_class"].item() == pytest.approx(math.log(1 + 3 / math.e**3))
    assert losses["stage1_mask"].item() == pytest.approx(math.log(1 + math.e**-4), rel=1e-4)  # the object fills its box


def test_a_mask_is_learnt_as_seen_from_inside_the_box():
    model = rig(tiny().train())
    truth = target((0, 0, 32, 32))
    truth["masks"][:, :, 16:] = 0  # the left half
    truth["labels"][:] = 3
    spied = cascade_mask_rcnn._sample(torch.tensor([[8.0, 0, 24, 32]]), truth, 0.5, model.roi_heads.sampler)
    boxes, labels, true, shapes, new = spied
    assert labels.tolist() == [3, 3] and new.tolist() == [True, False] and torch.equal(true[0], boxes[1])
    for shape in shapes:  # of both boxes the left half is filled
        assert shape[:, :14].all() and not shape[:, 14:].any()
    assert model.roi_heads.stages[0].mask(torch.zeros(2, 16, 14, 14)).shape[-2:] == shapes.shape[-2:]


@pytest.fixture
def seen(monkeypatch):
    """The boxes that were cut out for box heads and mask heads, in order."""
    calls = []

    def spy(maps, strides, boxes, cells):
        calls.append((cells, [b.clone() for b in boxes]))
        assert not any(b.requires_grad for b in boxes)
        return pool(maps, strides, boxes, cells)

    monkeypatch.setattr(cascade_mask_rcnn, "pool", spy)
    return calls


def moving(model):
    """Every stage moves boxes by a tenth, a twentieth and a thirtieth of their width to the right."""
    for stage in rig(model).roi_heads.stages:
        stage.offsets.bias.data = torch.tensor([1.0, 0, 0, 0])
    return model


def test_in_training_a_stage_starts_from_the_boxes_of_the_one_before(seen):
    model = moving(tiny().train())
    images, truth = [torch.rand(3, 64, 64)], [target(TRUE)]
    given = torch.tensor([GOOD, (30.0, 0, 60, 30)])  # the second will reach beyond the edge, and is clipped there
    model.roi_heads.losses(maps_of(model, images), [given], [(64, 62)], truth)
    first, second, third = (boxes[0] for cells, boxes in seen if cells == 7)
    true = torch.tensor([TRUE])
    torch.testing.assert_close(first, torch.cat([given, true]))
    torch.testing.assert_close(second, torch.cat([torch.tensor([(2.0, 0, 22, 16), (33, 0, 62, 30)]), true]))
    torch.testing.assert_close(third, torch.cat([torch.tensor([(3.0, 0, 23, 16), (34.45, 0, 62, 30)]), true]))
    masks = [boxes[0].tolist() for cells, boxes in seen if cells == 14]
    assert [len(boxes) for boxes in masks] == [2, 2, 1]  # (2, 0, 22, 16) has .64 of TRUE, (3, 0, 23, 16) .57


def test_at_test_a_stage_starts_from_the_boxes_of_the_one_before(seen):
    model = moving(tiny().eval())
    for stage in model.roi_heads.stages:
        stage.scores.bias.data = torch.tensor([0.0, 2, 1, -9])
    box, gone = torch.tensor([[10.0, 10, 40, 30]]), torch.tensor([[64.0, 10, 80, 30]])  # one lies outside the image
    with torch.no_grad():
        boxes = [torch.cat([gone, box])]
        (found,) = model.roi_heads.detections(maps_of(model, [torch.rand(3, 64, 64)]), boxes, [(64, 64)])
    assert [boxes[0][1, 0].item() for cells, boxes in seen if cells == 7] == pytest.approx([10, 13, 14.5])
    # Of two classes, since a box serves them all; the third is below the threshold.
    assert found["labels"].tolist() == [1, 2]
    torch.testing.assert_close(found["boxes"], torch.tensor([[15.5, 10, 45.5, 30]]).expand(2, 4))
    (masks,) = [boxes[0] for cells, boxes in seen if cells == 14]
    torch.testing.assert_close(masks, found["boxes"])


def test_scores_and_masks_are_the_mean_over_stages():
    model = rig(tiny(num_classes=2).eval())
    scores, masks = [(0.0, 1.0, 0.0), (0.0, 4.0, 1.0), (0.0, 1.0, 2.0)], [(-1.0, 3.0), (0.0, 2.0), (2.0, -4.0)]
    for stage, score, mask in zip(model.roi_heads.stages, scores, masks, strict=True):
        stage.scores.bias.data = torch.tensor(score)
        stage.mask_head[1].mask_fcn_logits.bias.data = torch.tensor(mask)
    box = torch.tensor([[10.0, 10, 40, 30]])
    with torch.no_grad():
        (found,) = model.roi_heads.detections(maps_of(model, [torch.rand(3, 64, 64)]), [box], [(64, 64)])
    assert found["labels"].tolist() == [1, 2]
    expected = torch.tensor([0.0, 2, 1]).softmax(0)[1:]  # of the logits
    torch.testing.assert_close(found["scores"], expected)
    expected = torch.tensor(masks).sigmoid().mean(0)  # of the probabilities
    torch.testing.assert_close(found["masks"], expected[:, None, None].expand(2, 28, 28))


def test_where_all_boxes_vanish_the_image_itself_remains():
    model = rig(tiny().train())
    model.roi_heads.stages[0].offsets.bias.data = torch.tensor([1000.0, 0, 0, 0])  # out of the image
    losses = model([torch.rand(3, 64, 64)], [target()])
    assert all(loss.isfinite() for loss in losses.values())
    empty = torch.tensor([[5.0, 5, 5, 9]])
    assert cascade_mask_rcnn._nonempty(empty, (30, 40)).tolist() == [[0, 0, 40, 30]]
    assert cascade_mask_rcnn._nonempty(torch.cat([empty, torch.tensor([NONE])]), (64, 64)).tolist() == [list(NONE)]


def test_the_box_loss_is_torchvisions_without_waiting_for_the_overlaps():
    start = torch.rand(2, 40, 2) * 60
    boxes, truth = torch.cat([start, start + 1 + 30 * torch.rand(2, 40, 2)], dim=2)
    results = []
    for loss in (cascade_mask_rcnn.giou_loss, partial(generalized_box_iou_loss, reduction="sum")):
        x = boxes.clone().requires_grad_()
        value = loss(x, truth)
        value.backward()
        results.append((value, x.grad))
    (ours, our_grad), (theirs, their_grad) = results
    assert torch.equal(ours, theirs) and torch.equal(our_grad, their_grad)


def test_masks_are_cut_out_a_few_at_a_time_as_one_by_one(monkeypatch):
    masks = torch.rand(7, 40, 50) < 0.5
    objects = torch.tensor([5, 0, 2, 5, 0, 6, 5])
    start = torch.rand(7, 2) * 20
    boxes = torch.cat([start, start + 2 + 18 * torch.rand(7, 2)], dim=1)
    counts = objects.bincount(minlength=7).tolist()
    alone = [
        roi_align(masks[n][None, None].float(), [box[None]], 28, sampling_ratio=0, aligned=True)[0, 0] >= 0.5
        for n, box in zip(objects, boxes, strict=True)
    ]
    for at_a_time in (1, 2, 8):
        monkeypatch.setattr(cascade_mask_rcnn, "MASKS", at_a_time)
        assert torch.equal(cascade_mask_rcnn._shapes(masks, boxes, objects, counts), torch.stack(alone))
    none = cascade_mask_rcnn._shapes(masks, boxes[:0], objects[:0], [0] * 7)
    assert none.shape == (0, 28, 28) and none.dtype == torch.bool


# Masks in images -----------------------------------------------------------------------------------------------------


def test_pasting_by_hand():
    mask = torch.tensor([[[1.0, 0], [1, 0]]])  # the left half
    pasted = paste(mask.repeat(2, 1, 1), torch.tensor([[2.0, 1, 6, 9], [2.75, 1, 6.75, 9]]), (10, 8))
    # Linearly from 1 at a quarter of the box to 0 at three quarters, and from the left edge, where it is .5, outwards
    # to nothing; the same above and below, so that the rows next to the edge are left out.
    assert pasted.any(dim=1).int().tolist() == [[0, 0, 1, 1, 0, 0, 0, 0], [0, 0, 0, 1, 1, 0, 0, 0]]
    assert pasted[0].any(dim=1).int().tolist() == [0, 0, 1, 1, 1, 1, 1, 1, 0, 0]
    assert paste(torch.zeros(0, 28, 28), torch.zeros(0, 4), (10, 8)).shape == (0, 10, 8)


def test_a_small_mask_survives_cutting_out_and_pasting():
    """28 x 28 values are enough for any small object, unless places are rounded on the way, as torchvision does."""
    y, x = torch.meshgrid(torch.arange(64) + 0.5, torch.arange(64) + 0.5, indexing="ij")
    disc = ((x - 20) ** 2 + (y - 30) ** 2 < 9**2) & (x + y > 45)
    roi = torch.tensor([[0.0, 10.5, 20.5, 29.5, 39.5]])
    seen = roi_align(disc[None, None].float(), roi, 28, sampling_ratio=0, aligned=True)[:, 0]

    def overlap(pasted):
        return (pasted & disc).sum() / (pasted | disc).sum()

    assert overlap(paste((seen >= 0.5).float(), roi[:, 1:], (64, 64))[0]) > 0.97
    assert overlap(paste_masks_in_image((seen >= 0.5).float()[:, None], roi[:, 1:], (64, 64))[0, 0] >= 0.5) < 0.93


# Images in, instances out --------------------------------------------------------------------------------------------


def test_instances_come_back_in_the_images_own_pixels():
    model = rig(tiny(size=128).eval())
    for stage in model.roi_heads.stages:
        stage.scores.bias.data = torch.tensor([0.0, 0, 3, 0])
        nn.init.constant_(stage.mask_head[1].mask_fcn_logits.bias, 9.0)  # objects fill their boxes
    images = [torch.rand(3, 40, 50), torch.rand(3, 300, 200), torch.rand(3, 128, 128)]
    with torch.no_grad():
        results = model(images)
    for image, found in zip(images, results, strict=True):
        height, width = image.shape[-2:]
        x1, y1, x2, y2 = found["boxes"].unbind(1)
        assert 0 < len(found["boxes"]) <= 100
        assert x1.min() >= 0 and y1.min() >= 0 and x2.max() <= width + 1e-3 and y2.max() <= height + 1e-3
        assert x2.max() > 0.99 * width and y2.max() > 0.99 * height  # and they do reach the far edges
        assert (found["labels"] == 2).all()
        assert found["masks"].dtype == torch.bool and found["masks"].shape == (len(x1), height, width)
        columns, rows = torch.arange(width) + 0.5, torch.arange(height) + 0.5
        inside = (columns > x1[:, None]) & (columns < x2[:, None])
        # On a column at the very edge the probability is .5, and rounding decides.
        assert (found["masks"].any(dim=1) != inside).sum(dim=1).max() <= 2
        inside = (rows > y1[:, None]) & (rows < y2[:, None])
        assert (found["masks"].any(dim=2) != inside).sum(dim=1).max() <= 2


def test_results_come_best_first_and_at_most_a_hundred_with_little_overlap():
    model = tiny(size=128, num_classes=5).eval()
    nn.init.normal_(model.roi_heads.stages[0].scores.weight, std=0.3)
    with torch.no_grad():
        (found,) = model([torch.rand(3, 128, 128)])
    assert len(found["scores"]) == 100
    assert (found["scores"].diff() <= 0).all() and found["scores"].min() > 0.05
    for label in found["labels"].unique():
        boxes = found["boxes"][found["labels"] == label]
        assert (box_iou(boxes, boxes) - torch.eye(len(boxes))).max() <= 0.5


def test_nothing_found():
    model = rig(tiny().eval())
    for stage in model.roi_heads.stages:
        stage.scores.bias.data[0] = 9.0
    with torch.no_grad():
        results = model([torch.rand(3, 64, 64), torch.rand(3, 50, 64)])
    assert [found["masks"].shape for found in results] == [(0, 64, 64), (0, 50, 64)]
    assert (results[0]["boxes"].shape, results[0]["labels"].shape) == ((0, 4), (0,))


# Training ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objects", [(2, 0), (0, 0), (1, 1)])
def test_images_without_objects_train(objects):
    model = tiny().train()
    boxes = [(4, 6, 40, 44), (20, 20, 60, 50)]
    truth = [target(*boxes[:n], size=size) for n, size in zip(objects, ((64, 64), (50, 64)), strict=True)]
    losses = model([torch.rand(3, 64, 64), torch.rand(3, 50, 64)], truth)
    assert set(losses) == LOSSES
    assert {name for name, loss in losses.items() if loss > 0} >= {"rpn_objectness", "stage3_class"}
    for name in ("stage1_box", "stage1_mask", "stage3_mask", "rpn_box"):
        assert (losses[name] > 0) == any(objects)
    sum(losses.values()).backward()
    # Every parameter, so that processes which draw no object stay in step with the others.
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert all(conv.weight.grad.any() for conv in model.backbone.body.convs)


def test_losses_of_the_proposals_worked_by_hand():
    model = sampling_all(tiny().train())
    mute(model.rpn.head.cls_logits, model.rpn.head.bbox_pred)
    images, box = [torch.rand(3, 64, 64)], torch.tensor([[18.0, 16, 34, 32]])  # an anchor of 16, 2 pixels to the right
    losses = model(images, [target(*box.tolist())])
    batch, _ = model.transform(images)
    (anchors,) = model.rpn.anchor_generator(batch, list(model.backbone(batch.tensors).values()))
    overlap = box_iou(box, anchors)[0]
    positive, negative = overlap >= 0.7, overlap < 0.3
    assert positive.sum() == 2  # the anchors at 16 and at 20, as far away on either side
    samples = int(positive.sum() + negative.sum())
    # Offsets of an eighth of the side each; beyond 1/9 the loss is linear, less half of 1/9.
    assert losses["rpn_box"].item() == pytest.approx(2 * (1 / 8 - 1 / 18) / samples, rel=1e-4)
    assert losses["rpn_objectness"].item() == pytest.approx(math.log(2))


def test_a_box_far_from_every_anchor_takes_none():
    """Torchvision gives it every anchor that overlaps nothing."""
    model = tiny(anchor_base=8.0)
    anchors = torch.tensor([[0.0, 0, 32, 32], [60, 60, 92, 92]])
    labels, _ = model.rpn.assign_targets_to_anchors([anchors], [target((40, 40, 50, 50), (0, 0, 16, 16))])
    assert labels[0].tolist() == [0, 0]
    labels, _ = model.rpn.assign_targets_to_anchors([anchors], [target((40, 40, 50, 50), (0, 0, 20, 20))])
    assert labels[0].tolist() == [1, 0]  # .39 is the best anchor of the second box, and enough


def test_images_on_several_processes_count_as_one_batch(monkeypatch):
    """The mean of two processes' losses is the loss of one that has both images, however unlike the two are."""
    model = sampling_all(tiny().train())
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.eval()  # on several devices its statistics are shared, which is not the point here
    images = [torch.rand(3, 64, 64), torch.rand(3, 64, 64)]
    truth = [target((4, 6, 40, 44), (20, 20, 60, 50), labels=[3, 1]), target()]
    counts = []

    def plain(count, device):
        counts.append(float(count))
        return torch.tensor(max(float(count), 1.0))

    for module in (cascade_mask_rcnn, region_proposals):
        monkeypatch.setattr(module, "mean_count", plain)
    whole = model(images, truth)
    alone = []
    for image, one in zip(images, truth, strict=True):
        counts.clear()
        model([image], [one])
        alone.append(list(counts))
    assert len(alone[0]) == len(alone[1]) == 7  # as often on either, or each would wait for the other
    shared = [torch.tensor((a + b) / 2) for a, b in zip(*alone, strict=True)]
    parts = []
    for image, one in zip(images, truth, strict=True):
        answers = iter(shared)
        for module in (cascade_mask_rcnn, region_proposals):
            monkeypatch.setattr(module, "mean_count", lambda count, device, answers=answers: next(answers))
        parts.append(model([image], [one]))
    for name, loss in whole.items():
        torch.testing.assert_close((parts[0][name] + parts[1][name]) / 2, loss, msg=name)
    assert parts[1]["stage1_class"] > 0 and parts[1]["stage1_mask"] == 0


def test_neither_the_order_of_objects_nor_that_of_classes_matters():
    model = sampling_all(tiny(num_classes=3).train())
    images, truth = [torch.rand(3, 64, 64)], target((4, 6, 40, 44), (30, 20, 60, 50), (2, 50, 16, 62), labels=[3, 1, 2])
    first = model(images, [truth])
    order = torch.tensor([2, 0, 1])
    second = model(images, [{name: x[order] for name, x in truth.items()}])
    torch.testing.assert_close(second, first)

    classes = torch.tensor([1, 2, 0])  # what was class 2 becomes class 1, ...
    for stage in model.roi_heads.stages:
        masks = stage.mask_head[1].mask_fcn_logits
        for layer, rows in ((stage.scores, torch.cat([torch.tensor([0]), classes + 1])), (masks, classes)):
            layer.weight.data, layer.bias.data = layer.weight.data[rows], layer.bias.data[rows]
    third = model(images, [{**truth, "labels": classes.argsort()[truth["labels"] - 1] + 1}])
    torch.testing.assert_close(third, first)


def test_one_image_is_learnt():
    model = tiny(num_classes=3, samples=32).train()
    image = torch.full((3, 64, 64), 0.5)
    image[:, 6:34, 4:36], image[0, 30:58, 34:62] = 0.0, 1.0
    truth = target((4, 6, 36, 34), (34, 30, 62, 58), labels=[3, 1])
    image[:, 6:20, 4:20], truth["masks"][0, 6:20, 4:20] = 0.5, 0  # of the first object a corner is missing
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    history = []
    for step in range(110):
        optimizer.param_groups[0]["lr"] = 4e-3 * (1 - step / 110)
        optimizer.zero_grad()
        losses = model([image], [truth])
        sum(losses.values()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        history.append({name: loss.item() for name, loss in losses.items()})
    assert sum(history[-1].values()) < 0.4 * sum(history[0].values())
    with torch.no_grad():
        (found,) = model.eval()([image])
    for n, label in enumerate([3, 1]):
        best = (found["labels"] == label).nonzero()[0, 0]  # results come best score first
        assert found["scores"][best] > 0.5
        assert box_iou(found["boxes"][best : best + 1], truth["boxes"][n : n + 1]) > 0.7
        mask, true = found["masks"][best], truth["masks"][n].bool()
        assert (mask & true).sum() / (mask | true).sum() > 0.7
    assert truth["labels"].tolist() == [3, 1]  # the caller's targets stay as they were


def test_training_it_leaves_the_backbone_alone():
    backbone = e3va_lite.build_backbone("e3va", "swin_nano")
    model = tiny(num_classes=2, backbone=backbone)
    truth = [target((4, 6, 40, 44), (30, 30, 50, 60), labels=[1, 2]), target()]
    images = [torch.rand(3, 64, 64), torch.rand(3, 64, 64)]
    e3va_lite.assert_isolated(model, images, truth, loss=lambda losses: sum(losses.values()))


def test_mixed_precision_keeps_losses_and_coordinates_exact():
    model = moving(tiny(size=1024))
    for stage in model.roi_heads.stages:
        stage.scores.bias.data[1] = 5.0
    images, box = [torch.rand(3, 96, 1000)], torch.tensor([[800.3, 10, 901.7, 80]])
    with torch.autocast("cpu", torch.bfloat16):
        losses = model.train()(images, [target((700, 10, 801, 80), size=(96, 1000))])
        sum(losses.values()).backward()
        with torch.no_grad():
            (found,) = model.eval().roi_heads.detections(maps_of(model, images), [box], [(96, 1000)])
            batch, _ = model.transform(images)
            proposals, _ = model.rpn(batch, model.backbone(batch.tensors))
            mask = torch.rand(1, 28, 28)
            pasted = paste(mask, box, (96, 1000))
    assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in losses.values())
    assert all(p.grad.isfinite().all() for p in model.parameters())
    width = 101.4
    moved = width / 10 + width / 20 + width / 30  # bfloat16 has steps of 4 pixels here
    expected = torch.tensor([[800.3 + moved, 10, 901.7 + moved, 80]])
    torch.testing.assert_close(found["boxes"], expected, atol=1e-3, rtol=0)
    assert proposals[0].dtype == torch.float32
    assert (proposals[0] != proposals[0].bfloat16()).any(dim=1).float().mean() > 0.5
    assert torch.equal(pasted, paste(mask, box, (96, 1000)))


def test_double_precision_stays_double():
    model = tiny().double()
    losses = model.train()([torch.rand(3, 64, 64).double()], [target((4, 6, 40, 44))])
    assert all(loss.dtype == torch.float64 for loss in losses.values())
    with torch.no_grad():
        (found,) = model.eval()([torch.rand(3, 64, 64).double()])
    assert found["boxes"].dtype == torch.float64


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_it_trains_and_detects_on_a_gpu():
    model = tiny().cuda().train()
    images = [torch.rand(3, 64, 64, device="cuda"), torch.rand(3, 50, 64, device="cuda")]
    truth = [{k: v.cuda() for k, v in t.items()} for t in (target((4, 6, 40, 44)), target(size=(50, 64)))]
    with torch.autocast("cuda", torch.bfloat16):
        sum(model(images, truth).values()).backward()
        assert all(p.grad.isfinite().all() for p in model.parameters())
        with torch.no_grad():
            results = model.eval()(images)
    assert all(found["masks"].is_cuda and len(found["masks"]) == len(found["boxes"]) for found in results)


# What is refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_classes": 0}, "num_classes is 0"),
        ({"min_sizes": []}, "min_sizes is empty"),
        ({"min_sizes": [64, 80]}, "min_size is 80 and max_size 64"),
        ({"min_size": 0}, "min_size is 0"),
        ({"fpn_channels": 0}, "fpn_channels is 0"),
        ({"head_channels": 0}, "head_channels is 0"),
        ({"samples": 3}, "samples is 3"),
        ({"anchor_base": 0.9}, "anchor_base is 0.9"),
        ({"backbone": nn.Conv2d(3, 8, 3)}, "Conv2d needs out_channels and strides"),
        ({"backbone": Patches((8, 8), (4, 16))}, r"strides are \[4, 16\]"),
    ],
)
def test_settings_that_cannot_work_are_refused(options, words):
    with pytest.raises(InputError, match=words):
        tiny(**options)


@pytest.mark.parametrize("masks", [None, torch.zeros(2, 64, 64), torch.zeros(1, 64, 60)])
def test_targets_without_fitting_masks_are_refused(masks):
    truth = target((4, 6, 40, 44))
    truth = {**truth, "masks": masks} if masks is not None else {k: v for k, v in truth.items() if k != "masks"}
    with pytest.raises(InputError, match="masks of target 1 are"):
        tiny().train()([torch.rand(3, 64, 64)] * 2, [target(), truth])


def test_fewer_maps_are_fine():
    model = tiny(backbone=Patches((8, 12, 16), (8, 16, 32))).train()
    losses = model([torch.rand(3, 64, 64)], [target((4, 6, 40, 44))])
    assert all(loss.isfinite() for loss in losses.values())
