"""The COCO reader, its augmentation and the metric, held to pycocotools and to cases worked by hand."""

import contextlib
import io
import json
import pickle
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from e3va_lite.datasets import augment as augmentation
from e3va_lite.datasets.coco import COCOInstances, lengths
from e3va_lite.datasets.shapes import CLASSES, COCO_IDS, write_scenes
from e3va_lite.errors import InputError
from e3va_lite.recipes.schema import load_recipe
from e3va_lite.tasks.coco_metric import average_precision
from e3va_lite.tasks.registry import task_module
from e3va_lite.training.sampling import seeded

WIDTH, HEIGHT = 64, 48
COCO_TASK = task_module("coco")


@pytest.fixture(autouse=True)
def no_stray_warnings():
    """A warning that a test does not expect is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # not pycocotools' quarrels with numpy
        yield


def thing(number=1, image=1, category=3, box=(10, 5, 20, 15), **more):
    """An annotation: a rectangle of ``x, y, width, height``, as a polygon unless told otherwise."""
    x, y, w, h = box
    polygon = [x, y, x + w, y, x + w, y + h, x, y + h]
    about = {"id": number, "image_id": image, "category_id": category, "bbox": list(box), "area": w * h, "iscrowd": 0}
    return about | {"segmentation": [polygon]} | more


def put(root, *annotations, images=2, split="train", categories=((3, "cell"), (7, "dot"))):
    """Write a COCO-shaped folder with images 1, 2, ... and return its root."""
    (root / split).mkdir(parents=True, exist_ok=True)
    (root / "annotations").mkdir(exist_ok=True)
    for number in range(1, images + 1):
        pixels = np.random.default_rng(number).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
        Image.fromarray(pixels).save(root / split / f"{number}.png")
    content = {
        "images": [{"id": n, "file_name": f"{n}.png", "width": WIDTH, "height": HEIGHT} for n in range(1, images + 1)],
        "annotations": list(annotations),
        "categories": [{"id": i, "name": name} for i, name in categories],
    }
    (root / f"annotations/instances_{split}.json").write_text(json.dumps(content))
    return root


def area_of(box, size=(HEIGHT, WIDTH)):
    mask = np.zeros(size, np.uint8, order="F")
    x, y, w, h = box
    mask[y : y + h, x : x + w] = 1
    return mask


def uncompressed(mask):
    flat = mask.ravel(order="F")
    edges = np.flatnonzero(np.diff(flat, prepend=0))
    return {"size": list(mask.shape), "counts": np.diff([0, *edges, flat.size]).tolist()}


# What is read --------------------------------------------------------------------------------------------------------


def test_item(tmp_path):
    """Ids with gaps become labels in their order, an image without objects stays, no `info` or `licenses` needed."""
    crowd = thing(12, box=(0, 0, 30, 30), iscrowd=1, segmentation=uncompressed(area_of((0, 0, 30, 30))))
    root = put(
        tmp_path, thing(10, category=7), thing(11, box=(0, 0, 64, 48)), crowd, categories=((7, "dot"), (3, "cell"))
    )
    dataset = COCOInstances(root, "train")
    assert len(dataset) == 2 and dataset.classes == ["cell", "dot"] and dataset.category_ids == [3, 7]
    image, target = dataset[0]
    assert image.shape == (3, HEIGHT, WIDTH) and image.dtype == torch.float32 and image.is_contiguous()
    stored = np.asarray(Image.open(root / "train/1.png"), np.float32) / 255
    assert np.allclose(image.numpy().transpose(1, 2, 0), stored, atol=1e-6)
    assert target["boxes"].tolist() == [[10, 5, 30, 20], [0, 0, 64, 48]] and target["boxes"].dtype == torch.float32
    assert target["labels"].tolist() == [2, 1] and target["labels"].dtype == torch.int64
    assert target["masks"].shape == (2, HEIGHT, WIDTH) and target["masks"].dtype == torch.uint8
    assert np.array_equal(target["masks"][0], area_of((10, 5, 20, 15))) and target["masks"][1].all()
    assert target["image_id"] == 1 and target["file"] == str(root / "train/1.png")
    _, empty = dataset[1]
    assert empty["boxes"].shape == (0, 4) and empty["labels"].shape == (0,)
    assert empty["masks"].shape == (0, HEIGHT, WIDTH)
    again = pickle.loads(pickle.dumps(dataset))[0][1]  # as workers need it
    assert torch.equal(again["masks"], target["masks"])


def test_three_forms_of_masks(tmp_path):
    mask = area_of((3, 4, 30, 9))
    mask[6:9, 10:20] = 0  # a hole; and runs that shrink and grow
    mask[::3, 40:] = 1
    compressed = coco_mask.encode(mask)
    forms = [uncompressed(mask), {"size": [HEIGHT, WIDTH], "counts": compressed["counts"].decode()}]
    parts = [[3, 4, 33, 4, 33, 13, 3, 13], [40, 20, 50, 20, 50, 30, 40, 30]]
    root = put(tmp_path, *(thing(i, segmentation=form) for i, form in enumerate([*forms, parts], start=1)))
    masks = COCOInstances(root, "train")[0][1]["masks"].numpy()
    assert np.array_equal(masks[0], mask) and np.array_equal(masks[1], mask)
    assert np.array_equal(masks[2], area_of((3, 4, 30, 9)) | area_of((40, 20, 10, 10)))


def test_compressed_lengths_are_pycocotools_own():
    rng = np.random.default_rng(0)
    for _ in range(200):
        mask = (rng.random(rng.integers(1, 60, 2)) < rng.random()).astype(np.uint8)
        counts = coco_mask.encode(np.asfortranarray(mask))["counts"].decode()
        assert lengths(counts) == uncompressed(mask)["counts"] and sum(lengths(counts)) == mask.size
    assert lengths("P") == lengths("0\x80") == []  # ends early, is no such text


def test_own_folders(tmp_path):
    put(tmp_path, thing(), split="fit")
    (tmp_path / "fit").rename(tmp_path / "pictures")
    (tmp_path / "annotations/instances_fit.json").rename(tmp_path / "fit.json")
    dataset = COCOInstances(tmp_path, "fit", images="pictures", annotations="{split}.json")
    assert dataset[0][1]["labels"].tolist() == [1]
    recipe = load_recipe("coco-nano", {"images": "pictures", "annotations": "'{split}.json'"})
    assert COCO_TASK.dataset(recipe, tmp_path, "fit")[0][1]["labels"].tolist() == [1]


def test_another_split_is_mapped_by_name(tmp_path):
    put(tmp_path, thing(), thing(2, category=7), split="train")
    put(
        tmp_path,
        thing(category=1),
        thing(2, category=5),
        split="val",
        categories=((1, "dot"), (5, "cell"), (9, "none")),
    )
    train = COCOInstances(tmp_path, "train")
    val = COCOInstances(tmp_path, "val", classes=train.classes)
    assert val.classes == ["cell", "dot"] and val[0][1]["labels"].tolist() == [2, 1] and val.category_ids == [5, 1]
    wider = COCOInstances(tmp_path, "train", classes=["bolt", "dot", "cell"])  # a class that this file does not know
    assert wider[0][1]["labels"].tolist() == [3, 2] and wider.category_ids == [8, 7, 3]
    assert average_precision(wider, [], "bbox")["by_class"] == {"bolt": None, "dot": 0.0, "cell": 0.0}
    with pytest.raises(
        InputError, match=r"annotations of an unknown class, first annotation 2 .*'dot'; known are cell\)"
    ):
        COCOInstances(tmp_path, "train", classes=["cell"])
    for classes in ([], ["cell", "cell"]):
        with pytest.raises(InputError, match="give every class once"):
            COCOInstances(tmp_path, "train", classes=classes)


def test_images_are_turned_only_if_the_annotation_says_so(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees
    root = put(tmp_path, thing(), images=1)
    for stored, shown in (((WIDTH, HEIGHT), False), ((HEIGHT, WIDTH), True)):
        picture = Image.fromarray(np.zeros((stored[1], stored[0], 3), np.uint8))
        picture.paste((255, 0, 0), (0, 0, 20, stored[1]))  # red on the left as stored, above as shown
        picture.save(root / "train/1.png", exif=exif)
        image, _ = COCOInstances(root, "train")[0]
        assert image.shape == (3, HEIGHT, WIDTH)
        red = image[0] > 0.5
        assert red[:20].all() and not red[20:].any() if shown else red[:, :20].all() and not red[:, 20:].any()
    picture = Image.fromarray(np.zeros((WIDTH, HEIGHT, 3), np.uint8))
    picture.save(root / "train/1.png")  # turned, without EXIF to explain it
    with pytest.raises(InputError, match=r"train/1.png' is 48x64, its annotation says 64x48"):
        COCOInstances(root, "train")[0]


def test_slips_are_mended_with_one_warning(tmp_path):
    root = put(
        tmp_path,
        thing(1, box=(5, 5, 0, 9)),
        thing(2, box=(5, 5, -3, 9)),
        thing(3, box=(64, 5, 9, 9), segmentation=[[1, 1, 9, 1, 9, 9]]),
        thing(4, box=(50, 40, 30, 30)),
        thing(5, segmentation=[]),
        thing(6, segmentation=[[1, 1, 5, 5]]),
        thing(7, segmentation=[[10, 5, 30, 5, 30, 20], [3, 3]]),
        thing(8, box=(0, 0, 64.4, 48.4)),  # less than a pixel: not worth a word
        thing(9, iscrowd=1, segmentation=[]),  # training never sees it
    )
    with pytest.warns(UserWarning) as caught:
        dataset = COCOInstances(root, "train")
    assert len(caught) == 1
    text = str(caught[0].message)
    assert str(root / "annotations/instances_train.json") in text
    assert "boxes of zero area, dropped: 1 (annotation 1 of 1.png)" in text
    assert "boxes with exchanged corners, swapped: 1 (annotation 2 of 1.png)" in text
    assert "boxes outside their image, dropped: 1 (annotation 3 of 1.png)" in text
    assert "boxes reaching out of their image, cut: 1 (annotation 4 of 1.png)" in text
    assert "objects without a pixel in their mask, dropped: 2 (annotation 5 of 1.png, annotation 6 of 1.png)" in text
    assert "polygons of fewer than three points, left out: 2" in text
    boxes = dataset[0][1]["boxes"].tolist()
    assert boxes == [[2, 5, 5, 14], [50, 40, 64, 48], [10, 5, 30, 20], [0, 0, 64, 48]]
    assert dataset[0][1]["masks"].flatten(1).any(1).all()
    with pytest.raises(InputError, match=r"zero area, dropped: 1 .*go without strict"):
        COCOInstances(root, "train", strict=True)


def test_missing_splits(tmp_path):
    put(tmp_path, split="fit")
    put(tmp_path, split="val")
    with pytest.raises(InputError, match=r"there is no '.*instances_train.json': choose a split out of fit, val"):
        COCOInstances(tmp_path, "train")
    with pytest.raises(InputError, match=r"there is no .*: give a COCO-shaped folder"):
        COCOInstances(tmp_path / "nowhere", "train")


# Augmentation --------------------------------------------------------------------------------------------------------

COLOURS = ((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0))


@pytest.fixture
def painted(tmp_path):
    """An image of 500x400 in which each object is painted in a colour of its own, on black."""
    boxes = ((20, 30, 120, 90), (300, 40, 150, 200), (60, 250, 200, 120), (471, 379, 22, 17))
    (tmp_path / "train").mkdir()
    (tmp_path / "annotations").mkdir()
    picture = Image.new("RGB", (500, 400))
    annotations = []
    for number, (box, colour) in enumerate(zip(boxes, COLOURS, strict=True), start=1):
        x, y, w, h = box
        mask = area_of(box, (400, 500))
        mask[y : y + h // 2, x : x + w // 2] = 0  # an L: left and right, up and down look different
        picture.paste(colour, mask=Image.fromarray(mask * 255))
        annotations.append(thing(number, box=box, segmentation=uncompressed(mask)))
    picture.save(tmp_path / "train/1.png")
    content = {
        "images": [{"id": 1, "file_name": "1.png", "width": 500, "height": 400}],
        "annotations": annotations,
        "categories": [{"id": 3, "name": "cell"}],
    }
    (tmp_path / "annotations/instances_train.json").write_text(json.dumps(content))
    return tmp_path


def test_image_boxes_and_masks_stay_together(painted):
    """Wherever an object went, its mask covers its colour and its box encloses its mask."""
    dataset = COCOInstances(painted, "train", train=True, crop=True)
    plain = COCOInstances(painted, "train")[0]
    seen = {"mirrored": 0, "cropped": 0, "lost": 0}
    for i in range(90):
        with seeded(7, i):
            image, target = dataset[0]
        height, width = image.shape[-2:]
        cropped = (height, width) != (400, 500)
        seen["cropped"] += cropped
        assert target["masks"].shape == (len(target["boxes"]), height, width) and image.is_contiguous()
        assert len(target["labels"]) == len(target["boxes"])
        colours = [image[:, mask.bool()].mean(1) for mask in target["masks"]]
        found = [int((torch.tensor(COLOURS) / 255 - colour).abs().sum(1).argmin()) for colour in colours]
        assert found == sorted(set(found)), "every mask lies on one object, in the old order"
        for which, mask, box in zip(found, target["masks"], target["boxes"], strict=True):
            painted_here = (image - torch.tensor(COLOURS[which])[:, None, None] / 255).abs().sum(0) < 0.75
            wrong = (painted_here != mask.bool()).sum()
            assert wrong == 0 if not cropped else wrong < 1.2 * (mask.shape[0] + mask.shape[1])  # borders are blurred
            rows, columns = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
            tight = torch.stack([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
            # An L that a crop has robbed of an arm leaves its box, which is only cut, too wide.
            inside = ((tight[:2] >= box[:2] - 1.01) & (tight[2:] <= box[2:] + 1.01)).all()
            assert inside and (cropped or torch.equal(tight.float(), box))
        for which in set(range(4)) - set(found):  # gone from the targets: gone from the image, but for a blurred rim
            assert ((image - torch.tensor(COLOURS[which])[:, None, None] / 255).abs().sum(0) < 0.3).sum() < 2 * height
        seen["lost"] += len(found) < 4
        if cropped:
            # A short side of 400, 500 or 600; the image is 400x500, so it comes to 400x500, 500x625 or 600x750.
            assert 384 <= height <= 600 and 384 <= width <= 600
        elif torch.equal(image, plain[0].flip(-1)):
            seen["mirrored"] += 1
            assert torch.equal(target["masks"], plain[1]["masks"].flip(-1))
        else:
            assert torch.equal(image, plain[0]) and torch.equal(target["boxes"], plain[1]["boxes"])
    assert 30 < seen["cropped"] < 60 and 12 < seen["mirrored"] < 35 and seen["lost"] > 5


def test_random_numbers_come_from_the_global_state_alone(painted):
    dataset = COCOInstances(painted, "train", train=True, crop=True)

    def item(*key):
        with seeded(*key):
            image, target = dataset[0]
        return image, target["boxes"], target["masks"]

    for i in range(6):
        assert all(torch.equal(a, b) for a, b in zip(item(1, i), item(1, i), strict=True))
    assert len({item(1, i)[0].shape for i in range(20)}) > 5
    quiet = COCOInstances(painted, "train", crop=True)
    assert all(torch.equal(quiet[0][0], quiet[0][0]) for _ in range(5)), "without train, nothing is random"


def test_objects_without_a_pixel_in_the_crop_are_gone():
    """However much of their box is still there; and a box of which nothing is left takes its mask along."""
    masks = torch.zeros(2, 600, 600, dtype=torch.uint8)
    masks[0, 540, 540] = masks[1, 300, 300] = 1
    boxes = torch.tensor([[0.0, 0.0, 600.0, 600.0], [599.999, 0.0, 600.0, 600.0]])
    counts = []
    for seed in range(30):
        torch.manual_seed(seed)
        _, target = augmentation._cropped(
            torch.zeros(3, 600, 600), {"boxes": boxes, "labels": torch.tensor([1, 2]), "masks": masks}
        )
        assert 2 not in target["labels"] and len(target["boxes"]) == len(target["masks"]) == target["masks"].sum()
        counts.append(len(target["labels"]))
    assert set(counts) == {0, 1}


@pytest.mark.parametrize("size, largest", [((300, 200), 600), ((3000, 40), 600)])
def test_crops_of_small_long_and_empty_images(size, largest):
    width, height = size
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    target = {**empty, "masks": torch.zeros(0, height, width, dtype=torch.uint8), "image_id": 3}
    for seed in range(30):
        torch.manual_seed(seed)
        image, cropped = augmentation.augment(torch.rand(3, height, width), target, crop=True)
        assert cropped["masks"].shape == (0, *image.shape[-2:]) and cropped["boxes"].shape == (0, 4)
        assert cropped["image_id"] == 3
        if image.shape != (3, height, width):
            assert max(image.shape[-2:]) <= largest


def test_crop_sizes_reach_their_limits(monkeypatch):
    """Sides are drawn from 384 to 600, both included, and never exceed the image."""
    sizes = set()
    target = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0), "masks": torch.zeros(0, 400, 700)}
    monkeypatch.setattr(augmentation, "CROP", (397, 399))
    for seed in range(60):
        torch.manual_seed(seed)
        sizes.add(tuple(augmentation._cropped(torch.zeros(3, 398, 700), target)[0].shape[-2:]))
    assert sizes == {(h, w) for h in (397, 398) for w in (397, 398, 399)}


# The metric ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """Generated scenes with crowds, empty images and category ids with gaps."""
    root = tmp_path_factory.mktemp("scenes") / "coco"
    write_scenes(root, "coco", train=1, val=25, seed=0, size=160)
    return root


def noisy(dataset, rng):
    """Records of a middling detector: objects moved, relabelled, doubled, forgotten, invented."""
    records = []
    for i in range(len(dataset)):
        _, target = dataset[i]
        height, width = target["masks"].shape[-2:]
        boxes, labels, masks = [], [], []
        for box, label, mask in zip(target["boxes"], target["labels"], target["masks"], strict=True):
            for _ in range(rng.choice(4, p=(0.2, 0.6, 0.1, 0.1))):
                x, y = rng.integers(-2, 3, 2).tolist()
                masks.append(torch.roll(mask, (y, x), (0, 1)))
                boxes.append((box + torch.tensor([x, y, x, y]) + rng.normal(0, 1)).tolist())
                labels.append(int(label) if rng.random() < 0.8 else int(rng.integers(1, len(dataset.classes) + 1)))
        for _ in range(rng.integers(0, 5)):
            x, y = rng.integers(0, width - 20), rng.integers(0, height - 20)
            boxes.append([x, y, x + 20, y + 20])
            masks.append(torch.from_numpy(area_of((x, y, 20, 20), (height, width)).copy()))
            labels.append(int(rng.integers(1, len(dataset.classes) + 1)))
        prediction = {
            "boxes": torch.tensor(boxes).reshape(-1, 4),
            "labels": torch.tensor(labels, dtype=torch.int64),
            "scores": torch.from_numpy(rng.random(len(boxes)).astype(np.float32)),
            "masks": torch.stack(masks).bool() if masks else torch.zeros(0, height, width, dtype=torch.bool),
        }
        records.append(COCO_TASK.record(prediction, target))
    return records


def by_pycocotools(annotations: Path, results: list[dict], kind: str, folder: Path):
    """The plain way, out of files."""
    (folder / "results.json").write_text(json.dumps(results))
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(annotations))
        found = truth.loadRes(str(folder / "results.json"))
        run = COCOeval(truth, found, kind)
        run.evaluate()
        run.accumulate()
        run.summarize()
    return run


def test_summary_is_what_pycocotools_says_of_files(scenes, tmp_path, capsys):
    dataset = COCOInstances(scenes, "val2017")
    assert dataset.category_ids == list(COCO_IDS) and len(dataset) == 25
    assert any(a["iscrowd"] for a in dataset.ground_truth()["annotations"])
    records = noisy(dataset, np.random.default_rng(0))
    summary = COCO_TASK.summary(records, dataset)
    path = scenes / "annotations/instances_val2017.json"
    results = [{**r, "category_id": COCO_IDS[r["category_id"] - 1]} for image in records for r in image]
    assert capsys.readouterr().out == ""
    json.dumps(summary)
    for name, kind in (("box", "bbox"), ("mask", "segm")):
        # For masks the official way is to leave the boxes out: areas are the masks' then.
        given = [{k: v for k, v in r.items() if kind == "bbox" or k != "bbox"} for r in results]
        run = by_pycocotools(path, given, kind, tmp_path)
        for key, value in zip(("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large"), run.stats, strict=False):
            assert summary[f"{name}_{key}"] == (None if value == -1 else round(value, 4)), (name, key)
        if kind == "bbox":
            for k, label in enumerate(CLASSES):
                values = run.eval["precision"][:, :, k, 0, 2]
                assert summary["by_class"][label] == round(values[values > -1].mean(), 4)
    assert 0.1 < summary["box_ap"] < summary["box_ap50"] < 0.9 and summary["mask_ap"] != summary["box_ap"]
    assert summary["mask_ap_large"] is None and summary[COCO_TASK.METRIC] == summary["box_ap"]


def test_nothing_found_is_zero_not_a_crash(scenes):
    dataset = COCOInstances(scenes, "val2017")
    summary = COCO_TASK.summary([[] for _ in range(len(dataset))], dataset)
    assert summary["box_ap"] == summary["mask_ap"] == 0.0 and set(summary["by_class"].values()) == {0.0}


def result(box, score, category=3):
    runs = coco_mask.encode(area_of(box))
    return {
        "image_id": 1,
        "category_id": category,
        "bbox": list(box),
        "score": score,
        "segmentation": {"size": runs["size"], "counts": runs["counts"].decode()},
    }


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_crowd_worked_by_hand(tmp_path, kind):
    """One object and a crowd. What lies within the crowd is neither right nor wrong; what does not is wrong.

    The best detection is false, the second finds the object: precision 1/2 at every recall, so AP is 1/2 at each of
    the overlaps. Two more of a high score lie in the crowd: were they wrong, AP would be 1/4, were the crowd to be
    found, recall would stop at 1/2.
    """
    crowd = area_of((0, 20, 30, 28))
    single, heap = thing(1, box=(40, 5, 20, 15)), thing(2, box=(0, 20, 30, 28), iscrowd=1)
    dataset = COCOInstances(put(tmp_path, single, heap | {"segmentation": uncompressed(crowd)}), "train")
    results = [result((45, 30, 10, 10), 0.9), result((40, 5, 20, 15), 0.5)]
    inside = [result((1, 21, 10, 10), 0.95), result((5, 25, 20, 15), 0.93)]
    assert average_precision(dataset, results + inside, kind)["ap"] == pytest.approx(0.5, abs=1e-4)
    assert average_precision(dataset, results + inside, kind)["by_class"] == {"cell": 0.5, "dot": None}
    plain = COCOInstances(put(tmp_path, single), "train")  # the same without the crowd
    assert average_precision(plain, results + inside, kind)["ap"] == pytest.approx(0.25, abs=1e-4)


def test_an_object_with_the_id_zero_counts(tmp_path):
    """pycocotools on its own takes the id of a found object for false where it is 0."""
    dataset = COCOInstances(put(tmp_path, thing(0)), "train")
    assert average_precision(dataset, [result((10, 5, 20, 15), 0.9)], "bbox")["ap"] == 1.0


def test_record_is_small_and_exact():
    masks = torch.zeros(2, HEIGHT, WIDTH, dtype=torch.bool)
    masks[0, 5:20, 10:30] = True
    prediction = {
        "boxes": torch.tensor([[10.0, 5.0, 30.5, 20.0], [0, 0, 5, 5]]),
        "scores": torch.tensor([0.75, 0.5]),
        "labels": torch.tensor([2, 1]),
        "masks": masks,
    }
    first, second = COCO_TASK.record(prediction, {"image_id": 42})
    assert first["image_id"] == 42 and first["category_id"] == 2 and type(first["category_id"]) is int
    assert first["bbox"] == [10, 5, 20.5, 15] and first["score"] == 0.75
    assert np.array_equal(coco_mask.decode(first["segmentation"]), masks[0])
    assert not coco_mask.decode(second["segmentation"]).any()
    json.dumps([first, second])
    nothing = {"boxes": torch.zeros(0, 4), "scores": torch.zeros(0), "labels": torch.zeros(0)}
    assert COCO_TASK.record({**nothing, "masks": torch.zeros(0, HEIGHT, WIDTH)}, {"image_id": 1}) == []


# Recipes, real images ------------------------------------------------------------------------------------------------


def test_recipes():
    paper, nano = (load_recipe(name, task="coco") for name in ("coco", "coco-nano"))
    assert paper.min_sizes == list(range(480, 801, 32)) and paper.max_size == 1333 and paper.crop
    assert (paper.epochs, paper.milestones, paper.schedule) == (36, [27, 33], "step")
    assert paper.backbone == "swin_base_patch4_window7_224" and (paper.lr, paper.weight_decay) == (1e-4, 0.05)
    assert nano.backbone == "swin_nano" and not nano.crop and max(nano.min_sizes) <= nano.min_size <= nano.max_size


def test_real_coco(real_data):
    """Genuine images with crowds: the annotations fed back as detections are perfect, and crowds do not count."""
    root = Path(real_data) / "coco_tiny"
    train = COCOInstances(root, "train2017", train=True, crop=True)
    assert len(train) == 80 and len(train.classes) == 80
    dataset = COCOInstances(root, "val2017", classes=train.classes)
    truth = dataset.ground_truth()["annotations"]
    crowds = [a for a in truth if a["iscrowd"]]
    assert len(truth) == 815 and crowds
    records, total = [], 0
    for image, target in (dataset[i] for i in range(len(dataset))):
        assert image.shape[-2:] == target["masks"].shape[-2:]
        total += len(target["boxes"])
        scores = torch.ones(len(target["boxes"]))
        records.append(COCO_TASK.record({**target, "scores": scores, "masks": target["masks"].bool()}, target))
    assert total == len(truth) - len(crowds)
    summary = COCO_TASK.summary(records, dataset)
    assert summary["box_ap"] == summary["mask_ap"] == 1.0 and set(summary["by_class"].values()) == {1.0}
    for i in range(0, 80, 16):
        with seeded(0, i):
            image, target = train[i]
        assert target["masks"].flatten(1).any(1).all() and torch.isfinite(image).all()
