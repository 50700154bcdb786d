"""Files that are written: their places are checked before anything is computed, and what has a name is whole."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import InputError


def check_place(path: Path, overwrite: bool | None = False, folder: bool = False, make_parents: bool = True) -> None:
    """Make sure that a file, or a ``folder``, can be written, before minutes go into what it is to hold.

    Args:
        path: The place.
        overwrite: What is there may be replaced (a file), or written into (a folder). None: it may not, and the
            command has no option for it.
        folder: The place is for a folder, not for a file.
        make_parents: Folders that are missing above it will be made.

    Raises:
        InputError: If something is there already, is of the wrong kind, a link to nothing, or not writable.
    """
    path = Path(path)
    way_out = "choose another place"
    try:
        if path.is_symlink() and not path.exists():
            raise InputError(f"'{path}' is a link to something that does not exist: remove it, or {way_out}.")
        if path.exists() and path.is_dir() != folder:
            raise InputError(f"'{path}' is a {'file' if folder else 'folder'}: {way_out}.")
        if path.exists() and not overwrite:
            raise InputError(f"'{path}' exists: {way_out}{'' if overwrite is None else ' or pass --overwrite'}.")
        above = path if folder and path.exists() else path.parent
        if not make_parents and not above.exists():
            raise InputError(f"there is no folder '{above}' for '{path.name}': make it first, or {way_out}.")
        while not above.exists() and not above.is_symlink():
            above = above.parent
        if not above.is_dir():
            raise InputError(f"'{path}' cannot be made, because '{above}' is not a folder: {way_out}.")
        if not os.access(above, os.W_OK | os.X_OK):
            raise InputError(f"'{path}' cannot be written, because '{above}' is read-only: {way_out}.")
    except OSError as error:  # a name that is too long, a loop of links, a folder that may not be looked into
        raise InputError(f"'{path}' cannot be written ({error.strerror}): {way_out}.") from None


def check_picture(path: Path, overwrite: bool = False) -> None:
    """:func:`check_place` for a figure, whose kind follows from the name's ending."""
    from matplotlib.backend_bases import FigureCanvasBase

    kinds = FigureCanvasBase.get_supported_filetypes()
    if path.suffix[1:].lower() not in kinds:
        raise InputError(f"'{path}' has no ending of a picture: name it .png, .pdf or .svg.")
    check_place(path, overwrite, make_parents=False)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """The place for the new content of ``path``, which takes that name when all of it is on the disk.

    If anything fails, what had the name before still has it. The file gets the permissions of any new file.
    """
    unfinished = path.with_name(path.name + ".tmp")
    try:
        unfinished.unlink(missing_ok=True)
        unfinished.touch()
        mode = unfinished.stat().st_mode
        yield unfinished
        unfinished.chmod(mode)  # safetensors makes its files private
        with unfinished.open("rb+") as file:  # Windows only flushes what is open for writing
            os.fsync(file.fileno())  # the name must not reach the disk before the content does
        unfinished.replace(path)
    except BaseException:
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)
        raise
