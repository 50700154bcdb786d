"""UPerNet on folders of images and index masks: what is read, what is trained, what is measured, what is refused."""

import importlib.util
import pickle
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

pytest.importorskip("cv2", reason="OpenCV, which mmsegmentation needs, does not import", exc_type=ImportError)
if not importlib.util.find_spec("mmseg"):
    pytest.skip("mmsegmentation is not installed (the extra 'segmentation')", allow_module_level=True)

from e3va_lite import assert_isolated, build_backbone
from e3va_lite.datasets.ade20k import VOID, MaskFolder, class_source, label_table
from e3va_lite.datasets.shapes import CLASSES, write_scenes
from e3va_lite.errors import InputError
from e3va_lite.recipes.schema import ADE20KRecipe, load_recipe
from e3va_lite.tasks import ade20k
from e3va_lite.tasks.detection import IMAGE_MEAN, IMAGE_STD
from e3va_lite.tasks.mmseg_backbone import mmseg
from e3va_lite.tasks.upernet import build_upernet
from e3va_lite.training.engine import build_model, evaluate, fit
from e3va_lite.training.sampling import seeded

WIDTH, HEIGHT = 64, 48
NAMES = [f"class {k}" for k in range(12)]


@pytest.fixture(autouse=True)
def same_augmentation():
    """mmcv draws from numpy's global state."""
    with seeded(0):
        yield


@pytest.fixture(autouse=True)
def no_stray_warnings():
    """A warning that a test does not expect is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def layout(**fields) -> ADE20KRecipe:
    return ADE20KRecipe(task="ade20k", steps=1, **fields)


PLAIN = layout(ignore=255, image_suffix=".png")


def blocks(width=WIDTH, height=HEIGHT, classes=12):
    """Labels 0..11 in blocks of 16 pixels, uint8 (H, W)."""
    rows, columns = np.mgrid[:height, :width] // 16
    return ((4 * rows + columns) % classes).astype(np.uint8)


def shades(labels):
    """A picture whose grey values tell the labels: 20 times as much."""
    return Image.fromarray(np.repeat(20 * labels[..., None], 3, axis=2))


def put(root, masks, split="train", images=None, suffix=".png"):
    """Write images and annotations: ``masks`` maps names to masks, arrays or pictures; returns ``root``."""
    for name, mask in masks.items():
        mask = Image.fromarray(mask) if isinstance(mask, np.ndarray) else mask
        image = (images or {}).get(name) or shades(blocks(*mask.size))
        for folder, picture, end in (("images", image, suffix), ("annotations", mask, ".png")):
            path = root / folder / split / f"{name}{end}"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture.save(path, **({"exif": image.getexif()} if folder == "images" else {}))
    return root


# What is read --------------------------------------------------------------------------------------------------------


def test_item(tmp_path):
    data = MaskFolder(put(tmp_path, {"b": blocks(), "a": blocks()}), "train", PLAIN, NAMES)
    assert len(data) == 2 and data.classes == NAMES
    image, target = data[0]
    assert image.shape == (3, HEIGHT, WIDTH) and image.dtype == torch.float32 and image.is_contiguous()
    assert target["image_id"] == "a" and target["file"] == str(tmp_path / "images/train/a.png")
    assert target["mask"].dtype == torch.int64 and target["mask"].equal(torch.from_numpy(blocks()).long())


def test_red_is_the_first_channel(tmp_path):
    picture = Image.new("RGB", (WIDTH, HEIGHT), (255, 128, 0))
    root = put(tmp_path, {"a": blocks()}, images={"a": picture})
    recipe = layout(ignore=255, image_suffix=".png", crop=128, scale=[64, 48], ratio=[1, 1])
    train = MaskFolder(root, "train", recipe, NAMES, train=True)
    train.augment = [transform for transform in train.augment if type(transform).__name__ != "PhotoMetricDistortion"]
    for image, _ in (MaskFolder(root, "train", recipe, NAMES)[0], train[0]):
        assert torch.allclose(image[:, 10, 10], torch.tensor([1.0, 128 / 255, 0.0]))
    image, target = train[0]
    assert torch.allclose(image[:, -1, -1], torch.tensor(IMAGE_MEAN), atol=0.002) and target["mask"][-1, -1] == VOID


CONVENTIONS = {  # ignore: values in the file, labels
    0: ([0, 1, 2, 150, 255], [VOID, 0, 1, 149, VOID]),
    255: ([0, 1, 149, 255], [0, 1, 149, VOID]),
    11: ([0, 10, 11, 12, 150, 255], [0, 10, VOID, 11, 149, VOID]),
}


@pytest.mark.parametrize("ignore", CONVENTIONS)
def test_labels_by_the_value_that_is_no_class(tmp_path, ignore):
    values, labels = CONVENTIONS[ignore]
    root = put(tmp_path, {"a": np.resize(np.uint8(values), (40, 40))})
    target = MaskFolder(root, "train", layout(ignore=ignore, image_suffix=".png"), [str(k) for k in range(150)])[0][1]
    assert target["mask"].flatten().tolist() == np.resize(labels, 1600).tolist()


def test_every_value_has_one_meaning():
    """All conventions, all numbers of classes: what is kept is a bijection onto the labels."""
    for ignore in (0, 3, 11, 200, 255):
        for count in (2, 11, 12, 150, 254):
            table = label_table([str(k) for k in range(count)], ignore)
            assert sorted(table[(table >= 0) & (table != VOID)]) == list(range(count)), (ignore, count)
            assert table[ignore] == table[255] == VOID


def test_of_a_palette_image_the_index_is_read(tmp_path):
    """Pascal VOC's masks are palette images; their colours have nothing to do with the numbers."""
    write_scenes(tmp_path, "voc", train=2, val=1, seed=0, size=64)
    files = {"images": "JPEGImages", "masks": "SegmentationClass", "listing": "ImageSets/Segmentation/{split}.txt"}
    data = MaskFolder(tmp_path, "val", layout(ignore=255, **files), ["none", *CLASSES])
    (_, target), stored = data[0], Image.open(tmp_path / "SegmentationClass/000003.png")
    assert len(data) == 1 and stored.mode == "P" and target["image_id"] == "000003"
    assert target["mask"].equal(torch.from_numpy(np.array(stored)).long()) and len(target["mask"].unique()) > 2


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
def test_images_of_other_modes_are_converted(tmp_path, mode):
    suffix = ".jpg" if mode == "CMYK" else ".png"
    picture = shades(blocks()).convert(mode) if mode != "P" else shades(blocks()).quantize(12)
    root = put(tmp_path, {"a": blocks()}, images={"a": picture}, suffix=suffix)
    image, _ = MaskFolder(root, "train", layout(ignore=255, image_suffix=suffix), NAMES)[0]
    assert image.shape == (3, HEIGHT, WIDTH)
    assert (image - torch.from_numpy(np.array(shades(blocks()))).permute(2, 0, 1) / 255).abs().mean() < 0.03


