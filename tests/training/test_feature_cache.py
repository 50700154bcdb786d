"""Training on stored maps of a frozen backbone: the same as computing them at every step; refused where it is not."""

import unittest.mock

import pytest
import torch
from torch.utils.data import Subset

from e3va_lite import InputError
from e3va_lite.datasets.shapes import write_scenes
from e3va_lite.recipes.schema import load_recipe
from e3va_lite.tasks.registry import task_module
from e3va_lite.training import feature_cache, runs
from e3va_lite.training.engine import build_model, fit
from e3va_lite.training.feature_cache import cached

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("cache") / "voc"
    write_scenes(root, "voc", 6, 1, seed=0, size=72)  # not the canvas, so that something is padded
    return root


def recipe_for(method, options=None, **fields):
    fields = {"min_size": 72, "max_size": 72, "canvas": 96, "steps": 4, "batch": 3, "clip": None, **fields}
    return load_recipe("photos-detection", {"method": method, "options": options or {}, "head_lr": 1e-3} | fields)


def trained(recipe, root, folder=None):
    """The trained part of a model after a few steps, and the losses."""
    dataset = task_module(recipe.task).dataset(recipe, root, "train", train=True)
    model = build_model(recipe, len(dataset.classes))
    if folder is None:
        losses = fit(model, dataset, recipe, CPU)
    else:
        with cached(model, dataset, recipe, folder, CPU) as stored:
            losses = fit(model, stored, recipe, CPU)
    return losses, {name: p for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("method", "options", "fields"),
    [
        ("fixed", {}, {}),
        ("fixed", {"fpn_norm": "trainable"}, {}),
        ("e3va", {"rank": 2}, {}),
        ("e3va", {"rank": 2, "memory": "store", "reduction": "trainable", "fpn_input": "e+l"}, {"stages": [1, 3]}),
        ("e3va", {"rank": 2}, {"backbone": "vit_small_patch14_dinov2", "pretrained": False, "canvas": 84}),
        ("fixed", {}, {"precision": "bfloat16"}),
        ("e3va", {"rank": 2}, {"precision": "bfloat16"}),
        ("e3va", {"rank": 2}, {"precision": "float16"}),
    ],
    ids=["fixed", "norms", "e3va", "e3va-options", "vit", "fixed-bfloat16", "e3va-bfloat16", "e3va-float16"],
)
def test_a_cached_run_equals_an_uncached_one(method, options, fields, root, tmp_path):
    recipe = recipe_for(method, options, **fields)
    losses, parameters = trained(recipe, root)
    for folder in (tmp_path, tmp_path):  # written, and found
        again, same = trained(recipe, root, folder)
        assert again == losses
        assert parameters.keys() == same.keys() and all(torch.equal(p, same[name]) for name, p in parameters.items())


def test_an_evaluation_does_not_read_the_cache(root, tmp_path):
    recipe = recipe_for("e3va", {"rank": 2})
    dataset = task_module("voc").dataset(recipe, root, "train", train=True)
    model = build_model(recipe, len(dataset.classes))
    image = dataset.as_stored(0)[0]
    expected = model.eval()([image])[0]["scores"]
    with cached(model, dataset, recipe, tmp_path, CPU):
        assert torch.equal(model.eval()([image])[0]["scores"], expected)
    assert model.backbone.body.cache is None and not model._forward_pre_hooks


def test_other_settings_have_other_maps(root, tmp_path, capsys):
    for fields in ({}, {"canvas": 128}, {"precision": "bfloat16"}, {"pretrained": False}, {"method": "e3va"}, {}):
        recipe = recipe_for(**{"method": "fixed", **fields})
        dataset = task_module("voc").dataset(recipe, root, "train", train=True)
        with cached(build_model(recipe, len(dataset.classes)), dataset, recipe, tmp_path, CPU) as stored:
            assert len(stored) == 6
    assert len(list(tmp_path.iterdir())) == 4  # the method is no other setting: E3VA's taps lie beside the maps
    said = capsys.readouterr()
    assert (said.out + said.err).count("GB for 6 images") == 5


def test_a_part_of_the_images_reads_the_maps_of_all(root, tmp_path):
    recipe = recipe_for("fixed")
    dataset = task_module("voc").dataset(recipe, root, "train", train=True)
    model, indices = build_model(recipe, len(dataset.classes)), [1, 4, 5]
    expected = fit(build_model(recipe, len(dataset.classes)), Subset(dataset, indices), recipe, CPU)
    with cached(model, dataset, recipe, tmp_path, CPU) as stored:
        assert fit(model, Subset(stored, indices), recipe, CPU) == expected


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"method": "full"}, "not for full"),
        ({"method": "e3va", "options": {"memory": "recompute"}}, "memory=store or memory=compress"),
        ({"method": "e3va", "options": {"structure": "chained"}}, "parallel E3VA"),
        ({"method": "fixed", "canvas": None}, "set canvas=72"),
        ({"method": "fixed", "zoom": True}, "set zoom=false"),
    ],
)
def test_where_maps_change_no_cache(fields, message, root, tmp_path):
    recipe = recipe_for(**fields)
    dataset = task_module("voc").dataset(recipe, root, "train", train=True)
    model = build_model(recipe, len(dataset.classes))
    with pytest.raises(InputError, match=message), cached(model, dataset, recipe, tmp_path, CPU):
        pass
    assert not list(tmp_path.iterdir())


def test_images_of_random_sizes_and_disks_that_are_too_small(root, tmp_path, monkeypatch):
    segmenter = load_recipe("photos-segmentation", {"method": "fixed"})
    with pytest.raises(InputError, match="augmented at random sizes"), cached(None, None, segmenter, tmp_path, CPU):
        pass
    recipe = recipe_for("fixed")
    dataset = task_module("voc").dataset(recipe, root, "train", train=True)
    model = build_model(recipe, len(dataset.classes))
    monkeypatch.setattr(feature_cache.shutil, "disk_usage", lambda _: feature_cache.shutil._ntuple_diskusage(2, 1, 1))
    with pytest.raises(InputError, match="choose another disk"), cached(model, dataset, recipe, tmp_path, CPU):
        pass
    assert not list(tmp_path.rglob("*.npy"))


def test_a_run_with_a_cache_goes_on_where_it_was_cut_off(root, tmp_path):
    """The command's way, with an evaluation between two steps."""
    whole = recipe_for("e3va", {"rank": 2}, eval_split="val", train_split="train", eval_every=1, steps=2)
    options = {"root": root, "device": CPU, "cache": tmp_path / "maps"}
    plain = runs.train(recipe=whole, run=tmp_path / "plain", **{**options, "cache": None})
    cut = unittest.mock.patch.object(runs._Recorder, "_evaluate", side_effect=InputError("stop here"))
    with cut, pytest.raises(InputError, match="stop here"):
        runs.train(recipe=whole, run=tmp_path / "cut", **options)
    again = runs.train(recipe=whole, run=tmp_path / "cut", resume=True, **options)
    assert again["evaluations"] == plain["evaluations"] and len(again["evaluations"]) == 2
    assert (tmp_path / "cut/losses.csv").read_text() == (tmp_path / "plain/losses.csv").read_text()
