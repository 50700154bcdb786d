"""The check before training: it finds what was planted, and calls it fatal exactly if training would stop at it."""

import json
import os
import shutil
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from e3va_lite.datasets.check import Problem, check_dataset, report
from e3va_lite.datasets.shapes import write_scenes
from e3va_lite.datasets.voc import VOC_CLASSES
from e3va_lite.errors import InputError
from e3va_lite.recipes.schema import load_recipe
from e3va_lite.tasks.registry import task_module

FATAL, HARMLESS = True, False


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    """Small scenes of both layouts, and what training makes of them."""
    root = tmp_path_factory.mktemp("clean")
    for layout in ("voc", "coco"):
        write_scenes(root / layout, layout, train=4, val=2, seed=1, size=64)
    return root


def recipe_of(task, **changes):
    splits = {"train_split": "train", "eval_split": "val"} if task == "voc" else {}
    return load_recipe(f"{task}-nano", splits | changes, task)


def checked(recipe, root):
    splits = check_dataset(recipe, root, task_module(recipe.task).check)
    return [problem for found in splits.values() for problem in found]


def stops(recipe, root):
    """Whether training would: both splits as it makes them, and every item. Any other error is a traceback."""
    task = task_module(recipe.task)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        try:
            train = task.dataset(recipe, root, recipe.train_split, recipe.classes, train=True)
            held_out = task.dataset(recipe, root, recipe.eval_split, train.classes)
            for dataset in (train, held_out):
                for i in range(len(dataset)):
                    dataset[i]
        except InputError as error:
            assert "\n" not in str(error)
            return True
    return False


# Faults of images, the same for both layouts -------------------------------------------------------------------------


def some_image(root):
    """Of the training split; it has objects."""
    folder = root / "JPEGImages" if (root / "JPEGImages").is_dir() else root / "train2017"
    return sorted(folder.iterdir())[0]


def resave(root, change, **options):
    path = some_image(root)
    with Image.open(path) as image:
        changed = change(image)
    changed.save(path, **options)


def cut_off(root):
    path = some_image(root)
    path.write_bytes(path.read_bytes()[:-200])


def exif():
    about = Image.Exif()
    about[0x0112] = 6
    return about


def broken_exif(root):
    path = some_image(root)
    with Image.open(path) as image:
        image.save(path, exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + b"\x12\x01" * 9)


def swap(root, pixels, suffix="PNG"):
    Image.fromarray(pixels).save(some_image(root), suffix)


IMAGES = {
    "missing": (lambda r: some_image(r).unlink(), "missing images", FATAL),
    "no picture": (lambda r: some_image(r).write_bytes(b"hello"), "cannot be read to their end", FATAL),
    "no bytes": (lambda r: some_image(r).write_bytes(b""), "cannot be read to their end", FATAL),
    "cut off": (cut_off, "cannot be read to their end", FATAL),
    "grey": (lambda r: resave(r, lambda i: i.convert("L")), "mode L, converted", HARMLESS),
    "cmyk": (lambda r: resave(r, lambda i: i.convert("CMYK")), "mode CMYK, converted", HARMLESS),
    "palette": (lambda r: resave(r, lambda i: i.convert("P"), format="PNG"), "mode P, converted", HARMLESS),
    "rotated": (lambda r: resave(r, lambda i: i.copy(), exif=exif()), "rotated by EXIF", HARMLESS),
    "broken exif": (broken_exif, None, HARMLESS),
    "16 bit": (lambda r: swap(r, np.full((64, 64), 4000, np.uint16)), "more than 8 bits", FATAL),
    "floats": (lambda r: swap(r, np.full((64, 64), 0.5, np.float32), "TIFF"), "more than 8 bits", FATAL),
    "small": (lambda r: swap(r, np.zeros((31, 64, 3), np.uint8)), "smaller than 32x32", FATAL),
}


# Faults of VOC's files -----------------------------------------------------------------------------------------------


