"""A training may start from an earlier one: what fits is taken, and what does not is said."""

import json

import pytest
import torch

from e3va_lite import InputError
from e3va_lite.datasets.shapes import write_scenes
from e3va_lite.recipes.schema import load_recipe
from e3va_lite.training import checkpoint, runs, trained_model
from e3va_lite.training.engine import build_model
from e3va_lite.training.export import export

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = {"min_size": 64, "max_size": 64, "fpn_channels": 16, "batch": 2, "steps": 2, "warmup": 0}
CLASSIFIER = "head.classification_head.cls_logits"


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    root = tmp_path_factory.mktemp("scenes") / "voc"
    write_scenes(root, "voc", train=4, val=2, seed=0, size=64)
    return root


def small(**changes):
    return load_recipe("shapes", SMALL | changes)


@pytest.fixture(scope="module")
def earlier(one_thread, scenes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "earlier"
    runs.train(scenes, small(), folder, CPU)
    return folder


@pytest.mark.parametrize("exported", [False, True])
def test_other_classes_take_everything_but_the_classifier(exported, earlier, scenes, tmp_path):
    source = earlier
    if exported:
        source = tmp_path / "model.safetensors"
        export(earlier, source)
    names = ["star", "crescent", "arrow"]
    model = build_model(small(), len(names))
    new = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = trained_model.start_from(model, source, names)
    before = checkpoint.without_optimizer(checkpoint.read(earlier / trained_model.LAST)[0])
    classifier = {f"{CLASSIFIER}.weight", f"{CLASSIFIER}.bias"}
    assert found["not_taken"].keys() == classifier and found["new"] == []
    assert found["taken"] == len(before) - 2
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name] if name in before and name not in classifier else new[name]), name
    assert any(not torch.equal(new[name], before[name]) for name in before if name.startswith("backbone.body."))


def test_the_same_model_starts_where_the_earlier_one_ended(earlier, scenes, tmp_path, capsys):
    again = runs.train(scenes, small(steps=1, lr=1e-30), tmp_path / "run", CPU, init=earlier)
    assert again["init"]["from"] == str(earlier) and not again["init"]["not_taken"] and not again["init"]["new"]
    a, b = (trained_model.open_run(folder).model.state_dict() for folder in (earlier, tmp_path / "run"))
    assert all(torch.allclose(a[name], b[name], atol=1e-20, rtol=0) for name in a)
    assert f"started from '{earlier}': {again['init']['taken']} tensors taken" in capsys.readouterr().err


def test_another_method_lists_what_it_could_not_take(earlier, scenes, tmp_path, capsys):
    result = runs.train(scenes, small(method="fixed", steps=1), tmp_path / "run", CPU, init=earlier)
    error = capsys.readouterr().err
    adapters = [name for name in result["init"]["not_taken"] if ".adapters." in name]
    assert adapters and all(f"not taken: {name}, " in error for name in adapters)
    assert json.loads((tmp_path / "run" / runs.RESULT).read_text())["init"] == result["init"]


def test_a_resumed_run_does_not_start_again(earlier, scenes, tmp_path):
    runs.train(scenes, small(steps=1), tmp_path / "run", CPU, init=earlier)
    (tmp_path / "run" / runs.RESULT).unlink()
    result = runs.train(scenes, small(), tmp_path / "run", CPU, resume=True, init=earlier, changes=["steps"])
    assert result["steps"] == 2 and result["init"]["from"] == str(earlier)
    first = trained_model.open_run(tmp_path / "run").step
    assert first == 2


def test_what_cannot_be_a_start_is_one_sentence(earlier, scenes, tmp_path):
    for source, recipe, message in (
        (tmp_path, small(), "is not a run with a checkpoint"),
        (tmp_path / "none", small(), "there is no"),
        (earlier, small(pretrained=False), "other pretrained weights"),
    ):
        with pytest.raises(InputError, match=message):
            runs.train(scenes, recipe, tmp_path / "run", CPU, init=source)
        assert not (tmp_path / "run").exists()
