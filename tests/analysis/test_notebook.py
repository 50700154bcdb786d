"""Predictions beside measurements, and what else the notebooks show."""

import re

import pytest
import torch
from matplotlib.figure import Figure

from e3va_lite import InputError, build_backbone, ledger
from e3va_lite.analysis import notebook
from e3va_lite.analysis.isolation import random_functional
from e3va_lite.analysis.notebook import kinds, results_folder, reveal, show

PARTS = {"a1": 131_072, "h1": 131_072, "log_p": 2_560, "loss": 8}
WHOLE = sum(PARTS.values())


def test_without_a_prediction_nothing_is_said_about_one():
    found = reveal(None, WHOLE, "bytes", PARTS)
    assert found.sentence == "" and found.forgotten == ()
    html = found._repr_html_()
    assert html.startswith("<details><summary>") and f"{WHOLE:,} bytes" in html and "You said" not in html


@pytest.mark.parametrize(
    ("guess", "sentence"),
    [
        (WHOLE, "You said 264,712 bytes: exactly right."),
        (262_144, "You said 262,144 bytes: right, within two percent."),
        (WHOLE - 131_072, "You said 133,640 bytes: 131,072 bytes, 50%, too little. You forgot a1 (131,072 bytes)."),
        (0, "You said 0 bytes: 264,712 bytes, 100%, too little. You forgot a1, h1 and log_p (264,704 bytes)."),
        (2_568, "You said 2,568 bytes: 262,144 bytes, 99%, too little. You forgot a1 and h1 (262,144 bytes)."),
        (395_784, "You said 395,784 bytes: 131,072 bytes, 50%, too much. Did you count a1 (131,072 bytes) twice?"),
        (
            WHOLE - 60_000,
            "You said 204,712 bytes: 60,000 bytes, 23%, too little. "
            "No parts add up to that; what you forgot may be log_p and loss (2,568 bytes).",
        ),
    ],
)
def test_how_far_off_and_what_was_forgotten(guess, sentence):
    found = reveal(guess, WHOLE, "bytes", PARTS)
    assert found.sentence == sentence
    assert found._repr_html_().startswith("<details open>") and sentence in found._repr_html_()
    assert sentence in repr(found)


def test_every_tensor_that_is_left_out_is_named():
    parts = {"x": 100.0, "y": 37.0, "z": 11.0}
    for name, size in parts.items():
        assert reveal(148 - size, 148, "MiB", parts).forgotten == (name,)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 links"),
        (7, "7 links"),
        (0.0123456, "0.0123 links"),
        (2.5, "2.50 links"),
        (1e7 + 0.5, "10,000,000 links"),
    ],
)
def test_numbers_are_short(value, text):
    assert f"Measured: <b>{text}</b>" in reveal(None, value, "links")._repr_html_()
    assert reveal(3, value, "links").sentence.startswith("You said 3 links: ")


@pytest.mark.parametrize("guess", ["40", True, float("nan"), [1], torch.tensor(3.0)])
def test_what_is_no_number_is_one_sentence(guess):
    with pytest.raises(InputError, match="is no number: write one of MiB, or None"):
        reveal(guess, 1.0, "MiB")


def test_what_else_was_measured_is_shown_and_no_part():
    found = reveal(10, 20, "MiB", {"a": 5.0}, {"full": "10 MiB of 40"})
    assert found.forgotten == ("a",)
    assert "<td>10 MiB of 40</td>" in found._repr_html_() and "full  10 MiB of 40" in repr(found)


def test_names_are_escaped():
    assert "&lt;b&gt;" in reveal(1, 2, "", {"<b>": 1})._repr_html_()


def test_the_ledger_knows_what_was_forgotten():
    """A reader who forgets the GELUs of all blocks is told that it was the GELUs."""
    model = build_backbone("full", "swin_nano")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    images = torch.randn(1, 3, 64, 64)
    found = ledger(model, optimizer, lambda: random_functional(model(images)), [images])
    parts = kinds(found)
    whole = found.largest["activations"] / 2**20
    assert sum(parts.values()) == pytest.approx(whole)
    assert {"attn", "mlp.act", "mlp.fc2"} <= parts.keys() and not any(re.search(r"\.\d", name) for name in parts)
    assert len(parts) < len(found.by_module) / 3 and list(parts.values()) == sorted(parts.values(), reverse=True)
    forgotten = reveal(whole - parts["mlp.act"], whole, "MiB", parts).forgotten
    assert sum(parts[name] for name in forgotten) == pytest.approx(parts["mlp.act"])


def test_a_figure_has_a_description():
    shell = pytest.importorskip("IPython.core.interactiveshell").InteractiveShell.instance()
    with pytest.importorskip("IPython.utils.capture").capture_output() as captured:
        shell.display_formatter.formatters["image/png"].for_type(Figure, lambda figure: b"png")
        show(Figure(), "A line that rises above < 3.")
    picture, described = captured.outputs
    assert picture.metadata == {"image/png": {"alt": "A line that rises above < 3."}}
    assert "<details>" in described.data["text/html"] and "above &lt; 3." in described.data["text/html"]


def test_results_are_found_from_any_folder_of_the_repository(monkeypatch, tmp_path):
    root = results_folder().parents[1]
    monkeypatch.chdir(root / "notebooks")
    assert results_folder() == root / "data" / "results"
    monkeypatch.chdir(tmp_path)
    assert results_folder() == root / "data" / "results"  # the package lies in it


def test_an_installed_package_says_that_it_has_no_results(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(notebook, "__file__", str(tmp_path / "site-packages/e3va_lite/analysis/notebook.py"))
    with pytest.raises(InputError, match="part of the repository and not of the installed package"):
        results_folder()
