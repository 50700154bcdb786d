"""Generated scenes: the same bytes for the same seed, and what each layout says is what the scene shows."""

import contextlib
import csv
import functools
import io
import json
import xml.etree.ElementTree as ET
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from e3va_lite.datasets import shapes
from e3va_lite.datasets.shapes import (
    CLASSES,
    COCO_IDS,
    FIRST_VAL,
    VOID,
    WORLDS,
    WRITERS,
    _annotate,
    _coco_region,
    _decoys,
    _voc_palette,
    scene,
    write_scenes,
)
from e3va_lite.datasets.silhouettes import OUTLINES, fill
from e3va_lite.datasets.voc import VOCDetection
from e3va_lite.errors import InputError
from e3va_lite.experiments.pretrain_shapes import PRETRAIN_OUTLINES

TRAIN, VAL, SEED, SIZE = 28, 6, 4, 144
SPLITS = {
    "train": [(SEED, i, SIZE, "stained") for i in range(TRAIN)],
    "val": [(SEED, FIRST_VAL + i, SIZE, "stained") for i in range(VAL)],
}

cached_scene = functools.cache(scene)


@pytest.fixture(scope="module")
def scenes():
    return {split: [cached_scene(*key) for key in keys] for split, keys in SPLITS.items()}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """One folder per layout, all of the same scenes, which are drawn once to save time."""
    root = tmp_path_factory.mktemp("scenes")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shapes, "scene", cached_scene)
        for layout in WRITERS:
            write_scenes(root / layout, layout, TRAIN, VAL, SEED, SIZE)
    return root


def files(root):
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def extent(mask):
    y, x = np.nonzero(mask)
    return [x.min(), y.min(), x.max() + 1, y.max() + 1]


# Scenes --------------------------------------------------------------------------------------------------------------


def test_half_of_the_classes_are_new():
    assert [name in PRETRAIN_OUTLINES for name in CLASSES] == 3 * [True] + 3 * [False]


def test_scene_depends_on_seed_and_index_alone():
    a, again = scene(1, 7, SIZE), scene(1, 7, SIZE)
    assert all(np.array_equal(getattr(a, field), getattr(again, field)) for field in vars(a))
    others = [scene(1, 8, SIZE), scene(2, 7, SIZE)]
    assert all((a.image != other.image).mean() > 0.9 for other in others)


def test_scene_agrees_with_itself(scenes):
    for s in scenes["train"] + scenes["val"]:
        assert s.image.shape == (SIZE, SIZE, 3) and s.image.dtype == np.uint8 and s.image.std() > 4
        n = len(s.labels)
        assert set(np.unique(s.instances)) - {0, VOID} == set(range(1, n + 1))
        for k in range(n):
            assert extent(s.instances == k + 1) == s.boxes[k].tolist()
        assert (s.boxes[:, 2:] - s.boxes[:, :2] >= 3).all()
        assert [len(field) for field in (s.boxes, s.difficult, s.truncated, s.crowd)] == 4 * [n]
        assert len(set(s.labels[s.crowd])) <= 1


def test_everything_occurs_in_25_scenes(scenes):
    row = scenes["train"][:25]
    assert sum(len(s.labels) == 0 for s in row) == 1
    assert sum(s.crowd.any() for s in row) == 2
    assert sum(s.difficult.any() for s in row) >= 1
    assert sum(s.truncated.any() for s in row) >= 5
    assert set(np.concatenate([s.labels for s in row])) == set(range(len(CLASSES)))
    assert all(1 <= (~s.crowd).sum() <= 11 for s in row if len(s.labels))


def test_bodies_can_be_seen_yet_are_no_beacons(scenes):
    inside, around = [], []
    for s in scenes["train"]:
        grey = s.image.mean(axis=2)
        for k in np.flatnonzero(~s.difficult & ~s.crowd):
            inside.append(grey[s.instances == k + 1].mean())
            around.append(np.median(grey[s.instances == 0]))
    contrast = np.subtract(around, inside)  # bodies are translucent: darker than the ground
    assert 15 < np.median(contrast) < 60  # of 255


