"""The commands of the three tasks one after another, as somebody uses them: check, train, eval, predict, export."""

import json

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from e3va_lite import InputError, cli, load_adapters
from e3va_lite.datasets.shapes import write_scenes
from e3va_lite.recipes.schema import load_recipe
from e3va_lite.training.engine import build_model

TINY = {"batch": 2, "steps": 2, "workers": 0}
BOXES = {"min_size": 64, "max_size": 64, "fpn_channels": 16}
TASKS = {
    "voc": ("shapes", BOXES, "JPEGImages", "ap50_11_point"),
    "coco": ("coco-nano", BOXES | {"min_sizes": [64], "head_channels": 32}, "val2017", "box_ap"),
    "ade20k": ("ade20k-nano", {"crop": 64, "scale": [64, 64], "head_channels": 16}, "images/validation", "miou"),
}


def e3va(*arguments):
    result = CliRunner().invoke(cli.cli, [str(a) for a in arguments])
    if result.exception and not isinstance(result.exception, SystemExit | InputError):
        raise result.exception
    return result


@pytest.fixture(scope="module", params=TASKS)
def trained(request, tmp_path_factory):
    """Task, data, settings and run folder of a training that went through the command line."""
    if request.param == "ade20k":
        pytest.importorskip("cv2", exc_type=ImportError)
    recipe, changes, *_ = TASKS[request.param]
    root = tmp_path_factory.mktemp(request.param) / "data"
    write_scenes(root, request.param, train=4, val=2, seed=0, size=64)
    settings = [word for k, v in (TINY | changes).items() for word in ("--set", f"{k}={json.dumps(v)}")]
    run = root.parent / "run"
    result = e3va("train", request.param, "--recipe", recipe, "--root", root, "--out", run, *settings)
    assert result.exit_code == 0, result.stderr
    assert f"{TASKS[request.param][3]} on" in result.stdout and result.stdout.endswith(f"run: {run}\n")
    return request.param, root, settings, run


def test_check_says_that_training_goes_through(trained):
    task, root, settings, _ = trained
    result = e3va("data", "check", TASKS[task][0], root, *settings)
    assert result.exit_code == 0 and result.stdout.endswith("training would go through.\n")


def test_check_fails_where_training_would(trained, tmp_path):
    task, root, settings, _ = trained
    victim = next(path for path in sorted(root.rglob("*.jpg")))
    whole = victim.read_bytes()
    victim.write_bytes(whole[: len(whole) // 2])
    try:
        result = e3va("data", "check", TASKS[task][0], root, *settings)
        assert result.exit_code == 1 and victim.name in result.stdout and "training would stop." in result.stdout
        stopped = e3va("train", task, "--recipe", TASKS[task][0], "--root", root, "--out", tmp_path / "run", *settings)
        assert isinstance(stopped.exception, InputError) and str(victim) in str(stopped.exception)
    finally:
        victim.write_bytes(whole)


def test_eval_repeats_the_result(trained):
    *_, run = trained
    result = e3va("eval", run, "--json")
    assert json.loads(result.stdout)["result"] == json.loads((run / "run.json").read_text())["result"]


def test_predict_and_export(trained, tmp_path):
    task, root, _, run = trained
    images = sorted((root / TASKS[task][2]).glob("*.jpg"))[-2:]
    exported = tmp_path / "model.safetensors"
    result = e3va("export", run, "--out", exported)
    assert result.exit_code == 0 and exported.stat().st_size < 3e6
    for source, out in ((run, tmp_path / "a"), (exported, tmp_path / "b")):
        result = e3va("predict", source, *images, "--out", out)
        assert result.exit_code == 0 and "2 images" in result.stdout
        assert {path.stem for path in images} <= {path.stem for path in out.glob("*.png")}
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file())
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in files)
    if task == "ade20k":
        with Image.open(tmp_path / f"a/masks/{images[0].stem}.png") as mask:
            assert set(np.unique(np.array(mask))) <= set(range(1, 8))  # 0 is void and never predicted


def test_adapters_alone(trained, tmp_path):
    _, _, _, run = trained
    path = tmp_path / "adapters.safetensors"
    assert e3va("export", run, "--out", path, "--backbone-only").exit_code == 0
    recipe = load_recipe(str(run / "recipe.yaml"))
    load_adapters(build_model(recipe, 2).backbone.body, path)


def test_resume_and_overwrite_exclude_each_other(trained):
    task, root, settings, run = trained
    result = e3va(
        "train", task, "--recipe", TASKS[task][0], "--root", root, "--out", run, "--resume", "--overwrite", *settings
    )
    assert "one of the two" in str(result.exception)


def test_a_recipe_of_another_task_is_refused():
    result = e3va("train", "voc", "--recipe", "coco-nano", "--root", "anywhere")
    assert "is for the task coco, not for voc" in str(result.exception)
