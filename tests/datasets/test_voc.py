"""The Pascal VOC reader: coordinates, classes, odd but legal files, one clear error for everything that is wrong."""

import os
import pickle
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from e3va_lite.datasets.voc import VOC_CLASSES, VOCDetection
from e3va_lite.errors import InputError

WIDTH, HEIGHT = 64, 48


def thing(name="cell", box=(11, 6, 30, 25), more=""):
    """One object's XML; ``box`` as in the file: from 1, last pixel included."""
    sides = "".join(f"<{s}>{v}</{s}>" for s, v in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True))
    return f"<object><name>{name}</name>{more}<bndbox>{sides}</bndbox></object>"


def picture(width=WIDTH, height=HEIGHT, mode="RGB"):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels).convert(mode)


def put(root, images, split="train", size=(WIDTH, HEIGHT), filename="whatever.jpg"):
    """Write a VOC-shaped folder: ``images`` maps names to the objects' XML; returns ``root``."""
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    head = f"<filename>{filename}</filename><size><width>{size[0]}</width><height>{size[1]}</height></size>"
    for name, objects in images.items():
        (root / f"Annotations/{name}.xml").write_text(f"<annotation>{head}{objects}</annotation>")
        picture().save(root / f"JPEGImages/{name}.jpg")
    (root / f"ImageSets/Main/{split}.txt").write_text("".join(f"{name}\n" for name in images))
    return root


@pytest.fixture(autouse=True)
def no_stray_warnings():
    """A warning that a test does not expect is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


# What is read --------------------------------------------------------------------------------------------------------


def test_item(tmp_path):
    root = put(tmp_path, {"a": thing() + thing("dot", (1, 1, WIDTH, HEIGHT), "<difficult>1</difficult>"), "b": ""})
    dataset = VOCDetection(root, "train")
    assert len(dataset) == 2 and dataset.classes == ["cell", "dot"]
    image, target = dataset[0]
    assert image.shape == (3, HEIGHT, WIDTH) and image.dtype == torch.float32 and image.is_contiguous()
    stored = np.asarray(Image.open(root / "JPEGImages/a.jpg"), np.float32) / 255
    assert np.allclose(image.numpy().transpose(1, 2, 0), stored, atol=1e-6)
    assert (
        target["boxes"].tolist() == [[10, 5, 30, 25], [0, 0, WIDTH, HEIGHT]] and target["boxes"].dtype == torch.float32
    )
    assert target["labels"].tolist() == [1, 2] and target["labels"].dtype == torch.int64
    assert target["difficult"].tolist() == [False, True] and target["difficult"].dtype == torch.bool
    assert target["image_id"] == "a"
    empty = dataset[1][1]
    assert empty["boxes"].shape == (0, 4) and empty["labels"].shape == (0,) and empty["difficult"].shape == (0,)
    assert empty["boxes"].dtype == torch.float32 and empty["labels"].dtype == torch.int64


def test_target_without_image_is_ones_own_copy(tmp_path):
    dataset = VOCDetection(put(tmp_path, {"a": thing()}), "train")
    (tmp_path / "JPEGImages/a.jpg").unlink()
    dataset.target(0)["boxes"].zero_()
    assert dataset.target(0)["boxes"].tolist() == [[10, 5, 30, 25]]
    assert pickle.loads(pickle.dumps(dataset)).target(0)["image_id"] == "a"  # as workers need it


def test_classes(tmp_path):
    put(tmp_path, {"a": thing("dog") + thing("aeroplane")}, "pets")
    put(tmp_path, {"b": thing("wolf") + thing("dog")}, "wild")
    assert VOCDetection(tmp_path, "pets").classes == list(VOC_CLASSES)
    assert VOCDetection(tmp_path, "pets").target(0)["labels"].tolist() == [12, 1]
    assert VOCDetection(tmp_path, "wild").classes == ["dog", "wolf"]
    given = VOCDetection(tmp_path, "wild", classes=("wolf", "elk", "dog"))
    assert given.classes == ["wolf", "elk", "dog"] and given.target(0)["labels"].tolist() == [1, 3]


def test_devkit_years_and_joined_splits(tmp_path):
    put(tmp_path / "VOCdevkit/VOC2007", {"000001": thing("dog")}, "trainval")
    put(tmp_path / "VOCdevkit/VOC2007", {"000002": thing("dog")}, "test")
    only = VOCDetection(tmp_path / "VOCdevkit", "trainval+test+trainval")
    assert [only.target(i)["image_id"] for i in range(len(only))] == ["000001", "000002"]
    put(tmp_path / "VOCdevkit/VOC2012", {"2008_000001": thing("cat"), "000001": thing("cow")}, "trainval")
    both = VOCDetection(tmp_path / "VOCdevkit", "2007_trainval+2012_trainval")
    assert [both.target(i)["image_id"] for i in range(len(both))] == ["000001", "2008_000001", "000001"]
    assert [both.classes[both.target(i)["labels"][0] - 1] for i in range(3)] == ["dog", "cat", "cow"]
    assert len(VOCDetection(tmp_path / "VOCdevkit/VOC2007", "test")) == 1
    with pytest.raises(InputError, match=r"holds VOC2007, VOC2012: give one of them, or put the year .* 2007_trainval"):
        VOCDetection(tmp_path / "VOCdevkit", "trainval")


def test_parts_of_a_person_are_no_objects(tmp_path):
    part = "<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>3</xmax><ymax>3</ymax></bndbox></part>"
    person = thing("person", more=part)
    assert VOCDetection(put(tmp_path, {"a": person}), "train").target(0)["boxes"].tolist() == [[10, 5, 30, 25]]


def test_odd_but_legal_files(tmp_path):
    """Size 0 in the XML, broken coordinates, space around text, an image's other suffix, a BOM in the list."""
    box = ("11.5", " 6 ", "30.25", "25")
    put(tmp_path, {"a b.c": thing(" cell ", box, "<difficult> 0 </difficult>")}, size=(0, 0))
    (tmp_path / "JPEGImages/a b.c.jpg").rename(tmp_path / "JPEGImages/a b.c.JPG")
    (tmp_path / "ImageSets/Main/train.txt").write_text("\ufeffa b.c  \r\n\r\n", encoding="utf-8")
    dataset = VOCDetection(tmp_path, "train")
    assert dataset.target(0)["boxes"].tolist() == [[10.5, 5, 30.25, 25]]
    assert dataset.target(0)["image_id"] == "a b.c" and dataset.classes == ["cell"]
    assert dataset[0][0].shape == (3, HEIGHT, WIDTH)


