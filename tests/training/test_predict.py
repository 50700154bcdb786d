"""Predictions on anybody's images: files that tools read back exactly, pictures that show what they should."""

import contextlib
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import nn

from e3va_lite import cli
from e3va_lite.datasets.shapes import CLASSES, COCO_IDS, scene, write_scenes
from e3va_lite.errors import InputError
from e3va_lite.recipes.schema import load_recipe
from e3va_lite.tasks import voc
from e3va_lite.tasks.registry import Known
from e3va_lite.training.engine import build_model, evaluate
from e3va_lite.training.predict import file_names, load_image, palette, picture, predict, read_images

WIDTH, HEIGHT = 640, 400  # large enough for a picture to have the pixels of its image


class Fake(nn.Module):
    """Returns what it was given, one prediction per image in turn, and keeps what it saw."""

    def __init__(self, *predictions):
        super().__init__()
        self.predictions, self.seen = list(predictions), []

    def forward(self, images):
        assert not self.training and torch.is_inference_mode_enabled() and len(images) == 1
        self.seen += images
        return [self.predictions[len(self.seen) - 1]]


def objects(boxes=(), labels=(), scores=(), masks=None):
    found = {
        "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        "labels": torch.tensor(labels, dtype=torch.int64),
        "scores": torch.tensor(scores, dtype=torch.float32),
    }
    return found if masks is None else {**found, "masks": masks}


def put(path, width=WIDTH, height=HEIGHT):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.tile((np.arange(width) % 256).astype(np.uint8)[:, None], (height, 1, 3))
    Image.fromarray(pixels).save(path)
    return path


def pixels(path):
    return np.asarray(Image.open(path))