def first_xml(root, split="train"):
    return root / f"Annotations/{(root / f'ImageSets/Main/{split}.txt').read_text().split()[0]}.xml"


def rewrite(root, old, new, split="train"):
    path = first_xml(root, split)
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def add_object(root, box, name="star", split="train"):
    sides = "".join(f"<{side}>{v}</{side}>" for side, v in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True))
    rewrite(root, "</annotation>", f"<object><name>{name}</name><bndbox>{sides}</bndbox></object></annotation>", split)


def without_objects(root, split):
    for name in (root / f"ImageSets/Main/{split}.txt").read_text().split():
        path = root / f"Annotations/{name}.xml"
        head, *_ = path.read_text().partition("<object>")
        path.write_text(head + "</annotation>")


def twice(function, root):
    function(root)
    function(root)


def main_list(root):
    return root / "ImageSets/Main/train.txt"


VOC = {
    "missing xml": (lambda r: first_xml(r).unlink(), "missing annotations", FATAL),
    "cut xml": (lambda r: rewrite(r, "</annotation>", ""), "not valid XML", FATAL),
    "empty xml": (lambda r: first_xml(r).write_text(""), "not valid XML", FATAL),
    "odd encoding": (lambda r: first_xml(r).write_bytes(b'<?xml version="1.0" encoding="foo"?><a/>'), "XML", FATAL),
    "xml of binary": (lambda r: first_xml(r).write_bytes(b"\xff\xfe\0<"), "not valid XML", FATAL),
    "no name": (lambda r: rewrite(r, "<name>", "<title>x</title><name/><name>"), "without a name or a whole", FATAL),
    "no side": (lambda r: rewrite(r, "ymax>", "ymox>"), "not valid XML", FATAL),
    "word for number": (lambda r: add_object(r, (1, 1, "x", 9)), "without a name or a whole box", FATAL),
    "nan": (lambda r: add_object(r, (1, 1, "nan", 9)), "without a name or a whole box", FATAL),
    "zero area": (lambda r: add_object(r, (5, 5, 5, 9)), "zero area, dropped", HARMLESS),
    "upside down": (lambda r: add_object(r, (5, 9, 9, 2)), "exchanged corners, swapped", HARMLESS),
    "outside": (lambda r: add_object(r, (70, 5, 90, 9)), "outside their image, dropped", HARMLESS),
    "reaching out": (lambda r: add_object(r, (50, 5, 90, 9)), "reaching out of their image, cut", HARMLESS),
    "twice": (lambda r: twice(lambda r: add_object(r, (5, 5, 30, 30)), r), "objects annotated twice", HARMLESS),
    "another size": (lambda r: rewrite(r, "<width>64", "<width>65"), "another size than their annotation", HARMLESS),
    "no objects": (lambda r: without_objects(r, "val"), "images without objects", HARMLESS),
    "split without objects": (lambda r: without_objects(r, "val"), "splits without objects", HARMLESS),
    "no classes to learn": (lambda r: without_objects(r, "train"), "classes that cannot be used", FATAL),
    "unknown class": (lambda r: add_object(r, (5, 5, 30, 30), "starr", "val"), "of an unknown class", FATAL),
    "listed twice": (lambda r: main_list(r).write_text(main_list(r).read_text() * 2), "listed twice", HARMLESS),
    "no list": (lambda r: main_list(r).unlink(), "splits that cannot be used", FATAL),
    "empty list": (lambda r: main_list(r).write_text("\n"), "splits that cannot be used", FATAL),
    "no folder": (lambda r: shutil.rmtree(r / "ImageSets"), "splits that cannot be used", FATAL),
}


# Faults of COCO's file -----------------------------------------------------------------------------------------------


def json_of(root, split="train2017"):
    return root / f"annotations/instances_{split}.json"


def edit(change, split="train2017"):
    """Change the content of the JSON file in place."""

    def spoil(root):
        content = json.loads(json_of(root, split).read_text())
        change(content)
        json_of(root, split).write_text(json.dumps(content))

    return spoil