@pytest.mark.parametrize("mode, suffix", [("L", "jpg"), ("CMYK", "jpg"), ("P", "png"), ("RGBA", "png"), ("1", "png")])
def test_every_image_becomes_rgb(tmp_path, mode, suffix):
    put(tmp_path, {"a": thing()})
    (tmp_path / "JPEGImages/a.jpg").unlink()
    picture(mode=mode).save(tmp_path / f"JPEGImages/a.{suffix}")
    image = VOCDetection(tmp_path, "train")[0][0]
    assert image.shape == (3, HEIGHT, WIDTH) and 0.2 < image.mean() < 0.8


def test_exif_orientation_is_not_applied(tmp_path):
    put(tmp_path, {"a": thing()})
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees
    picture().save(tmp_path / "JPEGImages/a.jpg", exif=exif)
    assert VOCDetection(tmp_path, "train")[0][0].shape == (3, HEIGHT, WIDTH)


# What is mended, and counted -----------------------------------------------------------------------------------------


def test_boxes_are_mended_with_one_warning(tmp_path):
    cases = {
        "line": (5, 5, 5, 20),  # zero area ...
        "point": (WIDTH + 9, 5, WIDTH + 9, 5),  # ... wherever it lies
        "right_of_it": (WIDTH + 1, 5, WIDTH + 9, 20),
        "above_it": (5, -20, 15, 0),
        "over_left": (-3, 5, 10, 20),
        "over_all": (0, 0, WIDTH + 5, HEIGHT + 1),
        "by_one_pixel": (0, 5, 10, 20),  # as in files that count pixels from 0
        "by_less_than_a_pixel": (0.5, 1, WIDTH + 0.4, 20),
        "whole": (1, 1, WIDTH, HEIGHT),
        "upside_down": (15, 20, 5, 6),
    }
    root = put(tmp_path, {name: thing("cell", box) + thing("dot") for name, box in cases.items()})
    with pytest.warns(UserWarning) as caught:
        dataset = VOCDetection(root, "train")
    assert len(caught) == 1
    text = str(caught[0].message)
    assert "in split 'train'" in text and str(root) in text
    assert "boxes of zero area, dropped: 2 (line.xml, point.xml)" in text
    assert "boxes outside their image, dropped: 2 (right_of_it.xml, above_it.xml)" in text
    assert "boxes reaching out of their image, cut: 3 (over_left.xml, over_all.xml, by_one_pixel.xml)" in text
    assert "boxes with exchanged corners, swapped: 1 (upside_down.xml)" in text
    left = {t["image_id"]: t["boxes"][:-1].tolist() for t in map(dataset.target, range(len(dataset)))}
    assert [name for name, boxes in left.items() if not boxes] == list(cases)[:4]
    assert left["over_left"] == left["by_one_pixel"] == [[0, 4, 10, 20]] and left["over_all"] == [[0, 0, WIDTH, HEIGHT]]
    assert left["upside_down"] == [[4, 5, 15, 20]]
    assert left["by_less_than_a_pixel"] == [[0, 0, WIDTH, 20]] and left["whole"] == [[0, 0, WIDTH, HEIGHT]]
    assert all(dataset.target(i)["labels"].tolist()[-1] == 2 for i in range(len(dataset))), (
        "labels stay with their boxes"
    )
    with pytest.raises(InputError, match=r"zero area, dropped: 2 .*outside their image, dropped: 2 .*strict"):
        VOCDetection(root, "train", strict=True)


