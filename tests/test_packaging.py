"""The files around the package agree with each other."""

import importlib.metadata
import json
import re
import tomllib
from pathlib import Path

import pytest
import yaml

from e3va_lite.backbones.swin import MINIATURES, PRETRAINED, create_swin

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_environment_yml_is_in_step_with_pyproject():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    *conda, pip = environment["dependencies"]
    assert [re.match(r"[a-z]+", name)[0] for name in conda] == ["python", "pip"]  # conda supplies nothing else
    extras = [name for group in PROJECT["optional-dependencies"].values() for name in group]
    wanted = {name for name in [*PROJECT["dependencies"], *extras] if not name.startswith("e3va_lite[")}
    assert set(pip["pip"]) - {"-e ."} == wanted
    python = conda[0].partition("=")[2]
    assert PROJECT["requires-python"] == f">={python}"


def test_the_test_extra_holds_what_the_tests_need_of_the_others():
    assert "e3va_lite[segmentation,peft,course]" in PROJECT["optional-dependencies"]["test"]


def test_the_readme_shows_both_commands_first():
    first_screen = (ROOT / "README.md").read_text().splitlines()[:40]
    assert "pip install -e . && e3va compare" in first_screen
    assert 'pip install -e ".[test]" && pytest' in first_screen


def test_the_version_is_the_same_everywhere():
    import e3va_lite

    assert e3va_lite.__version__ == PROJECT["version"] == importlib.metadata.version("e3va_lite")


@pytest.mark.parametrize("name", MINIATURES)
def test_the_shipped_weights_are_small_and_carry_their_card(name):
    card = json.loads((PRETRAINED / f"{name}.json").read_text())
    swin = create_swin(name, pretrained=True)
    assert card["parameters"] == sum(p.numel() for p in swin.parameters())
    assert 2e6 < card["parameters"] < 4e6
    accuracy, constant = card["accuracy_on_2000_held_out_images"], card["always_the_commonest_answer"]
    for question in ("outline", "texture"):
        assert accuracy[question] > 5 * constant[question]


def test_no_tracked_file_is_large():
    large = [path for path in ROOT.rglob("e3va_lite/**/*") if path.is_file() and path.stat().st_size > 8e6]
    assert not large


@pytest.mark.parametrize("path", sorted((ROOT / "e3va_lite" / "recipes").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_recipe_loads(path):
    from e3va_lite.recipes.schema import load_recipe

    assert load_recipe(path.stem) == load_recipe(str(path))