def of_annotation(**values):
    def change(content):
        entry = next(a for a in content["annotations"] if not a["iscrowd"])
        for key, value in values.items():
            if value is ...:
                del entry[key]
            else:
                entry[key] = value

    return edit(change)


def of(listed, split="train2017", **values):
    def change(content):
        content[listed][0] |= values
        for key in [key for key, value in values.items() if value is ...]:
            del content[listed][0][key]

    return edit(change, split)


def polygon(*numbers):
    return of_annotation(segmentation=[list(numbers)])


def again(listed, **values):
    return edit(lambda c: c[listed].append({**c[listed][0], **values}))


def runs(counts, size=(64, 64)):
    return of_annotation(segmentation={"size": list(size), "counts": counts})


def upright(stored, **options):
    """Add an image that the JSON calls 64 wide and 48 high."""

    def spoil(root):
        Image.new("RGB", stored).save(root / "train2017/added.jpg", **options)
        again("images", id=99, file_name="added.jpg", width=64, height=48)(root)

    return spoil


SPLIT, WRONG = "splits that cannot be used", "is missing or unusable"
COCO = {
    "missing json": (lambda r: json_of(r).unlink(), SPLIT, FATAL),
    "cut json": (lambda r: json_of(r).write_text(json_of(r).read_text()[:-9]), SPLIT, FATAL),
    "empty json": (lambda r: json_of(r).write_text(""), SPLIT, FATAL),
    "binary json": (lambda r: json_of(r).write_bytes(b"\xff\xfe\0\0\x01"), SPLIT, FATAL),
    "deep json": (lambda r: json_of(r).write_text("[" * 100_000), SPLIT, FATAL),
    "list for json": (lambda r: json_of(r).write_text("[1]"), SPLIT, FATAL),
    "no annotations": (edit(lambda c: c.pop("annotations")), SPLIT, FATAL),
    "no images": (edit(lambda c: c.update(images=[])), SPLIT, FATAL),
    "no categories": (edit(lambda c: c.update(categories=[])), SPLIT, FATAL),
    "categories of words": (edit(lambda c: c.update(categories=["a", None, 3])), SPLIT, FATAL),
    "words for images": (edit(lambda c: c["images"].append("a.jpg")), f"images whose 'id' {WRONG}", FATAL),
    "words for objects": (edit(lambda c: c["annotations"].append(3)), f"annotations whose 'id' {WRONG}", FATAL),
    "image id": (of("images", id="one"), f"images whose 'id' {WRONG}", FATAL),
    "image name": (of("images", file_name=...), f"images whose 'file_name' {WRONG}", FATAL),
    "long name": (of("images", file_name="x" * 5000), "missing images", FATAL),
    "zero name": (of("images", file_name="a\0b"), "missing images", FATAL),
    "image width": (of("images", width=0), f"images whose 'width' {WRONG}", FATAL),
    "endless width": (of("images", width=10**400), f"images whose 'width' {WRONG}", FATAL),
    "whole floats": (of("images", width=64.0, height=64.0), None, HARMLESS),
    "small in json": (of("images", width=20, height=20), "smaller than 32x32", FATAL),
    "another size": (of("images", width=65), "another size than their annotation says", FATAL),
    "turned, as EXIF says": (upright((48, 64), exif=exif()), "rotated by EXIF", HARMLESS),
    "as stored, whatever EXIF says": (upright((64, 48), exif=exif()), "rotated by EXIF", HARMLESS),
    "turned": (upright((48, 64)), "another size than their annotation says", FATAL),
    "image id twice": (again("images"), "images with an id that another", FATAL),
    "image twice": (again("images", id=99), "images listed twice", HARMLESS),
    "category id": (of("categories", id=None), f"categories whose 'id' {WRONG}", FATAL),
    "category id twice": (again("categories", name="new"), "categories with an id that another", FATAL),
    "category name twice": (again("categories", id=99), "categories with a name that another", FATAL),
    "unused category": (again("categories", id=99, name="new"), None, HARMLESS),
    "object id twice": (again("annotations"), "annotations with an id that another", FATAL),
    "object twice": (again("annotations", id=10**6), "objects annotated twice", HARMLESS),
    "unknown image": (of_annotation(image_id=77), "of an unknown image", FATAL),
    "unknown category": (of_annotation(category_id=2), "of an unknown category", FATAL),
    "unknown class": (of("categories", "val2017", name="starr"), "of an unknown class", FATAL),
    "no object id": (of_annotation(id=...), f"annotations whose 'id' {WRONG}", FATAL),
    "no box": (of_annotation(bbox=...), f"annotations whose 'bbox' {WRONG}", FATAL),
    "three sides": (of_annotation(bbox=[1, 2, 3]), f"annotations whose 'bbox' {WRONG}", FATAL),
    "nan": (of_annotation(bbox=[1, 2, 3, float("nan")]), f"annotations whose 'bbox' {WRONG}", FATAL),
    "true": (of_annotation(bbox=[1, 2, 3, True]), f"annotations whose 'bbox' {WRONG}", FATAL),
    "zero area": (of_annotation(bbox=[5, 5, 0, 5]), "zero area, dropped", HARMLESS),
    "hair": (of_annotation(bbox=[60, 5, 1e-7, 5]), "zero area, dropped", HARMLESS),
    "outside": (of_annotation(bbox=[70, 5, 5, 5]), "outside their image, dropped", HARMLESS),
    "reaching out": (of_annotation(bbox=[60, 5, 9, 5]), "reaching out of their image, cut", HARMLESS),
    "no mask": (of_annotation(segmentation=...), f"annotations whose 'segmentation' {WRONG}", FATAL),
    "flat polygon": (of_annotation(segmentation=[1, 1, 9, 1, 9, 9]), f"'segmentation' {WRONG}", FATAL),
    "odd polygon": (polygon(1, 1, 9, 1, 9, 9, 4), f"'segmentation' {WRONG}", FATAL),
    "polygon of words": (polygon("a", 1, 9, 1, 9, 9), f"'segmentation' {WRONG}", FATAL),
    "polygon of nan": (polygon(float("nan"), 1, 9, 1, 9, 9), f"'segmentation' {WRONG}", FATAL),
    "polygon to the moon": (polygon(1, 1, 1e12, 1, 9, 9), f"'segmentation' {WRONG}", FATAL),
    "two points": (polygon(1, 1, 9, 9), "fewer than three points, left out", HARMLESS),
    "speck": (polygon(3.1, 3.1, 3.2, 3.1, 3.2, 3.2), "without a pixel in their mask, dropped", HARMLESS),
    "elsewhere": (polygon(100, 100, 120, 100, 120, 120), "without a pixel in their mask, dropped", HARMLESS),
    "empty mask": (runs([4096]), "without a pixel in their mask, dropped", HARMLESS),
    "no runs": (of_annotation(segmentation={"size": [64, 64]}), f"'segmentation' {WRONG}", FATAL),
    "runs of another size": (runs([4096], (32, 128)), "masks of another size", FATAL),
    "too few runs": (runs([5, 5]), "do not fill their image", FATAL),
    "negative runs": (runs([-1, 4097]), "do not fill their image", FATAL),
    "broken runs": (runs([1.5, 4094.5]), "do not fill their image", FATAL),
    "compressed runs cut": (runs("aP"), "do not fill their image", FATAL),
    "compressed nonsense": (runs("\x80~~~"), "do not fill their image", FATAL),
    "no area": (of_annotation(area=...), "without 'area', counted from the mask", HARMLESS),
    "no iscrowd": (of_annotation(iscrowd=...), "without 'iscrowd', taken for single", HARMLESS),
    "image without objects": (again("images", id=99), "images without objects", HARMLESS),
    "no objects": (edit(lambda c: c.update(annotations=[])), "training splits that teach nothing", FATAL),
    "info": (edit(lambda c: [c.pop("info"), c.pop("licenses")]), None, HARMLESS),
}

