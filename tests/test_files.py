"""What is to be written is checked before anything is computed, and a name always stands for a whole file."""

import os
import stat

import pytest

from e3va_lite import InputError
from e3va_lite.files import check_picture, check_place, replacing


@pytest.fixture
def places(tmp_path):
    (tmp_path / "file").write_text("precious")
    (tmp_path / "folder").mkdir()
    (tmp_path / "dangling").symlink_to("nothing")
    (tmp_path / "loop").symlink_to("loop")
    return tmp_path


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("file", {}, "exists: choose another place or pass --overwrite"),
        ("file", {"overwrite": None}, "exists: choose another place.$"),
        ("file", {"overwrite": True, "folder": True}, "is a file"),
        ("folder", {"overwrite": True}, "is a folder"),
        ("file/below", {}, "'.*file' is not a folder"),
        ("file/far/below", {"folder": True}, "'.*file' is not a folder"),
        ("dangling", {"overwrite": True}, "is a link to something that does not exist"),
        ("dangling/below", {}, "'.*dangling' is not a folder"),
        ("loop", {}, "is a link to something that does not exist|cannot be written"),
        ("missing/below", {"make_parents": False}, "there is no folder '.*missing' for 'below'"),
        ("x" * 300, {}, "cannot be written"),
    ],
)
def test_a_place_that_cannot_be_written_is_one_sentence(places, name, options, message):
    with pytest.raises(InputError, match=message):
        check_place(places / name, **options)


def test_a_place_that_can_be_written_passes_and_nothing_is_made(places):
    before = sorted(places.rglob("*"))
    check_place(places / "new")
    check_place(places / "missing/new")
    check_place(places / "missing/new", folder=True)
    check_place(places / "file", overwrite=True)
    check_place(places / "folder", overwrite=True, folder=True)
    check_picture(places / "new.PNG")
    assert sorted(places.rglob("*")) == before


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="nothing is forbidden to this user")
def test_a_read_only_folder_is_one_sentence(places):
    (places / "folder").chmod(0o555)
    with pytest.raises(InputError, match="read-only"):
        check_place(places / "folder/new")


@pytest.mark.parametrize("name", ["figure.jpgg", "figure", "none/figure.png"])
def test_a_picture_needs_a_known_ending_and_a_folder(places, name):
    with pytest.raises(InputError, match=r"no ending of a picture|there is no folder"):
        check_picture(places / name)


def test_a_replaced_file_is_whole_and_has_the_permissions_of_a_new_file(tmp_path):
    path, plain = tmp_path / "file", tmp_path / "plain"
    plain.touch()
    with replacing(path) as unfinished:
        unfinished.unlink()
        os.close(os.open(unfinished, os.O_CREAT | os.O_WRONLY, 0o600))  # as safetensors does
        unfinished.write_text("old")
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)
    for failure in (OSError, KeyboardInterrupt):
        with pytest.raises(failure), replacing(path) as unfinished:
            unfinished.write_text("half of the n")
            raise failure
        assert path.read_text() == "old" and sorted(tmp_path.iterdir()) == [path, plain]