@pytest.mark.parametrize("turned", [False, True], ids=["mask of the pixels as stored", "mask of the upright picture"])
def test_a_mask_decides_whether_exif_turns_its_image(tmp_path, turned):
    stored = shades(blocks())
    stored.getexif()[0x0112] = 6  # show it a quarter to the right
    upright = np.rot90(blocks(), -1)
    mask = upright if turned else blocks()
    root = put(tmp_path, {"a": np.ascontiguousarray(mask)}, images={"a": stored})
    with Image.open(root / "images/train/a.png") as image:
        assert image.getexif()[0x0112] == 6
    image, target = MaskFolder(root, "train", PLAIN, NAMES)[0]
    assert (image[0] * 255 / 20).round().long().equal(target["mask"])
    assert target["mask"].numpy().tolist() == mask.tolist()
    assert [problem.fatal for problem in ade20k.check(layout(**PLAIN_FIELDS), root, "train")] == [False]


PLAIN_FIELDS = {"ignore": 255, "image_suffix": ".png", "classes": NAMES, "train_split": "train"}


def test_names_out_of_the_folder(tmp_path):
    write_scenes(tmp_path, "ade20k", train=1, val=1, seed=0, size=64)
    data = ade20k.dataset(layout(), tmp_path, "validation")
    assert data.classes == ["ground", *CLASSES] and len(data) == 1
    assert ade20k.dataset(layout(), tmp_path, "validation", list("abcdefg")).classes == list("abcdefg")
    assert ade20k.dataset(layout(classes=list("gfedcba")), tmp_path, "validation").classes == list("gfedcba")
    assert class_source(tmp_path / "annotations")[0][:3] == ["wall", "building", "sky"]  # nothing there: ADE20K's
    (tmp_path / "annotations/objectInfo150.txt").write_text("Idx\tName\n1\tscreen, door\n2\tscreen, crt\n3\tsea, wet\n")
    assert class_source(tmp_path / "annotations")[0] == ["screen, door", "screen, crt", "sea"]


def test_lists_and_folders_in_folders(tmp_path):
    """As Cityscapes has them: a folder per town, suffixes that are more than one word."""
    put(tmp_path, {"ulm/1_photo": blocks(), "bonn/2_photo": blocks()}, split="all")
    for path in (tmp_path / "annotations").rglob("*_photo.png"):
        path.rename(path.with_name(path.name.replace("photo", "ids")))
    (tmp_path / "few.txt").write_text("ulm/1\n\nulm/1\n")
    folders = {"images": "images/all", "masks": "annotations/all", "mask_suffix": "_ids.png", "ignore": 255}
    towns = layout(image_suffix="_photo.png", **folders)
    assert [pair.name for pair in MaskFolder(tmp_path, "any", towns, NAMES).pairs] == ["bonn/2", "ulm/1"]
    few = layout(image_suffix="_photo.png", listing="{split}.txt", **folders)
    assert [pair.name for pair in MaskFolder(tmp_path, "few", few, NAMES).pairs] == ["ulm/1"]