def phases_off(scenes, stains):
    """How far the colours of bodies are from their classes' stains, (bodies,), in -pi..pi.

    The share of light that a body takes away is a wave over red, green and blue; a stain is its phase.
    """
    off = []
    for s in scenes:
        ground = np.median(s.image[s.instances == 0], axis=0)
        for k in np.flatnonzero(~s.difficult & ~s.crowd):
            absorbed = np.log(ground / s.image[s.instances == k + 1].mean(axis=0))
            phase = np.angle(absorbed @ np.exp(2j * np.pi * np.arange(3) / 3))
            off.append(np.angle(np.exp(1j * (phase - 2 * np.pi * s.labels[k] / stains))))
    return np.array(off)


@pytest.mark.parametrize("world", WORLDS)
def test_bodies_wear_the_stain_of_their_class(scenes, world):
    row = scenes["train"] if world == "stained" else [scene(SEED, i, SIZE, world) for i in range(TRAIN)]
    stains = WORLDS[world].stains
    assert np.median(np.abs(phases_off(row, stains))) < np.pi / stains / 2  # other bodies mix their colours in


def test_in_the_duotone_world_stain_and_outline_tell_the_class():
    def drawn(**changes):
        world = replace(WORLDS["duotone"], **changes)
        found = [decoy for seed in range(80) for decoy in _decoys(np.random.default_rng(seed), SIZE, world)]
        assert found and all(k == 0 for k, *_ in found)  # nothing that an annotator would name
        return {(len(polygon), stain) for _, stain, polygon in found}

    corners = [len(OUTLINES[name]) for name in CLASSES]
    assert drawn(strangers=None) == {(corners[label], 1 - label % 2) for label in range(len(CLASSES))}
    foreign = {len(OUTLINES[name]) for name in OUTLINES if name not in CLASSES}
    assert drawn(decoys=(0, 1)) == {(number, stain) for number in foreign for stain in (0, 1)}


def test_a_folder_knows_its_world(tmp_path):
    write_scenes(tmp_path, "voc", 1, 1, seed=0, size=64)
    assert "world" not in json.loads((tmp_path / "shapes.json").read_text())  # as when there was only one
    with pytest.raises(InputError, match="world None, not duotone"):
        write_scenes(tmp_path, "voc", 1, 1, seed=0, size=64, world="duotone")
    write_scenes(tmp_path, "voc", 1, 1, seed=0, size=64, world="duotone", overwrite=True)
    assert json.loads((tmp_path / "shapes.json").read_text())["world"] == "duotone"
    with pytest.raises(InputError, match="other scenes"):
        write_scenes(tmp_path, "voc", 1, 1, seed=0, size=64)
    with pytest.raises(InputError, match="did you mean duotone"):
        write_scenes(tmp_path / "new", "voc", 1, 1, seed=0, size=64, world="duoton")


def test_a_decoy_wears_the_stain_of_another_class():
    corners = [len(OUTLINES[name]) for name in CLASSES]
    assert len(set(corners)) == len(CLASSES)  # so that a polygon tells its class
    decoys = [decoy for seed in range(20) for decoy in _decoys(np.random.default_rng(seed), SIZE, WORLDS["stained"])]
    outlines = [corners.index(len(polygon)) for _, _, polygon in decoys]
    assert {(outline, stain) for outline, (_, stain, _) in zip(outlines, decoys, strict=True)} == {
        (a, b) for a in range(len(CLASSES)) for b in range(len(CLASSES)) if a != b
    }
    assert all(k == 0 for k, _, _ in decoys)  # nothing that an annotator would name


