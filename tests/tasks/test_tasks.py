"""What the tasks share: records that keep nothing open, limits of detections, COCO's layout for boxes alone."""

import json
import os
import resource
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from e3va_lite.datasets.shapes import CLASSES, COCO_IDS, write_scenes
from e3va_lite.recipes.schema import COCOBoxesRecipe, load_recipe
from e3va_lite.tasks import coco, coco_boxes, voc
from e3va_lite.tasks.registry import Known, task_module
from e3va_lite.training.engine import build_model, evaluate, fit
from e3va_lite.training.sampling import loader

CPU = torch.device("cpu")
SMALL = {"pretrained": False, "steps": 2, "batch": 2, "min_size": 64, "max_size": 64, "fpn_channels": 16, "workers": 0}


class Targets(torch.utils.data.Dataset):
    """Many small images with targets as VOC's."""

    def __len__(self):
        return 120

    def __getitem__(self, index):
        boxes = torch.tensor([[0.0, 0, 10, 10]])
        target = {"boxes": boxes, "labels": torch.tensor([1]), "difficult": torch.tensor([False])}
        return torch.zeros(3, 32, 32), {**target, "image_id": str(index), "file": f"{index}.jpg"}


def test_records_of_many_images_from_a_worker_process_keep_no_file_open():
    """A tensor from a worker is one open file as long as anybody holds it: 3 of 120 images would be 360."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 100, hard))
    try:
        records = []
        for _, (target,) in loader(Targets(), [[(0, i)] for i in range(120)], seed=0, workers=1):
            prediction = {"boxes": target["boxes"], "scores": torch.tensor([0.9]), "labels": target["labels"]}
            records.append(voc.record(prediction, target))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len(records) == 120 and all(type(x) is np.ndarray for r in records for part in r for x in part.values())
    data = type("Data", (), {"classes": ["cat"]})
    assert voc.summary(records, data)["ap50_11_point"] == 1


def test_a_record_does_not_change_with_its_target():
    _, target = Targets()[0]
    prediction = {"boxes": target["boxes"].clone(), "scores": torch.tensor([0.9]), "labels": target["labels"]}
    _, truth = voc.record(prediction, target)
    target["boxes"].zero_()
    assert truth["boxes"].max() == 10


# Detections per image ------------------------------------------------------------------------------------------------


RECIPES = {"voc": "shapes", "coco": "coco-nano", "coco-boxes": "coco-boxes-nano"}


@pytest.mark.parametrize("task", RECIPES)
def test_detections_per_image_are_a_setting(task):
    settings = {key: value for key, value in SMALL.items() if key != "steps"}
    if task == "coco":
        settings["min_sizes"] = [64]
    assert load_recipe(RECIPES[task], task=task).detections == 100
    for most in (100, 130):
        loaded = load_recipe(RECIPES[task], {**settings, "detections": most}, task)
        model = build_model(loaded, 3).eval()
        if task != "coco":  # as if every place had an object
            torch.nn.init.zeros_(model.head.classification_head.cls_logits.bias)
        with torch.inference_mode():
            (found,) = model([torch.rand(3, 64, 64)])
        assert len(found["scores"]) == most and (found["scores"].diff() <= 0).all()


@pytest.mark.parametrize("task", RECIPES)
def test_the_check_says_where_there_are_more_objects_than_detections(tmp_path, task):
    root = tmp_path / "data"
    write_scenes(root, task.partition("-")[0], train=3, val=1, seed=0, size=96)
    module, recipe = task_module(task), load_recipe(RECIPES[task])
    data = module.dataset(recipe, root, recipe.train_split)
    targets = [data[i][1] for i in range(3)]
    counts = {Path(target["file"]).name: len(target["boxes"]) for target in targets}
    for limit in (min(counts.values()), max(counts.values())):
        problems = module.check(load_recipe(RECIPES[task], {"detections": limit}), root, recipe.train_split)
        found = [problem for problem in problems if "more objects than the" in problem.kind]
        wanted = {f"{file} ({n}: set detections={n} or more)" for file, n in counts.items() if n > limit}
        assert {Path(problem.where).name for problem in found} == wanted
        assert not any(problem.fatal for problem in found)
    assert min(counts.values()) < max(counts.values())


def test_cocos_metric_looks_at_all_that_the_detector_may_return(tmp_path):
    """130 objects, all found: with the best hundred alone the recall would end at 100/130."""
    annotations = [
        {"id": n + 1, "image_id": 1, "category_id": 1, "bbox": [x, y, 6, 6], "area": 36, "iscrowd": 0,
         "segmentation": [[x, y, x + 6, y, x + 6, y + 6, x, y + 6]]}
        for n, (x, y) in enumerate((8 * (n % 12), 8 * (n // 12)) for n in range(130))
    ]  # fmt: skip
    content = {
        "images": [{"id": 1, "file_name": "a.png", "width": 96, "height": 96}],
        "categories": [{"id": 1, "name": "dot"}],
        "annotations": annotations,
    }
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations/instances_val.json").write_text(json.dumps(content), encoding="utf-8")
    (tmp_path / "val").mkdir()
    (tmp_path / "val/a.png").touch()
    data = coco_boxes.dataset(COCOBoxesRecipe(task="coco-boxes", steps=1), tmp_path, "val")
    corners = [[x, y, x + w, y + h] for x, y, w, h in (a["bbox"] for a in annotations)]

    def ap(most):
        boxes = torch.tensor(corners[:most])
        prediction = {"boxes": boxes, "scores": torch.linspace(1, 0.5, most), "labels": torch.ones(most, dtype=int)}
        return coco_boxes.summary([coco.record(prediction, {"image_id": 1})], data)

    assert ap(130)["box_ap"] == ap(130)["by_class"]["dot"] == ap(130)["box_ap50"] == 1
    assert ap(100)["box_ap"] == pytest.approx(77 / 101, abs=1e-4)  # recalls 0, .01, ..., .76 of COCO's 101


# Boxes in COCO's layout ----------------------------------------------------------------------------------------------


def test_retinanet_trains_and_is_evaluated_on_cocos_layout(tmp_path):
    write_scenes(tmp_path, "coco", train=4, val=2, seed=0, size=64)
    recipe = load_recipe("coco-boxes-nano", {**SMALL, "steps": 60, "lr": 5e-3, "pretrained": True}, "coco-boxes")
    train = coco_boxes.dataset(recipe, tmp_path, "train2017", train=True)
    assert "masks" not in train[0][1] and train.category_ids == list(COCO_IDS)
    model = build_model(recipe, len(CLASSES))
    losses = fit(model, train, recipe, CPU)
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    metrics = evaluate(model, coco_boxes.dataset(recipe, tmp_path, "train2017", train.classes), recipe, CPU)
    assert metrics["box_ap"] > 0 and set(metrics["by_class"]) == set(CLASSES)
    assert not any(name.startswith("mask") for name in metrics)


def test_boxes_of_the_truth_have_ap_1(tmp_path):
    write_scenes(tmp_path, "coco", train=1, val=4, seed=3, size=96)
    data = coco_boxes.dataset(load_recipe("coco-boxes"), tmp_path, "val2017")
    targets = [data[i][1] for i in range(4)]
    records = [coco_boxes.record({**t, "scores": torch.ones(len(t["labels"]))}, t) for t in targets]
    assert coco_boxes.summary(records, data)["box_ap"] == 1


# What annotation files say of images ---------------------------------------------------------------------------------


def test_ids_of_the_runs_own_images_and_of_a_file(tmp_path):
    root = tmp_path / "data"
    write_scenes(root, "coco", train=2, val=2, seed=0, size=64)
    for split in ("train2017", "val2017"):  # names that say nothing
        file = root / f"annotations/instances_{split}.json"
        content = json.loads(file.read_text())
        for image in content["images"]:
            name = f"deep/{split}-{image['id']}.png"
            (root / split / "deep").mkdir(exist_ok=True)
            shutil.move(root / split / image["file_name"], root / split / name)
            image["file_name"] = name
        file.write_text(json.dumps(content))
    recipe = load_recipe("coco-nano")
    paths = sorted(root.glob("*2017/deep/*"))
    other = tmp_path / paths[0].name
    shutil.copy(paths[0], other)
    known = coco.known_images(recipe, root, [*paths, other])
    assert known == {p: Known(int(p.stem.rpartition("-")[2]), (64, 64)) for p in paths}  # a copy elsewhere is not known
    assert coco.known_images(recipe, None, paths) == {}
    val = root / "annotations/instances_val2017.json"
    mine = [p for p in paths if "val2017" in str(p)]
    assert coco.known_images(recipe, None, mine, val) == {p: known[p] for p in mine}
    moved = [shutil.copy(p, tmp_path / p.name) for p in mine]
    assert list(coco.known_images(recipe, None, moved, val).values()) == [known[p] for p in mine]
    with pytest.raises(ValueError, match=r"no entry for 2 of 4 images.*--annotations"):
        coco.known_images(recipe, None, paths, val)
    assert coco.category_ids(val, [*CLASSES[:2], "new"]) == [*COCO_IDS[:2], max(COCO_IDS) + 1]
    for text in ("[]", "{", '{"images": []}', '{"images": [{"id": 1}], "categories": []}'):
        val.write_text(text)
        with pytest.raises(ValueError, match=r"instances_val2017\.json"):
            coco.known_images(recipe, None, mine, val)
