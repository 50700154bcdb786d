"""JSON lines: files to which a finished thing is added, and that may be cut off at any moment."""

import contextlib
import json
from pathlib import Path


def read_lines(path: Path) -> list[dict]:
    """The lines of a file, none if there is no file; one that was cut off in the middle is left out."""
    lines = []
    for text in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            lines.append(json.loads(text))
    return lines


def append_line(path: Path, line: dict) -> None:
    """Add a line, behind whatever was cut off."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        if size := file.tell():
            file.seek(size - 1)
            if file.read() != b"\n":
                file.write(b"\n")
        file.write(json.dumps(line).encode() + b"\n")
