import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from e3va_lite.analysis import fit_on_gpu
from e3va_lite.analysis.cost import interleaved_seconds, split_methods, time_table, with_method
from e3va_lite.analysis.fit_on_gpu import CARDS, GIB, MIB, capacity, dry_peak, fit_table, gpu_slices, largest_batch
from e3va_lite.analysis.memory import CATEGORIES
from e3va_lite.backbones.swin import image_size
from e3va_lite.cli import cli
from e3va_lite.errors import InputError
from e3va_lite.fused import frozen_stream
from e3va_lite.recipes.schema import load_recipe

CPU = torch.device("cpu")
NANO = ["--recipe", "voc-nano", "--size", "64x96", "--batch-size", "2"]


def run(*arguments: str) -> str:
    result = CliRunner().invoke(cli, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.parametrize("how", [["--dry-run"], []])
def test_memory_as_json(how):
    table = json.loads(run("memory", *NANO, "--methods", "full,fixed,e3va", "--memory", "reference", *how, "--json"))
    assert table["settings"]["backbone"] == "swin_nano" and table["settings"]["size"] == [64, 96]
    assert table["settings"]["measured"].startswith("dry run") == bool(how)
    rows = {row["method"].removesuffix(":memory=reference"): row for row in table["rows"]}
    assert list(rows) == ["full", "fixed", "e3va"]
    for row in rows.values():
        assert sum(row[name] for name in CATEGORIES) == row["peak"] == max(row["curve"])
        assert row["share_of_full"] == pytest.approx(row["peak"] / rows["full"]["peak"], abs=1e-4)
        assert 0 < row["ends"]["forward"] < row["ends"]["backward"] < row["ends"]["optimizer"] <= 1
    assert rows["fixed"]["largest"]["gradients"] < rows["e3va"]["largest"]["gradients"]
    assert not any(name.startswith("backbone.body.backbone") for name in rows["fixed"]["by_module"])
    # The paper's point: what the highway keeps, its adapters keep; nothing is kept inside the backbone's blocks.
    blocks = {m: [name for name in rows[m]["by_module"] if ".backbone." in name and ".blocks." in name] for m in rows}
    assert len(blocks["full"]) > 8 and not blocks["e3va"]
    assert sum(".adapters." in name for name in rows["e3va"]["by_module"]) > 8


def test_memory_as_text_and_figure(tmp_path):
    text = run("memory", *NANO, "--methods", "e3va", "--dry-run", "--modules", "2", "--figure", str(tmp_path / "m.png"))
    assert "backbone.body" in text and "MiB kept by" in text and (tmp_path / "m.png").stat().st_size > 10_000
    result = CliRunner().invoke(cli, ["memory", *NANO, "--dry-run", "--figure", str(tmp_path / "m.png")])
    assert isinstance(result.exception, InputError) and "exists" in str(result.exception)


def test_checkpointing_is_for_methods_whose_gradient_runs_through_the_backbone():
    recipe = load_recipe("voc-nano")
    options = {method: with_method(recipe, method, checkpointing=True).options for method in ("full", "lora", "fixed")}
    assert options == {"full": {"checkpointing": True}, "lora": {"checkpointing": True}, "fixed": {}}
    assert with_method(recipe, "e3va:rank=4", checkpointing=True).options == {"rank": 4}


def test_lists_of_methods():
    assert split_methods("full, e3va:rank=4,structure=stacked,fixed") == [
        "full",
        "e3va:rank=4,structure=stacked",
        "fixed",
    ]
    assert len(split_methods("all")) == 12


class Counting:
    """A step whose phases take 1, 2 and 3 seconds of a clock of its own, times a factor."""

    def __init__(self, name: str, factor: float, order: list, clock: list) -> None:
        self.name, self.factor, self.order, self.clock = name, factor, order, clock

    def forward(self):
        self.order.append(self.name)
        self.clock[0] += self.factor

    def backward(self, loss):
        self.clock[0] += 2 * self.factor

    def update(self):
        self.clock[0] += 3 * self.factor


def test_methods_are_timed_in_turn_and_phase_by_phase():
    order, clock = [], [0.0]
    steps = {name: Counting(name, factor, order, clock) for name, factor in (("a", 1.0), ("b", 10.0))}
    seconds = interleaved_seconds(steps, 3, CPU, clock=lambda: clock[0])
    assert order == ["a", "b", "b", "a"] * 2
    for name, factor in (("a", 1), ("b", 10)):
        for phase, wanted in (("forward", 1), ("backward", 2), ("optimizer", 3), ("step", 6)):
            np.testing.assert_allclose(seconds[name][phase], [wanted * factor] * 3)


def test_time_as_json():
    arguments = ["--methods", "full,fixed,e3va", "--rounds", "2", "--json"]
    table = json.loads(run("time", *NANO, *arguments))
    rows = {row["method"]: row for row in table["rows"]}
    for row in rows.values():
        assert row["of_full"]["step"] > 0 and row["of_fixed"]["step"] > 0 and len(row["seconds_by_round"]) == 2
        assert row["of_full"]["peak"] == pytest.approx(row["peak"] / rows["full"]["peak"], abs=1e-4)
        assert row["quartiles"]["step"][0] <= row["step"] <= row["quartiles"]["step"][1]
    assert rows["full"]["of_full"]["step"] == rows["fixed"]["of_fixed"]["step"] == 1
    counted = json.loads(run("memory", *NANO, "--methods", "full,fixed,e3va", "--json"))["rows"]
    assert {row["method"]: row["peak"] for row in counted} == {method: row["peak"] for method, row in rows.items()}
    assert "of fixed" in run("time", *NANO, "--methods", "fixed,e3va", "--rounds", "1")


def test_without_full_there_is_no_share_of_it():
    table = time_table(load_recipe("voc-nano", {"batch": 1}), ["fixed"], (64, 64), CPU, rounds=1)
    assert table["rows"][0]["of_full"] is None and table["rows"][0]["of_fixed"]["step"] == 1


PEAKS = {
    "affine": lambda n: 80 + 20 * n,
    "nothing else": lambda n: 100 * n,
    "optimizer first": lambda n: max(8300 + n, 6000 + 800 * n, 4800 + 1106 * n),  # as full fine-tuning of swin_nano
    "curved": lambda n: 90 + 10 * n + n * n // 3,
    "a workspace from seven images on": lambda n: 1000 + 70 * n + 500 * (n > 6),
}


@pytest.mark.parametrize("available", [1, 99, 100, 101, 1000, 8301, 12345, 10**5, 10**7])
@pytest.mark.parametrize("name", PEAKS)
def test_the_largest_batch_fits_and_the_next_does_not(name, available):
    asked, peak = [], PEAKS[name]

    def counted(batch):
        asked.append(batch)
        return peak(batch)

    batch, bytes_ = largest_batch(counted, available)
    assert bytes_ == peak(max(batch, 1)) and (batch == 0) == (peak(1) > available)
    if batch:
        assert peak(batch) <= available and (batch == 4096 or peak(batch + 1) > available)
    if name in ("affine", "nothing else", "optimizer first"):
        assert len(asked) <= 4 and len(set(asked)) == len(asked)


@pytest.mark.parametrize("method", ["full", "fixed", "e3va"])
def test_a_few_dry_runs_answer_for_a_model_too(method, monkeypatch):
    asked = []
    monkeypatch.setattr(
        fit_on_gpu, "dry_peak", lambda recipe, size, batch: asked.append(batch) or dry_peak(recipe, size, batch)
    )
    recipe = load_recipe("voc-nano", {"pretrained": False})
    [row] = fit_table(recipe, [method], (96, 96), "200MB", overhead=0)["rows"]
    assert len(asked) <= 4 and row["peak"] <= row["available"]
    own = with_method(recipe, method)
    with gpu_slices():
        assert row["peak"] == dry_peak(own, (96, 96), row["batch_size"])
        assert row["available"] < dry_peak(own, (96, 96), row["batch_size"] + 1)


def test_slices_of_a_gpu_change_neither_the_peak_of_a_highway_nor_later_runs(monkeypatch):
    """Eight images of 96x96 are two slices of a CPU and one of a GPU."""
    recipe, rows = load_recipe("voc-nano", {"method": "e3va", "pretrained": False}), frozen_stream.ROWS["cpu"]
    slices, cut = [], frozen_stream.slices
    monkeypatch.setattr(frozen_stream, "slices", lambda tokens: slices.append(len(cut(tokens))) or cut(tokens))
    with gpu_slices():
        peak = dry_peak(recipe, (96, 96), 8)
    assert max(slices) == 1 and frozen_stream.ROWS["cpu"] == rows
    assert dry_peak(recipe, (96, 96), 8) == peak and max(slices) == 2


def test_fit_is_what_the_ledger_says():
    recipe = load_recipe("voc-nano", {"pretrained": False})
    overhead = 64 * MIB
    [row] = fit_table(recipe, ["full"], (64, 64), "148MB", overhead)["rows"]
    own = with_method(recipe, "full")
    assert row["batch_size"] > 1 and row["peak"] == dry_peak(own, (64, 64), row["batch_size"])
    assert row["peak"] <= 84 * MIB < dry_peak(own, (64, 64), row["batch_size"] + 1)
    text = run(
        "fit", "--recipe", "voc-nano", "--size", "96x96", "--gpu", "100MB", "--overhead", "90", "--methods", "full"
    )
    assert "full: not even one image fits" in text


def test_cards():
    assert capacity("11GB") == capacity("11 GiB") == capacity("1080Ti") == capacity("11264MB") == 11 * GIB
    assert all(capacity(card) == size * GIB for card, size in CARDS.items())
    assert capacity("1.5g") == 1.5 * GIB


BAD = {
    "the size": (["memory", "--recipe", "voc-nano", "--size", "16x64", "--dry-run"], "size '16x64' cannot be taken"),
    "no size": (["memory", "--recipe", "voc-nano", "--size", "64", "--dry-run"], "HEIGHTxWIDTH"),
    "the batch": (["memory", "--recipe", "voc-nano", "--batch-size", "0", "--dry-run"], "--batch-size"),
    "the card": (["fit", "--recipe", "voc-nano", "--gpu", "1080"], "did you mean 1080ti"),
    "nothing": (["fit", "--recipe", "voc-nano", "--gpu", "0GB"], "unknown card or memory '0GB'"),
    "the device": (["memory", "--recipe", "voc-nano", "--device", "cuda"], "this machine has no such device"),
    "a dry device": (
        ["memory", "--recipe", "voc-nano", "--device", "cuda", "--dry-run"],
        "this machine has no such device",
    ),
    "the method": (["memory", "--recipe", "voc-nano", "--methods", "e4va", "--dry-run"], "did you mean e3va"),
    "the precision": (["time", "--recipe", "voc-nano", "--precision", "float8"], "did you mean"),
    "the option": (["time", "--recipe", "voc-nano", "--methods", "fixed:rank=2"], "option of method fixed 'rank'"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_one_sentence(what):
    arguments, sentence = BAD[what]
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    result = CliRunner().invoke(cli, arguments)
    said = result.output if result.exit_code == 2 else str(result.exception)
    assert sentence in said and (result.exit_code == 2 or isinstance(result.exception, InputError))


@pytest.mark.parametrize("text", ["", "64", "64x", "x64", "64x64x3", "-64x64", "6.4x64", "²x64"])
def test_sizes_that_are_none(text):
    with pytest.raises(InputError, match="HEIGHTxWIDTH"):
        image_size(text)
