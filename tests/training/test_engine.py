import csv
import json
import os
import pickle
import resource
import shutil
import subprocess
import sys
from dataclasses import FrozenInstanceError, replace

import pytest
import torch
from click.testing import CliRunner
from pydantic import ValidationError

from e3va_lite import InputError
from e3va_lite import cli as command
from e3va_lite.datasets.shapes import write_scenes
from e3va_lite.recipes.schema import load_recipe, save_recipe
from e3va_lite.tasks import voc
from e3va_lite.training.engine import Training, build_model, build_optimizer, evaluate, fit, rate, total_steps
from e3va_lite.training.sampling import StepSampler, loader

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
CPU = torch.device("cpu")


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
    length = {"epochs": None} if "steps" in changes else {}
    return load_recipe("shapes", {**SMALL, **length, **changes})


def data(scenes, split="train", train=True):
    return voc.dataset(small(), scenes, split, train=train)


def test_a_run_keeps_what_is_needed_to_repeat_and_to_evaluate_it(run, scenes):
    folder, result = run
    names = [".lock", "best.safetensors", "last.safetensors", "losses.csv", "recipe.yaml", "run.json", "tensorboard"]
    assert sorted(p.name for p in folder.iterdir()) == names
    assert json.loads((folder / "run.json").read_text()) == result
    assert load_recipe(str(folder / "recipe.yaml")) == small()
    rows = list(csv.reader((folder / "losses.csv").open()))
    assert rows[0] == ["step", "loss"] and [row[0] for row in rows[1:]] == ["1", "2"]  # 6 images in batches of 3
    for option in ([], ["--best"]):
        again = e3va("eval", folder, "--json", *option)
        assert again.exit_code == 0 and json.loads(again.stdout)["result"] == result["result"]
    other = e3va("eval", folder, "--root", scenes, "--split", "train")
    assert other.exit_code == 0 and "ap50_11_point on 'train'" in other.stdout