def test_annotation_by_hand():
    """Squares of 20 pixels a side: whole, a quarter visible, too little of it, a sliver, reaching out, in a crowd."""
    size = 100
    corners = [(0, 0), (30, 0), (60, 0), (30, 70), (90, 40), (0, 70)]
    squares = [np.array([(x, y), (x + 19, y), (x + 19, y + 19), (x, y + 19)], float) for x, y in corners]
    instances = np.zeros((size, size), np.uint8)
    for k, square in enumerate(squares, start=1):
        box, mask = fill(square, size, size)
        instances[box][mask] = k
    instances[5:20, 30:50] = 0
    instances[0:20, 65:80] = instances[4:20, 60:80] = 0  # 20 of 400 pixels are left
    instances[70:90, 32:50] = 0  # 40 of 400, but two pixels wide
    things = [(k, square, k == 5) for k, square in enumerate(squares)]
    known, labels, boxes, difficult, truncated, crowd = _annotate(instances, things)
    assert labels.tolist() == [0, 1, 4, 5]
    assert boxes.tolist() == [[0, 0, 20, 20], [30, 0, 50, 5], [90, 40, 100, 60], [0, 70, 20, 90]]
    assert difficult.tolist() == [False, True, False, False]
    assert truncated.tolist() == [False, False, True, False]
    assert crowd.tolist() == [False, False, False, True]
    assert (known[0:4, 60:65] == VOID).all() and (known[70:90, 30:32] == VOID).all()  # nobody's
    assert (known == VOID).sum() == 60
    assert (known == 3).sum() == 200 and (known == 4).sum() == 400


# Layouts -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", WRITERS)
def test_same_request_same_bytes(tmp_path, layout):
    for name, seed in (("a", 0), ("again", 0), ("other", 1)):
        small(tmp_path / name, layout=layout, train=3, val=2, seed=seed)
    ours = files(tmp_path / "a")
    assert ours == files(tmp_path / "again")
    other = files(tmp_path / "other")
    pictures = [name for name in ours if name.endswith(("jpg", "png"))]
    assert len(pictures) == {"voc": 15, "coco": 5, "ade20k": 10}[layout]
    assert all(ours[name] != other[name] for name in pictures)


def test_validation_scenes_do_not_depend_on_train(written, tmp_path):
    write_scenes(tmp_path / "few", "ade20k", 1, 1, SEED, SIZE)
    name = "annotations/validation/ADE_val_00000001.png"
    assert files(tmp_path / "few")[name] == files(written / "ade20k")[name]


def test_voc_reads_back_exactly(written, scenes):
    start = 1
    for split in ("train", "val"):
        dataset = VOCDetection(written / "voc", split, CLASSES, strict=True)
        assert len(dataset) == len(scenes[split])
        for i, s in enumerate(scenes[split]):
            image, target = dataset[i]
            assert target["image_id"] == f"{start + i:06d}"
            assert target["boxes"].tolist() == s.boxes.tolist()
            assert target["labels"].tolist() == (s.labels + 1).tolist()
            assert target["difficult"].tolist() == (s.difficult | s.crowd).tolist()
            assert np.abs(image.permute(1, 2, 0).numpy() * 255 - s.image).mean() < 6  # JPEG, but the right one
        start += len(dataset)
    assert len(VOCDetection(written / "voc", "trainval")) == TRAIN + VAL


def test_voc_has_the_devkits_files(written, scenes):
    root = written / "voc"
    tree = ET.parse(root / "Annotations/000001.xml").getroot()
    assert [tree.findtext(f"size/{side}") for side in ("width", "height", "depth")] == [str(SIZE), str(SIZE), "3"]
    assert [item.findtext("truncated") for item in tree.iter("object")] == [
        str(int(cut)) for cut in scenes["train"][0].truncated
    ]
    for c, name in enumerate(CLASSES):
        lines = (root / f"ImageSets/Main/{name}_train.txt").read_text().splitlines()
        assert len(lines) == TRAIN
        for i, (line, s) in enumerate(zip(lines, scenes["train"], strict=True), start=1):
            mine = s.labels == c
            verdict = -1 if not mine.any() else 0 if (s.difficult | s.crowd)[mine].all() else 1
            assert line == f"{i:06d} {verdict:2d}"
    assert (root / "ImageSets/Segmentation/val.txt").read_text().split() == [f"{TRAIN + i + 1:06d}" for i in range(VAL)]


