import numpy as np
import pytest
import torch
from PIL import Image

from e3va_lite import InputError, build_backbone
from e3va_lite.datasets.photographs import read_photographs
from e3va_lite.experiments import probe


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Four classes of six images: a bright bar that stands somewhere else in each class, under noise."""
    root, rng = tmp_path_factory.mktemp("bars"), np.random.default_rng(0)
    for label in range(4):
        (root / f"bar {label}").mkdir()
        for i in range(6):
            image = rng.integers(0, 40, (32, 32, 3))
            image[8 * label : 8 * label + 8] += 200
            Image.fromarray(image.astype(np.uint8)).save(root / f"bar {label}" / f"{i}.png")
    return root


def test_splits_are_balanced_and_disjoint(folder):
    photographs = read_photographs(folder)
    known, named = probe.balanced_split(photographs, known=2, named=3, every=2)
    assert photographs.labels[known].tolist() == [0, 0, 2, 2]
    assert photographs.labels[named].tolist() == [0, 0, 0, 2, 2, 2]
    assert not set(known.tolist()) & set(named.tolist())
    with pytest.raises(InputError, match=r"has 6 images.*--known"):
        probe.balanced_split(photographs, known=6, named=1)


def test_nearest_neighbour_worked_by_hand():
    vectors = torch.tensor([[1.0, 0.0], [0.0, 1.0], [5.0, 1.0], [1.0, 9.0], [0.0, -1.0]])
    labels = torch.tensor([0, 1, 0, 1, 1])
    share = probe.nearest_neighbour(vectors, labels, torch.tensor([0, 1]), torch.tensor([2, 3, 4]))
    assert share == pytest.approx(2 / 3)  # the last one's cosine is 0 with the first and -1 with its own class


def test_a_linear_probe_separates_what_a_line_separates():
    x = torch.randn(200, 2)
    labels = (x @ torch.tensor([1.0, -2.0]) > 0).long()
    known, named = torch.arange(100), torch.arange(100, 200)
    assert probe.linear_probe(x, labels, known, named) > 0.94
    assert probe.linear_probe(x, labels[torch.randperm(200)], known, named) < 0.7


def test_pixels_tell_bars_apart_and_every_stage_is_reported(folder):
    backbones = {"nano": build_backbone("fixed", "swin_nano")}
    result = probe.probe(folder, backbones, 2, 4, 1, 32, False, torch.device("cpu"))
    pixels, *stages = result["rows"]
    assert pixels == {"backbone": "pixels", "stage": None, "accuracy": 1.0}
    assert [row["stage"] for row in stages] == [1, 2, 3, 4]
    assert (result["classes"], result["known"], result["named"]) == (4, 8, 16)
    assert "1.000" in probe.as_text(result)