CASES = [(task, name) for task, faults in (("voc", VOC), ("coco", COCO)) for name in {**IMAGES, **faults}]


@pytest.mark.parametrize("task, fault", CASES)
def test_found_and_fatal_exactly_if_training_stops(clean, tmp_path, task, fault):
    spoil, kind, fatal = {**IMAGES, **(VOC if task == "voc" else COCO)}[fault]
    root = shutil.copytree(clean / task, tmp_path / task)
    recipe = recipe_of(task)
    spoil(root)
    problems = checked(recipe, root)
    assert kind is None or any(kind in problem.kind for problem in problems), report(problems)
    assert any(problem.fatal for problem in problems) == stops(recipe, root) == fatal, report(problems)
    # The one that was planted is the fatal one.
    assert not fatal or any(problem.fatal and kind in problem.kind for problem in problems)


@pytest.mark.parametrize("task", ["voc", "coco"])
def test_clean_files_have_no_problems_but_empty_images(clean, task):
    problems = checked(recipe_of(task), clean / task)
    assert {problem.kind for problem in problems} <= {"images without objects"}
    assert not stops(recipe_of(task), clean / task)


@pytest.mark.parametrize("task", ["voc", "coco"])
def test_objects_of_other_classes_are_left_out_and_counted(clean, task):
    few = recipe_of(task, classes=["star", "fish"])
    module, root = task_module(task), clean / task
    with pytest.warns(UserWarning, match=r"objects of other classes, dropped: \d+"):
        train = module.dataset(few, root, few.train_split, few.classes, train=True)
    every = module.dataset(recipe_of(task), root, few.train_split)
    names = Counter(every.classes[label - 1] for i in range(len(every)) for label in every.target(i)["labels"])
    contents = module.check(few, root, few.train_split).contents
    left = {name: n for (name, reason), n in contents.left_out.items() if reason == "other classes"}
    assert left == {name: names[name] for name in left} and set(left) == set(names) - {"star", "fish"}
    assert {int(label) for i in range(len(train)) for label in train[i][1]["labels"]} <= {1, 2}
    assert not any(problem.fatal for problem in checked(few, root)) and not stops(few, root)
    double = recipe_of(task, classes=["star", "star"])
    assert any(problem.fatal for problem in checked(double, root)) and stops(double, root)
    with pytest.warns(UserWarning, match=r"classes without objects to learn from: 1 \(stars \(did you mean star\?\)\)"):
        module.dataset(recipe_of(task, classes=["fish", "stars"]), root, few.train_split, ["fish", "stars"], train=True)


