"""The bench in miniature on the CPU. What only a GPU can do is exercised with stand-ins for torch's functions."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from e3va_lite import InputError, build_backbone, cli
from e3va_lite.analysis.fit_on_gpu import LARGEST, capacity
from e3va_lite.experiments import bench, bench_checks, bench_costs, bench_plan, bench_text
from e3va_lite.fused import highway
from e3va_lite.methods.registry import parse_method
from e3va_lite.recipes.schema import load_recipe

METHODS = ("full", "e3va", "fixed")
SIZES = ((2, (64, 64)), (1, (64, 64)), (1, (32, 32)))
PLAN = bench_plan.Plan("voc-nano", (bench_plan.Model("swin_nano", SIZES),), METHODS, ("e3va",), rounds=2, card="35MB")
CHECKS = [
    ("passes", {"maps": 1e-4}, lambda: {"maps": 1e-6}),
    ("fails", {"maps": 1e-4}, lambda: {"maps": 1e-3}),
    ("raises", {}, lambda: 1 / 0),
]


def predicted(recipe, specs, size, gpu, overhead):
    """Stands in for dry runs, which take seconds."""
    rows = [{"method": spec, "batch_size": 8, "peak": 1, "available": 2} for spec in specs]
    settings = {"backbone": recipe.backbone, "size": size, "precision": recipe.precision}
    settings |= {"gpu": gpu, "bytes": capacity(gpu)}
    return {"settings": settings, "rows": rows}


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setitem(bench.PLANS, "trial", PLAN)
    monkeypatch.setattr(bench, "checks", lambda device: CHECKS)
    monkeypatch.setattr(bench_costs, "fit_table", predicted)


def run(out, *arguments):
    return CliRunner().invoke(cli.cli, ["bench", "--device", "cpu", "--out", str(out), *arguments])


def read(out):
    return json.loads((out / "bench.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("bench") / "cpu"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(bench.PLANS, "trial", PLAN)
        patch.setattr(bench, "checks", lambda device: CHECKS)
        result = run(out)
    assert result.exit_code == 0, result.exception
    return out, result.stdout, read(out)


def test_every_part_is_there_and_every_row_complete(finished):
    result = finished[2]
    assert {"device", "processor", "versions", "date"} <= result["environment"].keys()
    assert [(row["check"], row["ok"]) for row in result["correctness"]] == [
        ("passes", True),
        ("fails", False),
        ("raises", False),
    ]
    assert "ZeroDivisionError" in result["correctness"][2]["failed"]
    (entry,) = result["costs"]
    assert (entry["batch_size"], entry["size"], entry["fell_back"]) == (2, [64, 64], [])
    assert [row["method"] for row in entry["rows"]] == list(METHODS)
    rows = {row["method"]: row for row in entry["rows"]}
    assert rows["fixed"]["peak"] < rows["e3va"]["peak"] < rows["full"]["peak"]
    for row in rows.values():
        assert len(row["sweeps"]) == len(row["step_by_sweep"]) == 2
        assert all(len(seconds) == 2 for sweep in row["sweeps"] for seconds in sweep.values())
        assert row["quartiles"][0] <= row["step"] <= row["quartiles"][1]
        assert row["peak_of_full"] == pytest.approx(row["peak"] / rows["full"]["peak"], abs=1e-4)
        assert row["step_of_full"] == pytest.approx(row["step"] / rows["full"]["step"], rel=1e-3)
    assert result["ledger"]["compared"] == 0 and result["not_reached"] == []


def test_the_largest_batch_that_runs_is_the_predicted_one(finished):
    (row,) = finished[2]["fit"]["rows"]
    assert row["measured"] == row["predicted"] > 1 and row["too_large"] == row["measured"] + 1
    assert row["because"] == bench_costs.OUT_OF_MEMORY


def test_the_summary_and_the_picture(finished):
    out, text, _ = finished
    assert "1 of 3 checks are within their bounds" in text
    assert "NOT fails: maps 0.001 (bound 0.0001)" in text and "NOT raises: ZeroDivisionError" in text
    assert all(any(line.startswith(method) for line in text.splitlines()) for method in METHODS)
    assert "only a trial" in text.splitlines()[-1]
    with Image.open(out / "bench.png") as image:
        assert min(image.size) > 300 and len(image.convert("L").getcolors()) > 20


def test_a_finished_bench_measures_nothing_again(finished, small, monkeypatch):
    out, *_ = finished
    before = read(out)
    for module in (bench, bench_costs):
        monkeypatch.setattr(module, "attempt", lambda *_: pytest.fail("measured again"))
    result = run(out, "--json")
    assert {**json.loads(result.stdout), "seconds": 0} == {**before, "seconds": 0}
    assert json.loads(result.stdout) == read(out)


def test_out_of_memory_and_failures_are_rows(tmp_path, small, monkeypatch):
    build = bench_costs.build_step

    def too_small_a_card(recipe, size, device):
        if recipe.method == "full" and (recipe.batch, size) != SIZES[-1]:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        if recipe.method == "e3va":
            raise RuntimeError("cuBLAS error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
        if recipe.method == "fixed":
            raise RuntimeError("\nsomething else\nand its trace")
        return build(recipe, size, device)

    monkeypatch.setattr(bench_costs, "build_step", too_small_a_card)
    result = run(tmp_path)
    assert result.exit_code == 0, result.exception
    (entry,) = read(tmp_path)["costs"]
    assert (entry["batch_size"], tuple(entry["size"])) == SIZES[-1]
    assert [(tried["batch_size"], tuple(tried["size"])) for tried in entry["fell_back"]] == list(SIZES[:-1])
    full, e3va, fixed = entry["rows"]
    assert full["peak"] > 0 and "failed" not in full
    assert e3va == {"method": "e3va", "failed": bench_costs.OUT_OF_MEMORY, "peak_of_full": None, "step_of_full": None}
    assert fixed["failed"] == "RuntimeError: something else"
    assert read(tmp_path)["fit"]["rows"][0]["measured"] == 0
    assert "not 2 x 64x64: full: out of memory" in result.stdout and "  e3va: out of memory" in result.stdout


def test_a_model_that_fits_at_no_size(tmp_path, small, monkeypatch):
    def no_card(*arguments):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(bench_costs, "build_step", no_card)
    assert run(tmp_path).exit_code == 0
    (entry,) = read(tmp_path)["costs"]
    assert [row["failed"] for row in entry["rows"]] == [bench_costs.OUT_OF_MEMORY] * len(METHODS)
    assert len(entry["fell_back"]) == len(SIZES) - 1 and tuple(entry["size"]) == SIZES[-1][1]


def test_an_interrupted_bench_goes_on(tmp_path, small, monkeypatch):
    measured, measure = [], bench_costs._memory_and_seconds

    def cut(recipe, *arguments):
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(recipe.method)
        return measure(recipe, *arguments)

    monkeypatch.setattr(bench_costs, "_memory_and_seconds", cut)
    assert run(tmp_path).exit_code != 0
    before = read(tmp_path)
    assert [row["method"] for row in before["costs"][0]["rows"]] == ["full", "e3va"]
    measured.clear()
    assert run(tmp_path).exit_code == 0
    after = read(tmp_path)
    assert measured == ["fixed"] and after["correctness"] == before["correctness"]
    for old, new in zip(before["costs"][0]["rows"], after["costs"][0]["rows"], strict=False):
        assert new["sweeps"][0] == old["sweeps"][0] and len(new["sweeps"]) == 2


def test_what_the_time_was_not_enough_for_is_said(tmp_path, small, monkeypatch):
    result = run(tmp_path, "--minutes", "0.00001")
    assert result.exit_code == 0, result.exception
    assert read(tmp_path)["not_reached"][0] == "correctness, from passes on"
    assert "not reached: swin_nano, float32, sweep 1, from full on" in result.stdout
    assert not read(tmp_path)["correctness"]
    measured = []
    monkeypatch.setattr(
        bench_costs, "_memory_and_seconds", lambda recipe, *_: measured.append(recipe.method) or {"failed": "x"}
    )
    assert run(tmp_path).exit_code == 0  # the same command goes on
    assert measured == list(METHODS) and read(tmp_path)["not_reached"] == []


def test_measurements_of_another_machine_are_not_mixed(finished, small, tmp_path):
    file = tmp_path / "bench.json"
    for change, sentence in (
        ({"device": "NVIDIA H200"}, r"another device \(NVIDIA H200, now"),
        ({"versions": {"torch": "1.0"}}, "another versions"),
    ):
        other = finished[2] | {"environment": finished[2]["environment"] | change}
        file.write_text(json.dumps(other), encoding="utf-8")
        before = file.read_bytes()
        with pytest.raises(InputError, match=sentence):
            bench.bench(file, torch.device("cpu"), False, 20)
        assert file.read_bytes() == before
    file.write_text(json.dumps(finished[2] | {"plan": {"name": "whole"}}), encoding="utf-8")
    with pytest.raises(InputError, match=r"another plan \(whole, now trial\)"):
        bench.bench(file, torch.device("cpu"), False, 20)
    for text in ("{", "[]", "{}"):
        file.write_text(text, encoding="utf-8")
        with pytest.raises(InputError, match="was not written by this version of e3va bench"):
            bench.bench(file, torch.device("cpu"), False, 20)
    assert run(tmp_path, "--overwrite", "--minutes", "0.00001").exit_code == 0
    assert read(tmp_path)["environment"] == finished[2]["environment"]


@pytest.mark.parametrize("limit", [0, 1, 3, 17, 60, 299, LARGEST, 2 * LARGEST])
@pytest.mark.parametrize("guess", [0, 1, 20, 300, 5000])
def test_the_search_for_the_largest_batch(limit, guess):
    tried = []

    def failure(batch):
        tried.append(batch)
        return "out of memory" if batch > limit else None

    found = bench_costs.largest_that_runs(failure, guess)
    assert len(tried) == len(set(tried)) <= 24 and min(tried) >= 1 and max(tried) <= LARGEST
    assert found["measured"] <= limit
    if limit >= LARGEST:
        assert found == {"measured": LARGEST, "too_large": None, "because": None}
    else:
        near = max(1, round(bench_costs.NEAR * found["measured"]))
        assert limit < found["too_large"] <= found["measured"] + near and found["because"] == "out of memory"


def correctness(part):
    """The rows of the checks whose names begin like this, on the CPU."""
    checks = [check for check in bench.checks(torch.device("cpu")) if check[0].startswith(part)]
    rows = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "checks", lambda device: checks)
        list(bench._correctness(rows, torch.device("cpu")))
    return rows


@pytest.mark.parametrize("part", ["highway, swin_nano, memory=compress", "isolation, ", "training step, e3va"])
def test_the_checks_pass(part):
    rows = correctness(part)
    assert len(rows) >= 2 and all(row["ok"] for row in rows), rows


def test_the_checks_find_faults(monkeypatch):
    monkeypatch.setattr(highway.MemoryMode, "unpack", lambda self, parts, dtype: 1.01 * parts[0].to(dtype))
    (float32, _) = correctness("highway, swin_nano, memory=store")
    assert not float32["ok"] and float32["maps"] < 1e-5 and float32["gradients"] > 1e-4
    monkeypatch.setattr(bench_checks, "assert_isolated", lambda *_: None)
    (adapter,) = correctness("isolation, adapter")
    assert not adapter["ok"] and "do not find the gradient" in adapter["failed"]


def test_no_number_is_no_small_error():
    good, bad = torch.ones(3), torch.tensor([1.0, float("nan"), 1.0])
    assert bench_checks.worst_error([good], [good]) == 0
    assert bench_checks.worst_error([bad], [good]) == bench_checks.worst_error([good, good], [good]) == float("inf")


@pytest.mark.parametrize("backbone", sorted({model.backbone for plan in bench.PLANS.values() for model in plan.models}))
def test_every_method_of_a_plan_can_be_built(backbone):
    for plan in bench.PLANS.values():
        assert set(plan.fit) <= set(plan.methods) and plan.methods[0] == "full"
        if backbone in [model.backbone for model in plan.models]:
            for spec in ("full", *plan.methods[-4:-1]):
                method, options = parse_method(spec)
                with torch.device("meta"):
                    build_backbone(method, backbone, **options)


# A card is imitated --------------------------------------------------------------------------------------------------


@pytest.fixture
def card(monkeypatch):
    """Torch's functions about a card of 8 GiB, which remember what they were asked."""
    asked = []
    properties = SimpleNamespace(total_memory=8 * 2**30, major=9, minor=0, multi_processor_count=132)
    for name, answer in {
        "get_device_name": lambda device: "NVIDIA GeForce RTX 3070",
        "get_device_properties": lambda device: properties,
        "set_per_process_memory_fraction": lambda share, device: asked.append((share, device)),
        "current_device": lambda: 0,
        "is_initialized": lambda: True,
        "synchronize": lambda device=None: None,
        "empty_cache": lambda: asked.append("freed"),
        "reset_peak_memory_stats": lambda device: None,
        "max_memory_allocated": lambda device: 123,
    }.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    monkeypatch.setattr(bench, "_driver", lambda: "580.1")
    return asked


