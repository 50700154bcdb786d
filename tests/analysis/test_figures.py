"""Figures: what drawing leaves alone, and where they can be written."""

import json
from pathlib import Path

import matplotlib
import pytest
from click.testing import CliRunner

from e3va_lite.analysis import diagrams, plots
from e3va_lite.analysis.gradient_path_report import on_meta
from e3va_lite.cli import cli
from e3va_lite.errors import InputError

RESULTS = Path(__file__).parents[2] / "data" / "results"


def result(name):
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def reported(study):
    return result("reproduce/report.json")["studies"][study]


DRAWN = {
    "compare": lambda: plots.compare_figure(result("shapes-5-seeds.json")),
    "memory": lambda: plots.memory_figure(result("memory-voc.json")),
    "tables": lambda: list(plots.table_figures(result("paper-tables.json")["tables"])),
    "memory trade-off": lambda: plots.memory_trade_off({study: reported(study) for study in STUDIES}, ["AP"] * 6),
    "neighbours": lambda: plots.neighbours_figure(reported("longer"), result("neighbours-time-swin-l.json")),
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


PLACES = [
    "file/x.png", "file/below/x.png", "missing/x.png", "dangling.png", "loop.png", "folder.png", "kept.png", "x.jpgg",
    "x", f"{'x' * 300}.png",
]  # fmt: skip


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place[:20])
def test_a_place_that_cannot_be_written_is_said_before_anything_is_computed(place, places, monkeypatch):
    monkeypatch.setattr("e3va_lite.analysis.cost.memory_table", lambda *_: pytest.fail("computed first"))
    arguments = ["memory", "--recipe", "voc-nano", "--dry-run", "--size", "64x64", "--figure", str(places / place)]
    error = CliRunner().invoke(cli, arguments).exception
    assert isinstance(error, InputError) and Path(place).name in str(error) and "\n" not in str(error)


@pytest.mark.parametrize("command", ["gradpath", "tables"])
def test_folders_of_figures_are_checked_too(command, places):
    for place in ("file", "file/below"):
        answer = CliRunner().invoke(cli, [command, "--figures", str(places / place)])
        assert "is not a folder" in str(answer.exception) or "is a file" in answer.output
    error = CliRunner().invoke(cli, ["compare", "--out", str(places / "file" / "run")]).exception
    assert isinstance(error, InputError) and "is not a folder" in str(error)