def names(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


# Files ---------------------------------------------------------------------------------------------------------------


def truth_of(coco, image_id):
    """Ground truth as a perfect model would predict it, crowds left out."""
    things = [a for a in coco.loadAnns(coco.getAnnIds(image_id)) if not a["iscrowd"]]
    image = coco.imgs[image_id]
    masks = np.array([coco.annToMask(a) for a in things], bool).reshape(-1, image["height"], image["width"])
    boxes = [(x, y, x + w, y + h) for x, y, w, h in (a["bbox"] for a in things)]
    labels = [COCO_IDS.index(a["category_id"]) + 1 for a in things]
    return objects(boxes, labels, [0.4] * len(things), torch.from_numpy(masks))


def test_coco_results_of_the_truth_have_ap_1(tmp_path):
    root, out = tmp_path / "shapes", tmp_path / "out"
    write_scenes(root, "coco", train=1, val=6, seed=3, size=96)
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(root / "annotations/instances_val2017.json")
        model = Fake(*(truth_of(coco, i) for i in sorted(coco.imgs)))
        assert predict(model, [root / "val2017"], out, "coco", CLASSES, COCO_IDS) == 6
        results = coco.loadRes(str(out / "results.json"))  # ids of images and categories are the file's own
        for kind in ("bbox", "segm"):
            evaluation = COCOeval(coco, results, kind)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
            assert evaluation.stats[0] == 1
    assert names(out) == sorted(["classes.json", "results.json", *(f"{i:012d}.png" for i in coco.imgs)])
    assert json.loads((out / "classes.json").read_text()) == dict(zip(map(str, COCO_IDS), CLASSES, strict=True))


def test_run_lengths_are_text_that_gives_the_masks_back(tmp_path):
    masks = (torch.rand(3, HEIGHT // 20, WIDTH // 20) > 0.5).repeat_interleave(20, 1).repeat_interleave(20, 2)
    masks[2] = False
    found = objects([(1, 2, 30, 40)] * 3, (1, 2, 1), (0.9, 0.6, 0.1), masks)
    predict(Fake(found), [put(tmp_path / "in/a.png")], tmp_path / "out", "coco", ("cat", "dog"))
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert all(isinstance(r["segmentation"]["counts"], str) for r in results)
    assert np.array_equal([coco_mask.decode(r["segmentation"]) for r in results], masks.numpy())
    assert [r["image_id"] for r in results] == ["a"] * 3 and [r["category_id"] for r in results] == [1, 2, 1]


def test_results_and_devkit_text(tmp_path):
    """The files hold all detections, whatever the threshold; only names that are numbers become numbers."""
    images = [put(tmp_path / f"in/{name}.jpg") for name in ("000012", "2007_000032")]
    first = objects([(10, 5, 30, 25), (0.25, 0, 640, 400)], (2, 1), (0.75, 0.03125))
    model = Fake(first, objects([(1, 2, 3.5, 4)], (2,), (0.001,)))
    out = tmp_path / "new/out"
    assert predict(model, images, out, "voc", ("cat", "a/b", "dog"), threshold=0.9) == 2
    text = {path.name: path.read_text() for path in out.glob("*.txt")}
    assert text == {  # pixels count from 1, and the last one belongs to the box: 10, 5, 30, 25 is 11, 6, 30, 25
        "comp4_det_test_cat.txt": "000012 0.03125 1.25 1 640 400\n",
        "comp4_det_test_a_b.txt": "000012 0.75 11 6 30 25\n2007_000032 0.00100000005 2 3 3.5 4\n",
        "comp4_det_test_dog.txt": "",
    }
    assert json.loads((out / "results.json").read_text()) == [
        {"image_id": 12, "category_id": 2, "bbox": [10, 5, 20, 20], "score": 0.75},
        {"image_id": 12, "category_id": 1, "bbox": [0.25, 0, 639.75, 400], "score": 0.03125},
        {"image_id": "2007_000032", "category_id": 2, "bbox": [1, 2, 2.5, 2], "score": pytest.approx(0.001)},
    ]
    assert not any(path.name.endswith(".tmp") for path in out.iterdir())


@pytest.mark.parametrize(("ignore", "count"), [(0, 150), (0, 254), (255, 255), (11, 11), (11, 20)])
def test_masks_read_back_are_the_label_map(tmp_path, ignore, count):
    mask = torch.arange(HEIGHT * WIDTH).reshape(HEIGHT, WIDTH) % count
    classes = [f"class {k}" for k in range(count)]
    image = put(tmp_path / "in/a.png")
    predict(Fake({"mask": mask}), [image], tmp_path / "out", "ade20k", classes, ignore=ignore)
    written = Image.open(tmp_path / "out/masks/a.png")
    assert written.mode == "P" and written.size == (WIDTH, HEIGHT)
    values = np.asarray(written).astype(int)
    assert not (values == ignore).any() and values.max() < 255
    assert np.array_equal(np.where(values > ignore, values - 1, values), mask)
    assert np.array_equal(np.asarray(written.convert("RGB")), palette(count)[mask])
    known = json.loads((tmp_path / "out/classes.json").read_text())
    assert known[str(values[0, count - 1])] == classes[-1]
    assert names(tmp_path / "out") == ["a.png", "classes.json", "masks/a.png"]


def test_the_datasets_reader_takes_a_written_mask_back(tmp_path):
    masks = pytest.importorskip("e3va_lite.datasets.ade20k")
    classes, mask = [f"class {k}" for k in range(20)], torch.arange(HEIGHT * WIDTH).reshape(HEIGHT, WIDTH) % 20
    for ignore in (0, 11, 255):
        image, out = put(tmp_path / "in/a.png"), tmp_path / f"out{ignore}"
        predict(Fake({"mask": mask}), [image], out, "ade20k", classes, ignore=ignore)
        assert np.array_equal(masks.label_table(classes, ignore)[pixels(out / "masks/a.png")], mask)


@pytest.mark.parametrize(("task", "empty"), [("voc", {}), ("coco", {"masks": torch.zeros(0, HEIGHT, WIDTH) > 0})])
def test_nothing_found(tmp_path, task, empty):
    image, out = put(tmp_path / "in/a.png"), tmp_path / "out"
    predict(Fake(objects(**empty)), [image], out, task, ("cat",))
    assert json.loads((out / "results.json").read_text()) == []
    assert np.array_equal(pixels(out / "a.png"), pixels(image))


def test_a_model_is_left_in_its_mode(tmp_path):
    model = Fake(objects()).train()
    predict(model, [put(tmp_path / "in/a.png")], tmp_path / "out", "voc", ("cat",))
    assert model.training


# Pictures ------------------------------------------------------------------------------------------------------------


def drawn(prediction, threshold=0.5, classes=("cat", "dog")):
    """Where the picture of a random image differs from it, bool (H, W)."""
    image = torch.randint(0, 256, (3, HEIGHT, WIDTH)) / 255
    before = (255 * image).round().byte().permute(1, 2, 0).numpy()
    return (np.asarray(picture(image, prediction, classes, threshold)) != before).any(axis=2)


def test_a_box_changes_its_edge_and_its_name_and_nothing_else():
    changed = drawn(objects([(100, 80, 300, 240)], (1,), (0.5,)))
    assert changed[80:240, 100].all() and changed[80:240, 299].all()  # half-open: 299 is the last column
    assert changed[80, 100:300].all() and changed[239, 100:300].all()
    assert not changed[120:230, 110:290].any()
    changed[80:240, 100:300] = False  # the name lies inside, at the top left
    assert not changed.any()


def test_threshold():
    found = objects([(100, 80, 300, 240), (400, 80, 500, 240)], (1, 2), (0.7, 0.3))
    assert not drawn(found, 0.71).any()
    assert drawn(found, 0.7)[240 - 1, 100:300].all() and not drawn(found, 0.7)[:, 350:].any()
    assert drawn(found, 0.3)[240 - 1, 400:500].all()


def test_a_mask_changes_its_pixels_and_no_others():
    mask = torch.zeros(1, HEIGHT, WIDTH, dtype=torch.bool)
    mask[0, 150:250, 200:400] = True
    mask[0, 180:220, 250:350] = False  # a hole
    found = objects([(200, 150, 400, 250)], (1,), (0.9,), mask)
    changed = drawn(found)
    assert changed[mask[0].numpy()].mean() > 0.99  # what had the colour before still has it
    assert not changed[180:220, 255:345].any()
    black = np.asarray(picture(torch.zeros(3, HEIGHT, WIDTH), found, ("cat", "dog")))
    np.testing.assert_allclose(black[230, 250], 0.45 * palette(1)[0], atol=1)
    nothing = drawn(objects([(200, 150, 400, 250)], (1,), (0.9,), torch.zeros_like(mask)))
    assert not nothing[190:245, 210:390].any()


def test_where_masks_overlap_the_better_one_is_seen():
    masks = torch.ones(2, HEIGHT, WIDTH, dtype=torch.bool)
    found = objects([(0, 0, 640, 400)] * 2, (1, 2), (0.9, 0.6), masks)
    below = 0.45 * palette(2)[1].astype(float)
    shown = np.asarray(picture(torch.zeros(3, HEIGHT, WIDTH), found, ("cat", "dog")))[300, 300]
    np.testing.assert_allclose(shown, 0.55 * below + 0.45 * palette(2)[0], atol=2)


def test_boxes_outside_the_picture_are_cut():
    whole = np.asarray(picture(torch.zeros(3, HEIGHT, WIDTH), objects([(-50, -50, 900, 900)], (1,), (0.9,)), ("cat",)))
    for edge in (whole[-1], whole[:, -1]):
        assert (edge == palette(1)[0]).all()


def test_every_object_has_its_own_name():
    image, classes = torch.zeros(3, HEIGHT, WIDTH), ("ox", "hippopotamus")
    one, two = ((50, 100, 90, 140), 1, 0.6), ((350, 300, 390, 340), 2, 0.8)
    alone = [np.asarray(picture(image, objects(*([value] for value in item)), classes)) for item in (one, two)]
    both = np.asarray(picture(image, objects(*zip(one, two, strict=True)), classes))
    assert np.array_equal(both, np.maximum(*alone)) and alone[0].any() and alone[1].any()


def test_small_images_are_enlarged_and_large_ones_are_not():
    found = objects([(10, 20, 30, 40)], (1,), (0.9,))
    small = np.asarray(picture(torch.zeros(3, 120, 160), found, ("cat",)))
    assert small.shape == (480, 640, 3)
    assert (small[80:160, 40] == palette(1)[0]).all() and not small[80:160, 30:40].any()
    assert picture(torch.zeros(3, 300, 1000), found, ("cat",)).size == (1000, 300)


def test_a_label_map_has_the_legend_of_its_classes():
    image, mask = torch.full((3, HEIGHT, WIDTH), 0.5), torch.zeros(HEIGHT, WIDTH, dtype=torch.int64)
    mask[:, 400:] = 7
    classes = [*(f"class {k}" for k in range(7)), "a name that is far too long to be shown whole", "unseen"]
    whole = np.asarray(picture(image, {"mask": mask}, classes))
    assert whole.shape[1] == WIDTH and whole.shape[0] > HEIGHT
    blend = 0.4 * 127.5 + 0.6 * palette(9)[[0, 7]]
    assert np.allclose(whole[:HEIGHT, :400], blend[0], atol=1.5) and np.allclose(
        whole[:HEIGHT, 400:], blend[1], atol=1.5
    )
    shown = [(whole[HEIGHT:] == colour).all(axis=-1).any() for colour in palette(9)]
    assert shown == [k in (0, 7) for k in range(9)]
    every = torch.arange(HEIGHT * WIDTH).reshape(HEIGHT, WIDTH) % 150
    tall = np.asarray(picture(image, {"mask": every}, [f"class {k}" for k in range(150)]))
    assert tall.shape[1] == WIDTH
    assert set(map(tuple, palette(150).tolist())) <= set(map(tuple, tall[HEIGHT:].reshape(-1, 3).tolist()))
    narrow = picture(torch.zeros(3, 640, 40), {"mask": torch.zeros(640, 40, dtype=torch.int64)}, ["a long name"])
    assert narrow.width > 100  # the legend needs the room


def test_colours_are_distinct_and_stay_those_of_a_class():
    many = palette(255).astype(int)
    assert len(np.unique(many, axis=0)) == 255
    assert np.array_equal(palette(20), many[:20]) and np.array_equal(palette(3), many[:3])
    apart = np.linalg.norm(many[:20, None] - many[None, :20], axis=2)
    assert apart[~np.eye(20, dtype=bool)].min() > 45


def test_a_scene_of_every_kind(tmp_path):
    """The three kinds of pictures of a generated scene: to look at, in the folder of this test."""
    s = scene(0, 3, 160)
    image, n = torch.from_numpy(s.image).permute(2, 0, 1) / 255, len(s.labels)
    masks = torch.from_numpy(np.stack([s.instances == k + 1 for k in range(n)]))
    found = objects(s.boxes.tolist(), (s.labels + 1).tolist(), [0.9] * n, masks)
    label_map = torch.from_numpy(np.append(0, s.labels + 1)[np.where(s.instances == 255, 0, s.instances)])
    for name, prediction in (("masks", found), ("map", {"mask": label_map})):
        shown = picture(image, prediction, ("ground", *CLASSES))
        shown.save(tmp_path / f"{name}.png")
        assert shown.width == 640 and shown.mode == "RGB"


# Images --------------------------------------------------------------------------------------------------------------


def test_a_photo_comes_out_upright_and_boxes_refer_to_that(tmp_path):
    upright = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    upright[:100, :200] = 255  # white at the top left
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to show it
    path = tmp_path / "in/photo.png"
    path.parent.mkdir()
    Image.fromarray(np.rot90(upright).copy()).save(path, exif=exif)
    assert Image.open(path).size == (HEIGHT, WIDTH)
    model = Fake(objects([(300, 200, 500, 300)], (1,), (0.9,)))
    predict(model, [path], tmp_path / "out", "voc", ("cat",))
    assert np.array_equal(model.seen[0].permute(1, 2, 0), upright / np.float32(255))
    shown = pixels(tmp_path / "out/photo.png")
    assert (shown[:100, :200] == 255).all() and shown.shape == upright.shape
    assert (shown[200:300, 300] == palette(1)[0]).all()


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
def test_other_modes_become_rgb(tmp_path, mode):
    path = tmp_path / "a.tif"
    Image.new("RGB", (40, 50), "red").convert(mode).save(path)
    image = load_image(path)
    assert image.shape == (3, 50, 40) and image.dtype == torch.float32 and 0 <= image.min() <= image.max() <= 1


def test_folders_and_files(tmp_path):
    for name in ("b.JPG", "a.png", "c.webp", ".hidden.png", "inner/d.png"):
        put(tmp_path / name, 40, 40)
    (tmp_path / "notes.txt").write_text("no image")
    assert [path.name for path in read_images([tmp_path])] == ["a.png", "b.JPG", "c.webp"]
    found = read_images([tmp_path / "inner/d.png", str(tmp_path), tmp_path / "a.png"])  # one of them twice
    assert [path.name for path in found] == ["d.png", "a.png", "b.JPG", "c.webp"]


def test_as_many_pictures_as_images(tmp_path):
    images = [put(tmp_path / f"in/{k}.png", 64, 48) for k in range(4)]
    model = Fake(*[objects([(1, 2, 30, 40)], (1,), (0.9,))] * 4)
    assert predict(model, [tmp_path / "in"], tmp_path / "out", "voc", ("cat",)) == len(images)
    assert len(list((tmp_path / "out").glob("*.png"))) == 4 and len(model.seen) == 4


# Errors --------------------------------------------------------------------------------------------------------------


def test_images_that_cannot_be_used(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"no '.*missing.png'"):
        read_images([tmp_path / "missing.png"])
    with pytest.raises(InputError, match="empty' holds no images"):
        read_images([tmp_path / "empty"])
    with pytest.raises(InputError, match="no images"):
        read_images([])
    for other in ("two/a.jpg", "two/A.png", "two/a.png"):
        one, two = put(tmp_path / "one/a.png", 40, 40), put(tmp_path / other, 40, 40)
        with pytest.raises(InputError, match="same name: rename one"):
            read_images([one, two])
    with pytest.raises(InputError, match="same name"):  # both would be image 7
        read_images([put(tmp_path / "7.png", 40, 40), put(tmp_path / "0007.png", 40, 40)])
    text, small, deep = tmp_path / "text.png", put(tmp_path / "small.png", 31, 40), tmp_path / "deep.png"
    text.write_text("no image")
    Image.fromarray(np.zeros((40, 40), np.uint16)).save(deep)
    cut = put(tmp_path / "cut.jpg")
    cut.write_bytes(cut.read_bytes()[:2000])
    for path, message in ((text, "cannot be read"), (small, "31x40"), (deep, "8 bits"), (cut, "cannot be read")):
        with pytest.raises(InputError, match=message):
            load_image(path)


def test_a_bad_image_is_found_before_the_first_prediction(tmp_path):
    put(tmp_path / "in/a.png")
    (tmp_path / "in/b.png").write_text("no image")
    model = Fake(objects())
    with pytest.raises(InputError, match=r"b.png' cannot be read"):
        predict(model, [tmp_path / "in"], tmp_path / "out", "voc", ("cat",))
    assert not model.seen and not (tmp_path / "out").exists()


def test_nothing_is_overwritten_unless_asked(tmp_path):
    image, out = put(tmp_path / "in/a.png"), tmp_path / "out"
    out.mkdir()  # an empty one is fine
    predict(Fake(objects()), [image], out, "voc", ("cat",))
    (out / "diary.txt").write_text("mine")
    before = {name: (out / name).read_bytes() for name in names(out)}
    found = objects([(100, 80, 300, 240)], (1,), (0.9,))
    with pytest.raises(InputError, match="--overwrite"):
        predict(Fake(found), [image], out, "voc", ("cat",))
    assert {name: (out / name).read_bytes() for name in names(out)} == before
    predict(Fake(found), [image], out, "voc", ("cat",), overwrite=True)
    assert len(json.loads((out / "results.json").read_text())) == 1
    assert (out / "diary.txt").read_text() == "mine" and names(out) == sorted(before)


def test_the_images_themselves_are_safe(tmp_path):
    image = put(tmp_path / "in/a.png")
    before = image.read_bytes()
    for out in (tmp_path / "in", tmp_path / "in/../in"):
        with pytest.raises(InputError, match="holds the images themselves"):
            predict(Fake(objects()), [image], out, "voc", ("cat",), overwrite=True)
    inner = put(tmp_path / "run/masks/a.png")
    with pytest.raises(InputError, match="holds the images themselves"):
        predict(Fake(objects()), [inner], tmp_path / "run", "ade20k", ("cat",), overwrite=True)
    assert image.read_bytes() == before
    with pytest.raises(InputError, match=r"a.png' is a file: choose another place"):
        predict(Fake(objects()), [image], image, "voc", ("cat",))


def test_no_file_grows_under_its_own_name(tmp_path, monkeypatch):
    written, write = [], Path.write_bytes
    monkeypatch.setattr("pathlib.Path.write_bytes", lambda path, content: written.append(path) or write(path, content))
    predict(Fake(objects()), [put(tmp_path / "in/a.png")], tmp_path / "out", "voc", ("cat",))
    assert len(written) == len(names(tmp_path / "out")) and {path.suffix for path in written} == {".tmp"}


def test_an_interrupted_run_leaves_whole_files_only(tmp_path, monkeypatch):
    def disk_full(path, content):
        path.open("wb").write(content[:10])
        raise OSError("no space left")

    image, out = put(tmp_path / "in/a.png"), tmp_path / "out"
    monkeypatch.setattr("pathlib.Path.write_bytes", disk_full)
    with pytest.raises(InputError, match="no space left"):
        predict(Fake(objects()), [image], out, "voc", ("cat",))
    assert names(out) == []


def test_tasks_and_classes_that_cannot_be(tmp_path):
    image = put(tmp_path / "in/a.png")
    with pytest.raises(InputError, match="did you mean coco"):
        predict(Fake(objects()), [image], tmp_path / "out", "cocoo", ("cat",))
    for count, ignore in ((256, 255), (255, 0), (300, 255)):
        with pytest.raises(InputError, match="8 bits"):
            predict(Fake(objects()), [image], tmp_path / "out", "ade20k", ["cat"] * count, ignore=ignore)
    assert not (tmp_path / "out").exists()


# What was computed is kept -------------------------------------------------------------------------------------------


def cut_short(path):
    """An image whose header is whole and whose pixels are not."""
    put(path)
    path.write_bytes(path.read_bytes()[:-200])
    return path


FOUND = objects([(100, 80, 300, 240)], (1,), (0.9,))


def test_an_image_cut_short_is_found_before_the_first_prediction(tmp_path):
    put(tmp_path / "in/a.jpg"), cut_short(tmp_path / "in/b.jpg"), put(tmp_path / "in/c.jpg")
    model = Fake(FOUND, FOUND)
    with pytest.raises(InputError, match=r"b.jpg' cannot be read .* 1 of 3 images .* --skip-bad"):
        predict(model, [tmp_path / "in"], tmp_path / "out", "voc", ("cat",))
    assert not model.seen and not (tmp_path / "out").exists()


def test_bad_images_are_left_out_and_listed(tmp_path):
    put(tmp_path / "in/a.jpg"), cut_short(tmp_path / "in/b.jpg"), put(tmp_path / "in/c.jpg", 31, 31)
    put(tmp_path / "in/d.jpg")
    out = tmp_path / "out"
    with pytest.warns(UserWarning, match="2 images were left out") as warned:
        assert predict(Fake(FOUND, FOUND), [tmp_path / "in"], out, "voc", ("cat",), skip_bad=True) == 2
    assert len(warned) == 1
    assert [r["image_id"] for r in json.loads((out / "results.json").read_text())] == ["a", "d"]
    assert (out / "comp4_det_test_cat.txt").read_text().count("\n") == 2
    assert re.findall(r"/(\w+).jpg", (out / "left_out.txt").read_text(encoding="utf-8")) == ["b", "c"]
    (tmp_path / "in/a.jpg").unlink(), (tmp_path / "in/d.jpg").unlink()
    with pytest.raises(InputError, match="2 of 2 images cannot be used"):
        predict(Fake(), [tmp_path / "in"], tmp_path / "none", "voc", ("cat",), skip_bad=True)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, InputError, SystemExit])
@pytest.mark.parametrize("task", ["voc", "coco", "ade20k"])
def test_what_was_predicted_before_an_error_is_written(tmp_path, error, task):
    class Failing(Fake):
        def forward(self, images):
            if len(self.seen) == 2:
                raise error("out of memory")
            return super().forward(images)

    for name in "abc":
        put(tmp_path / f"in/{name}.png", 64, 64)
    found = objects([(1, 2, 30, 40)], (1,), (0.9,), torch.ones(1, 64, 64) > 0)
    if task == "ade20k":
        found = {"mask": torch.zeros(64, 64, dtype=torch.int64)}
    model, out = Failing(found, found).train(), tmp_path / "out"
    with pytest.raises(error), pytest.warns(UserWarning, match="first 2 of 3 images"):
        predict(model, [tmp_path / "in"], out, task, ("cat",))
    assert model.training and json.loads((out / "classes.json").read_text())
    if task == "ade20k":
        assert names(out / "masks") == ["a.png", "b.png"]
    else:
        assert [r["image_id"] for r in json.loads((out / "results.json").read_text())] == ["a", "b"]


# Names and places ----------------------------------------------------------------------------------------------------


def test_every_name_gets_a_file_of_its_own_that_any_system_allows():
    given = ["a/b", "a_b", "Cat", "cat", "cat ", "x:y?", "CON", "com1.old", "..", "", "\u732b", "a\\b", "e" * 300]
    safe = file_names(given)
    assert list(map(safe.get, given[:8])) == ["a_b_2", "a_b", "Cat", "cat_2", "cat ", "x_y_", "_CON", "_com1.old"]
    assert safe["\u732b"] == "\u732b" and safe["a\\b"] == "a_b_3"
    assert len({name.casefold() for name in safe.values()}) == len(given)
    assert not any(set(name) & set('<>:"/\\|?*') for name in safe.values())
    assert all(0 < len(name.encode()) <= 200 for name in safe.values())


def test_two_classes_of_one_file_name_have_a_file_each(tmp_path):
    found = objects([(1, 2, 30, 40), (5, 6, 20, 20), (7, 8, 20, 20)], (1, 2, 3), (0.9, 0.8, 0.7))
    predict(Fake(found), [put(tmp_path / "in/a.png")], tmp_path / "out", "voc", ("a/b", "a_b", "A_b"))
    texts = {path.name: path.read_text() for path in (tmp_path / "out").glob("*.txt")}
    assert {name[15:-4]: float(text.split()[1]) for name, text in texts.items()} == pytest.approx(
        {"a_b_3": 0.9, "a_b": 0.8, "A_b_2": 0.7}
    )


def test_an_image_whose_name_windows_forbids(tmp_path):
    predict(Fake(FOUND), [put(tmp_path / "in/12:30?.png")], tmp_path / "out", "voc", ("cat",))
    assert "12_30_.png" in names(tmp_path / "out")
    assert (tmp_path / "out/comp4_det_test_cat.txt").read_text().startswith("12:30? 0.8999")


def test_files_are_utf_8_whatever_the_locale(tmp_path, monkeypatch):
    monkeypatch.setattr("locale.getpreferredencoding", lambda *_: "cp1252")
    out, name = tmp_path / "out", "\u732b"
    with pytest.warns(UserWarning, match="left out"):
        cut_short(tmp_path / f"in/{name}.jpg")
        predict(Fake(FOUND), [tmp_path / "in", put(tmp_path / "b.png")], out, "voc", (name,), skip_bad=True)
    assert json.loads((out / "classes.json").read_bytes().decode("utf-8")) == {"1": name}
    assert (out / f"comp4_det_test_{name}.txt").is_file() and name in (out / "left_out.txt").read_bytes().decode()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("below a file", "is not a folder: choose another place"),
        ("dangling link", "is a link to something that does not exist: remove it, or choose another place"),
        ("masks is a file", "masks' is a file: choose another place"),
        ("a folder of that name", "a.png' is a folder: choose another place"),
    ],
)
def test_places_that_cannot_be_written_are_found_first(tmp_path, kind, message):
    image, out = put(tmp_path / "in/a.png"), tmp_path / "out"
    if kind == "below a file":
        out = image / "out/deep"
    elif kind == "dangling link":
        out.symlink_to(tmp_path / "nowhere")
    elif kind == "masks is a file":
        out.mkdir()
        (out / "masks").write_text("mine")
    else:
        (out / "a.png").mkdir(parents=True)
    model = Fake(FOUND)
    with pytest.raises(InputError, match=message):
        predict(model, [image], out, "voc", ("cat",), overwrite=True)
    assert not model.seen