def test_voc_masks(written, scenes):
    for i, s in enumerate(scenes["train"], start=1):
        by_class, by_object = (
            Image.open(written / f"voc/Segmentation{kind}/{i:06d}.png") for kind in ("Class", "Object")
        )
        assert by_class.mode == by_object.mode == "P"
        by_class, by_object = np.asarray(by_class), np.asarray(by_object)
        assert np.array_equal(by_class == VOID, by_object == VOID)
        clear = by_class != VOID
        assert np.array_equal(by_object[clear], s.instances[clear])
        assert np.array_equal(by_class[clear], np.append(0, s.labels + 1)[s.instances[clear]])
        hard = np.flatnonzero(s.difficult | s.crowd) + 1
        assert not clear[np.isin(s.instances, [VOID, *hard])].any()
        assert len(s.labels) == 0 or (~clear).any()
        assert len(s.labels) or clear.all()


def test_voc_palette_is_the_devkits():
    colours = np.frombuffer(_voc_palette(), np.uint8).reshape(256, 3)
    known = {0: (0, 0, 0), 1: (128, 0, 0), 2: (0, 128, 0), 7: (128, 128, 128), 8: (64, 0, 0), 15: (192, 128, 128)}
    assert {i: tuple(colours[i].tolist()) for i in known} == known
    assert tuple(colours[20].tolist()) == (0, 64, 128) and tuple(colours[255].tolist()) == (224, 224, 192)


def test_coco_loads_and_decodes(written, scenes):
    ids, crowds, empty = set(), 0, 0
    for split in ("train", "val"):
        with contextlib.redirect_stdout(io.StringIO()):
            coco = COCO(written / f"coco/annotations/instances_{split}2017.json")
        assert {c["id"]: c["name"] for c in coco.cats.values()} == dict(zip(COCO_IDS, CLASSES, strict=True))
        assert len(coco.imgs) == len(scenes[split])
        for (image_id, image), s in zip(sorted(coco.imgs.items()), scenes[split], strict=True):
            assert Image.open(written / f"coco/{split}2017" / image["file_name"]).size == (SIZE, SIZE)
            rows = coco.imgToAnns[image_id]
            ids |= {row["id"] for row in rows}
            empty += not rows
            single = np.flatnonzero(~s.crowd)
            assert [row["category_id"] for row in rows[: len(single)]] == [COCO_IDS[c] for c in s.labels[single]]
            assert [row["iscrowd"] for row in rows] == [0] * len(single) + [1] * bool(s.crowd.any())
            masks = [s.instances == k + 1 for k in single]
            if s.crowd.any():
                masks.append(np.isin(s.instances, np.flatnonzero(s.crowd) + 1))
                crowds += 1
                assert rows[-1]["category_id"] == COCO_IDS[s.labels[s.crowd][0]]
                counts = rows[-1]["segmentation"]["counts"]
                assert isinstance(counts, list) and sum(counts) == SIZE * SIZE
                assert np.array_equal(coco.annToMask(rows[-1]), masks[-1])
            for row, mask in zip(rows, masks, strict=True):
                x1, y1, x2, y2 = extent(mask)
                assert row["bbox"] == [x1, y1, x2 - x1, y2 - y1]
                decoded = coco.annToMask(row).astype(bool)
                assert decoded.sum() == row["area"]
                # The rasteriser of pycocotools rounds; holes, which polygons cannot have, come on top.
                assert (mask & ~decoded).sum() <= 0.05 * mask.sum() + 4
                assert abs(row["area"] - mask.sum()) <= 0.3 * mask.sum() + 4
    assert crowds >= 2 and empty >= 1
    assert ids == set(range(1, len(ids) + 1)), "annotation ids are unique over both files"


