import json
import shutil

import pytest
from click.testing import CliRunner
from PIL import Image

from e3va_lite import InputError, cli
from e3va_lite.datasets.shapes import write_scenes
from e3va_lite.experiments import compare
from tests.training.test_engine import SMALL

METHODS = ("fixed", "fixed:fpn_norm=trainable", "e3va", "full")


def run(*arguments):
    return CliRunner().invoke(cli.cli, ["compare", *map(str, arguments)])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The main job in miniature, two seeds."""
    folder = tmp_path_factory.mktemp("compare")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"TRAIN_IMAGES": 6, "VAL_IMAGES": 4, "ROUNDS": 2}.items():
            patch.setattr(compare, name, value)
        words = [w for key, value in SMALL.items() for w in ("--set", f"{key}={json.dumps(value)}")]
        words += [w for method in METHODS for w in ("--method", method)]
        result = run(*words, "--seeds", 2, "--data", folder / "data", "--out", folder / "table", "--json")
    assert result.exit_code == 0, result.exception
    return folder, result


def test_the_document_is_alone_on_standard_output_and_kept(finished):
    folder, result = finished
    document = json.loads(result.stdout)
    assert json.loads((folder / "table.json").read_text()) == document
    assert [row["method"] for row in document["rows"]] == list(METHODS)
    for key in ("device", "precision", "versions", "date", "recipe", "task"):
        assert document[key]


def test_costs_and_shares(finished):
    rows = {row["method"]: row for row in json.loads(finished[1].stdout)["rows"]}
    assert rows["fixed"]["trainable"] == 0 and rows["fixed:fpn_norm=trainable"]["trainable"] == 2 * (80 + 160 + 320)
    assert rows["fixed"]["peak_bytes"] < rows["e3va"]["peak_bytes"] < rows["full"]["peak_bytes"]
    for row in rows.values():
        assert row["peak_bytes_of_full"] == pytest.approx(row["peak_bytes"] / rows["full"]["peak_bytes"], abs=1e-4)
        assert len(row["ap50_by_seed"]) == 2 and len(row["step_seconds_by_round"]) == 2
    assert rows["full"]["step_seconds_of_full"] == 1


def test_a_comparison_that_was_cut_off_goes_on(tmp_path, monkeypatch):
    for name, value in {"TRAIN_IMAGES": 4, "VAL_IMAGES": 2, "ROUNDS": 1}.items():
        monkeypatch.setattr(compare, name, value)
    words = [w for key, value in SMALL.items() for w in ("--set", f"{key}={json.dumps(value)}")]
    words += ["--method", "fixed", "--method", "e3va", "--data", tmp_path / "data"]
    whole = run(*words, "--seeds", 2, "--out", tmp_path / "whole", "--json")
    assert not (tmp_path / "whole.partial").exists()
    trained, fit = [], compare.fit

    def cut(model, dataset, recipe, device):
        if len(trained) == 3:
            raise KeyboardInterrupt
        trained.append((recipe.method, recipe.seed))
        fit(model, dataset, recipe, device)

    monkeypatch.setattr(compare, "fit", cut)
    assert run(*words, "--seeds", 2, "--out", tmp_path / "cut").exit_code != 0
    with (tmp_path / "cut.partial").open("a") as file:
        file.write('\n{"recipe": ')  # the power went off while this line was written
    shutil.copy(tmp_path / "cut.partial", tmp_path / "other.partial")
    trained.clear()
    resumed = run(*words, "--seeds", 2, "--out", tmp_path / "cut", "--json")
    assert trained == [("e3va", 1)]
    rows, same = (json.loads(result.stdout)["rows"] for result in (whole, resumed))
    assert [row["ap50_by_seed"] for row in rows] == [row["ap50_by_seed"] for row in same]
    trained.clear()
    run(*words, "--set", "clip=0.5", "--out", tmp_path / "other")
    assert trained == [("fixed", 0), ("e3va", 0)]  # runs of another recipe are not taken for these


def test_real_images_are_compared_the_same_way(tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "ROUNDS", 1)
    root = tmp_path / "mine"
    write_scenes(root, "voc", 4, 2, seed=3, size=64)
    words = [w for key, value in SMALL.items() for w in ("--set", f"{key}={json.dumps(value)}")]
    words += ["--method", "fixed", "--set", "eval_split=val", "--root", root]
    result = run(*words, "--out", tmp_path / "table", "--json")
    assert result.exit_code == 0, result.exception
    document = json.loads(result.stdout)
    assert document["task"].startswith("mine: 4 images for training, 2 to evaluate")
    assert document["recipe"]["classes"] is None  # the recipe for real images, not the one for the scenes
    assert str(tmp_path) not in result.stdout


def test_differences_are_paired_by_seed():
    ap = {"a": [0.30, 0.40, 0.35], "b": [0.20, 0.31, 0.24]}
    difference = compare._difference(ap, "a", "b")
    # by hand: differences .10 .09 .11, mean .10, deviation .01, t(2) = 4.303, half width .0248
    assert difference["mean"] == pytest.approx(0.10) and difference["interval95"] == pytest.approx([0.0752, 0.1248])


def test_other_methods_say_how_large_the_noise_is():
    # every mean of a method and of a seed is 2, so what is left has squares of 6 in all and 4 degrees of freedom: the
    # variance of a difference is 2 * 6 / 4, that of the mean of three is 1, and t(4) = 2.7764
    difference = compare._difference({"a": [1, 2, 3], "b": [2, 3, 1], "c": [3, 1, 2]}, "a", "b")
    assert difference["mean"] == 0 and difference["interval95"] == pytest.approx([-2.7764, 2.7764])


def test_the_figure_is_a_picture(finished):
    with Image.open(finished[0] / "table.png") as image:
        assert min(image.size) > 300 and len(image.convert("L").getcolors()) > 20


def test_the_text_names_every_method_and_share(finished):
    text = compare.as_text(json.loads(finished[1].stdout))
    lines = text.splitlines()
    assert [line.split()[0] for line in lines[2:6]] == list(METHODS)
    assert "(100%)" in lines[5] and "95% interval" in text


def test_nothing_is_overwritten_unasked(finished):
    folder, _ = finished
    before = (folder / "table.json").read_bytes()
    result = run("--out", folder / "table")
    assert isinstance(result.exception, InputError) and "--overwrite" in str(result.exception)
    assert (folder / "table.json").read_bytes() == before


@pytest.mark.parametrize("method", ["e3vaa", "e3va:rank", "e3va:rnk=3"])
def test_a_wrong_method_is_known_before_any_work(method, tmp_path):
    result = run("--method", method, "--data", tmp_path / "data", "--out", tmp_path / "table")
    assert isinstance(result.exception, InputError) and method.partition("=")[0].split(":")[-1] in str(result.exception)
    assert not list(tmp_path.iterdir())