# What is augmented ---------------------------------------------------------------------------------------------------


def training_folder(root, ratio, crop=64, colours=True, size=(160, 96)):
    recipe = layout(ignore=255, image_suffix=".png", scale=[size[0], size[1]], ratio=ratio, crop=crop)
    data = MaskFolder(put(root, {"a": blocks(*size)}), "train", recipe, NAMES, train=True)
    if not colours:
        data.augment = [transform for transform in data.augment if type(transform).__name__ != "PhotoMetricDistortion"]
    return data


def test_the_mask_follows_the_image(tmp_path):
    """Cut and mirrored, an image still tells its mask; resized too, but at the edges of its blocks."""
    data = training_folder(tmp_path, [1.0, 1.0], colours=False)
    crops = [data[0] for _ in range(20)]
    assert all(target["mask"].equal((image[0] * 255 / 20).round().long()) for image, target in crops)
    steps = [int(target["mask"].diff(dim=1).clamp(-1, 1).sum()) for _, target in crops]
    assert min(steps) < 0 < max(steps)  # some are mirrored, some not
    assert len({tuple(target["mask"].flatten().tolist()) for _, target in crops}) > 10
    data = training_folder(tmp_path, [0.5, 2.0], colours=False)
    for image, target in (data[0] for _ in range(20)):
        known = target["mask"] != VOID
        assert image.shape == (3, 64, 64) and target["mask"].shape == (64, 64) and known.float().mean() > 0.5
        assert ((image[0] * 255 / 20 - target["mask"]).abs() < 0.5)[known].float().mean() > 0.7


def test_images_smaller_than_the_crop_are_padded_with_void(tmp_path):
    data = training_folder(tmp_path, [1.0, 1.0], crop=128, colours=False)
    image, target = data[0]
    assert image.shape == (3, 128, 128) and (target["mask"][96:] == VOID).all() and (target["mask"][:96] != VOID).all()
    assert torch.allclose(image[:, 96:].mean((1, 2)), torch.tensor(IMAGE_MEAN), atol=0.002)


def test_augmentation_follows_from_the_seed(tmp_path):
    """All random numbers come out of the states that the engine seeds, so the same key gives the same crop."""
    data = training_folder(tmp_path, [0.5, 2.0])

    def drawn(*key):
        with seeded(*key):
            return data[0]

    again = [drawn(0, epoch, 0) for epoch in range(8)]
    for epoch, (image, target) in enumerate(again):
        other, label = drawn(0, epoch, 0)
        assert other.equal(image) and label["mask"].equal(target["mask"])
    assert len({float(image.sum()) for image, _ in again}) == 8


# What is refused -----------------------------------------------------------------------------------------------------


def outside():
    mask = blocks()
    mask[0, :3] = 12, 77, 12
    return mask


BAD_MASKS = {
    "values": (outside(), r"a\.png' has values that are no class: 12, 77; classes are 0 to 11, void 255"),
    "colours": (shades(blocks()), r"mask '.*a\.png' is a picture in colours \(mode RGB\)"),
    "16 bits": (Image.fromarray(blocks().astype(np.uint16)), r"a\.png' has not 8 bits per pixel \(mode I;16\)"),
    "1 bit": (Image.fromarray(blocks() > 3), r"not 8 bits per pixel \(mode 1\)"),
    "size": (blocks(WIDTH, HEIGHT + 1), r"mask '.*a\.png' is 64x49 and its image 64x48"),
    "turned": (blocks(HEIGHT, WIDTH), r"is 48x64 and its image 64x48"),
}


@pytest.mark.parametrize("case", BAD_MASKS)
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_bad_masks(tmp_path, case, train):
    mask, message = BAD_MASKS[case]
    root = put(tmp_path, {"a": mask}, images={"a": shades(blocks())})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of classes that the one mask does not show
        data = MaskFolder(root, "train", PLAIN, NAMES, train)
    with pytest.raises(InputError, match=message) as caught:
        data[0]
    sent = pickle.loads(pickle.dumps(caught.value))  # as a worker process does
    assert str(sent) == str(caught.value) and sent.problem == caught.value.problem
    assert ade20k.check(layout(**PLAIN_FIELDS), tmp_path, "train") == [caught.value.problem]


BAD_IMAGES = {
    "16 bits": (Image.fromarray(np.zeros((HEIGHT, WIDTH), np.uint16)), "more than 8 bits"),
    "small": (Image.new("RGB", (31, 40)), "31x40, smaller than 32x32"),
}


@pytest.mark.parametrize("case", BAD_IMAGES)
def test_bad_images(tmp_path, case):
    image, message = BAD_IMAGES[case]
    data = MaskFolder(put(tmp_path, {"a": blocks()}, images={"a": image}), "train", PLAIN, NAMES)
    with pytest.raises(InputError, match=rf"image '.*a\.png' .*{message}"):
        data[0]