@pytest.mark.parametrize("crowd", [0, 1])
def test_coco_regions_by_hand(crowd):
    """The image's first and last pixel, pieces, a hole, a single pixel, everything: sizes other than square."""
    masks = np.zeros((4, 20, 30), bool)
    masks[0, :6, :9] = masks[0, 10:, 20:] = True
    masks[1, 3:15, 4:20] = True
    masks[1, 6:10, 8:12] = False
    masks[2, 7, 11] = True
    masks[3] = True
    for mask, holes in zip(masks, (0, 16, 0, 0), strict=True):
        region = _coco_region(mask, crowd)
        encoded = coco_mask.frPyObjects(region["segmentation"], 20, 30)
        decoded = coco_mask.decode(encoded if crowd else coco_mask.merge(encoded)).astype(bool)
        if crowd:
            assert np.array_equal(decoded, mask) and region["area"] == mask.sum()
        elif mask.sum() > 1:
            assert mask.sum() - 4 <= region["area"] <= mask.sum() + holes + 4
        x1, y1, x2, y2 = extent(mask)
        assert region["bbox"] == [x1, y1, x2 - x1, y2 - y1]


def test_coco_polygons_fit(written, scenes):
    """Over all objects, polygon and visible pixels are nearly the same."""
    content = json.loads((written / "coco/annotations/instances_train2017.json").read_text())
    rows = iter(row for row in content["annotations"] if not row["iscrowd"])
    overlaps = []
    for s in scenes["train"]:
        for k in np.flatnonzero(~s.crowd):
            polygons = next(rows)["segmentation"]
            assert all(len(polygon) >= 6 and min(polygon) >= 0 and max(polygon) <= SIZE for polygon in polygons)
            encoded = coco_mask.merge(coco_mask.frPyObjects(polygons, SIZE, SIZE))
            truth = coco_mask.encode(np.asfortranarray(s.instances == k + 1, dtype=np.uint8))
            overlaps.append(coco_mask.iou([encoded], [truth], [0]).item())
    assert np.mean(overlaps) > 0.97 and np.median(overlaps) > 0.97


