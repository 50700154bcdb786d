"""Values, names and layouts as other people's tools write them: taken for what they mean, or said by their name."""

import json
import os
import pickle
import resource
import struct
import warnings
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest
import torch
import torch.multiprocessing  # tells ForkingPickler how tensors travel
from click.testing import CliRunner
from PIL import Image

from e3va_lite.cli import cli
from e3va_lite.datasets.check import check_dataset
from e3va_lite.datasets.coco import COCOInstances
from e3va_lite.datasets.images import Limits, read_header, read_image
from e3va_lite.datasets.parsing import number, truth, whole
from e3va_lite.datasets.voc import Folders, VOCDetection
from e3va_lite.errors import InputError
from e3va_lite.recipes.schema import load_recipe
from e3va_lite.tasks.registry import task_module

WIDTH, HEIGHT = 64, 48


def picture(seed=0, width=WIDTH, height=HEIGHT):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def thing(name="cat", box=(11, 6, 30, 25), more=""):
    sides = "".join(f"<{s}>{v}</{s}>" for s, v in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True))
    return f"<object><name>{name}</name>{more}<bndbox>{sides}</bndbox></object>"


ONE = (thing(),)


def voc(root, train=ONE, val=ONE, size=(WIDTH, HEIGHT), suffix="jpg"):
    """A VOC folder whose splits have an image per element, each the XML of its objects."""
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    head = f"<size><width>{size[0]}</width><height>{size[1]}</height></size>"
    for offset, (split, images) in enumerate((("train", train), ("val", val))):
        names = [f"{split}{i}" for i in range(len(images))]
        (root / f"ImageSets/Main/{split}.txt").write_text("\n".join(names))
        for i, (name, objects) in enumerate(zip(names, images, strict=True)):
            (root / f"Annotations/{name}.xml").write_text(f"<annotation>{head}{objects}</annotation>")
            picture(100 * offset + i).save(root / f"JPEGImages/{name}.{suffix}")
    return root


def coco_thing(category=1, box=(10, 5, 20, 15), image=1, **more):
    x, y, w, h = box
    polygon = [x, y, x + w, y, x + w, y + h, x, y + h]
    return {"image_id": image, "category_id": category, "bbox": list(box), "area": w * h, "iscrowd": 0} | {
        "segmentation": [polygon], **more}  # fmt: skip


def coco(root, *objects, categories=((1, "cat"), (2, "dog")), **splits):
    """A COCO folder of one image per split; ``objects`` are those of both unless a split has its own."""
    (root / "annotations").mkdir(parents=True)
    for seed, split in enumerate(("train", "val")):
        (root / split).mkdir()
        picture(seed).save(root / split / "a.png")
        listed = splits.get(split, objects)
        content = {
            "images": [{"id": 1, "file_name": "a.png", "width": WIDTH, "height": HEIGHT}],
            "annotations": [{"id": i, **entry} for i, entry in enumerate(listed, start=1)],
            "categories": [c if isinstance(c, dict) else {"id": c[0], "name": c[1]} for c in categories],
        }
        (root / f"annotations/instances_{split}.json").write_text(json.dumps(content))
    return root


def masks(root, train, val=None, suffix=".png"):
    for seed, (split, values) in enumerate((("training", train), ("validation", train if val is None else val))):
        for folder in ("images", "annotations"):
            (root / folder / split).mkdir(parents=True)
        picture(seed).save(root / f"images/{split}/a.jpg")
        Image.fromarray(values).save(root / f"annotations/{split}/a{suffix}")
    return root


