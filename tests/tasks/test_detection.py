"""What both detectors share."""

import torch
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from e3va_lite.tasks.detection import IMAGE_MEAN, IMAGE_STD, Coder, Transform


def some_boxes(number, height=90, width=120):
    start = torch.rand(number, 2) * torch.tensor([width - 20, height - 20])
    return torch.cat([start, start + 1 + 19 * torch.rand(number, 2)], dim=1)


def test_images_and_targets_are_prepared_as_torchvision_does():
    settings = 70, 100, IMAGE_MEAN, IMAGE_STD
    ours, theirs = Transform(*settings), GeneralizedRCNNTransform(*settings)
    images = [torch.rand(3, 90, 120), torch.rand(3, 80, 60)]
    targets = [{"boxes": some_boxes(5), "labels": torch.arange(5)}, {"boxes": some_boxes(0), "labels": torch.arange(0)}]
    (batch, truth), (wanted, wanted_truth) = ours(images, targets), theirs(images, targets)
    assert torch.equal(batch.tensors, wanted.tensors) and batch.image_sizes == wanted.image_sizes
    for one, other in zip(truth, wanted_truth, strict=True):
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    found, wanted_found = (
        transform.eval().postprocess(
            [{"boxes": t["boxes"].clone()} for t in truth], batch.image_sizes, [(90, 120), (80, 60)]
        )
        for transform in (ours, theirs)
    )
    assert all(torch.equal(a["boxes"], b["boxes"]) for a, b in zip(found, wanted_found, strict=True))


def test_boxes_are_coded_as_torchvision_does():
    weights = (10.0, 12.0, 5.0, 6.0)
    ours, theirs = Coder(weights), BoxCoder(weights)
    boxes, anchors = some_boxes(50), some_boxes(50)
    assert torch.equal(ours.encode_single(boxes, anchors), theirs.encode_single(boxes, anchors))
    results = []
    for coder in (ours, theirs):
        codes = torch.linspace(-60, 60, 50 * 8).reshape(50, 8).requires_grad_()  # the largest are clamped; two a box
        decoded = coder.decode_single(codes, anchors)
        decoded.square().sum().backward()
        results += [decoded, codes.grad]
    assert torch.equal(results[0], results[2]) and torch.equal(results[1], results[3])