def test_ade20k_masks(written, scenes):
    root, seen = written / "ade20k", set()
    for folder, split in (("training", "train"), ("validation", "val")):
        assert len(list((root / "images" / folder).iterdir())) == len(scenes[split])
        for i, s in enumerate(scenes[split], start=1):
            mask = Image.open(root / f"annotations/{folder}/ADE_{split}_{i:08d}.png")
            assert mask.mode == "L"
            mask = np.asarray(mask)
            seen |= set(np.unique(mask).tolist())
            expected = np.zeros(256, int)
            expected[: len(s.labels) + 1] = [1, *(s.labels + 2)]
            clear = mask > 0
            assert np.array_equal(mask[clear], expected[s.instances[clear]])
            # Nothing but borders and remains is void: no void pixel has a neighbourhood of one kind.
            inner = [np.roll(s.instances, (dy, dx), (0, 1)) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
            uniform = (np.ptp(inner, axis=0) == 0) & (s.instances != VOID)
            assert clear[1:-1, 1:-1][uniform[1:-1, 1:-1]].all()
            assert len(s.labels) == 0 or (~clear).any()
    assert seen == set(range(len(CLASSES) + 2))
    with (root / "objectInfo.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["Idx"]: row["Name"] for row in rows} == {str(i): n for i, n in enumerate(("ground", *CLASSES), start=1)}


# Folders -------------------------------------------------------------------------------------------------------------


def small(root, **changes):
    write_scenes(**{"root": root, "layout": "voc", "train": 2, "val": 1, "seed": 0, "size": 64, **changes})


def test_complete_folder_is_reused(tmp_path):
    small(tmp_path / "a")
    (tmp_path / "a/JPEGImages/000001.jpg").write_bytes(b"touched")
    before = files(tmp_path / "a")
    small(tmp_path / "a")
    assert files(tmp_path / "a") == before
    small(tmp_path / "a", overwrite=True)
    assert files(tmp_path / "a") != before


def test_other_scenes_are_kept_without_overwrite(tmp_path):
    small(tmp_path / "a", train=4)
    before = files(tmp_path / "a")
    with pytest.raises(InputError, match=r"a' holds other scenes \(layout voc, not coco\): .* or remove it"):
        small(tmp_path / "a", layout="coco", train=4)
    with pytest.raises(InputError, match=r"\(train 4, not 2\)"):
        small(tmp_path / "a")
    assert files(tmp_path / "a") == before
    (tmp_path / "a/mine.txt").write_text("mine")
    small(tmp_path / "a", overwrite=True)
    small(tmp_path / "b")
    assert files(tmp_path / "a") == {**files(tmp_path / "b"), "mine.txt": b"mine"}, (
        "nothing is left of the fourth scene"
    )


@pytest.mark.parametrize("layout", WRITERS)
def test_half_written_folder_is_finished(tmp_path, monkeypatch, layout):
    small(tmp_path / "whole", layout=layout)

    def cut_off(seed, index, size, world):
        if index == 1:
            raise KeyboardInterrupt
        return scene(seed, index, size, world)

    with monkeypatch.context() as patch:
        patch.setattr(shapes, "scene", cut_off)
        with pytest.raises(KeyboardInterrupt):
            small(tmp_path / "half", layout=layout)
    assert not json.loads((tmp_path / "half/shapes.json").read_text())["complete"]
    with pytest.raises(InputError, match=r"holds other scenes \(seed 0, not 1\)"):
        small(tmp_path / "half", layout=layout, seed=1)
    small(tmp_path / "half", layout=layout)
    assert files(tmp_path / "half") == files(tmp_path / "whole")


def test_other_peoples_files_are_never_replaced(tmp_path):
    (tmp_path / "JPEGImages").mkdir()
    (tmp_path / "JPEGImages/000001.jpg").write_bytes(b"holiday")
    for stamp in (None, "no json", '["complete"]', '{"seed": 0}'):
        if stamp is not None:
            (tmp_path / "shapes.json").write_text(stamp)
        for overwrite in (False, True):
            with pytest.raises(InputError, match="holds files that are not generated scenes: choose a new folder"):
                small(tmp_path, overwrite=overwrite)
    assert (tmp_path / "JPEGImages/000001.jpg").read_bytes() == b"holiday"
    with pytest.raises(InputError, match=r"000001.jpg' is a file: choose a new folder"):
        small(tmp_path / "JPEGImages/000001.jpg")


def test_an_empty_folder_will_do(tmp_path):
    small(tmp_path)
    assert (tmp_path / "ImageSets/Main/trainval.txt").read_text() == "000001\n000002\n000003\n"


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"layout": "cocoo"}, "unknown layout 'cocoo': did you mean coco"),
        ({"train": 0}, "train is 0: choose 1 or more"),
        ({"val": -1}, "val is -1: choose 1 or more"),
        ({"train": 1_000_001}, "train is 1000001: choose 1000000 or fewer"),
        ({"seed": -1}, "seed is -1: choose 0 or more"),
        ({"size": 32}, "size is 32: choose 64 or more"),
    ],
)
def test_bad_requests(tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        small(tmp_path / "a", **changes)
    assert not (tmp_path / "a").exists()


def test_outlines_of_the_classes_are_simple():
    """The hidden share rests on the area of the outline, which a self-crossing one does not have."""
    for name in CLASSES:
        polygon = OUTLINES[name] * 100 + 200
        _, mask = fill(polygon, 400, 400)
        x, y = polygon.T
        assert mask.sum() == pytest.approx(0.5 * abs(x @ np.roll(y, 1) - y @ np.roll(x, 1)), rel=0.05)