@pytest.mark.parametrize("folder", ["images", "annotations"])
def test_files_that_end_early(tmp_path, folder):
    path = put(tmp_path, {"a": blocks()}) / folder / "train/a.png"
    path.write_bytes(path.read_bytes()[:-60])
    data = MaskFolder(tmp_path, "train", PLAIN, NAMES)
    with pytest.raises(InputError, match=r"a\.png' cannot be read"):
        data[0]


def test_bad_folders(tmp_path):
    root = put(tmp_path, {"a": blocks(), "b": blocks()})
    put(root, {"a": blocks()}, split="val")

    def refused(message, split="train", classes=NAMES, **fields):
        recipe = layout(**{"ignore": 255, "image_suffix": ".png"} | fields)
        with pytest.raises(InputError, match=message):
            MaskFolder(root, split, recipe, classes, train="crop" in fields or "ratio" in fields)

    refused(r"no folder '.*images/test': there are train, val; ", split="test")
    refused(r"no folder '.*labels/train': check the root; ", masks="labels/{split}")
    refused(r"images/train' has no images: .* image_suffix=_x\.png \('a\.png' has another\)", image_suffix="_x.png")
    refused(r"no list '.*names\.txt'", listing="names.txt")
    (root / "names.txt").write_text("\n")
    refused(r"names\.txt' has no images", listing="names.txt")
    (root / "names.txt").write_text("a\nc\n")
    refused(r"image '.*images/train/c\.png' is missing", listing="names.txt")
    refused(r"1 classes \(x, \.\.\.\) cannot work", classes=["x"])
    refused(r"every one once", classes=["x", "y", "x"])
    refused(r"256 classes", classes=[str(k) for k in range(256)])
    refused(r"crop=31 is too small", crop=31)
    refused(r"ratio=\[2\.0, 1\.0\]", ratio=[2.0, 1.0])
    (root / "annotations/train/b.png").unlink()
    refused(r"image '.*images/train/b\.png' has no mask '.*annotations/train/b\.png'")


def test_masks_without_an_image_are_counted(tmp_path):
    root = put(tmp_path, {"a": blocks(), "b": blocks()})
    (root / "images/train/b.png").unlink()
    with pytest.warns(UserWarning, match=r"masks without an image: 1 \(b\.png"):
        assert len(MaskFolder(root, "train", PLAIN, NAMES)) == 1
    with pytest.raises(InputError, match="or go without strict"):
        MaskFolder(root, "train", PLAIN, NAMES, strict=True)


# The check of all files ----------------------------------------------------------------------------------------------


def test_check_of_clean_data(tmp_path):
    write_scenes(tmp_path, "ade20k", train=3, val=1, seed=0, size=64)
    assert ade20k.check(layout(), tmp_path, "training") == []


def test_check_finds_everything(tmp_path):
    """Each planted fault once, and fatal exactly where training stops at the file."""
    turned = shades(blocks())
    turned.getexif()[0x0112] = 6
    images = {"grey": shades(blocks()).convert("L"), "turned": turned, "tiny": Image.new("RGB", (16, 16))}
    masks = {name: blocks() for name in ("good", "cut", "cutmask", "lonely", "orphan", "grey", "turned")}
    masks |= {"tiny": blocks(16, 16), "void": np.full((HEIGHT, WIDTH), 255, np.uint8)}
    masks |= {"colours": shades(blocks()), "size": blocks(32, 32), "outside": outside()}
    put(tmp_path, masks, images=images | {"size": shades(blocks())})
    for path in ("images/train/cut.png", "annotations/train/cutmask.png"):
        (tmp_path / path).write_bytes((tmp_path / path).read_bytes()[:-60])
    (tmp_path / "annotations/train/lonely.png").unlink()
    (tmp_path / "images/train/orphan.png").unlink()
    recipe = layout(**PLAIN_FIELDS)
    problems = ade20k.check(recipe, tmp_path, "train")
    assert {(problem.kind, Path(problem.where.split(" (")[0]).stem, problem.fatal) for problem in problems} == {
        ("masks without an image", "orphan", False),
        ("images without a mask", "lonely", True),
        ("images that cannot be read to their end", "cut", True),
        ("masks that cannot be read to their end", "cutmask", True),
        ("images smaller than 32x32", "tiny", True),
        ("images of mode L, converted to RGB", "grey", False),
        ("images rotated by EXIF", "turned", False),
        ("masks of mode RGB", "colours", True),
        ("masks of another size than their image", "size", True),
        ("masks with values that are no class", "outside", True),
        ("masks of nothing but void", "void", False),
    }
    assert any("12, 77" in problem.where for problem in problems) and len(problems) == 11
    put(tmp_path, {"lonely": blocks()})
    with pytest.warns(UserWarning, match="without an image"):
        data = MaskFolder(tmp_path, "train", recipe, NAMES, train=True)
    fatal = {Path(problem.where.split(" (")[0]).stem for problem in problems if problem.fatal} - {"lonely"}
    for index, pair in enumerate(data.pairs):
        if pair.name in fatal:
            with pytest.raises(InputError):
                data[index]
        else:
            data[index]