def test_the_environment_of_a_card(card):
    found = bench.environment(torch.device("cuda", 0))
    assert found["device"] == "NVIDIA GeForce RTX 3070" and found["memory_mib"] == 8192 and found["driver"] == "580.1"
    assert bench.card_name(found) == "rtx-3070"


def test_a_card_that_does_nothing_right_is_reported(card, small, monkeypatch, tmp_path):
    monkeypatch.setitem(bench.PLANS, "whole", replace(PLAN, card=None))
    gpu = torch.device("cuda")
    result = bench.bench(tmp_path / "bench.json", gpu, quick=False, minutes=20)  # this machine has no GPU
    assert all("failed" in row for row in result["costs"][0]["rows"])
    (row,) = result["fit"]["rows"]
    assert result["fit"]["settings"]["gpu"] == "8192MB" and (row["measured"], row["predicted"]) == (0, 8)
    assert bench_text.as_text(result)


def test_the_way_through_on_a_card(card, small, monkeypatch, tmp_path):
    """All that runs on the card runs on the CPU instead; three images are too many."""
    build = bench_costs.build_step

    def built(recipe, size, device):
        assert device == torch.device("cuda", 0)  # torch wants a number in some places
        if recipe.batch > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return build(recipe, tuple(size), torch.device("cpu"))

    monkeypatch.setattr(bench_costs, "_built", built)
    monkeypatch.setitem(bench.PLANS, "quick", PLAN)
    monkeypatch.setattr(bench_text, "TRIAL", "no trial")
    monkeypatch.setattr(cli, "_device", lambda name: torch.device("cuda"))
    result = CliRunner().invoke(cli.cli, ["bench", "--quick", "--out", str(tmp_path)])
    assert result.exit_code == 0, result.exception
    document = read(tmp_path)
    assert document["environment"]["device"].endswith("3070") and document["plan"]["name"] == "quick"
    sweeps = [sweep for row in document["costs"][0]["rows"] for sweep in row["sweeps"]]
    assert len(sweeps) == 2 * len(METHODS) and all(sweep["max_memory_allocated"] == 123 for sweep in sweeps)
    (row,) = document["fit"]["rows"]
    assert (row["measured"], row["too_large"], row["because"]) == (2, 3, bench_costs.OUT_OF_MEMORY)
    assert "no trial" not in result.stdout + result.stderr and "without --quick" in result.stdout.splitlines()[-1]


