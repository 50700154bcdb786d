import numpy as np
import pytest
import torch
from PIL import Image

from e3va_lite import InputError
from e3va_lite.datasets.photographs import held_out, read_photographs


def write(folder, name, size=(40, 30), colour=(10, 20, 30), exif=None):
    folder.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(folder / name, **({"exif": exif} if exif else {}))


@pytest.fixture
def photographs(tmp_path):
    """Two classes, one of them nested as in Tiny-ImageNet, and a text file between the images."""
    for i in range(3):
        write(tmp_path / "p" / "bathroom", f"{i}.png", colour=(255, 0, 0))
        write(tmp_path / "p" / "n01443537" / "images", f"{i}.JPEG", colour=(0, 0, 255))
    (tmp_path / "p" / "n01443537" / "boxes.txt").write_text("no image", encoding="utf-8")
    return tmp_path / "p"


def test_a_class_is_a_folder_that_holds_images(photographs):
    read = read_photographs(photographs)
    assert read.classes == ["bathroom", "n01443537/images"]
    assert read.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert read.pixels.shape == (6, 3, 30, 30) and read.pixels.dtype == torch.uint8  # the usual shorter side
    assert read.pixels[0, 0].min() == 255 and read.pixels[5, 2].min() > 250


def test_the_square_is_from_the_middle_of_the_turned_image(tmp_path):
    for name in ("a", "b"):
        image = np.zeros((20, 60, 3), np.uint8)
        image[:, 20:40] = 200
        exif = Image.Exif()
        exif[0x0112] = 6
        (tmp_path / name).mkdir()
        Image.fromarray(image).save(tmp_path / name / "x.png", exif=exif)
    pixels = read_photographs(tmp_path, side=20).pixels
    assert pixels.shape == (2, 3, 20, 20) and pixels.min() > 190


def test_a_cache_holds_the_same_pixels_until_the_images_change(photographs, tmp_path):
    cache = tmp_path / "cache"
    first = read_photographs(photographs, cache=cache)
    [file] = cache.iterdir()
    second = read_photographs(photographs, cache=cache)
    assert torch.equal(first.pixels, second.pixels) and torch.equal(first.pixels, read_photographs(photographs).pixels)
    write(photographs / "bathroom", "3.png")
    assert len(read_photographs(photographs, cache=cache).labels) == 7 and len(list(cache.iterdir())) == 2
    assert file.exists()


def test_a_source_says_its_name_and_terms(photographs):
    assert "not stated" in read_photographs(photographs).about()["terms"]
    (photographs / "SOURCE.txt").write_text("Small Photographs\nfor tests\nonly\n", encoding="utf-8")
    assert read_photographs(photographs).about() == {"name": "Small Photographs", "terms": "for tests only"}


def test_what_is_held_out_is_never_trained_on(photographs):
    read = read_photographs(photographs)
    train, kept = held_out(read, every=3)
    assert sorted([*train.tolist(), *kept.tolist()]) == list(range(6)) and kept.tolist() == [1, 4]


def damaged(folder):
    (folder / "bathroom" / "1.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")


def truncated(folder):
    file = folder / "n01443537" / "images" / "2.JPEG"
    file.write_bytes(file.read_bytes()[:-40])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "empty").mkdir(), "class folder .*empty.* holds no images"),
        (damaged, r"image .*1\.png.* cannot be read"),
        (truncated, r"image .*2\.JPEG.* cannot be read"),
    ],
)
def test_a_spoilt_folder_gets_one_sentence(photographs, spoil, message, tmp_path):
    spoil(photographs)
    with pytest.raises(InputError, match=message) as error:
        read_photographs(photographs, cache=tmp_path / "cache")
    assert "\n" not in str(error.value)
    assert not [*(tmp_path / "cache").glob("*")]  # and no half a cache stays behind


def test_nothing_to_learn_from_gets_one_sentence(tmp_path):
    with pytest.raises(InputError, match="no folder"):
        read_photographs(tmp_path / "nowhere")
    (tmp_path / "none").mkdir()
    with pytest.raises(InputError, match="holds no images"):
        read_photographs(tmp_path / "none")
    write(tmp_path / "one" / "only", "x.png")
    with pytest.raises(InputError, match="lie in one folder"):
        read_photographs(tmp_path / "one")