def test_missing_folders_are_made_and_links_followed(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    predict(Fake(FOUND), [put(tmp_path / "in/a.png")], tmp_path / "link/x/y", "voc", ("cat",))
    assert (tmp_path / "real/x/y/results.json").is_file()


# The same scores as evaluation, the dataset's own ids ----------------------------------------------------------------


@pytest.fixture(scope="module")
def sizes(tmp_path_factory):
    """A VOC-shaped folder of images of several sizes; two are photographs that EXIF turns."""
    root = tmp_path_factory.mktemp("sizes")
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (root / folder).mkdir(parents=True)
    rng = np.random.default_rng(0)
    shapes = {"1": (96, 64), "2": (64, 96), "3": (80, 80), "turned": (96, 48), "stored": (96, 48)}
    for name, (width, height) in shapes.items():
        exif = Image.Exif()
        exif[0x0112] = 6 if name in ("turned", "stored") else 1
        Image.fromarray(rng.integers(0, 255, (height, width, 3), np.uint8)).save(
            root / f"JPEGImages/{name}.png", exif=exif
        )
        size = (height, width) if name == "turned" else (width, height)
        text = "<annotation><size><width>{}</width><height>{}</height></size>{}</annotation>"
        box = "<bndbox><xmin>9</xmin><ymin>9</ymin><xmax>40</xmax><ymax>40</ymax></bndbox>"
        things = "".join(f"<object><name>{thing}</name>{box}</object>" for thing in ("cat", "dog"))
        (root / f"Annotations/{name}.xml").write_text(text.format(*size, things))
    (root / "ImageSets/Main/val.txt").write_text("\n".join(shapes))
    return root


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_predict_finds_what_evaluation_finds(sizes, tmp_path, monkeypatch, precision):
    settings = {"pretrained": False, "min_size": 64, "max_size": 96, "fpn_channels": 16, "batch": 1, "workers": 0}
    recipe = load_recipe("shapes", {**settings, "precision": precision, "eval_split": "val"})
    model = build_model(recipe, 2)
    torch.nn.init.zeros_(model.head.classification_head.cls_logits.bias)  # else nothing scores above .05
    seen, record = {}, voc.record

    def spy(prediction, target):
        seen[target["image_id"]] = prediction
        return record(prediction, target)

    monkeypatch.setattr(voc, "record", spy)
    metrics = evaluate(model, voc.dataset(recipe, sizes, "val"), recipe, torch.device("cpu"))
    paths = sorted((sizes / "JPEGImages").iterdir())
    known = voc.known_images(recipe, sizes, paths)
    predict(model, paths, tmp_path / "out", "voc", ("cat", "dog"), known=known, precision=precision)
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert metrics["ap50_11_point"] is not None and len(results) > 100
    for name in ("1", "2", "3", "stored"):
        mine = [r for r in results if str(r["image_id"]) == name]
        assert [r["score"] for r in mine] == seen[name]["scores"].tolist()
        corners = [[x, y, x + w, y + h] for x, y, w, h in (r["bbox"] for r in mine)]
        np.testing.assert_allclose(corners, seen[name]["boxes"], rtol=0, atol=1e-4)


def test_exif_turns_an_image_unless_its_annotation_has_the_size_as_stored(sizes):
    paths = sorted((sizes / "JPEGImages").iterdir())
    known = voc.known_images(load_recipe("shapes"), None, paths)
    assert {path.stem: known[path] for path in paths} == {
        "1": Known(None, (96, 64)),
        "2": Known(None, (64, 96)),
        "3": Known(None, (80, 80)),
        "turned": Known(None, (48, 96)),
        "stored": Known(None, (96, 48)),
    }
    shapes = {path.stem: tuple(load_image(path, known[path].size).shape[1:]) for path in paths}
    assert shapes["turned"] == (96, 48) and shapes["stored"] == (48, 96)


def command(*arguments):
    result = CliRunner().invoke(cli.cli, [str(a) for a in arguments])
    if result.exception and not isinstance(result.exception, SystemExit | InputError):
        raise result.exception
    return result


@pytest.fixture(scope="module")
def coco_run(tmp_path_factory):
    """A run on a COCO-shaped folder whose images have names that are not their ids."""
    root = tmp_path_factory.mktemp("coco")
    write_scenes(root / "data", "coco", train=2, val=2, seed=0, size=64)
    for split in ("train2017", "val2017"):
        file = root / f"data/annotations/instances_{split}.json"
        content = json.loads(file.read_text())
        for k, image in enumerate(content["images"]):
            new = f"{split}_{k}.jpg"
            (root / "data" / split / image["file_name"]).rename(root / "data" / split / new)
            image["file_name"] = new
        file.write_text(json.dumps(content))
    sets = [f"{k}={v}" for k, v in {
        "pretrained": False, "min_sizes": [64], "min_size": 64, "max_size": 64, "fpn_channels": 16, "head_channels": 16,
        "steps": 1, "batch": 1, "proposals": 50,
    }.items()]  # fmt: skip
    words = [word for setting in sets for word in ("--set", setting)]
    command("train", "coco", "--root", root / "data", "--recipe", "coco-nano", "--out", root / "run", *words)
    return root


def test_json_has_the_datasets_own_ids(coco_run):
    """What loadRes takes: results of the run's own images, or of images that a given file knows."""
    out, file = coco_run / "out", coco_run / "data/annotations/instances_val2017.json"
    own = command("predict", coco_run / "run", coco_run / "data/val2017", "--out", out, "--json")
    results = json.loads(own.stdout)
    assert results == json.loads((out / "results.json").read_text()) and results
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(file)
        truth.loadRes(str(out / "results.json"))
    assert {r["image_id"] for r in results} == set(truth.imgs)
    moved = coco_run / "moved"
    (coco_run / "data/val2017").rename(moved)
    try:
        plain = command("predict", coco_run / "run", moved, "--out", coco_run / "plain", "--json")
        given = command(
            "predict", coco_run / "run", moved, "--out", coco_run / "given", "--json", "--annotations", file
        )
    finally:
        moved.rename(coco_run / "data/val2017")
    assert json.loads(given.stdout) == results
    assert {r["image_id"] for r in json.loads(plain.stdout)} == {"val2017_0", "val2017_1"}


def test_categories_are_those_of_the_file_that_is_given(coco_run):
    file = coco_run / "other.json"
    content = json.loads((coco_run / "data/annotations/instances_val2017.json").read_text())
    for category in content["categories"]:
        category["id"] += 1000
    file.write_text(json.dumps(content))
    folder = coco_run / "data/val2017"
    given = command("predict", coco_run / "run", folder, "--out", coco_run / "ids", "--json", "--annotations", file)
    assert {r["category_id"] for r in json.loads(given.stdout)} <= {i + 1000 for i in COCO_IDS}


def test_a_command_with_a_bad_image_says_what_to_do(coco_run, tmp_path):
    good, out = coco_run / "data/val2017/val2017_0.jpg", tmp_path / "out"
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(good.read_bytes()[:-100])
    refused = command("predict", coco_run / "run", good, bad, "--out", out)
    assert isinstance(refused.exception, InputError) and "--skip-bad" in str(refused.exception) and not out.exists()
    with pytest.warns(UserWarning, match=r"bad\.jpg"):
        done = command("predict", coco_run / "run", good, bad, "--out", out, "--skip-bad")
    assert "1 images" in done.stdout and (out / "results.json").is_file()
    for options in (["--annotations", tmp_path / "none.json"], ["--annotations", good]):
        refused = command("predict", coco_run / "run", good, "--out", tmp_path / "x", *options)
        assert "cannot be read as JSON" in str(refused.exception)


def test_two_images_of_one_number_are_refused(tmp_path):
    paths = [put(tmp_path / "a.png", 64, 64), put(tmp_path / "7.png", 64, 64)]
    with pytest.raises(InputError, match="would both be image 7"):
        predict(Fake(), paths, tmp_path / "out", "coco", ("cat",), known={paths[0]: Known(7, (64, 64))})
    with pytest.raises(InputError, match=r"64x64, its annotation says 60x64"):
        predict(Fake(), paths, tmp_path / "out", "coco", ("cat",), known={paths[0]: Known(8, (60, 64))})
