"""Boxes and labels follow what augmentation does to an image."""

import torch

from e3va_lite.datasets.augment import augment


def scene() -> tuple[torch.Tensor, dict]:
    """Three squares on grey: the one with label n is n tenths bright."""
    image = torch.full((3, 120, 160), 0.45)
    boxes = torch.tensor([[10.0, 10, 50, 50], [70, 20, 130, 80], [20, 70, 60, 110]])
    for label, (x1, y1, x2, y2) in enumerate(boxes.int().tolist(), start=1):
        image[:, y1:y2, x1:x2] = label / 10
    return image, {"boxes": boxes, "labels": torch.tensor([1, 2, 3]), "difficult": torch.zeros(3, dtype=torch.bool)}


def test_zooming_keeps_boxes_on_their_objects():
    torch.manual_seed(0)
    sizes, counts = set(), set()
    for _ in range(60):
        image, target = augment(*scene(), zoom=True)
        assert type(image) is type(target["boxes"]) is torch.Tensor
        assert image.is_contiguous() and image.shape[0] == 3
        assert len(target["boxes"]) == len(target["labels"]) == len(target["difficult"]) > 0
        for (x1, y1, x2, y2), label in zip(target["boxes"].round().int().tolist(), target["labels"], strict=True):
            assert 0 <= x1 < x2 <= image.shape[2] and 0 <= y1 < y2 <= image.shape[1]
            inside = image[:, y1:y2, x1:x2]
            torch.testing.assert_close(inside, torch.full_like(inside, label / 10))
            outline = [(x1 - 2, y1), (x2 + 1, y2 - 1), (x1, y1 - 2), (x2 - 1, y2 + 1)]
            for x, y in outline:  # beside the box is something else
                if 0 <= x < image.shape[2] and 0 <= y < image.shape[1]:
                    assert abs(image[0, y, x] - label / 10) > 0.05
        sizes.add(tuple(image.shape[1:]))
        counts.add(len(target["boxes"]))
    assert max(height * width for height, width in sizes) > 120 * 160 > min(height * width for height, width in sizes)
    assert counts > {1, 3}


def test_an_image_without_objects_stays_one():
    image, target = scene()
    nothing = {key: value[:0] for key, value in target.items()}
    for _ in range(20):
        image_now, target_now = augment(image, nothing, zoom=True)
        assert target_now["boxes"].shape == (0, 4) and image_now.numel() >= image.numel()