def test_everything_is_found_not_only_the_first(clean, tmp_path):
    voc = shutil.copytree(clean / "voc", tmp_path / "voc")
    for fault in ("unknown class", "word for number", "nan", "zero area", "outside", "another size", "twice"):
        VOC[fault][0](voc)
    some_image(voc).write_bytes(b"hello")
    problems = checked(recipe_of("voc"), voc)
    kinds = [problem.kind for problem in problems]
    for kind in ("objects of an unknown class", "images that cannot be read to their end"):
        assert kind in kinds
    assert kinds.count("objects without a name or a whole box") == 2
    swap(voc, np.zeros((64, 64, 3), np.uint8), "JPEG")  # boxes are judged where there is an image to judge them by
    kinds = {problem.kind for problem in checked(recipe_of("voc"), voc)}
    assert {"boxes of zero area, dropped", "boxes outside their image, dropped", "objects annotated twice"} <= kinds
    assert "images of another size than their annotation says" in kinds

    coco = shutil.copytree(clean / "coco", tmp_path / "coco")
    for fault in ("image twice", "category name twice", "unknown category", "object id twice"):
        COCO[fault][0](coco)
    for path in sorted((coco / "val2017").iterdir()):
        path.unlink()
    cut_off(coco)
    kinds = [problem.kind for problem in checked(recipe_of("coco"), coco)]
    assert kinds.count("missing images") == 2 and "images that cannot be read to their end" in kinds
    for kind in ("images listed twice", "categories with a name that another one has"):
        assert kind in kinds
    assert "annotations of an unknown category" in kinds and "annotations with an id that another one has" in kinds