def test_tensorboard_gets_every_step_and_evaluation(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder, result = run
    board = EventAccumulator(str(folder / "tensorboard"))
    board.Reload()
    assert [event.step for event in board.Scalars("train/loss")] == [1, 2]
    losses = [float(row[1]) for row in list(csv.reader((folder / "losses.csv").open()))[1:]]
    assert [event.value for event in board.Scalars("train/loss")] == pytest.approx(losses)
    (event,) = board.Scalars("eval/ap50_11_point")
    assert event.step == 2 and event.value == pytest.approx(result["result"]["ap50_11_point"])


def test_evaluation_comes_as_often_as_asked_and_the_best_is_kept(scenes, tmp_path, monkeypatch):
    metrics = iter([0.3, 0.5, 0.4, 0.2])
    monkeypatch.setattr("e3va_lite.training.runs.evaluate", lambda *_: {"ap50_11_point": next(metrics)})
    from e3va_lite.training import runs, trained_model

    result = runs.train(scenes, small(epochs=4, eval_every=1), tmp_path / "run", CPU)
    assert [e["step"] for e in result["evaluations"]] == [2, 4, 6, 8]
    assert (
        trained_model.open_run(tmp_path / "run", best=True).step == 4
        and trained_model.open_run(tmp_path / "run").step == 8
    )
    result = json.loads((tmp_path / "run/run.json").read_text())
    assert result["result"]["ap50_11_point"] == 0.2  # the last one; the best one is named, not passed off as it


def test_a_run_is_never_overwritten_unasked(run, scenes, tmp_path):
    folder, _ = run
    arguments = ("train", "voc", "--recipe", "shapes", "--root", scenes, *settings())
    before = (folder / "last.safetensors").read_bytes()
    result = e3va(*arguments, "--out", folder)
    assert "--overwrite" in str(result.exception) and (folder / "last.safetensors").read_bytes() == before
    precious = tmp_path / "thesis"
    precious.mkdir()
    (precious / "chapter1.txt").write_text("irreplaceable")
    result = e3va(*arguments, "--out", precious, "--overwrite")
    assert "is not a run" in str(result.exception) and (precious / "chapter1.txt").exists()


def test_the_same_seed_gives_the_same_weights_with_any_number_of_workers(scenes):
    states = []
    for workers in (0, 2):
        model = build_model(small(), 6)
        fit(model, data(scenes), small(workers=workers), CPU)
        states.append(model.state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_training_leaves_the_frozen_backbone_alone(scenes, device):
    recipe = small(epochs=2)
    model = build_model(recipe, 6)
    before = {key: value.clone() for key, value in model.backbone.body.backbone.state_dict().items()}
    adapters = [p.detach().clone() for p in model.backbone.body.adapters.parameters()]
    fit(model, data(scenes), recipe, device)
    assert all(
        torch.equal(value.cpu(), before[key]) for key, value in model.backbone.body.backbone.state_dict().items()
    )
    moved = [
        not torch.equal(p.cpu(), q) for p, q in zip(model.backbone.body.adapters.parameters(), adapters, strict=True)
    ]
    assert all(moved)


def test_the_detector_with_its_loss_is_isolated(scenes):
    from e3va_lite import assert_isolated

    model = build_model(small(clip=None), 6)
    images, targets = zip(*(data(scenes)[i] for i in range(2)), strict=True)
    assert_isolated(model, list(images), list(targets), loss=lambda losses: sum(losses.values()))


def test_norms_and_position_tables_do_not_decay():
    model = build_model(small(method="full"), 6)
    decayed, spared = ({id(p) for p in group["params"]} for group in build_optimizer(model, small()).param_groups)
    for name, p in model.named_parameters():
        wanted = spared if "norm" in name or "relative_position_bias_table" in name else decayed
        assert id(p) in wanted, name
    assert decayed.isdisjoint(spared)


def test_heads_learn_at_a_rate_of_their_own(scenes):
    """One step of AdamW without decay changes every parameter by its learning rate, or not at all."""
    recipe = small(lr=1e-4, head_lr=1e-2, steps=10, batch=1, warmup=1, schedule="step", weight_decay=0.0, clip=None)
    model = build_model(recipe, 6)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    training = Training(model, data(scenes), recipe, torch.device("cpu"))
    batches = [next(training.batches())]
    training.backward(batches)
    training.update(batches)
    changed = {name: (p - before[name]).abs().max().item() for name, p in model.named_parameters() if name in before}
    tuned = {name: most for name, most in changed.items() if name.startswith("backbone.body.")}
    heads = {name: most for name, most in changed.items() if name not in tuned}
    assert max(tuned.values()) == pytest.approx(5e-5, rel=0.02)  # half of the rate: warming up
    assert max(heads.values()) == pytest.approx(5e-3, rel=0.02)


def test_the_schedules():
    recipe = small(schedule="step", epochs=12, milestones=[8, 11], warmup=4)
    by_hand = [0.2, 1.0, 1.0, 0.1, 0.01]
    assert [rate(recipe, step, 120, unit=10) for step in (0, 4, 79, 80, 110)] == pytest.approx(by_hand)
    recipe = small(schedule="step", steps=100, milestones=[60], warmup=0)
    assert [rate(recipe, step, 100, unit=1) for step in (59, 60)] == pytest.approx([1.0, 0.1])
    recipe = small(schedule="cosine", epochs=10, warmup=0)
    assert [rate(recipe, step, 100, unit=10) for step in (0, 50, 100)] == pytest.approx([1.0, 0.5, 0.0])
    recipe = small(schedule="poly", power=2.0, warmup=0)
    assert [rate(recipe, step, 100, unit=10) for step in (0, 50, 90, 100)] == pytest.approx([1.0, 0.25, 0.01, 0.0])


def test_epochs_become_steps():
    assert total_steps(small(epochs=12, batch=4), 205) == 615  # 51 1/4 steps an epoch
    assert total_steps(small(epochs=12, batch=4, accumulate=2), 205) == 308
    assert total_steps(small(steps=7), 205) == 7
    assert total_steps(small(epochs=1, batch=16), 6) == 1


def test_another_length_keeps_the_proportions():
    assert load_recipe("voc").milestones == [8, 11]
    assert load_recipe("voc", {"epochs": 24}).milestones == [16, 22]
    recipe = load_recipe("voc", {"steps": 1200, "eval_every": 7})
    assert (recipe.epochs, recipe.milestones, recipe.eval_every) == (None, [800, 1100], 7)
    assert load_recipe("voc", {"steps": 1200, "milestones": "[3]"}).milestones == [3]


# Batches


def first(stream, count):
    return [keys for keys, _ in zip(stream, range(count), strict=False)]


def test_every_pass_shows_every_image_once_in_an_order_of_its_own():
    keys = [key for batch in first(StepSampler(10, 4, 1, seed=3), 5) for key in batch]
    assert [epoch for epoch, _ in keys] == [0] * 10 + [1] * 10
    orders = [[index for _, index in keys[k : k + 10]] for k in (0, 10)]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(10)) and orders[0] != orders[1]
    assert orders[0] != [index for batch in first(StepSampler(10, 5, 1, seed=4), 2) for _, index in batch]


def test_a_stream_goes_on_where_another_stopped():
    assert first(StepSampler(10, 4, 2, 0, first=3), 4) == first(StepSampler(10, 4, 2, 0), 10)[6:]


def test_processes_and_accumulation_share_out_the_batch_of_one(monkeypatch):
    whole = [set(batch) for batch in first(StepSampler(50, 12, 1, 0), 3)]
    parts = []
    for number in range(2):
        monkeypatch.setattr("e3va_lite.training.sampling.rank", lambda number=number: number)
        monkeypatch.setattr("e3va_lite.training.sampling.world", lambda: 2)
        parts.append(first(StepSampler(50, 3, 2, 0), 6))
    for step in range(3):
        seen = [key for part in parts for batch in part[2 * step : 2 * step + 2] for key in batch]
        assert len(seen) == 12 and set(seen) == whole[step]


def test_random_numbers_of_an_item_follow_from_pass_and_index_alone():
    class Noise:
        def __getitem__(self, index):
            return torch.rand(3), {"index": index}

    def draw(*keys):
        return [images[0] for images, _ in loader(Noise(), [[key] for key in keys], seed=1, workers=0)]

    before = torch.get_rng_state()
    a, b, c = draw((0, 5), (0, 6), (1, 5))
    assert not torch.equal(a, b) and not torch.equal(a, c)
    assert torch.equal(draw((0, 5))[0], a)
    assert torch.equal(torch.get_rng_state(), before)  # nobody else's numbers are disturbed


@pytest.fixture
def few_files():
    """So few files may be open that hardly a dozen more fit."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 40, limit[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, limit)


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="this system does not list open files")
def test_images_that_workers_read_hold_no_files(few_files):
    class Images(torch.utils.data.Dataset):
        def __getitem__(self, index):
            boxes = torch.full((2, 4), float(index))
            return torch.full((3, 8, 8), index / 200), {"boxes": boxes, "labels": torch.tensor(index), "file": "a"}

    kept = list(loader(Images(), [[(0, i), (0, i + 1)] for i in range(0, 200, 2)], seed=0, workers=2))
    assert len(kept) == 100
    for step, (images, targets) in enumerate(kept):
        for k, (image, target) in enumerate(zip(images, targets, strict=True)):
            index = 2 * step + k
            assert image.dtype == torch.float32 and (image == index / 200).all()
            assert target["labels"] == index and (target["boxes"] == index).all() and target["file"] == "a"


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="this system does not list open files")
def test_an_evaluation_of_many_images_needs_few_files(scenes, few_files):
    class Often(torch.utils.data.Dataset):
        def __init__(self, dataset):
            self.dataset, self.classes = dataset, dataset.classes

        def __len__(self):
            return 60

        def __getitem__(self, index):
            return self.dataset[index % len(self.dataset)]

    recipe = small(min_size=32, max_size=32, workers=2)
    assert evaluate(build_model(recipe, 6), Often(data(scenes, "val", False)), recipe, CPU) is not None


# Precision and accumulation


def gradients(scenes, **changes):
    recipe = small(clip=None, **changes)
    training = Training(build_model(recipe, 6), data(scenes), recipe, CPU)
    batches = training.batches()
    losses = training.backward([next(batches) for _ in range(recipe.accumulate)])
    scale = training.scaler.get_scale()
    grads = {name: p.grad / scale for name, p in training.model.named_parameters() if p.requires_grad}
    return losses, grads


@pytest.mark.parametrize(("precision", "tolerance"), [("bfloat16", 0.15), ("float16", 0.05)])
def test_lower_precision_gives_nearly_the_same_gradient(precision, tolerance, scenes):
    _, exact = gradients(scenes)
    losses, grads = gradients(scenes, precision=precision)
    assert all(grad.dtype == torch.float32 for grad in grads.values())
    difference = torch.stack([(grads[k] - exact[k]).norm() for k in exact]).norm()
    assert 0 < difference < tolerance * torch.stack([g.norm() for g in exact.values()]).norm()
    assert all(torch.isfinite(x) for x in losses.values())


def test_accumulated_gradients_are_the_mean_over_the_parts(scenes):
    _, both = gradients(scenes, batch=2, accumulate=2)
    recipe = small(clip=None, batch=2)
    training = Training(build_model(recipe, 6), data(scenes), recipe, CPU)
    batches, parts = training.batches(), []
    for _ in range(2):
        training.optimizer.zero_grad()
        training.backward([next(batches)])
        parts.append({name: p.grad.clone() for name, p in training.model.named_parameters() if p.requires_grad})
    for name, grad in both.items():
        torch.testing.assert_close(grad, (parts[0][name] + parts[1][name]) / 2, rtol=1e-4, atol=1e-7)


def test_clipping_and_rate_act_on_the_update(scenes):
    recipe = small(clip=0.01, lr=0.5, warmup=1)
    training = Training(build_model(recipe, 6), data(scenes), recipe, CPU)
    training.optimizer = torch.optim.SGD([p for p in training.model.parameters() if p.requires_grad], lr=9.0)
    training.rates = [0.5]
    before = [p.detach().clone() for p in training.model.parameters() if p.requires_grad]
    batch = next(training.batches())
    training.backward([batch])
    norm = training.update([batch])["gradient_norm"]
    after = [p.detach() for p in training.model.parameters() if p.requires_grad]
    moved = torch.stack([(a - b).norm() for a, b in zip(after, before, strict=True)]).norm()
    assert norm > 0.01 and moved == pytest.approx(
        0.5 * 0.5 * 0.01, rel=1e-3
    )  # half the rate: warm-up; cosine starts at 1


# Commands


def test_eval_takes_an_exported_file(run, scenes, tmp_path):
    folder, result = run
    file = tmp_path / "model.safetensors"
    assert e3va("export", folder, "--out", file).exit_code == 0
    again = e3va("eval", file, "--root", scenes, "--json")
    assert json.loads(again.stdout)["result"] == result["result"]
    assert "give the folder with --root" in str(e3va("eval", file).exception)
    assert "exists: choose another place." in str(e3va("export", folder, "--out", file).exception)


def test_the_default_folder_has_a_number_where_the_name_is_taken(scenes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ("train", "voc", "--recipe", "shapes", "--root", scenes, *settings(epochs=None, steps=1))
    for name in ("shapes-e3va", "shapes-e3va-2", "shapes-e3va-3"):
        assert e3va(*arguments).stdout.endswith(f"run: runs/{name}\n")
    (tmp_path / "runs/shapes-e3va-3/run.json").unlink()  # cut off
    assert e3va(*arguments, "--resume").stdout.endswith("run: runs/shapes-e3va-3\n")
    assert e3va(*arguments, "--overwrite").stdout.endswith("run: runs/shapes-e3va-3\n")
    assert len(list((tmp_path / "runs").iterdir())) == 3


def test_a_change_named_on_the_command_line_is_made(scenes, tmp_path):
    arguments = ("train", "voc", "--recipe", "shapes", "--root", scenes, "--out", tmp_path / "run", "--json")
    assert e3va(*arguments, *settings(epochs=None, steps=2)).exit_code == 0
    (tmp_path / "run/run.json").unlink()
    again = e3va(*arguments, *settings(epochs=None, steps=3, lr=1e-5), "--resume")
    result = json.loads(again.stdout)
    assert not result["bit_exact"] and result["changes"] == [{"after_step": 2, "steps": [2, 3], "lr": [0.002, 1e-5]}]


@pytest.mark.parametrize("device", ["mps", "xpu", "meta", "cuda:99", "gpu9"])
def test_a_device_that_is_not_there_is_one_sentence(device, run):
    error = str(e3va("eval", run[0], "--device", device).exception)
    assert f"--device {device}" in error and error.count("\n") == 0


@pytest.mark.parametrize(
    "command",
    [
        "memory --recipe shapes --methods fixed --dry-run --size 64x64 --figure {}.png",
        "memory --recipe shapes --methods fixed --dry-run --size 64x64 --figure {}.what",
        "gradpath --figures {}",
        "tables --table 4 --figures {}",
        "compare --out {} --data {}",
        "reproduce --out {} --data {}",
        "data shapes {}",
        "pretrain --out {} --generated",
    ],
)
def test_places_that_cannot_be_written_are_one_sentence_before_anything_is_computed(command, tmp_path):
    (tmp_path / "file").touch()
    words = command.format(tmp_path / "file/place", tmp_path / "file/place").split()
    result = e3va(*words)
    assert isinstance(result.exception, InputError) or result.exit_code == 2
    assert str(tmp_path / "file") in str(result.exception) + result.stderr


def test_names_that_the_terminal_cannot_show_do_not_stop_a_command(tmp_path):
    code = "import sys, e3va_lite.cli as c; sys.argv = ['e3va', 'eval', '星']; c.main()"
    environment = os.environ | {"PYTHONIOENCODING": "cp1252"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 2 and "'?' is not a run" in done.stderr


# Bad input


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("shape", {}, "unknown recipe 'shape': did you mean shapes"),
        ("no/such.yaml", {}, "no recipe file 'no/such.yaml'"),
        ("shapes", {"epoch": 3}, "unknown field of a recipe for voc 'epoch': did you mean epochs"),
        ("shapes", {"epochs": "many"}, "epochs='many' must be of type int"),
        ("shapes", {"epochs": 0}, "epochs=0 cannot work"),
        ("shapes", {"lr": "-1e-3"}, "lr=-1e-3 cannot work"),
        ("shapes", {"schedule": "cosin"}, "unknown schedule 'cosin': did you mean cosine"),
        ("shapes", {"precision": "float8"}, "unknown precision 'float8': did you mean"),
        ("shapes", {"steps": 3, "epochs": 3}, "epochs=3 and steps=3: give exactly one"),
        ("shapes", {"milestones": "[1, two]"}, "milestones='two' must be of type int"),
        ("shapes", {"crop": 512}, "unknown field of a recipe for voc 'crop'"),
        ("shapes", {"task": "vok"}, "unknown task of a recipe 'vok': did you mean voc"),
        ("shapes", {"betas": "[0.9]"}, "betas=.* two numbers"),
        ("shapes", {"betas": "[0.9, 1.5]"}, "betas=.* two numbers"),
        ("shapes", {"stages": "2"}, "stages=2 must be of type list"),
        ("shapes", {"lr": "nan"}, "lr=nan cannot work"),
        ("shapes", {"batch": True}, "batch=True must be of type int"),
        ("shapes", {"workers": -1}, "workers=-1 cannot work: choose 0 or more"),
        ("shapes", {"classes": "[no, yes]"}, "classes=False must be of type str; put quotes around it"),
    ],
)
def test_recipes_are_checked(name, overrides, message):
    with pytest.raises(InputError, match=message):
        load_recipe(name, overrides)


def test_numbers_may_look_as_yaml_reads_them():
    assert load_recipe("shapes", {"lr": "1e-3", "clip": "null", "epochs": "7"}).lr == 1e-3


@pytest.mark.parametrize("text", ["{split}annot", "{split}", "2012", "yes", "a #b", "a: b", "[x"])
def test_a_field_of_text_takes_the_text_as_it_stands(text):
    recipe = load_recipe("ade20k-nano", {"masks": text, "listing": text, "images": f"'{text}'"})
    assert (recipe.masks, recipe.listing, recipe.images) == (text, text, text)
    assert load_recipe("ade20k-nano", {"listing": "null"}).listing is None


def test_a_recipe_is_validated_however_it_is_made_and_cannot_be_changed():
    recipe = small()
    assert replace(recipe, batch=7).batch == 7 and pickle.loads(pickle.dumps(recipe)) == recipe
    for wrong in ({"batch": 0}, {"bach": 2}, {"lr": "high"}):
        with pytest.raises((ValidationError, TypeError)):
            replace(recipe, **wrong)
    with pytest.raises(FrozenInstanceError):
        recipe.batch = 7


def test_recipes_are_read_and_written_as_utf8_and_whole(tmp_path):
    recipe = small(classes=["Hütte", "星"])
    save_recipe(recipe, tmp_path / "recipe.yaml")
    assert "星" in (tmp_path / "recipe.yaml").read_text(encoding="utf-8")
    assert load_recipe(str(tmp_path / "recipe.yaml")) == recipe


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "options={rank: 0}"], "rank=0"),
        (["--method", "e3v"], "unknown method 'e3v': did you mean e3va"),
        (["--backbone", "swin_nana"], "unknown backbone 'swin_nana': did you mean swin_nano"),
        (["--set", "classes=[starr]"], "starr"),
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
    assert not out and err == "error: unknown backbone 'swin_nana': did you mean swin_nano or swin_nano_deep?\n"


def test_a_loss_that_is_not_finite_stops_with_the_images(scenes):
    with pytest.raises(InputError, match=r"the (loss|gradient) is \S.* at step \d+ \(images .*\d{6}.jpg.*\): lower lr"):
        fit(build_model(small(), 6), data(scenes), small(lr=1e30, epochs=20, clip=None), CPU)


def test_a_gradient_that_is_not_finite_changes_nothing(scenes):
    training = Training(build_model(small(), 6), data(scenes), small(), CPU)
    batch = next(training.batches())
    training.backward([batch])
    next(p for p in training.model.parameters() if p.grad is not None).grad[0] = torch.nan
    before = {name: tensor.clone() for name, tensor in training.model.state_dict().items()}
    with pytest.raises(InputError, match=r"gradient is not finite at step 1 \(images"):
        training.update([batch])
    assert all(torch.equal(tensor, before[name]) for name, tensor in training.model.state_dict().items())


def test_the_batch_whose_loss_is_not_finite_is_named_and_changes_nothing(scenes):
    training = Training(build_model(small(), 6), data(scenes), small(accumulate=2, batch=1, precision="float16"), CPU)
    batches = [next(training.batches()) for _ in range(2)]
    batches[1][1][0]["file"] = "the bad one.jpg"
    batches[1][0][0][:] = torch.nan
    before = {name: p.detach().clone() for name, p in training.model.named_parameters()}
    losses = training.backward(batches)  # which does not look at them: on CUDA it would wait for each
    assert not all(loss.isfinite() for loss in losses.values())
    with pytest.raises(InputError, match=r"the loss is nan at step 1 \(images the bad one.jpg\): lower lr"):
        training.update(batches)
    assert not training.between_steps
    assert all(torch.equal(p, before[name]) for name, p in training.model.named_parameters())


@pytest.mark.parametrize("missing", ["last.safetensors", "recipe.yaml"])
def test_eval_wants_a_finished_run(missing, run, tmp_path):
    broken = shutil.copytree(run[0], tmp_path / "run")
    (broken / missing).unlink()
    assert f"has no {missing}" in str(e3va("eval", broken).exception)


def test_eval_refuses_damage(run, tmp_path):
    broken = shutil.copytree(run[0], tmp_path / "run")
    (broken / "last.safetensors").write_bytes((broken / "last.safetensors").read_bytes()[:1000])
    assert "it is damaged" in str(e3va("eval", broken).exception)


@pytest.mark.slow
def test_a_few_images_can_be_learnt_by_heart(tmp_path):
    """Detector, loss, loop and metric together: what training shows it must find again."""
    write_scenes(tmp_path, "voc", train=6, val=1, seed=0, size=160)
    for method in ("e3va", "full"):
        recipe = load_recipe("shapes", {"method": method, "epochs": 100, "batch": 6})
        model = build_model(recipe, 6)
        fit(model, voc.dataset(recipe, tmp_path, "train", train=True), recipe, CPU)
        assert evaluate(model, voc.dataset(recipe, tmp_path, "train"), recipe, CPU)["ap50_all_point"] > 0.9, method
