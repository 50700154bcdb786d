import numpy as np
import pytest
import torch

from e3va_lite.experiments import pretrain
from e3va_lite.experiments import pretrain_shapes as shapes


def test_images_are_the_same_in_every_run_and_labels_fit_the_pixels():
    a, b = shapes.DenseShapes(10, seed=3), shapes.DenseShapes(99, seed=3)
    for x, y in zip(a[7], b[7], strict=True):
        assert torch.equal(x, y)
    assert not torch.equal(a[7][0], a[8][0]) and not torch.equal(a[7][0], shapes.DenseShapes(10, seed=4)[7][0])
    for i in range(10):
        image, outlines, textures, distances = a[i]
        assert image.shape == (3, 112, 112) and image.min() >= 0 and image.max() <= 1
        assert torch.equal(outlines == 0, textures == shapes.IGNORE)  # a texture exactly where there is an object
        assert torch.equal(outlines == 0, distances.sum(0) == 0)


def test_distances_lead_to_the_sides_of_the_box_and_to_the_outline():
    """A corner: 60 wide, 40 high, whose upper right part is missing."""
    mask = np.zeros((112, 112), bool)
    mask[30:70, 20:80] = True
    mask[30:50, 40:80] = False
    pixels = (28 * shapes._distances(mask, y=np.array([60, 35]), x=np.array([30, 30]))).round(3)
    left, top, right, bottom, *rays = pixels.T[0]
    assert (left, top, right, bottom) == (10, 30, 49, 9)
    east, _, south, _, west, _, north, north_east = rays
    assert np.allclose((east, south, west, north), (49, 9, 10, 30), atol=1.5)
    assert north_east == pytest.approx(10 * 2**0.5, abs=2)  # into the inner corner, not to the box
    to_box, to_outline = pixels.T[1][[2, 4]]  # both to the right, from the arm that points up
    assert to_box == 49 and to_outline == pytest.approx(9, abs=1.5)


def test_accuracy_worked_by_hand():
    """Two label maps of 28 x 28: in one four pixels that are named rightly and six not, in the other nothing."""
    outlines, textures = torch.zeros(2, 28, 28, dtype=torch.int64), torch.full((2, 28, 28), shapes.IGNORE)
    outlines[0, 0, :4], outlines[0, 1, :4], outlines[0, 2, :2] = 3, 5, 5
    textures[0, 0, :4], textures[0, 1, :4], textures[0, 2, :2] = 0, 1, 2
    images, distances = torch.zeros(2, 3, 112, 112), torch.zeros(2, shapes.DISTANCES, 28, 28)

    def model(images):
        answers = torch.zeros(2, 17, 28, 28), torch.zeros(2, 8, 28, 28), torch.full((2, 12, 28, 28), 0.5)
        answers[0][:, 0], answers[0][:, 3], answers[1][:, 1] = 9, 2, 2  # "ground, else the third", "the second"
        return answers

    model.eval = lambda: None
    accuracy, commonest = shapes.dense_accuracy(model, [(images, outlines, textures, distances)], torch.device("cpu"))
    assert accuracy == pytest.approx({"outline": 0.4, "texture": 0.4, "distance_error_px": 14})
    assert commonest == pytest.approx({"outline": 0.6, "texture": 0.4})


@pytest.mark.slow
def test_pretraining_beats_the_best_constant_answers(tmp_path, monkeypatch):
    """Outlines are not among these: they take a thousand steps."""
    monkeypatch.setattr(shapes, "HELD_OUT", 100)
    settings = {
        "backbone": "swin_nano", "images": (), "generated": True, "teacher": None, "teacher_weights": None,
        "steps": 300, "batch": 16, "lr": 7e-4, "size": 112, "ema": False, "seed": 0,
    }  # fmt: skip
    objective = pretrain.build_objective(settings, workers=1)
    card = pretrain.pretrain(objective, settings, tmp_path / "n.safetensors", torch.device("cpu"))
    accuracy = card["accuracy_on_100_held_out_images"]
    assert accuracy["texture"] > card["always_the_commonest_answer"]["texture"] + 0.05
    held_out = shapes.DenseShapes(100, seed=1_000_000)
    inside = torch.cat([distances[:, outlines > 0] for _, outlines, _, distances in held_out], dim=1)
    same_everywhere = shapes.SIZE / 4 * (inside - inside.median(dim=1, keepdim=True).values).abs().mean()
    assert accuracy["distance_error_px"] < 0.75 * same_everywhere
