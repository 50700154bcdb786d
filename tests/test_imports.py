"""What is imported when: nothing slow before it is asked for, and nothing from above."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import e3va_lite

PACKAGE = Path(e3va_lite.__file__).parent
SLOW = {"torch", "timm", "torchvision", "numpy", "scipy", "matplotlib", "mmseg"}

# From the ground up: a file imports of its own floor and of those below. The last floor is the command line.
FLOORS = (
    ("errors",),
    ("files", "transfer"),
    ("backbones", "adapters", "recipes"),
    ("fused", "datasets"),
    ("highway",),
    ("methods",),
    ("tasks",),
    ("training",),
    ("tuning",),
    ("analysis",),
    ("experiments",),
    ("cli",),
)
FLOOR = {room: number for number, floor in enumerate(FLOORS) for room in floor}


def loaded_by(program: str) -> set[str]:
    """The modules that a new process has after running a program."""
    program += "\nimport sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


def rooms_loaded_by(program: str) -> set[str]:
    """Those of this package, its files at the top among them."""
    return {name.split(".")[1] for name in loaded_by(program) if name.startswith("e3va_lite.")}


@pytest.mark.parametrize(
    "program",
    [
        "import e3va_lite; dir(e3va_lite), e3va_lite.__version__, e3va_lite.InputError",
        "from e3va_lite.cli import cli; cli.main(['--help'], standalone_mode=False)",
        "from e3va_lite.cli import cli; cli.main(['train', 'coco', '--help'], standalone_mode=False)",
    ],
    ids=["package", "help", "help-of-a-command"],
)
def test_nothing_slow_is_imported_before_it_is_asked_for(program):
    assert not loaded_by(program) & SLOW


def test_a_backbone_comes_without_what_trains_it():
    assert rooms_loaded_by("import e3va_lite.backbones.swin") == {"backbones", "errors"}
    built = rooms_loaded_by("import e3va_lite; e3va_lite.build_backbone('e3va', 'swin_nano')")
    assert built == {"adapters", "backbones", "errors", "fused", "highway", "methods", "transfer"}


@pytest.mark.parametrize("name", e3va_lite.__all__)
def test_every_public_name_is_there(name):
    assert name in dir(e3va_lite)
    assert getattr(e3va_lite, name) is not None


def test_other_names_are_not_there():
    with pytest.raises(AttributeError, match="module 'e3va_lite' has no attribute 'build_backbones'"):
        _ = e3va_lite.build_backbones
    with pytest.raises(ImportError):
        from e3va_lite import build_backbones  # noqa: F401


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_only_point_down(file):
    place = ("e3va_lite", *file.relative_to(PACKAGE).with_suffix("").parts)
    if len(place) == 2 and place[1] in ("__init__", "__main__"):
        return  # they re-export and start what lies below
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            target = (*place[: -node.level], *(node.module.split(".") if node.module else ()))
            rooms = [target[1]] if len(target) > 1 else [name.name for name in node.names]
            for room in rooms:
                if room in FLOOR:  # and not __version__
                    own = FLOOR[place[1]]
                    assert room == place[1] or FLOOR[room] < own, f"line {node.lineno}: {room}"


def test_every_room_has_a_floor():
    rooms = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert rooms - {"__init__", "__main__"} == FLOOR.keys()