def test_check_reads_a_list(tmp_path):
    root = put(tmp_path, {"a": blocks(), "b": blocks()})
    (root / "names.txt").write_text("a\nc\n")
    (problem, other) = ade20k.check(layout(listing="names.txt", **PLAIN_FIELDS), root, "train")
    assert problem.kind == "missing images" and other.kind == "images without a mask" and problem.fatal


# What is measured ----------------------------------------------------------------------------------------------------


class Classes:
    """As much of a dataset as the metric wants."""

    def __init__(self, *classes):
        self.classes = list(classes)


def measured(predicted, annotated, *classes):
    pairs = zip(predicted, annotated, strict=True)
    return ade20k.summary([ade20k.record({"mask": p}, {"mask": a}) for p, a in pairs], Classes(*classes))


def test_a_case_worked_by_hand():
    """Two images, four classes of which one does not occur; two pixels are void, one of them predicted right of it."""
    annotated = [torch.tensor([[0, 0, 1, 1], [0, 1, VOID, VOID]]), torch.tensor([[2, 2], [0, 0]])]
    predicted = [torch.tensor([[0, 1, 1, 1], [0, 1, 2, 0]]), torch.tensor([[2, 0], [0, 0]])]
    # class 0: in both 2 + 2, in one or the other 3 + 3; class 1: 3 of 4; class 2: 1 of 2; 3 is nowhere.
    result = measured(predicted, annotated, "a", "b", "c", "d")
    assert result["by_class"] == {"a": round(4 / 6, 4), "b": 0.75, "c": 0.5, "d": None}
    assert result["miou"] == pytest.approx((4 / 6 + 3 / 4 + 1 / 2) / 3, abs=1e-4)
    assert result["accuracy"] == pytest.approx(8 / 10)
    assert result["mean_accuracy"] == pytest.approx((4 / 5 + 3 / 3 + 1 / 2) / 3, abs=1e-4)


def test_a_class_that_is_only_predicted_counts():
    result = measured([torch.tensor([[0, 1]])], [torch.tensor([[0, 0]])], "a", "b", "c")
    assert result["by_class"] == {"a": 0.5, "b": 0.0, "c": None} and result["miou"] == 0.25


def test_nothing_but_void():
    result = measured([torch.zeros(4, 4).long()], [torch.full((4, 4), VOID)], "a", "b")
    assert result == {"miou": 0.0, "accuracy": 0.0, "mean_accuracy": 0.0, "by_class": {"a": None, "b": None}}


def test_it_is_mmsegmentations_metric():
    generator = torch.Generator().manual_seed(1)
    annotated = [torch.randint(0, 150, (40, 50), generator=generator) for _ in range(5)]
    predicted = [torch.where(torch.rand(40, 50, generator=generator) < 0.4, mask, 149 - mask) for mask in annotated]
    for mask in annotated:
        mask[:, :7] = VOID
        mask[mask == 17] = 18
    names = list(mmseg.datasets.ADE20KDataset.METAINFO["classes"])
    reference = mmseg.evaluation.IoUMetric()
    reference.dataset_meta = {"classes": names}
    samples = [
        {"pred_sem_seg": {"data": p[None]}, "gt_sem_seg": {"data": a[None]}}
        for p, a in zip(predicted, annotated, strict=True)
    ]
    reference.process({}, samples)
    expected = reference.compute_metrics(reference.results)
    result = measured(predicted, annotated, *names)
    for ours, theirs in (("miou", "mIoU"), ("accuracy", "aAcc"), ("mean_accuracy", "mAcc")):
        assert 100 * result[ours] == pytest.approx(expected[theirs], abs=0.011)
    assert 0.1 < result["miou"] < 0.9


def perfect(data):
    masks = [data[i][1]["mask"] for i in range(len(data))]
    guesses = [torch.where(mask == VOID, 0, mask) for mask in masks]
    return measured(guesses, masks, *data.classes), masks


def test_annotations_as_predictions_are_perfect(tmp_path):
    write_scenes(tmp_path, "ade20k", train=3, val=1, seed=0, size=96)
    result, _ = perfect(ade20k.dataset(layout(), tmp_path, "training"))
    assert result["miou"] == result["accuracy"] == 1.0


def test_real_ade20k(real_data):
    root = Path(real_data) / "ade20k_sample"
    recipe = layout(images="sampleData/images", masks="sampleData/annotations")
    data = ade20k.dataset(recipe, root, "validation")
    assert len(data) == 3 and len(data.classes) == 150 and data.classes[:3] == ["wall", "building", "sky"]
    assert ade20k.check(recipe, root, "validation") == []
    result, masks = perfect(data)
    assert result["miou"] == 1.0 and sum(iou is not None for iou in result["by_class"].values()) > 10
    stored = np.array(Image.open(root / "sampleData/annotations/ADE_val_00000001.png")).astype(int)
    assert masks[0].equal(torch.from_numpy(np.where(stored == 0, VOID, stored - 1)))
    image, target = ade20k.dataset(recipe, root, "validation", train=True)[0]
    assert image.shape == (3, 512, 512) and target["mask"].shape == (512, 512)


