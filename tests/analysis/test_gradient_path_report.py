"""``e3va gradpath``: the report, its JSON and its files."""

import json

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from e3va_lite import InputError, build_backbone
from e3va_lite.analysis import diagrams
from e3va_lite.analysis.gradient_path import trace
from e3va_lite.analysis.gradient_path_report import FIGURES, as_text, equations, measure
from e3va_lite.backbones.swin import image_size
from tests.test_commands import e3va


def test_one_method_block_by_block():
    text = e3va("gradpath", "--method", "adapter").stdout
    assert "one image of 64x64" in text
    row = next(line.split() for line in text.splitlines() if line.startswith("adapter"))
    assert row[:5] == ["adapter", "0", "73", "682", "138"] and row[5:9] == ["27", "34", "34", "34"]
    blocks = [line.split() for line in text.splitlines() if line.startswith("stage")]
    assert len(blocks) == 8 and blocks[0][:7] == ["stage", "1", "block", "1", "128", "7", "0"]
    for label in equations():
        assert f"{label}: " in text


def test_three_methods_side_by_side():
    lines = e3va("gradpath").stdout.splitlines()
    assert [line.split()[0] for line in lines[3:6]] == ["full", "adapter", "e3va"]
    assert not any(line.startswith("stage") for line in lines) and max(map(len, lines)) <= 120


def test_nothing_to_walk():
    text = e3va("gradpath", "--method", "fixed").stdout
    assert next(line.split() for line in text.splitlines() if line.startswith("fixed"))[1:5] == ["0"] * 4
    assert "stage 4 block 2" in text


def test_json_says_what_the_trace_says():
    row = json.loads(e3va("gradpath", "--method", "e3va:structure=stacked", "--size", "72x100", "--json").stdout)
    found = trace(build_backbone("e3va", "swin_nano", structure="stacked"), torch.randn(1, 3, 72, 100))
    assert row["method"] == "e3va:structure=stacked" and row["size"] == [72, 100]
    assert row["backbone_parameters_reached"] == row["backbone_activations_reached"] == 0
    assert row["longest_path_per_stage"] == [10, 10, 10, 10] == list(found.longest_path_per_stage)
    for key in ("nodes", "longest_path", "bytes_on_path"):
        assert row[key] == getattr(found, key)
    assert [block["m"] for block in row["blocks"]] == [[5, 0]] * 8
    rows = json.loads(e3va("gradpath", "--method", "full", "--method", "fixed", "--json").stdout)["rows"]
    assert [row["method"] for row in rows] == ["full", "fixed"]


def test_figures_are_written_once(tmp_path, monkeypatch):
    folder = tmp_path / "new" / "figures"
    result = e3va("gradpath", "--method", "lora", "--figures", folder)
    assert result.stdout.endswith(f"saved: {folder}, 6 figures\n")
    assert {path.name for path in folder.iterdir()} == set(FIGURES)
    for name in FIGURES:
        with Image.open(folder / name) as picture:
            assert min(picture.size) > 500
    again = e3va("gradpath", "--figures", folder)
    assert isinstance(again.exception, InputError) and "figure1.png' exists" in str(again.exception)
    asked = []
    monkeypatch.setattr(diagrams, "save", lambda *arguments: asked.append(arguments))
    result = e3va("gradpath", "--method", "e3va", "--figures", folder, "--overwrite", "--json", "--size", "32x64")
    assert json.loads(result.stdout)["method"] == "e3va" and asked == [(folder, ("e3va",), "swin_nano", (32, 64))]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--size", "31x64"], "both 32 pixels or more"),
        (["--size", "224"], "HEIGHTxWIDTH"),
        (["--size", "ax64"], "HEIGHTxWIDTH"),
        (["--size", "-64x64"], "HEIGHTxWIDTH"),
        (["--method", "e4va"], "unknown method 'e4va'"),
        (["--method", "e3va:rang=4"], "unknown option of method e3va 'rang'"),
        (["--method", "e3va:rank"], "METHOD:option=value"),
        (["--method", "e3va:rank=["], "METHOD:option=value"),
        (["--backbone", "swin_mano"], "unknown backbone 'swin_mano'"),
    ],
)
def test_what_cannot_be_walked_is_one_sentence(arguments, sentence):
    result = e3va("gradpath", *arguments)
    assert isinstance(result.exception, InputError) and sentence in str(result.exception)
    assert not result.stdout


@pytest.mark.parametrize(("method", "backbone"), [("lst", "swin_nano"), ("e3va", "vit_tiny_patch16_224")])
def test_what_the_papers_figures_do_not_show_is_not_drawn(method, backbone, tmp_path):
    arguments = ("gradpath", "--method", method, "--backbone", backbone)
    assert f"the gradient's path through {backbone}" in e3va(*arguments).stdout
    result = e3va(*arguments, "--figures", tmp_path / "new")
    assert isinstance(result.exception, InputError) and f"not for {method} on {backbone}" in str(result.exception)
    assert not list(tmp_path.iterdir())


def test_sizes():
    assert image_size("32x1000") == (32, 1000)


def test_the_report_is_made_of_rows():
    rows = [measure(spec, "swin_nano") for spec in ("adapter", "e3va")]
    assert as_text(rows).count("e3va") == 1 and as_text(rows[:1]) != as_text(rows)


def test_equations_can_be_drawn():
    figure = Figure()
    for y, text in enumerate(equations(mathtext=True).values()):
        figure.text(0, y / 4, text)
    figure.canvas.draw()
    assert list(equations()) == ["(11) as printed", "(11) corrected", "(12) as printed", "(12) corrected"]