def halves(left, right):
    values = np.full((HEIGHT, WIDTH, *np.shape(left)), left, np.uint8)
    values[:, WIDTH // 2 :] = right
    return values


def recipe(task, **changes):
    splits = {} if task == "ade20k" else {"train_split": "train", "eval_split": "val"}
    return load_recipe(f"{task}-nano", splits | changes, task)


def kinds(recipe, root, fatal=None):
    found = check_dataset(recipe, root, task_module(recipe.task).check)
    return [p.kind for problems in found.values() for p in problems if fatal in (None, p.fatal)]


def trained(recipe, root):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return task_module(recipe.task).dataset(recipe, root, recipe.train_split, recipe.classes, train=True)


# Flags and numbers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [True, 1, 1.0, "1", " TRUE ", "yes", "1.0", "Y"])
def test_true(value):
    assert truth(value) is True


@pytest.mark.parametrize("value", [False, 0, 0.0, "0", "FALSE", "no", "0.0", "n"])
def test_false(value):
    assert truth(value) is False


@pytest.mark.parametrize("value", [None, "", "Unspecified", 2, -1, "2", "maybe", float("nan"), [], "1_0"])
def test_neither(value):
    assert truth(value) is None


def test_numbers():
    assert [whole(v) for v in (3, 3.0, "3", " 3.0 ", 3.5, "x", True, None, "1_0", 10**400)] == [3] * 4 + [None] * 6
    assert number("96.5") == 96.5 and number("nan") is number("inf") is number([]) is None


FLAGS = [("Unspecified", False, 1), ("no", False, 0), ("FALSE", False, 0), ("0.0", False, 0), ("", False, 0),
         ("1", True, 0), ("yes", True, 0), ("2", False, 1), ("-1", False, 1)]  # fmt: skip


@pytest.mark.parametrize("text, difficult, said", FLAGS)
def test_difficult(tmp_path, text, difficult, said):
    root = voc(tmp_path, [thing(more=f"<difficult>{text}</difficult>") + thing("dog")])
    with warnings.catch_warnings():
        warnings.simplefilter("error" if not said else "ignore")
        assert VOCDetection(root, "train").target(0)["difficult"].tolist() == [difficult, False]
    assert sum("'difficult' is neither" in kind for kind in kinds(recipe("voc"), root)) == said
    assert len(trained(recipe("voc"), root)[0][1]["labels"]) == 2 - difficult


CROWDS = [("0", False, 0), ("false", False, 0), (1.0, True, 0), ("1", True, 0), (True, True, 0), (2, False, 2),
          (-1, False, 2)]  # fmt: skip


@pytest.mark.parametrize("flag, crowd, said", CROWDS)
def test_iscrowd(tmp_path, flag, crowd, said):
    root = coco(tmp_path, coco_thing(iscrowd=flag), coco_thing(2, (30, 20, 20, 20)))
    assert sum("'iscrowd' is neither" in kind for kind in kinds(recipe("coco"), root)) == said
    data = trained(recipe("coco", crop=False), root)
    assert len(data[0][1]["labels"]) == 2 - crowd
    assert data.ground_truth()["annotations"][0]["iscrowd"] == crowd


@pytest.mark.parametrize("size", [("64.0", "48.0"), (-1, -1), (0, 0), ("", ""), ("unknown", 48)])
def test_sizes_of_voc_that_are_right_or_unknown(tmp_path, size):
    root = voc(tmp_path, size=size)
    assert len(VOCDetection(root, "train", strict=True)) == 1 and not kinds(recipe("voc", classes=["cat"]), root)


def test_numbers_as_text_in_coco(tmp_path):
    root = coco(
        tmp_path,
        {**coco_thing(category="1", image="1"), "bbox": ["10", "5", "20.0", 15], "area": "300"},
        coco_thing(2.0, segmentation=[["10", "5", "30", "5", "30", "20", "10", "20"]]),
        categories=(("1", "cat"), (2.0, "dog")),
    )
    _, target = COCOInstances(root, "train")[0]
    assert target["boxes"].tolist() == [[10, 5, 30, 20]] * 2 and target["labels"].tolist() == [1, 2]
    assert target["masks"].sum((1, 2)).tolist() == [300, 300]


# What a training set teaches -----------------------------------------------------------------------------------------

NOTHING = {
    "all difficult": lambda r: ("voc", voc(r, [thing(more="<difficult>1</difficult>")])),
    "coordinates in 0..1": lambda r: ("voc", voc(r, [thing(box=(0.1, 0.2, 0.5, 0.9))])),
    "all crowds": lambda r: ("coco", coco(r, coco_thing(iscrowd=1))),
    "no masks": lambda r: ("coco", coco(r, coco_thing(segmentation=[]))),
    "relative boxes": lambda r: ("coco", coco(r, coco_thing(box=(0.1, 0.2, 0.5, 0.6)))),
    "void": lambda r: ("ade20k", masks(r, halves(0, 255))),
}


@pytest.mark.parametrize("case", NOTHING)
def test_nothing_to_train_on_stops(tmp_path, case):
    task, root = NOTHING[case](tmp_path)
    chosen = recipe(task, classes=["cat", "dog"])
    assert kinds(chosen, root, fatal=True) == ["training splits that teach nothing"]
    with pytest.raises(InputError, match=r"there is nothing to train on in .*: (.* left out|no masks)"):
        trained(chosen, root)


def test_reasons_are_given(tmp_path):
    objects = thing() + thing("dog", more="<difficult>1</difficult>") + thing("elk")
    with pytest.warns(UserWarning, match=r"learn from: 1 \(dog \(difficult 1\)\)"):
        VOCDetection(voc(tmp_path / "v", [objects]), "train", train=True)
    group = ({"id": 0, "name": "pets", "supercategory": "none"}, {"id": 1, "name": "cat", "supercategory": "pets"})
    with pytest.warns(UserWarning, match=r"learn from: 1 \(pets \(a group of other classes"):
        task_module("coco").dataset(
            recipe("coco"), coco(tmp_path / "c", coco_thing(), categories=group), "train", train=True
        )
    with pytest.warns(UserWarning, match=r"learn from: 1 \(fg\)"):
        plain = recipe("ade20k", classes=["bg", "fg"], ignore=255)
        task_module("ade20k").dataset(plain, masks(tmp_path / "m", halves(0, 255)), "training", plain.classes, True)


def test_forgotten_classes_of_masks_are_said(tmp_path):
    root = masks(tmp_path, halves(1, 2))
    with pytest.warns(UserWarning, match="ADE20K's own, since neither the recipe nor the folder names any: give class"):
        task_module("ade20k").dataset(recipe("ade20k"), root, "training", train=True)
    found = check_dataset(recipe("ade20k"), root, task_module("ade20k").check)
    assert any("ADE20K's own" in line for line in found["training"].contents.summary())


SUSPICIOUS = {
    "corners": ((15, 15, 35, 35), [15, 15, 35, 15, 35, 35, 15, 35], "only as x1, y1, x2, y2"),
    "exchanged": ((30, 5, 20, 10), [5, 30, 15, 30, 15, 46, 5, 46], "with x and y exchanged"),
    "apart": ((1, 1, 9, 9), [40, 30, 60, 30, 60, 40, 40, 40], "far from their masks"),
    "negative": ((30, 20, -20, -15), [10, 5, 30, 5, 30, 20, 10, 20], "exchanged corners, swapped"),
}


@pytest.mark.parametrize("case", SUSPICIOUS)
def test_suspicious_boxes_of_coco_are_said(tmp_path, case):
    box, polygon, kind = SUSPICIOUS[case]
    root = coco(tmp_path, coco_thing(box=box, segmentation=[polygon]))
    assert any(kind in found for found in kinds(recipe("coco"), root))
    with pytest.warns(UserWarning, match=kind):
        data = COCOInstances(root, "train")
    if case == "negative":
        assert data[0][1]["boxes"].tolist() == [[10, 5, 30, 20]]
        assert data.ground_truth()["annotations"][0]["bbox"] == [10, 5, 20, 15]


def test_splits_are_compared(tmp_path):
    root = voc(tmp_path, [thing("raccoon")] * 20 + [thing("Raccoon")], [thing("raccoon")] * 2)
    (root / "JPEGImages/val1.jpg").write_bytes((root / "JPEGImages/train3.jpg").read_bytes())
    (root / "JPEGImages/train5.jpg").write_bytes((root / "JPEGImages/train4.jpg").read_bytes())
    picture(77).save(root / "JPEGImages/nobody.jpg")
    (root / "ImageSets/Main/val.txt").write_text("val0\nval1\ntrain7\n")
    assert sorted(kinds(recipe("voc"), root)) == [
        "classes with nearly the same name",
        "image files that no annotation names",
        "images that are copies of another file, across splits",
        "images that are copies of another file, within a split",
        "images that the training split has, too",
    ]
    assert "splits that are used for training and evaluation" in kinds(recipe("voc", eval_split="train"), root)


def test_image_files_that_no_json_names(tmp_path):
    root = coco(tmp_path, coco_thing())
    picture(9).save(root / "train/b.png")
    assert kinds(recipe("coco"), root).count("image files that no annotation names") == 1


# Images --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size, upright", [((HEIGHT, WIDTH), True), ((WIDTH, HEIGHT), False), ((0, 0), False)])
def test_voc_images_are_turned_where_the_annotation_says_so(tmp_path, size, upright):
    root = voc(tmp_path, [thing(box=(1, 1, 40, 60) if upright else (1, 1, 60, 40))], size=size)
    stored = Image.fromarray(np.mgrid[:HEIGHT, :WIDTH, :3].sum(0).astype(np.uint8))
    about = Image.Exif()
    about[0x0112] = 6
    stored.save(root / "JPEGImages/train0.jpg", exif=about, quality=100, subsampling=0)
    for train in (False, True):
        torch.manual_seed(0)
        image, target = VOCDetection(root, "train", ["cat"], strict=True, train=train)[0]
        assert image.shape == ((3, WIDTH, HEIGHT) if upright else (3, HEIGHT, WIDTH)) and len(target["boxes"]) == 1
    image = VOCDetection(root, "train", ["cat"])[0][0]
    wanted = np.rot90(np.asarray(stored), -1) if upright else np.asarray(stored)
    assert abs(image.numpy().transpose(1, 2, 0) * 255 - wanted).max() < 5


@pytest.mark.parametrize("orientation", [0, 1, 65537])
def test_orientations_that_mean_nothing(tmp_path, orientation):
    entry = struct.pack("<HHII", 0x0112, 4, 1, orientation)  # as a long integer
    picture().save(tmp_path / "a.png", exif=b"Exif\0\0II*\0\x08\0\0\0\x01\0" + entry + b"\0\0\0\0")
    assert read_header(tmp_path / "a.png").orientation == 1
    assert read_image(tmp_path / "a.png", (HEIGHT, WIDTH)).shape == (HEIGHT, WIDTH, 3)


def test_limits_of_images(tmp_path):
    root = voc(tmp_path)
    Image.new("RGB", (12000, 32)).save(root / "JPEGImages/train0.jpg")
    assert "images too thin to be resized" in kinds(recipe("voc"), root, fatal=True)
    with pytest.raises(InputError, match="12000x32, and its short side vanishes"):
        trained(recipe("voc"), root)
    Image.new("RGB", (WIDTH, HEIGHT)).save(root / "JPEGImages/train0.jpg")
    with pytest.raises(InputError, match=r"more than max_megapixels=0\.001: make it smaller, or raise"):
        trained(recipe("voc", max_megapixels=0.001), root)


def test_large_images_are_a_setting(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # Pillow would refuse ours
    picture().save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png", None, Limits(1.0)).shape == (HEIGHT, WIDTH, 3)
    assert Image.MAX_IMAGE_PIXELS == 100


@pytest.mark.parametrize("suffix", ["Jpg", "webp", "JPEG", "PNG"])
def test_suffixes_of_images(tmp_path, suffix):
    assert len(VOCDetection(voc(tmp_path, suffix=suffix), "train", ["cat"])[0][1]["boxes"]) == 1


def test_a_format_that_is_not_read_is_named(tmp_path):
    root = voc(tmp_path)
    (root / "JPEGImages/train0.jpg").rename(root / "JPEGImages/train0.heic")
    with pytest.raises(InputError, match=r"train0\.heic' is in a format that is not read: convert"):
        VOCDetection(root, "train")


@pytest.mark.parametrize("line", ["train0.jpg", "train0  1", "train0 -1", "JPEGImages/train0.jpg", "./train0"])
def test_lines_of_a_list(tmp_path, line):
    root = voc(tmp_path)
    (root / "ImageSets/Main/train.txt").write_text(line)
    data = VOCDetection(root, "train")
    assert data.target(0)["image_id"] == "train0" and len(data) == 1
    assert any("column of 1, 0 and -1" in kind for kind in kinds(recipe("voc"), root)) == ("1" in line)


# Layouts -------------------------------------------------------------------------------------------------------------


def test_voc_folders_of_any_name(tmp_path):
    root = voc(tmp_path)
    (root / "JPEGImages").rename(root / "pictures")
    (root / "Annotations").rename(root / "xml")
    changed = recipe("voc", images="pictures", annotations="xml", classes=["cat"])
    assert len(trained(changed, root)) == 1 and kinds(changed, root) == []
    (root / "train").mkdir()
    for path in (*(root / "pictures").glob("train*"), *(root / "xml").glob("train*")):
        path.rename(root / "train" / path.name)
    assert len(VOCDetection(root, "train", folders=Folders("{split}", "{split}"))) == 1
    with pytest.raises(InputError, match=r"there is no folder '.*nowhere'"):
        VOCDetection(root, "train", folders=Folders("nowhere", "xml"))


def test_boxes_of_coco_train_a_retinanet(tmp_path):
    """No masks in the file; crowds count as difficult: not taught, not asked for."""
    bare = {"segmentation": ...}
    objects = [coco_thing(**bare), coco_thing(2, (30, 20, 20, 20), iscrowd=1, **bare)]
    objects = [{key: value for key, value in entry.items() if value is not ...} for entry in objects]
    root = coco(tmp_path, *objects)
    chosen = recipe("coco-boxes", images="./{split}", annotations="annotations/instances_{split}.json")
    task = task_module("coco-boxes")
    held_out = task.dataset(chosen, root, "val")
    _, target = held_out[0]
    assert target["boxes"].tolist() == [[10, 5, 30, 20], [30, 20, 50, 40]] and "masks" not in target
    assert target["difficult"].tolist() == [False, True] and target["labels"].tolist() == [1, 2]
    assert len(trained(chosen, root)[0][1]["labels"]) == 1 and not kinds(chosen, root, fatal=True)
    found = {**target, "scores": torch.ones(2)}
    assert task.summary([task.record(found, target)], held_out)[task.METRIC] == 1.0


def test_values_of_masks_can_be_mapped(tmp_path):
    root = masks(tmp_path, halves(0, 255))
    mapped = recipe("ade20k", classes=["bg", "fg"], ignore=254, values="{255: 1}")
    data = task_module("ade20k").dataset(mapped, root, "validation", mapped.classes)
    assert data[0][1]["mask"].unique().tolist() == [0, 1] and kinds(mapped, root) == []
    with pytest.raises(InputError, match=r"map values of 0\.\.255"):
        trained(recipe("ade20k", classes=["bg", "fg"], values="{300: 1}"), root)


LABELMAP = "# label:color_rgb:parts:actions\nbackground:0,0,0::\ncat:128,0,0::\ndog:0,128,0::\n"


def test_masks_in_colours(tmp_path):
    root = masks(tmp_path, halves((0, 0, 0), (128, 0, 0)), halves((224, 224, 192), (0, 128, 0)))
    with pytest.raises(InputError, match=r"picture in colours \(mode RGB\).* or add a labelmap\.txt"):
        task_module("ade20k").dataset(recipe("ade20k"), root, "training")[0]
    (root / "labelmap.txt").write_text(LABELMAP)
    data = task_module("ade20k").dataset(recipe("ade20k"), root, "training")
    assert data.classes == ["background", "cat", "dog"] and data[0][1]["mask"].unique().tolist() == [0, 1]
    other = task_module("ade20k").dataset(recipe("ade20k"), root, "validation", data.classes)
    assert other[0][1]["mask"].unique().tolist() == [2, 255]
    Image.fromarray(halves((0, 0, 0), (1, 2, 3))).save(root / "annotations/training/a.png")
    with pytest.raises(InputError, match=r"colours that labelmap\.txt does not: \(1, 2, 3\)"):
        data[0]


def test_mixed_suffixes_of_masks(tmp_path):
    root = masks(tmp_path, halves(1, 2), suffix=".bmp")
    (root / "images/training/a.jpg").rename(root / "images/training/a.Jpeg")
    assert len(trained(recipe("ade20k", classes=["a", "b"]), root)) == 1
    assert not kinds(recipe("ade20k", classes=["a", "b"]), root, fatal=True)


def test_check_goes_on_after_a_split_that_is_missing(tmp_path):
    root = masks(tmp_path, halves(1, 2))
    result = CliRunner().invoke(cli, ["data", "check", "ade20k-nano", str(root), "--set", "train_split=nope"])
    assert result.exit_code == 1 and "split 'validation'" in result.output and "split 'nope'" in result.output


def test_booleans_of_yaml_get_a_hint():
    with pytest.raises(InputError, match="quotes"):
        load_recipe("voc-nano", {"classes": "[no, yes]"})


# Splitting -----------------------------------------------------------------------------------------------------------


def test_split_of_voc_and_masks(tmp_path):
    root = voc(tmp_path / "v", [thing()] * 9, [])
    for name in ("train1", "train2"):  # copies stay together
        (root / f"JPEGImages/{name}.jpg").write_bytes((root / "JPEGImages/train0.jpg").read_bytes())
    for path in (root / "ImageSets/Main").iterdir():
        path.unlink()
    words = ["data", "split", "voc-nano", str(root), "--set", "eval_split=val"]
    assert CliRunner().invoke(cli, words).exit_code == 0
    parts = [set((root / f"ImageSets/Main/{name}.txt").read_text().split()) for name in ("train", "val")]
    assert parts[0] | parts[1] == {f"train{i}" for i in range(9)} and not parts[0] & parts[1] and parts[1]
    assert {"train0", "train1", "train2"} <= parts[0] or {"train0", "train1", "train2"} <= parts[1]
    again = CliRunner().invoke(cli, words)
    assert isinstance(again.exception, InputError) and "pass --overwrite" in str(again.exception)

    root = tmp_path / "m"
    for i in range(4):
        for folder, content in (("images", picture(i)), ("masks", Image.fromarray(halves(1, 2)))):
            (root / folder).mkdir(parents=True, exist_ok=True)
            content.save(root / folder / f"{i}.png")
    names = {"images": "images", "masks": "masks", "image_suffix": ".png", "classes": ["a", "b"]}
    words = [part for key, value in names.items() for part in ("--set", f"{key}={value}")]
    assert "listing={split}.txt" in CliRunner().invoke(cli, ["data", "split", "ade20k-nano", str(root), *words]).output
    assert len(trained(recipe("ade20k", listing="./{split}.txt", **names), root)) == 3


def test_split_of_coco(tmp_path):
    root = tmp_path
    (root / "images").mkdir()
    for i in range(5):
        picture(i).save(root / f"images/{i}.png")
    content = {
        "images": [{"id": i, "file_name": f"{i}.png", "width": WIDTH, "height": HEIGHT} for i in range(5)],
        "annotations": [{"id": i + 1, **coco_thing(image=i)} for i in range(5)],
        "categories": [{"id": 1, "name": "cat"}],
    }
    (root / "all.json").write_text(json.dumps(content))
    words = ["data", "split", "coco-nano", str(root), "--set", "images=images", "--share", "0.4"]
    assert CliRunner().invoke(cli, words).exit_code == 0
    changed = load_recipe("coco-nano", {"images": "images"})
    assert kinds(changed, root) == [] and len(trained(changed, root)) == 3


# Open files ----------------------------------------------------------------------------------------------------------


def test_a_dataset_travels_to_spawned_workers_with_few_open_files(tmp_path):
    """Tensors would travel as one open file each; three an image were kept once."""
    data = VOCDetection(voc(tmp_path / "v", [thing()] * 80), "train")
    instances = COCOInstances(coco(tmp_path / "c", *[coco_thing()] * 80), "train")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 20, limits[1]))
    try:
        sent = [bytes(ForkingPickler.dumps(thing)) for thing in (data, instances)]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert [len(pickle.loads(thing).target(0)["boxes"]) for thing in sent] == [1, 80]
