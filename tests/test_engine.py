import csv
import json
import shutil

import pytest
import torch
from click.testing import CliRunner

from e3va_lite import InputError
from e3va_lite import cli as command
from e3va_lite.datasets.shapes import write_scenes
from e3va_lite.datasets.voc import VOCDetection
from e3va_lite.engine import build_detector, build_optimizer, evaluate, fit, load_model, mirror, rate, save_model
from e3va_lite.recipe import load_recipe

SMALL = {
    "pretrained": False,
    "min_size": 96,
    "max_size": 96,
    "fpn_channels": 16,
    "epochs": 1,
    "batch": 3,
    "anchor_base": 3,
    "warmup": 0,
}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    root = tmp_path_factory.mktemp("scenes") / "voc"
    write_scenes(root, "voc", train=6, val=3, seed=0, size=96)
    return root


@pytest.fixture(scope="module")
def run(scenes, tmp_path_factory):
    """A finished run, made through the command line as users make it."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    result = e3va("train", "voc", "--recipe", "shapes", "--root", scenes, "--out", folder, *settings(), "--json")
    assert result.exit_code == 0, result.stderr
    return folder, json.loads(result.stdout)


def e3va(*arguments):
    """The command as `main` runs it, errors of the user included."""
    result = CliRunner().invoke(command.cli, [str(a) for a in arguments])
    if result.exception and not isinstance(result.exception, SystemExit | InputError):
        raise result.exception
    return result


def settings(**changes):
    return [word for key, value in {**SMALL, **changes}.items() for word in ("--set", f"{key}={json.dumps(value)}")]


def small(**changes):
    return load_recipe("shapes", {**SMALL, **changes})


def test_a_run_keeps_what_is_needed_to_repeat_and_to_evaluate_it(run, scenes):
    folder, result = run
    assert sorted(p.name for p in folder.iterdir()) == ["losses.csv", "model.safetensors", "recipe.yaml", "run.json"]
    assert json.loads((folder / "run.json").read_text()) == result
    assert load_recipe(str(folder / "recipe.yaml")) == small()
    rows = list(csv.reader((folder / "losses.csv").open()))
    assert rows[0] == ["step", "loss"] and len(rows) == 1 + 2  # 6 images in batches of 3
    again = e3va("eval", folder, "--json")
    assert again.exit_code == 0 and json.loads(again.stdout)["ap"] == result["ap"]
    other = e3va("eval", folder, "--root", scenes, "--split", "train")
    assert other.exit_code == 0 and "AP at IoU .5 on 'train'" in other.stdout


def test_a_run_is_never_overwritten_unasked(run, scenes, tmp_path):
    folder, _ = run
    arguments = ("train", "voc", "--recipe", "shapes", "--root", scenes, *settings())
    before = (folder / "model.safetensors").read_bytes()
    result = e3va(*arguments, "--out", folder)
    assert "--overwrite" in str(result.exception) and (folder / "model.safetensors").read_bytes() == before
    precious = tmp_path / "thesis"
    precious.mkdir()
    (precious / "chapter1.txt").write_text("irreplaceable")
    result = e3va(*arguments, "--out", precious, "--overwrite")
    assert "is not a run" in str(result.exception) and (precious / "chapter1.txt").exists()


def test_the_same_seed_gives_the_same_weights(scenes):
    states = []
    for _ in range(2):
        dataset = VOCDetection(scenes, "train")
        model = build_detector(small(), len(dataset.classes))
        fit(model, dataset, small(), torch.device("cpu"))
        states.append(model.state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_saved_models_hold_what_training_changes_and_come_back(scenes, tmp_path, device):
    dataset = VOCDetection(scenes, "train")
    for method in ("e3va", "full"):
        recipe = small(method=method)
        model = build_detector(recipe, len(dataset.classes))
        fit(model, dataset, recipe, device)
        save_model(model, tmp_path / "model.safetensors")
        other = build_detector(recipe, len(dataset.classes))
        load_model(other, tmp_path / "model.safetensors")
        for key, value in model.state_dict().items():
            assert torch.equal(value.cpu(), other.state_dict()[key]), key
        size = (tmp_path / "model.safetensors").stat().st_size
        assert (size < 2e6) == (method == "e3va")  # the frozen 14 MB stay out
    with pytest.raises(InputError, match="does not fit its recipe"):
        load_model(build_detector(small(), len(dataset.classes)), tmp_path / "model.safetensors")


def test_training_leaves_the_frozen_backbone_alone(scenes, device):
    recipe = small(epochs=2)
    dataset = VOCDetection(scenes, "train")
    model = build_detector(recipe, len(dataset.classes))
    before = {key: value.clone() for key, value in model.backbone.body.swin.state_dict().items()}
    adapters = [p.detach().clone() for p in model.backbone.body.adapters.parameters()]
    fit(model, dataset, recipe, device)
    assert all(torch.equal(value.cpu(), before[key]) for key, value in model.backbone.body.swin.state_dict().items())
    moved = [
        not torch.equal(p.cpu(), q) for p, q in zip(model.backbone.body.adapters.parameters(), adapters, strict=True)
    ]
    assert all(moved)


def test_the_detector_with_its_loss_is_isolated(scenes):
    from e3va_lite import assert_isolated

    dataset = VOCDetection(scenes, "train")
    model = build_detector(small(clip=None), len(dataset.classes))
    images, targets = zip(*(dataset[i] for i in range(2)), strict=True)
    assert_isolated(model, list(images), list(targets), loss=lambda losses: sum(losses.values()))


def test_norms_and_position_tables_do_not_decay():
    model = build_detector(small(method="full"), 6)
    decayed, spared = ({id(p) for p in group["params"]} for group in build_optimizer(model, small()).param_groups)
    for name, p in model.named_parameters():
        wanted = spared if "norm" in name or "relative_position_bias_table" in name else decayed
        assert id(p) in wanted, name
    assert decayed.isdisjoint(spared)


def test_the_schedule():
    recipe = small(schedule="step", epochs=12, milestones=[8, 11], warmup=4)
    assert [rate(recipe, step, 10) for step in (0, 4, 79, 80, 110)] == pytest.approx([0.2, 1.0, 1.0, 0.1, 0.01])
    recipe = small(schedule="cosine", epochs=10, warmup=0)
    assert [rate(recipe, step, 10) for step in (0, 50, 100)] == pytest.approx([1.0, 0.5, 0.0])


def test_mirroring_twice_changes_nothing():
    image, boxes = torch.rand(3, 20, 30), torch.tensor([[2.0, 3, 10, 12], [0, 0, 30, 20]])
    flipped, target = mirror(image, {"boxes": boxes, "labels": torch.tensor([1, 2])})
    assert target["boxes"].tolist() == [[20, 3, 28, 12], [0, 0, 30, 20]]
    x1, y1, x2, y2 = boxes[0].int().tolist()
    assert torch.equal(flipped[:, y1:y2, 20:28], image[:, y1:y2, x1:x2].flip(-1))
    again, target = mirror(flipped, target)
    assert torch.equal(again, image) and torch.equal(target["boxes"], boxes)


# Bad input


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("shape", {}, "unknown recipe 'shape': did you mean shapes"),
        ("no/such.yaml", {}, "no recipe file 'no/such.yaml'"),
        ("shapes", {"epoch": 3}, "unknown recipe field 'epoch': did you mean epochs"),
        ("shapes", {"epochs": "many"}, "epochs='many' must be of type int"),
        ("shapes", {"epochs": 0}, "epochs=0 cannot work"),
        ("shapes", {"lr": "-1e-3"}, "lr=-0.001 cannot work"),
        ("shapes", {"schedule": "cosin"}, "unknown schedule 'cosin': did you mean cosine"),
        ("shapes", {"stages": "2"}, "stages=2 must be of type list"),
    ],
)
def test_recipes_are_checked(name, overrides, message):
    with pytest.raises(InputError, match=message):
        load_recipe(name, overrides)


def test_numbers_may_look_as_yaml_reads_them():
    assert load_recipe("shapes", {"lr": "1e-3", "clip": "null", "epochs": "7"}).lr == 1e-3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "options={rank: 0}"], "rank=0"),
        (["--method", "e3v"], "unknown method 'e3v': did you mean e3va"),
        (["--backbone", "swin_nana"], "unknown backbone 'swin_nana': did you mean swin_nano"),
        (["--set", "classes=[star, house]"], "class"),
        (["--set", "train_split=trian"], "trian"),
        (["--set", "weights=lost.pth"], "lost.pth"),
        (["--set", "nonsense"], "--set nonsense is not understood"),
        (["--device", "gpu9"], "--device gpu9"),
    ],
)
def test_what_cannot_work_is_one_sentence_before_training(arguments, message, scenes, tmp_path):
    out = tmp_path / "run"
    result = e3va("train", "voc", "--recipe", "shapes", "--root", scenes, "--out", out, *settings(), *arguments)
    assert isinstance(result.exception, InputError) and message in str(result.exception)
    assert not out.exists()  # nothing was begun


def test_the_command_prints_a_sentence_and_no_traceback(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["e3va", "params", "--backbone", "swin_nana"])
    with pytest.raises(SystemExit) as stop:
        command.main()
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert not out and err == "error: unknown backbone 'swin_nana': did you mean swin_nano?\n"


def test_a_loss_that_is_not_finite_stops_with_the_images(scenes):
    dataset = VOCDetection(scenes, "train")
    with pytest.raises(InputError, match=r"the loss is (nan|inf) at step \d+ \(images .*\d{6}"):
        fit(build_detector(small(), 6), dataset, small(lr=1e30, epochs=20, clip=None), torch.device("cpu"))


@pytest.mark.parametrize("missing", ["model.safetensors", "recipe.yaml"])
def test_eval_wants_a_finished_run(missing, run, tmp_path):
    broken = shutil.copytree(run[0], tmp_path / "run")
    (broken / missing).unlink()
    assert f"has no {missing}" in str(e3va("eval", broken).exception)


def test_eval_refuses_damage_and_other_weights(run, tmp_path):
    broken = shutil.copytree(run[0], tmp_path / "run")
    (broken / "model.safetensors").write_bytes((broken / "model.safetensors").read_bytes()[:1000])
    assert "the file is damaged" in str(e3va("eval", broken).exception)
    other = shutil.copytree(run[0], tmp_path / "other")
    (other / "run.json").write_text((other / "run.json").read_text().replace('"weights": "', '"weights": "0'))
    assert "are not those" in str(e3va("eval", other).exception)


@pytest.mark.slow
def test_a_few_images_can_be_learnt_by_heart(tmp_path):
    """Detector, loss, loop and metric together: what training shows it must find again."""
    write_scenes(tmp_path, "voc", train=6, val=1, seed=0, size=160)
    dataset = VOCDetection(tmp_path, "train")
    for method in ("e3va", "full"):
        recipe = load_recipe("shapes", {"method": method, "epochs": 100, "batch": 6})
        model = build_detector(recipe, len(dataset.classes))
        fit(model, dataset, recipe, torch.device("cpu"))
        assert evaluate(model, dataset, recipe, torch.device("cpu")).mean_all_point > 0.9, method