def test_report():
    missing = [Problem("missing images", f"{n}.jpg", FATAL) for n in range(5)]
    text = report([Problem("images of mode L, converted to RGB", "a.jpg", HARMLESS), *missing], shown=2)
    assert text.splitlines() == [
        "  stops training: missing images: 5",
        "    0.jpg",
        "    1.jpg",
        "    ... and 3 more",
        "  no obstacle: images of mode L, converted to RGB: 1",
        "    a.jpg",
    ]
    assert report([]) == ""


def test_training_items_of_voc(clean):
    """Mirrored in half of the cases, without difficult objects, each with its file."""
    from e3va_lite.training.sampling import seeded

    task, recipe = task_module("voc"), recipe_of("voc")
    train = task.dataset(recipe, clean / "voc", "train", train=True)
    plain = task.dataset(recipe, clean / "voc", "train")
    assert train.classes == plain.classes and len(train) == len(plain)
    mirrored = difficult = 0
    for i in range(len(train)):
        image, target = plain[i]
        assert Path(target["file"]).is_file() and target["file"].endswith(f"{target['image_id']}.jpg")
        keep = ~target["difficult"]
        difficult += int((~keep).sum())
        for seed in range(20):
            with seeded(seed, i):
                changed, seen = train[i]
            assert seen["file"] == target["file"] and not seen["difficult"].any()
            boxes = target["boxes"][keep]
            if not (changed == image).all():
                mirrored += 1
                assert (changed == image.flip(-1)).all()
                boxes = boxes[:, [2, 1, 0, 3]] * boxes.new_tensor([-1, 1, -1, 1]) + boxes.new_tensor([64, 0, 64, 0])
            assert (seen["boxes"] == boxes).all() and (seen["labels"] == target["labels"][keep]).all()
    assert difficult and 24 < mirrored < 56


def test_summary_of_voc(clean):
    """The truth fed back finds everything; a split without a class has no number for it, and JSON can hold it."""
    task, recipe = task_module("voc"), recipe_of("voc")
    dataset = task.dataset(recipe, clean / "voc", "val", [*task.dataset(recipe, clean / "voc", "train").classes, "elk"])
    targets = [dataset[i][1] for i in range(len(dataset))]
    records = [
        task.record({**target, "scores": target["boxes"].new_ones(len(target["boxes"]))}, target) for target in targets
    ]
    assert all(set(truth) == {"boxes", "labels", "difficult"} for _, truth in records)
    summary = task.summary(records, dataset)
    assert summary["ap50_11_point"] == summary["ap50_all_point"] == summary[task.METRIC] == 1.0
    assert summary["by_class_all_point"]["elk"] is None and "NaN" not in json.dumps(summary)
    nothing = task.summary([task.record({**records[0][0]}, {k: v[:0] for k, v in records[0][1].items()})], dataset)
    assert nothing["ap50_11_point"] is None


# Real images ---------------------------------------------------------------------------------------------------------


def test_real_blood_cells(real_data):
    """The two boxes of zero area are found, and stop nothing; the three splits show the same three classes."""
    recipe = recipe_of("voc", eval_split="val+test")
    problems = checked(recipe, Path(real_data) / "bccd_voc/BCCD")
    assert not any(problem.fatal for problem in problems)
    zero = [os.path.basename(p.where) for p in problems if p.kind == "boxes of zero area, dropped"]
    assert zero == ["BloodImage_00343.xml (object 4)", "BloodImage_00338.xml (object 13)"]
    assert not set(VOC_CLASSES) & {"RBC", "WBC", "Platelets"}


def test_real_coco_is_sound(real_data):
    problems = checked(recipe_of("coco"), Path(real_data) / "coco_tiny")
    assert not any(problem.fatal for problem in problems), report(problems)