def test_only_the_first_files_are_named(tmp_path):
    root = put(tmp_path, {f"{i:02d}": thing(box=(5, 5, 5, 5)) * 2 for i in range(9)})
    with pytest.warns(UserWarning, match=r"zero area, dropped: 18 \(00.xml, 01.xml, 02.xml, \.\.\.\)$"):
        VOCDetection(root, "train")


def test_annotation_made_for_another_size(tmp_path):
    root = put(tmp_path, {"a": thing()}, size=(HEIGHT, WIDTH))
    with pytest.warns(UserWarning, match=r"images of another size than their annotation says: 1 \(a.xml\)"):
        VOCDetection(root, "train")
    with pytest.raises(InputError, match="another size"):
        VOCDetection(root, "train", strict=True)


# What is refused -----------------------------------------------------------------------------------------------------


def spoil_image(root, content):
    (root / "JPEGImages/a.jpg").write_bytes(content)


def spoil_xml(root, old, new):
    path = root / "Annotations/a.xml"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


SPOILT = {
    "no image": (lambda r: (r / "JPEGImages/a.jpg").unlink(), r"image '.*JPEGImages/a.jpg' is missing: add it"),
    "no picture": (lambda r: spoil_image(r, b"hello"), r"image '.*a.jpg' cannot be read .*: replace it or remove it"),
    "empty image": (lambda r: spoil_image(r, b""), r"image '.*a.jpg' cannot be read"),
    "small": (lambda r: picture(31, 60).save(r / "JPEGImages/a.jpg"), r"a.jpg' is 31x60, smaller than 32x32: enlarge"),
    "no xml": (lambda r: (r / "Annotations/a.xml").unlink(), r"annotation '.*Annotations/a.xml' is missing"),
    "cut xml": (lambda r: spoil_xml(r, "</annotation>", ""), r"annotation '.*a.xml' is not valid XML .*: correct it"),
    "no name": (lambda r: spoil_xml(r, "<name>cell</name>", ""), r"a.xml' has an object without 'name'"),
    "no box": (lambda r: spoil_xml(r, "bndbox", "polygon"), r"a.xml' has an object without 'bndbox/xmin'"),
    "no side": (lambda r: spoil_xml(r, "<ymax>25</ymax>", ""), r"a.xml' has an object without 'bndbox/ymax'"),
    "no number": (lambda r: spoil_xml(r, "<ymax>25<", "<ymax>2S<"), r"a.xml' has '2S' as 'bndbox/ymax': put a number"),
    "not finite": (lambda r: spoil_xml(r, "<ymax>25<", "<ymax>nan<"), r"a.xml' has 'nan' as 'bndbox/ymax'"),
    "class": (lambda r: spoil_xml(r, "cell", "Cel"), r"a.xml': unknown class 'Cel': did you mean cell\?"),
    "no list": (lambda r: (r / "ImageSets/Main/train.txt").rename(r / "ImageSets/Main/fit.txt"),
                r"there is no '.*train.txt': choose a split out of fit, test"),
    "empty list": (lambda r: (r / "ImageSets/Main/train.txt").write_text("\n \n"), r"split 'train' .* lists no images"),
    "no sets": (lambda r: (r / "ImageSets/Main").rename(r / "Main"), r"has no ImageSets/Main: give a VOC-shaped"),
}  # fmt: skip


