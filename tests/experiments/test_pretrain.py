import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from e3va_lite import InputError, build_backbone
from e3va_lite.backbones.swin import MINIATURES
from e3va_lite.backbones.weights import fingerprint
from e3va_lite.experiments import pretrain
from e3va_lite.experiments import pretrain_photographs as photographs

TEACHER = "vit_tiny_patch16_224"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """200 photographs of two sources, of other sizes and with labels of their own: stripes of a colour for each."""
    root = tmp_path_factory.mktemp("photographs")
    rng = np.random.default_rng(0)
    for source, classes, side in (("one", 5, 64), ("two", 3, 80)):
        for label in range(classes):
            folder = root / source / f"class {label}"
            folder.mkdir(parents=True)
            for i in range(25):
                image = rng.integers(0, 60, (side, side + 10, 3))
                image[:, :: label + 2] += 120
                Image.fromarray(image.astype(np.uint8)).save(folder / f"{i}.png")
    return [root / "one", root / "two"]


@pytest.fixture(scope="module")
def teacher_weights(tmp_path_factory):
    torch.manual_seed(1)
    vit = timm.create_model(TEACHER, num_classes=0)
    file = tmp_path_factory.mktemp("teacher") / "teacher.safetensors"
    save_file(vit.state_dict(), file)
    return file


@pytest.fixture
def run(folders):
    def run(out, overwrite=False, **changes):
        settings = {
            "backbone": "swin_nano", "images": folders, "generated": False, "teacher": None, "teacher_weights": None,
            "steps": 4, "batch": 6, "lr": 1e-3, "size": 56, "ema": True, "seed": 0, **changes,
        }  # fmt: skip
        return pretrain.pretrain(pretrain.build_objective(settings), settings, out, torch.device("cpu"), overwrite)

    return run


def stop_after(monkeypatch, steps):
    """Press Ctrl-C in the step after the next ``steps``."""
    losses, taken = photographs.PhotographObjective.losses, []

    def stopping(self, *items):
        if len(taken) == steps:
            raise KeyboardInterrupt
        taken.append(1)
        return losses(self, *items)

    monkeypatch.setattr(photographs.PhotographObjective, "losses", stopping)


@pytest.mark.parametrize("teacher", [False, True])
def test_a_stopped_run_goes_on_as_if_nothing_had_happened(run, tmp_path, monkeypatch, teacher, teacher_weights):
    options = {"teacher": TEACHER, "teacher_weights": teacher_weights} if teacher else {}
    run(tmp_path / "whole.safetensors", **options)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(patch, 2)
        run(tmp_path / "cut.safetensors", **options)
    assert (tmp_path / "cut.partial").exists() and not (tmp_path / "cut.safetensors").exists()
    run(tmp_path / "cut.safetensors", **options)
    whole, cut = load_file(tmp_path / "whole.safetensors"), load_file(tmp_path / "cut.safetensors")
    assert whole.keys() == cut.keys() and all(torch.equal(whole[key], cut[key]) for key in whole)
    assert not (tmp_path / "cut.partial").exists()


def test_states_are_written_by_time(run, tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain, "SAVE_SECONDS", 0)
    written = []
    save = torch.save
    monkeypatch.setattr(torch, "save", lambda state, file: written.append(state["step"]) or save(state, file))
    run(tmp_path / "a.safetensors")
    assert written == [1, 2, 3]


@pytest.mark.parametrize("change", [{"lr": 2e-3}, {"seed": 1}, {"batch": 8}, {"size": 112}, {"steps": 5}])
def test_a_state_of_other_settings_is_refused_and_kept(run, tmp_path, monkeypatch, change):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(patch, 1)
        run(tmp_path / "a.safetensors")
    before = (tmp_path / "a.partial").read_bytes()
    with pytest.raises(InputError, match=r"a\.partial.*other settings.*to go on"):
        run(tmp_path / "a.safetensors", **change)
    assert (tmp_path / "a.partial").read_bytes() == before


def test_a_state_of_other_photographs_is_refused(run, tmp_path, monkeypatch, folders):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(patch, 1)
        run(tmp_path / "a.safetensors")
    with pytest.raises(InputError, match="sources"):
        run(tmp_path / "a.safetensors", images=folders[:1])
    state = torch.load(tmp_path / "a.partial")
    state["weights"] = {f"renamed.{key}": value for key, value in state["weights"].items()}
    torch.save(state, tmp_path / "a.partial")
    with pytest.raises(InputError, match="another version"):
        run(tmp_path / "a.safetensors")
    (tmp_path / "a.partial").write_bytes(b"damaged")
    with pytest.raises(InputError, match="cannot be read"):
        run(tmp_path / "a.safetensors")


