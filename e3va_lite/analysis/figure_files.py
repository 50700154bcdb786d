"""Where figures are written: checked before anything is computed."""

import os
from pathlib import Path

from matplotlib.figure import Figure

from ..errors import InputError, unknown


def check_figure_file(file: Path, overwrite: bool, make_folder: bool = False) -> None:
    """Check that a figure can be written to a file, which is not touched.

    Args:
        file: Its ending is the type of the picture, one of those that matplotlib writes.
        overwrite: Whether a file that exists may be replaced.
        make_folder: Whether the folder may be missing, because the caller makes it.

    Raises:
        InputError: For an unknown type, a file that exists, or a place where none can be made.
    """
    types = [kind for kind in Figure().canvas.get_supported_filetypes() if kind != "pgf"]  # which asks for LaTeX
    if file.suffix.lower()[1:] not in types:
        raise unknown("type of picture", file.suffix or file.name, [f".{kind}" for kind in types])
    try:
        if file.is_dir():
            raise InputError(f"'{file}' is a folder: name a file in it.")
        if file.exists() and not overwrite:
            raise InputError(f"'{file}' exists: choose another place or pass --overwrite.")
        target = file.resolve()  # behind a link, which may point to nothing
        folder = target.parent
        while make_folder and not folder.exists():
            folder = folder.parent
        if not folder.is_dir():
            state = "is not a folder" if folder.exists() else "does not exist"
            raise InputError(
                f"'{file}' cannot be written: '{folder}' {state}. Make that folder or choose another place."
            )
        if not os.access(target if target.exists() else folder, os.W_OK):
            raise InputError(f"'{file}' cannot be written: there is no permission to. Choose another place.")
    except (OSError, RuntimeError) as error:  # the latter for a link that leads to itself
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"'{file}' cannot be written: {reason}. Choose another place.") from error