def test_a_small_card_is_imitated_on_a_large_one(card, monkeypatch):
    build, gpu = bench_costs.build_step, torch.device("cuda", 0)
    monkeypatch.setattr(bench_costs, "_built", lambda recipe, size, device: build(recipe, size, torch.device("cpu")))
    recipe = load_recipe("voc-nano", {"backbone": "swin_nano", "method": "e3va"})
    assert bench_costs._two_steps(recipe, (64, 64), gpu, 2 * 2**30) == {}
    assert card == [(0.25, gpu), (1.0, gpu)]


def test_memory_is_freed_after_a_failure_and_a_broken_card_is_said(card, monkeypatch):
    assert bench_costs.attempt(lambda: 1 / 0)["failed"].startswith("ZeroDivisionError") and card == ["freed"]

    def broken(device=None):
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nCompile with ...")

    monkeypatch.setattr(torch.cuda, "synchronize", broken)
    with pytest.raises(InputError, match=r"does not answer any more .*illegal memory.*: start the same command again"):
        bench_costs.attempt(dict)


def test_the_ledger_beside_the_allocator():
    row = {"method": "full", "allocated": 1000, "counted": 990}
    entry = {"backbone": "swin_nano", "precision": "float32", "rows": [row, {"method": "e3va", "failed": "x"}]}
    found = bench_costs.ledger_summary([entry])
    assert found == {"compared": 1, "largest_difference": 0.01, "where": "full on swin_nano, float32"}


def test_other_devices_are_refused(tmp_path):
    with pytest.raises(InputError, match="on CUDA, or for a trial on the CPU"):
        bench.bench(tmp_path / "bench.json", torch.device("mps"), False, 20)