# The model -----------------------------------------------------------------------------------------------------------


def small(method="e3va", classes=5, scale=(96, 64), **options):
    backbone = build_backbone(method, "swin_nano", pretrained=True, **options)
    return build_upernet(backbone, classes, head_channels=16, scale=scale)


def batch_of(*sizes, classes=5):
    generator = torch.Generator().manual_seed(2)
    images = [torch.rand(3, *size, generator=generator) for size in sizes]
    masks = [torch.randint(0, classes, size, generator=generator) for size in sizes]
    for mask in masks:
        mask[:4] = VOID
    return images, [{"mask": mask} for mask in masks]


@pytest.fixture(scope="module")
def configured():
    """What somebody who uses mmsegmentation would build with our backbone, out of a configuration alone."""
    from mmengine import ConfigDict

    norm = {"type": "BN"}
    config = {
        "type": "EncoderDecoder",
        "data_preprocessor": {
            "type": "mmseg.SegDataPreProcessor",
            "mean": [123.675, 116.28, 103.53],
            "std": [58.395, 57.12, 57.375],
            "size": (64, 64),
        },
        "backbone": {
            "type": "E3VABackbone",
            "method": "e3va",
            "name": "swin_nano",
            "pretrained": True,
            "stages": [1, 2, 3, 4],
            "rank": 4,
        },
        "decode_head": {
            "type": "UPerHead",
            "in_channels": [40, 80, 160, 320],
            "in_index": [0, 1, 2, 3],
            "pool_scales": (1, 2, 3, 6),
            "channels": 16,
            "num_classes": 5,
            "norm_cfg": norm,
        },
        "auxiliary_head": {
            "type": "FCNHead",
            "in_channels": 160,
            "in_index": 2,
            "channels": 16,
            "num_convs": 1,
            "concat_input": False,
            "num_classes": 5,
            "norm_cfg": norm,
            "loss_decode": {"type": "CrossEntropyLoss", "loss_weight": 0.4},
        },
        "test_cfg": {"mode": "whole"},
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # mmsegmentation's own
        return mmseg.registry.MODELS.build(ConfigDict(config))


def samples_of(targets):
    from mmengine.structures import PixelData

    return [mmseg.structures.SegDataSample(gt_sem_seg=PixelData(data=target["mask"][None])) for target in targets]


def test_losses_are_mmsegmentations(configured):
    model = small(rank=4).train()
    configured.train().load_state_dict(model.state_dict())
    images, targets = batch_of((64, 64), (64, 64))
    torch.manual_seed(3)  # dropout
    losses = model(images, targets)
    assert losses.keys() == {"decode", "auxiliary"} and all(loss.ndim == 0 for loss in losses.values())
    torch.manual_seed(3)
    data = configured.data_preprocessor(
        {"inputs": [255 * image for image in images], "data_samples": samples_of(targets)}, training=True
    )
    expected = configured.loss(**data)
    assert losses["decode"].item() == pytest.approx(expected["decode.loss_ce"].item(), rel=1e-5)
    assert losses["auxiliary"].item() == pytest.approx(expected["aux.loss_ce"].item(), rel=1e-5)


RESIZED = {(50, 75): (64, 96), (40, 200): (19, 96)}  # fitted into 64 on the short side and 96 on the long one


@pytest.mark.parametrize("size", RESIZED, ids=str)
@torch.no_grad()
def test_predictions_are_mmsegmentations(configured, size):
    """mmcv resizes the image, mmsegmentation predicts, takes away what was padded to 32, and resizes back."""
    from mmcv.transforms import Resize

    model = small(rank=4)
    for head in (model.decode_head, model.auxiliary_head):
        torch.nn.init.normal_(head.conv_seg.weight)  # maps with structure
    model.eval()
    configured.eval().load_state_dict(model.state_dict())
    image = F.interpolate(torch.rand(1, 3, 8, 11), size, mode="bicubic")[0]
    resized = Resize(scale=(96, 64), keep_ratio=True)({"img": image.permute(1, 2, 0).numpy()})["img"]
    assert resized.shape[:2] == RESIZED[size]
    normalised = torch.from_numpy((resized - np.float32(IMAGE_MEAN)) / np.float32(IMAGE_STD)).permute(2, 0, 1)
    below = max(0, 32 - resized.shape[0])
    padded = F.pad(normalised, (0, 0, 0, below))[None]
    sizes = {"ori_shape": size, "img_shape": padded.shape[2:], "img_padding_size": (0, 0, 0, below)}
    sample = mmseg.structures.SegDataSample(metainfo=sizes)
    expected = configured.predict(padded, [sample])[0].pred_sem_seg.data[0]
    ours = model([image])[0]["mask"]
    assert ours.shape == size and ours.dtype == torch.int64 and len(ours.unique()) > 1
    assert (ours == expected).float().mean() > 0.999


@pytest.mark.parametrize("size", [(64, 96), (33, 517), (517, 33), (600, 410), (32, 32)], ids=str)
@torch.no_grad()
def test_predictions_have_the_size_of_the_image(size):
    """Also where the short side, resized, is less than Swin can take."""
    model = small().eval()
    first, second = model([torch.rand(3, *size), torch.rand(3, 40, 50)])
    assert first["mask"].shape == size and second["mask"].shape == (40, 50)
    assert first["mask"].min() >= 0 and first["mask"].max() < 5


@torch.no_grad()
def test_images_of_a_batch_do_not_touch_each_other_in_evaluation():
    model = small().eval()
    images, _ = batch_of((64, 64), (48, 80))
    assert model(images)[1]["mask"].equal(model(images[1:])[0]["mask"])


def test_images_of_several_sizes_are_padded_with_void():
    model = small().train()
    (first, second), targets = batch_of((64, 64), (48, 40))
    torch.manual_seed(3)
    losses = model([first, second], targets)
    mean = torch.tensor(IMAGE_MEAN)[:, None, None].expand(3, 64, 64).clone()
    mean[:, :48, :40] = second
    label = torch.full((64, 64), VOID)
    label[:48, :40] = targets[1]["mask"]
    torch.manual_seed(3)
    padded = model([first, mean], [targets[0], {"mask": label}])
    assert {name: loss.item() for name, loss in losses.items()} == pytest.approx(
        {name: loss.item() for name, loss in padded.items()}, rel=1e-5
    )


def test_a_batch_of_nothing_but_void_has_finite_losses(device):
    model = small().to(device).train()
    images, targets = batch_of((64, 64), (64, 64))
    images = [image.to(device) for image in images]
    losses = model(images, [{"mask": torch.full_like(target["mask"], VOID).to(device)} for target in targets])
    sum(losses.values()).backward()
    assert all(loss.item() == 0 for loss in losses.values())
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_one_image_trains_and_then_two():
    """The pool to a single place has no variance over one image: its norm must not ask for it, in that batch only."""
    model = small().train()
    images, targets = batch_of((64, 64), (64, 64))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    norm = model.decode_head.psp_modules[0][1].bn
    for few, updates in ((1, 0), (2, 1), (1, 1), (2, 2)):
        optimizer.zero_grad()
        sum(model(images[:few], targets[:few]).values()).backward()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
        assert norm.num_batches_tracked == updates and all(m.training for m in model.decode_head.modules())
    model.decode_head.psp_modules[0].eval()  # somebody's own wish
    model(images, targets)
    assert not norm.training and norm.num_batches_tracked == 2


@pytest.mark.parametrize("method", ["e3va", "full", "fixed", "lora"])
def test_every_trainable_parameter_gets_a_gradient(method):
    """What several processes rely on; twice, for zero-initialised factors hide a parameter that is never used."""
    model = small(method).train()
    images, targets = batch_of((64, 64), (64, 64))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        sum(model(images, targets).values()).backward()
        optimizer.step()
    without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []
    assert any(p.grad.abs().sum() > 0 for p in model.backbone.body.parameters() if p.grad is not None) or (
        method == "fixed"
    )


@pytest.mark.parametrize("stages", [(1, 2, 3, 4), (2, 3, 4), (1, 2)], ids=str)
def test_isolation(stages):
    """Also with the maps of fewer stages; without stage 3 the auxiliary head sees the last map."""
    model = small(stages=stages)
    assert model.auxiliary_head.in_index == (stages.index(3) if 3 in stages else 1)
    assert_isolated(model, *batch_of((64, 64), (64, 64)), loss=lambda losses: sum(losses.values()))


def test_losses_are_float32_under_autocast(device):
    model = small().to(device).train()
    images, targets = batch_of((64, 64), (64, 64))
    images = [image.to(device) for image in images]
    targets = [{"mask": target["mask"].to(device)} for target in targets]
    with torch.autocast(device.type, torch.bfloat16):
        losses = model(images, targets)
    sum(losses.values()).backward()
    assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in losses.values())
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    model.eval()
    with torch.autocast(device.type, torch.bfloat16), torch.no_grad():
        maps = model.backbone(torch.stack(images))
        assert model.decode_head(maps).dtype == model.auxiliary_head(maps).dtype == torch.float32
        assert model(images)[0]["mask"].shape == (64, 64)