@pytest.mark.parametrize("backbone", MINIATURES)
def test_weights_load_and_the_card_says_where_they_are_from(backbone, run, tmp_path, folders):
    out = tmp_path / "weights.safetensors"
    card = run(out, backbone=backbone)
    assert json.loads(out.with_suffix(".json").read_text(encoding="utf-8")) == card
    assert [source["classes"] for source in card["sources"]] == [5, 3] and card["images_seen"] == 24
    assert set(card["accuracy_held_out"]) == {"one", "two"}
    assert str(folders[0].parent) not in json.dumps(card)  # nobody's paths
    assert {value.dtype for value in load_file(out).values()} == {torch.float16}
    swin = build_backbone("e3va", backbone, weights=out).backbone
    assert fingerprint(swin) == card["fingerprint"]
    with pytest.raises(InputError, match="--overwrite"):
        run(out)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": ()}, "--images FOLDER"),
        ({"generated": True}, "one kind"),
        ({"generated": True, "images": (), "teacher": TEACHER}, "--teacher goes with photographs"),
        ({"teacher_weights": "x.safetensors"}, "--teacher NAME"),
        ({"teacher": "vit_smal_patch14_dinov2"}, "vit_small_patch14_dinov2"),
        ({"backbone": "swin_nona"}, "swin_nano"),
    ],
)
def test_what_does_not_go_together_gets_one_sentence(run, tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        run(tmp_path / "a.safetensors", **changes)
    assert not list(tmp_path.iterdir())


def test_the_average_is_written_where_it_answers_better(run, tmp_path, monkeypatch):
    scores = iter([0.1, 0.9])  # of the weights, then of their average
    monkeypatch.setattr(
        photographs.PhotographObjective, "accuracy", lambda *_: (next(scores), {"accuracy_held_out": {}})
    )
    assert run(tmp_path / "a.safetensors")["weights_are_a_moving_average"]
    scores = iter([0.9, 0.1])
    assert not run(tmp_path / "b.safetensors")["weights_are_a_moving_average"]
    a, b = load_file(tmp_path / "a.safetensors"), load_file(tmp_path / "b.safetensors")
    assert any(not torch.equal(a[key], b[key]) for key in a)
    monkeypatch.undo()
    run(tmp_path / "c.safetensors", ema=False)
    c = load_file(tmp_path / "c.safetensors")
    assert all(torch.equal(b[key], c[key]) for key in b)


def test_every_epoch_shows_every_image_once():
    shown = torch.cat([photographs.epoch_positions(10, 4, step, seed=3) for step in range(5)])
    assert shown[:10].sort().values.tolist() == list(range(10)) == shown[10:].sort().values.tolist()
    assert shown[:10].tolist() != shown[10:].tolist()
    other = torch.cat([photographs.epoch_positions(10, 4, step, seed=4) for step in range(5)])
    assert other.tolist() != shown.tolist()


def test_augmented_images_keep_their_contents():
    """A picture of one colour stays one colour, whose brightness changes; the same seed gives the same crops."""
    pixels = torch.full((8, 3, 40, 40), 100, dtype=torch.uint8)
    images = photographs.augment(pixels, 24, torch.Generator().manual_seed(0))
    assert images.shape == (8, 3, 24, 24) and images.flatten(1).std(dim=1).max() < 1e-6
    assert (images[:, 0, 0, 0] * 255 / 100 - 1).abs().max() <= photographs.JITTER + 1e-6
    halves = torch.zeros(64, 3, 40, 40, dtype=torch.uint8)
    halves[..., 20:] = 250
    left, right = photographs.augment(halves, 24, torch.Generator().manual_seed(0))[:, 0, 12].split(12, dim=1)
    flipped = (left.mean(dim=1) > right.mean(dim=1)).sum()
    assert 16 < flipped < 48
    again = photographs.augment(halves, 24, torch.Generator().manual_seed(0))[:, 0, 12]
    assert torch.equal(torch.cat([left, right], dim=1), again)


def test_a_teacher_gives_one_token_per_eight_pixels_and_never_learns(teacher_weights):
    teacher = photographs.Teacher(TEACHER, teacher_weights).train()
    assert not teacher.vit.training and not any(p.requires_grad for p in teacher.parameters())
    images = torch.randn(2, 3, 56, 56)
    tokens, class_token = teacher(images)
    assert tokens.shape == (2, 192, 7, 7) and class_token.shape == (2, 192)
    assert torch.allclose(tokens.norm(dim=1), torch.ones(2, 7, 7)) and torch.allclose(
        class_token.norm(dim=1), torch.ones(2)
    )
    vit = timm.create_model(TEACHER, num_classes=0, img_size=112)
    vit.load_state_dict(
        timm.models.vision_transformer.checkpoint_filter_fn(load_file(teacher_weights), vit), strict=True
    )
    large = torch.nn.functional.interpolate(images, (112, 112), mode="bicubic", antialias=True)
    [(expected, _)] = vit.eval().forward_intermediates(
        large, indices=[10], return_prefix_tokens=True, intermediates_only=True
    )
    expected = torch.nn.functional.layer_norm(expected.permute(0, 2, 3, 1), (192,))
    similar = torch.nn.functional.cosine_similarity(tokens.permute(0, 2, 3, 1), expected, dim=-1)
    assert similar.min() > 0.999
