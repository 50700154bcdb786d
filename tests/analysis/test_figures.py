"""Figures: what drawing leaves alone, and where they can be written."""

import json
from pathlib import Path

import matplotlib
import pytest
from click.testing import CliRunner

from e3va_lite.analysis import diagrams, plots
from e3va_lite.analysis.figure_files import check_figure_file
from e3va_lite.analysis.gradient_path_report import on_meta
from e3va_lite.cli import cli
from e3va_lite.errors import InputError

RESULTS = Path(__file__).parents[2] / "data" / "results"


def result(name):
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


DRAWN = {
    "compare": lambda: plots.compare_figure(result("shapes-5-seeds.json")),
    "memory": lambda: plots.memory_figure(result("memory-voc.json")),
    "tables": lambda: list(plots.table_figures(result("paper-tables.json")["tables"])),
    "trade-offs": lambda: plots.trade_offs(result("reproduce/report.json")["studies"], dict.fromkeys(STUDIES, "AP")),
    "neighbours": lambda: plots.neighbours_figure(
        result("reproduce/report.json")["studies"]["longer"], result("neighbours-time-swin-l.json")
    ),
    "diagrams": lambda: [
        diagrams.figure5({"e3va": on_meta("e3va", "swin_nano")[0]}, on_meta("e3va", "swin_nano")[1]),
        diagrams.lengths(blocks=(1, 2)),
    ],
}
STUDIES = ("detection", "few images", "segmentation", "instances", "longer", "quick")


@pytest.mark.parametrize("what", DRAWN)
def test_drawing_changes_no_setting_of_the_session(what):
    with matplotlib.rc_context({"axes.edgecolor": "red", "font.size": 13}):
        before = dict(matplotlib.rcParams)
        assert DRAWN[what]()
        assert {key for key, value in before.items() if matplotlib.rcParams[key] != value} == set()


def test_the_seeds_of_a_comparison_are_points_on_its_bars():
    measured = result("shapes-5-seeds.json")
    axis = plots.compare_figure(measured).axes[0]
    seeds = {round(float(x), 4) for points in axis.collections for x, _ in points.get_offsets()}
    assert seeds == {x for row in measured["rows"] for x in row["ap50_by_seed"]}
    names = [row["method"] for row in measured["rows"]]
    assert [label.get_text() for label in axis.get_yticklabels()] == names
    assert axis.get_ylim()[0] > axis.get_ylim()[1]  # the first method is at the top


@pytest.fixture
def places(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "kept.png").write_text("")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "dangling.png").symlink_to(tmp_path / "none" / "x.png")
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    return tmp_path


PLACES = {
    "file/x.png": "is not a folder",
    "file/below/x.png": "cannot be written",
    "missing/x.png": "does not exist",
    "dangling.png": "does not exist",
    "loop.png": "cannot be written",
    "folder.png": "is a folder",
    "kept.png": "exists: choose another place or pass --overwrite",
    "x.jpgg": "unknown type of picture '.jpgg': did you mean .jpg or .jpeg",
    "x": "unknown type of picture 'x': known are",
    f"{'x' * 300}.png": "File name too long",
}


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place[:20])
def test_a_place_that_cannot_be_written_is_said_before_anything_is_computed(place, places, monkeypatch):
    monkeypatch.setattr("e3va_lite.analysis.cost.memory_table", lambda *_: pytest.fail("computed first"))
    arguments = ["memory", "--recipe", "voc-nano", "--dry-run", "--size", "64x64", "--figure", str(places / place)]
    error = CliRunner().invoke(cli, arguments).exception
    assert isinstance(error, InputError) and PLACES[place] in str(error) and str(error).count("\n") == 0


@pytest.mark.parametrize("command", ["gradpath", "tables"])
def test_folders_of_figures_are_checked_too(command, places):
    for place, sentence in (("file", "is not a folder"), ("file/below", "is not a folder")):
        error = CliRunner().invoke(cli, [command, "--figures", str(places / place)]).exception
        said = CliRunner().invoke(cli, [command, "--figures", str(places / place)]).output
        assert (isinstance(error, InputError) and sentence in str(error)) or "is a file" in said
    error = CliRunner().invoke(cli, ["compare", "--out", str(places / "file" / "run")]).exception
    assert isinstance(error, InputError) and "is not a folder" in str(error)


def test_places_that_can_be_written(places):
    for name, options in (("x.svg", {}), ("X.PNG", {}), ("new/er/x.pdf", {"make_folder": True})):
        check_figure_file(places / name, False, **options)
    check_figure_file(places / "kept.png", True)
    (places / "link.png").symlink_to(places / "to be made.png")
    check_figure_file(places / "link.png", False)
    assert not (places / "new").exists()