def test_the_papers_model_on_the_meta_device():
    with torch.device("meta"):
        backbone = build_backbone("e3va", "swin_large_patch4_window7_224")
        model = build_upernet(backbone, 150)
        images, targets = [torch.rand(3, 512, 512)] * 2, [{"mask": torch.zeros(512, 512).long()}] * 2
        losses = model.train()(images, targets)
    assert model.backbone.body is backbone and all(p.is_meta for p in model.parameters())
    assert model.auxiliary_head.channels == 256 and model.decode_head.channels == 512
    assert sum(p.numel() for p in backbone.parameters() if p.requires_grad) == 1_792_512
    assert losses["decode"].is_meta and losses["decode"].requires_grad


def test_class_weights():
    """The losses are means over pixels, each with its class's weight; void ones have none."""
    images, targets = batch_of((64, 64), (64, 64))
    counts = torch.bincount(torch.stack([target["mask"] for target in targets]).flatten(), minlength=5)[:5]

    def losses(weights):
        torch.manual_seed(0)
        model = build_upernet(build_backbone("fixed", "swin_nano"), 5, head_channels=16, class_weights=weights).train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout2d):
                module.p = 0.0
        return model(images, targets)

    single = [losses([float(k == wanted) for k in range(5)]) for wanted in range(5)]
    plain, chosen = losses(None), [0.1, 2.0, 1.0, 0.0, 1.0]
    for name, value in losses(chosen).items():
        sums = torch.stack([found[name] for found in single]) * counts
        weights = torch.tensor(chosen)
        torch.testing.assert_close(value, (weights * sums).sum() / (weights * counts).sum())
        torch.testing.assert_close(plain[name], sums.sum() / (2 * 64 * 64))  # mmsegmentation's own counts void ones