@pytest.mark.parametrize("spoil, message", SPOILT.values(), ids=SPOILT)
def test_bad_files_are_refused_at_once(tmp_path, spoil, message):
    put(tmp_path, {"c": thing()}, "test")
    put(tmp_path, {"b": thing(), "a": thing()})
    (tmp_path / "ImageSets/Main/cell_train.txt").write_text("b 1\na 1\n")  # the devkit's lists are no splits to offer
    assert len(VOCDetection(tmp_path, "train", ["cell", "dot"])) == 2
    spoil(tmp_path)
    with pytest.raises(InputError, match=message):
        VOCDetection(tmp_path, "train", ["cell", "dot"])


def test_no_such_root(tmp_path):
    with pytest.raises(InputError, match=r"nowhere' has no ImageSets/Main"):
        VOCDetection(tmp_path / "nowhere", "train")


def test_image_that_ends_early_is_named_when_loaded(tmp_path):
    path = put(tmp_path, {"a": thing()}) / "JPEGImages/a.jpg"
    path.write_bytes(path.read_bytes()[:-400])
    dataset = VOCDetection(tmp_path, "train")
    with pytest.raises(InputError, match=r"image '.*a.jpg' cannot be read \(.*truncated.*\): replace it"):
        dataset[0]


def test_sixteen_bits_are_refused(tmp_path):
    put(tmp_path, {"a": thing()})
    (tmp_path / "JPEGImages/a.jpg").unlink()
    Image.fromarray(np.full((HEIGHT, WIDTH), 4000, np.uint16)).save(tmp_path / "JPEGImages/a.png")
    with pytest.raises(InputError, match=r"a.png' has more than 8 bits per channel: convert it to 8 bits"):
        VOCDetection(tmp_path, "train")


def test_class_lists_are_checked(tmp_path):
    root = put(tmp_path, {"a": thing(), "b": ""})
    with pytest.raises(InputError, match="classes cell, dot, cell: give every class once"):
        VOCDetection(root, "train", ["cell", "dot", "cell"])
    with pytest.raises(InputError, match=r"classes \(none\): give every class once"):
        VOCDetection(root, "train", [])
    put(tmp_path, {"b": ""}, "nothing")
    with pytest.raises(InputError, match=r"split 'nothing' .* has no objects to learn the classes from: give classes"):
        VOCDetection(root, "nothing")
    assert len(VOCDetection(root, "nothing", ["cell"])) == 1


# Real images ---------------------------------------------------------------------------------------------------------


@pytest.mark.skipif("E3VA_REAL_DATA" not in os.environ, reason="E3VA_REAL_DATA does not name the folder of real data")
def test_real_blood_cells():
    root = Path(os.environ["E3VA_REAL_DATA"]) / "bccd_voc/BCCD"
    with pytest.warns(UserWarning, match=r"zero area, dropped: 1 \(BloodImage_00343.xml\)$"):
        train = VOCDetection(root, "train")
    with pytest.warns(UserWarning, match=r"zero area, dropped: 1 \(BloodImage_00338.xml\)$"):
        val = VOCDetection(root, "val", train.classes)
    test = VOCDetection(root, "test", train.classes)  # nothing to warn of
    assert train.classes == ["Platelets", "RBC", "WBC"]
    assert [len(train), len(val), len(test)] == [205, 87, 72]
    image, target = train[0]
    assert image.shape == (3, 480, 640) and target["image_id"] == "BloodImage_00001"
    assert target["boxes"][0].tolist() == [67, 314, 286, 480] and target["labels"][0] == 3
    # A white cell is stained: its box is bluer than the image.
    x1, y1, x2, y2 = target["boxes"][0].int().tolist()
    assert image[2, y1:y2, x1:x2].mean() > image[2].mean() + 0.05
    total = sum(len(split.target(i)["labels"]) for split in (train, val, test) for i in range(len(split)))
    assert total == 4886
