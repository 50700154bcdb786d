"""The files around the package agree with each other."""

import importlib.metadata
import json
import re
import tomllib
from pathlib import Path

import pytest
import yaml

from e3va_lite.backbones.swin import MINIATURES, PRETRAINED, create_swin
from e3va_lite.backbones.weights import fingerprint

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "data" / "results"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PAGES = (
    "README.md",
    "data/README.md",
    "data/results/README.md",
    "notebooks/course/README.md",
    "tests/integrations/README.md",
)


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def anchors(markdown: str) -> set[str]:
    """The fragments that GitHub gives to a page's headings."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", markdown, flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_environment_yml_is_in_step_with_pyproject():
    environment = yaml.safe_load(read("environment.yml"))
    *conda, pip = environment["dependencies"]
    assert [re.match(r"[a-z]+", name)[0] for name in conda] == ["python", "pip"]  # conda supplies nothing else
    extras = [name for group in PROJECT["optional-dependencies"].values() for name in group]
    wanted = {name for name in [*PROJECT["dependencies"], *extras] if not name.startswith("e3va_lite[")}
    assert set(pip["pip"]) - {"-e ."} == wanted
    python = conda[0].partition("=")[2]
    assert PROJECT["requires-python"] == f">={python}"


def test_the_test_extra_holds_what_the_tests_need_of_the_others():
    assert "e3va_lite[segmentation,peft,course]" in PROJECT["optional-dependencies"]["test"]


def test_the_readme_shows_both_commands_first_and_is_short():
    lines = read("README.md").splitlines()
    assert "pip install -e . && e3va compare" in lines[:40]
    assert 'pip install -e ".[test]" && pytest' in lines[:40]
    assert len(lines) <= 180


@pytest.mark.parametrize("page", ["README.md", "data/results/README.md"])
def test_the_comparison_shown_is_the_committed_one(page):
    from e3va_lite.experiments.compare import as_text

    assert as_text(json.loads((RESULTS / "compare.json").read_text(encoding="utf-8"))) in read(page)


def test_the_readme_states_the_committed_savings():
    rows = json.loads((RESULTS / "price-swin-l.json").read_text(encoding="utf-8"))["rows"]
    (e3va,) = (row["of_full"] for row in rows if row["method"] == "e3va:memory=compress")
    memory, time = re.search(r"(\d+) % of the memory and (\d+) % of the time of\s+full", read("README.md")).groups()
    assert (int(memory), int(time)) == (round(100 * e3va["peak"]), round(100 * e3va["step"]))


def test_the_python_of_the_readme_runs():
    (code,) = re.findall(r"```python\n(.*?)```", read("README.md"), re.S)
    exec(code, names := {})
    assert names["step"].peak == sum(names["step"].at_peak.values()) > 0


def test_every_command_is_in_the_readme():
    from e3va_lite.cli import cli

    (section,) = re.findall(r"^## Commands\n(.*?)^## ", read("README.md"), re.M | re.S)
    assert not [name for name in cli.commands if not re.search(rf"`(e3va )?{name}\b", section)]


@pytest.mark.parametrize("page", PAGES)
def test_links_of_a_page_lead_somewhere(page):
    text = read(page)
    for target, _, fragment in (link.partition("#") for link in re.findall(r"\]\((?!https?:)([^)]+)\)", text)):
        path = (ROOT / page).parent / target if target else ROOT / page
        assert path.exists(), target
        if fragment:
            assert fragment in anchors(path.read_text(encoding="utf-8")), f"{target}#{fragment}"


def test_the_index_names_every_result_once():
    index = read("data/results/README.md").split("## Index of the files")[1]
    named = re.findall(r"^\| `([^`]+)` \|.*\|.*\|$", index, re.M)
    files = {path.relative_to(RESULTS).as_posix() for path in RESULTS.rglob("*") if path.is_file()}
    assert sorted(named) == sorted(files - {"README.md"})


def test_the_version_is_the_same_everywhere():
    import e3va_lite

    assert e3va_lite.__version__ == PROJECT["version"] == importlib.metadata.version("e3va_lite")


@pytest.mark.parametrize("name", MINIATURES)
def test_the_shipped_weights_are_small_and_carry_their_card(name):
    card = json.loads((PRETRAINED / f"{name}.json").read_text(encoding="utf-8"))
    swin = create_swin(name, pretrained=True)
    assert card["parameters"] == sum(p.numel() for p in swin.parameters())
    assert 2e6 < card["parameters"] < 4e6
    assert card["fingerprint"] == fingerprint(swin)
    for source in card["sources"]:
        assert card["accuracy_held_out"][source["folder"]] > 20 / source["classes"]  # chance is 1 / classes
        assert source["terms"] and source["photographs"] > 40 * source["held_out"]


def test_no_tracked_file_is_large():
    large = [path for path in ROOT.rglob("e3va_lite/**/*") if path.is_file() and path.stat().st_size > 8e6]
    assert not large


@pytest.mark.parametrize("path", sorted((ROOT / "e3va_lite" / "recipes").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_recipe_loads(path):
    from e3va_lite.recipes.schema import load_recipe

    assert load_recipe(path.stem) == load_recipe(str(path))