def test_bad_models():
    backbone = build_backbone("fixed", "swin_nano")
    with pytest.raises(InputError, match="num_classes is 1"):
        build_upernet(backbone, 1)
    with pytest.raises(InputError, match=r"scale=\[64, 16\]"):
        build_upernet(backbone, 5, scale=(64, 16))
    with pytest.raises(InputError, match="a number for each of 5 classes"):
        build_upernet(backbone, 5, class_weights=[1.0, 2.0])
    backbone.strides = [4, 8, 16, 64]
    with pytest.raises(InputError, match="promise"):
        build_upernet(backbone, 5, head_channels=8).eval()([torch.rand(3, 512, 512)])


# In mmsegmentation, and in the engine --------------------------------------------------------------------------------


def test_in_somebodys_own_configuration(configured):
    """Built by mmsegmentation, started by mmengine as its runner does: loaded weights stay, and the proofs hold."""
    before = {name: value.clone() for name, value in configured.backbone.state_dict().items()}
    pretrained = build_backbone("e3va", "swin_nano", pretrained=True).state_dict()
    swin = [name for name in pretrained if name.startswith("backbone.")]
    configured.init_weights()
    after = configured.backbone.state_dict()
    assert all(after[name].equal(before[name]) for name in before)
    assert swin and all(after[f"body.{name}"].equal(pretrained[name]) for name in swin)

    images, targets = batch_of((64, 64), (64, 64))
    losses = configured.train()(torch.stack(images), samples_of(targets), mode="loss")
    configured.parse_losses(losses)[0].backward()
    trainable = {name: p for name, p in configured.named_parameters() if p.requires_grad}
    assert all(p.grad is not None for p in trainable.values())
    assert not any(".backbone." in name for name in trainable)
    total = lambda losses: losses["decode.loss_ce"] + losses["aux.loss_ce"]  # noqa: E731
    assert_isolated(configured, torch.stack(images), samples_of(targets), "loss", loss=total)


def test_a_misspelt_argument_in_a_configuration():
    with pytest.raises(InputError, match="unknown option of method e3va 'init_cfg'"):
        mmseg.registry.MODELS.build({"type": "E3VABackbone", "name": "swin_nano", "init_cfg": None})


def test_recipes():
    recipe = load_recipe("ade20k")
    assert (recipe.lr, recipe.steps, recipe.crop, recipe.head_channels) == (3e-4, 160_000, 512, 512)
    assert load_recipe("ade20k", {"method": "full"}).lr == 6e-5
    assert load_recipe("ade20k-nano").backbone == "swin_nano"


def test_the_engine_trains_and_evaluates(tmp_path, device):
    write_scenes(tmp_path, "ade20k", train=4, val=2, seed=0, size=64)
    small = {"crop": 64, "scale": [64, 64], "steps": 3, "head_channels": 16, "batch": 2, "eval_every": 3}
    recipe = load_recipe("ade20k-nano", small)
    train = ade20k.dataset(recipe, tmp_path, "training", train=True)
    model = build_model(recipe, len(train.classes))
    losses = fit(model, train, recipe, device)
    assert len(losses) == 3 and all(np.isfinite(losses))
    result = evaluate(model, ade20k.dataset(recipe, tmp_path, "validation"), recipe, device)
    assert set(result) == {"miou", "accuracy", "mean_accuracy", "by_class"} and 0 <= result[ade20k.METRIC] <= 1
