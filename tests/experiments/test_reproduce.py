"""The paper in miniature: which runs come when, that a stopped experiment goes on, and what the report makes of it."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from e3va_lite import InputError
from e3va_lite.analysis.plots import neighbours_figure
from e3va_lite.backbones.base import trainable_parameters
from e3va_lite.cli import cli
from e3va_lite.datasets.shapes import write_scenes
from e3va_lite.experiments import claims, report, report_text, reproduce, studies
from e3va_lite.experiments.jsonl import read_lines
from e3va_lite.experiments.reproduce import CHOOSE_SEED, Run, chosen_rate, next_runs, run_experiment
from e3va_lite.experiments.studies import (
    ARMS,
    METHODS,
    PARTS,
    PHOTOGRAPH_PARTS,
    RATES,
    STUDIES,
    photograph_studies,
    spec_for,
    write_lists,
)
from e3va_lite.methods.registry import METHODS as WAYS
from e3va_lite.methods.registry import build_backbone, parse_method
from e3va_lite.recipes.schema import load_recipe

FIRST_RATES = RATES[3:6]  # around the recipes' 1e-3
PAIR = (STUDIES["detection"], "e3va++")


def line(purpose, lr, seed=CHOOSE_SEED, score=None, pair=("detection", "e3va++")):
    made = {"study": pair[0], "arm": pair[1], "purpose": purpose, "lr": lr, "seed": seed}
    return made if score is None else {**made, "score": score}


def chosen(scores):
    return [line("choose", lr, score=score) for lr, score in scores.items()]


def wanted(lines, pairs=(PAIR,)):
    return [(run.purpose, run.lr, run.seed) for run in next_runs(list(pairs), lines)]


def test_first_the_learning_rates():
    assert wanted([]) == [("choose", lr, CHOOSE_SEED) for lr in FIRST_RATES]
    under_way = [line("choose", FIRST_RATES[0])]
    assert wanted(under_way) == [("choose", lr, CHOOSE_SEED) for lr in FIRST_RATES[1:]]


@pytest.mark.parametrize("best", [0, -1])
def test_the_best_rate_has_worse_ones_on_both_sides(best):
    low, _, high = FIRST_RATES
    scores = dict.fromkeys(FIRST_RATES, 0.2) | {FIRST_RATES[best]: 0.3}
    next_one = RATES[RATES.index(low) - 1] if best == 0 else RATES[RATES.index(high) + 1]
    assert wanted(chosen(scores)) == [("choose", next_one, CHOOSE_SEED)]
    assert wanted([*chosen(scores), line("choose", next_one)]) == []  # under way: nothing can be decided
    assert wanted(chosen(scores | {next_one: 0.1}))[0] == ("test", FIRST_RATES[best], 0)


def test_the_ends_of_the_rates_are_ends():
    scores = {lr: 0.5 - place / 100 for place, lr in enumerate(RATES)}
    assert wanted(chosen(scores))[0] == ("test", RATES[0], 0)


def test_of_equal_rates_the_lowest():
    assert chosen_rate({1e-3: 0.2, 3e-4: 0.2, 3e-3: 0.1}) == 3e-4


def test_then_the_seeds():
    lines = chosen(dict.fromkeys(FIRST_RATES, 0.1) | {1e-3: 0.3})
    lines += [line("test", 1e-3, 0, 0.3), line("test", 1e-3, 2)]  # one done, one under way
    assert wanted(lines) == [("test", 1e-3, seed) for seed in (1, 3, 4)]
    assert wanted(lines, [(STUDIES["detection"], "fixed")])[0] == ("choose", FIRST_RATES[0], CHOOSE_SEED)


def test_scenes_to_choose_on_are_no_test_scenes():
    assert studies.CHOOSE_SCENES != studies.TEST_SCENES
    assert CHOOSE_SEED not in range(max(STUDIES[study].seeds(arm) for part in PARTS.values() for study, arm in part))


def test_every_part_is_made_of_studies_and_arms():
    for part in PHOTOGRAPH_PARTS.values():
        assert len(part) == len(set(part)) and all(kind in studies.ON_PHOTOGRAPHS and arm in ARMS for kind, arm in part)
    pairs = [pair for part in PARTS.values() for pair in part]
    assert len(pairs) == len(set(pairs)) and all(study in STUDIES and arm in ARMS for study, arm in pairs)
    for study in ("detection", "segmentation", "few images"):
        assert {arm for s, arm in pairs if s == study} >= METHODS.keys()
    assert {(claim.study, arm) for claim in (*claims.CLAIMS, *claims.PREMISES) for arm in (claim.a, claim.b)} <= set(
        pairs
    )


def test_the_twelve_ways_with_ranks_that_are_low(recwarn):
    assert list(METHODS) == list(WAYS)
    for name, arm in METHODS.items():
        method, options = parse_method(arm.spec)
        assert method == name.rstrip("+")
        build_backbone(method, "swin_nano", **options)
    assert not [warning for warning in recwarn if "no longer low" in str(warning.message)]


def test_other_backbones_get_the_papers_ranks():
    assert spec_for("e3va", "swin_nano_deep") == "e3va:rank=2" and spec_for("full", "swin_large") == "full"
    assert spec_for("e3va", "swin_large") == "e3va:rank=8" and spec_for("lora", "vit_small") == "lora:rank=64"
    assert spec_for("standard", "swin_large") == "e3va:adapter=standard,middle=32"  # Table 5's


def test_the_standard_adapters_have_as_many_parameters():
    """As nearly as a whole number of dimensions can."""
    method, options = parse_method(ARMS["standard, as many parameters"].spec)
    low_rank = trainable_parameters(build_backbone("e3va", "swin_nano", rank=2))
    off = {
        middle: abs(
            trainable_parameters(build_backbone(method, "swin_nano", **{**options, "middle": middle})) - low_rank
        )
        for middle in range(4, 9)
    }
    assert options["middle"] == min(off, key=off.get) and min(off.values()) < 0.04 * low_rank


@pytest.mark.parametrize(("arm", "option", "near"), [("lst", "narrower", (10, 40)), ("losa", "rank", (17, 19))])
def test_the_neighbours_have_as_many_parameters(arm, option, near):
    """The next width on either side is further off."""
    method, options = parse_method(ARMS[arm].spec)
    ours = trainable_parameters(build_backbone("e3va", "swin_nano", rank=2))
    off = [
        abs(trainable_parameters(build_backbone(method, "swin_nano", **{option: value})) - ours)
        for value in (options[option], *near)
    ]
    assert off[0] == min(off) < 0.12 * ours


def test_heads_learn_at_one_rate_in_all_arms_of_a_study():
    def rates(arm, lr):
        recipe = Run(STUDIES["detection"], arm, "test", lr, 0).recipe()
        return recipe.lr, recipe.head_lr

    heads = load_recipe("mini-detection").head_lr
    assert rates("e3va", 3e-5) == rates("from scratch", 3e-5) == (3e-5, heads)
    assert rates("fixed", 3e-5) == (3e-5, 3e-5)  # what it chooses is the rate of the heads


@pytest.mark.parametrize("study", ["detection", "segmentation", "instances"])
def test_the_rate_of_heads_is_one_that_the_frozen_backbone_chooses(study):
    """By the committed runs, no other rate is better by half a point on the scenes to choose on."""
    lines = read_lines(Path(__file__).parents[2] / "data" / "results" / "reproduce.jsonl")
    chosen = [x for x in lines if x["purpose"] == "choose"]  # lines of costs have no arm
    tried = {x["lr"]: x["score"] for x in chosen if (x["study"], x["arm"]) == (study, "fixed")}
    assert len(tried) >= 3 and tried[load_recipe(STUDIES[study].base).head_lr] > max(tried.values()) - 0.005


@pytest.fixture
def tiny(monkeypatch):
    """The experiment with next to no images and steps."""
    sizes = {"TRAIN_IMAGES": 6, "TEST_IMAGES": 2, "CHOOSE_IMAGES": 2, "SEEDS": 2, "SEEDS_OF_CLAIMED": 2}
    for name, value in sizes.items():
        monkeypatch.setattr(studies, name, value)
    for module in (reproduce, studies):
        monkeypatch.setattr(module, "RATES", (3e-4, 1e-3, 3e-3))
    study = studies.Scenes("detection", "mini-detection", images=4, steps=1)
    return [(study, "fixed"), (study, "e3va")]


def test_a_stopped_experiment_goes_on(tiny, tmp_path):
    file = tmp_path / "runs.jsonl"

    def go():
        run_experiment([tiny], read_lines(file), file, tmp_path / "data", torch.device("cpu"), 2)
        return read_lines(file)

    whole = go()
    assert [x["purpose"] for x in whole].count("choose") == 6 and len(whole) == 10
    assert all(x["status"] == "done" and x["versions"]["torch"] and x["weights"] for x in whole)
    assert go() == whole  # nothing left to do
    kept = [x for x in whole if (x["arm"], x["purpose"], x["seed"]) != ("e3va", "test", 1)]
    others = [{**x, "recipe": {**x["recipe"], "clip": 0.5}} for x in whole if x not in kept]
    file.write_text("".join(json.dumps(x) + "\n" for x in [*kept, *others]) + '{"study": "dete')
    again = go()
    assert len(again) == 11  # the cut line is nobody's, and a run with another recipe is not this one
    assert again[-1]["score"] == next(x for x in whole if x not in kept)["score"]
    assert again[-1]["last_losses"] == next(x for x in whole if x not in kept)["last_losses"]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="children are looked up in /proc")
def test_no_run_outlives_the_experiment(tmp_path):
    """Whoever kills the command, even without a chance to tidy up, has killed its runs."""
    words = [
        "reproduce",
        "--quick",
        "--jobs",
        "1",
        "--data",
        str(tmp_path / "data"),
        "--out",
        str(tmp_path / "a.jsonl"),
    ]
    for name, value in {"TRAIN_IMAGES": 4, "TEST_IMAGES": 1, "CHOOSE_IMAGES": 1}.items():
        words += [f"{name}={value}"]
    program = (
        "import sys; from e3va_lite import cli; from e3va_lite.experiments import studies\n"
        "for word in sys.argv[9:]: name, value = word.split('='); setattr(studies, name, int(value))\n"
        "sys.argv[9:] = []; cli.main()"
    )
    command = subprocess.Popen([sys.executable, "-c", program, *words], stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while not (children := _children(command.pid)) and time.monotonic() < deadline:
            time.sleep(0.1)
        time.sleep(6)  # a run is under way
        children = _children(command.pid)
    finally:
        command.kill()
        command.wait()
    assert children
    deadline = time.monotonic() + 60  # a worker that still imports torch notices it afterwards
    while any(Path(f"/proc/{pid}").exists() for pid in children) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not [pid for pid in children if Path(f"/proc/{pid}").exists()]


def _children(pid):
    return [int(child) for file in Path(f"/proc/{pid}/task").glob("*/children") for child in file.read_text().split()]


def test_costs():
    arms = [(STUDIES["detection"], arm) for arm in ("full", "fixed", "e3va", "chained")]
    (found,) = reproduce.measure_costs(arms, torch.device("cpu"), rounds=1)
    rows = {row["arm"]: row for row in found["rows"]}
    assert list(rows) == [arm for _, arm in arms] and rows["full"]["seconds_of_full"] == 1
    assert rows["fixed"]["peak"] < rows["e3va"]["peak"] < rows["chained"]["peak"] < rows["full"]["peak"]
    assert all(row["seconds"] > 0 and row["images_per_second"] > 0 for row in rows.values())
    assert all(row["by_round"] == [row["seconds"]] for row in rows.values())


def test_a_run_that_diverges_is_a_run(tmp_path, monkeypatch):
    monkeypatch.setattr(studies, "TRAIN_IMAGES", 4)
    monkeypatch.setattr(studies, "TEST_IMAGES", 1)
    study = studies.Scenes("detection", "mini-detection", images=4)
    study.prepare(tmp_path)
    recipe = Run(study, "full", "test", 1e30, 0).recipe()
    found = reproduce.perform(study, reproduce.replace(recipe, steps=3, clip=None), "test", tmp_path, "cpu")
    assert (found["status"], found["score"]) == ("failed", 0.0) and "lower lr" in found["message"]


def run_lines(arms):
    """Lines as an experiment would leave them: chosen rate 1e-3, scores by seed."""
    lines = []
    for (study, arm), scores in arms.items():
        about = {"device": "a CPU", "versions": {"torch": "2"}, "precision": "float32", "date": "2026-01-01"}
        about |= {"status": "done", "trainable": 7}
        for lr, score in dict.fromkeys(FIRST_RATES, 0.0).items():
            lines.append({**line("choose", lr, score=score or (lr == 1e-3) * 0.5, pair=(study, arm)), **about})
        lines += [{**line("test", 1e-3, s, score, (study, arm)), **about} for s, score in enumerate(scores)]
    return lines


def verdicts(arms):
    summary = report.summarise(run_lines(arms))
    return {claim["claim"]: claim["verdict"] for claim in summary["claims"]}


FIXED, NEAR_FULL, ADAPTER = [0.20, 0.21, 0.19, 0.2], [0.30, 0.32, 0.29, 0.31], [0.31, 0.32, 0.30, 0.315]


def test_verdicts():
    found = verdicts(
        {
            ("detection", "e3va"): [0.30, 0.31, 0.29, 0.305],
            ("detection", "fixed"): FIXED,
            ("detection", "adapter"): [0.302, 0.311, 0.293, 0.306],
            ("detection", "full"): [0.4, 0.41, 0.42, 0.39],
            ("longer", "e3va"): [0.30, 0.31, 0.29, 0.305],
            ("longer", "stacked"): [0.1, 0.5, 0.2, 0.4],
        }
    )
    assert found == {
        "E3VA is better than a frozen backbone": "holds",
        "E3VA is near adapters inside the backbone": "holds",
        "E3VA is near full fine-tuning": "does not",
        "Parallel adapters are better than stacked ones": "undecided",
    }


def test_premises_ask_for_room():
    """Ten points are surely more than five, six may be five."""
    arms = {("segmentation", "fixed"): FIXED, ("segmentation", "full"): NEAR_FULL, ("detection", "fixed"): FIXED}
    arms |= {("detection", "full"): [0.26, 0.27, 0.26, 0.25], ("detection", "from scratch"): NEAR_FULL}
    found = {(x["claim"], x["study"]): x["verdict"] for x in report.summarise(run_lines(arms))["premises"]}
    room = "A frozen backbone leaves 5 points or more to full fine-tuning"
    assert found[room, "segmentation"] == "holds" and found[room, "detection"] == "undecided"
    assert found["A frozen pretrained backbone is better than training from scratch", "detection"] == "does not"
    assert found["A pretrained backbone, fully tuned, is better than training from scratch", "detection"] == "does not"


def test_many_claims_ask_for_more():
    """A difference that is significant alone is not where there are many."""
    pair = {("detection", "e3va"): [0.30, 0.32, 0.29, 0.31], ("detection", "fixed"): [0.28, 0.29, 0.28, 0.28]}
    assert list(verdicts(pair).values()) == ["holds"]
    noise = [0.1, 0.5, 0.2, 0.4]
    others = {("longer", arm): noise for arm in ("stacked", "chained", "e + l", "random start", "fixed norms")}
    others[("longer", "e3va")] = [0.3, 0.4, 0.1, 0.3]
    assert verdicts(pair | others)["E3VA is better than a frozen backbone"] == "undecided"


def test_the_report_says_what_the_lines_say(tmp_path):
    arms = {("detection", "e3va"): [0.30, 0.32], ("detection", "fixed"): [0.20, 0.24], ("quick", "full"): [0.1, 0.2]}
    lines = run_lines(arms)
    costs = [{"arm": arm, "peak": 3 * 2**20, "seconds": 1.0, "images_per_second": 4.0} for arm in ("e3va", "fixed")]
    lines.append({"purpose": "cost", "study": "detection", "rows": costs})
    lines[0] |= {"status": "failed"}
    path = tmp_path / "runs.jsonl"
    path.write_text("".join(json.dumps(x) + "\n" for x in lines))
    done = CliRunner().invoke(cli, ["report", str(path), "--out", str(tmp_path / "report")])
    assert done.exit_code == 0, done.exception
    text = (tmp_path / "report" / "report.md").read_text()
    # Differences of 10 and 8 points deviate by sqrt 2, so one score by 1; half is t(1) = 12.706 times 1 / sqrt 2.
    assert "| `e3va:rank=2` | 7 | 31.0 ± 9.0 (2) | 3 | 86.5 |" in text
    assert "detection, e3va, lr 0.0003" in text and "a CPU" in text and "| full" not in text.split("## Table 2")[0]
    assert "## Table 2" not in text and "Table 2: instances; " in text.split("Not run yet: ")[1]
    summary = json.loads((tmp_path / "report" / "report.json").read_text())
    assert summary["studies"]["detection"]["e3va"]["mean"] == pytest.approx(0.31)
    assert (tmp_path / "report" / "scenes.png").stat().st_size > 10_000


PRICE = Path(__file__).parents[2] / "data" / "results" / "neighbours-time-swin-l.json"


def test_neighbours_are_drawn_over_their_price(tmp_path):
    ways = ("full", "fixed", "e3va", "lst", "losa", "lora")
    lines = run_lines({("longer", way): [0.1 * i, 0.1 * i + 0.02] for i, way in enumerate(ways, start=1)})
    arms = report.summarise(lines)["studies"]["longer"]
    costs = json.loads(PRICE.read_text())
    memory, time, trained = neighbours_figure(arms, costs).axes
    peaks = {row["method"].partition(":")[0]: row["of_full"]["peak"] for row in costs["rows"][::-1]}
    drawn = {line.get_label(): line.lines[0].get_xydata()[0] for line in memory.containers}
    assert drawn.keys() == {*ways, "lora, checkpointed"}
    for i, way in enumerate(ways, start=1):
        assert drawn[way] == pytest.approx([peaks[way], 100 * (0.1 * i + 0.01)])
    assert drawn["lora, checkpointed"][1] == drawn["lora"][1] and drawn["lora, checkpointed"][0] < drawn["lora"][0]
    assert neighbours_figure({}, costs) is None and all(axis.get_xlabel() for axis in (memory, time, trained))

    (tmp_path / "runs.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    words = ["report", str(tmp_path / "runs.jsonl"), "--price"]
    done = CliRunner().invoke(cli, [*words, str(PRICE)])
    assert done.exit_code == 0 and (tmp_path / "runs" / "neighbours.png").stat().st_size > 10_000
    for wrong in ("nothing.json", "runs.jsonl"):
        result = CliRunner().invoke(cli, [*words, str(tmp_path / wrong)])
        assert isinstance(result.exception, InputError) and "is no output of 'e3va time --json'" in str(
            result.exception
        )


def test_a_way_of_tuning_trains_another_number_in_each_task():
    lines = run_lines({(study, "e3va"): [0.3, 0.3] for study in ("detection", "few images", "segmentation")})
    lines = [{**x, "trainable": 9000 if x["study"] == "segmentation" else 7000} for x in lines]
    assert "| `e3va:rank=2` | 7,000 / 9,000 | 30.0" in report_text.as_markdown(report.summarise(lines))


def test_the_report_says_where_the_heads_rate_is_not_the_frozen_backbones_own():
    lines = run_lines({("few images", "fixed"): FIXED, ("detection", "fixed"): FIXED})
    for x in lines:
        if x["study"] == "few images" and x["purpose"] == "choose":
            x["score"] = {1e-3: 0.5, 3e-3: 0.53}.get(x["lr"], 0.0)
        elif x["study"] == "few images":
            x["lr"] = 3e-3
    said = (
        "detection 0.001; few images 0.001 (`fixed` itself chose 0.003, 3.0 points better on the scenes to choose on)"
    )
    assert said in report_text.as_markdown(report.summarise(lines))


def test_the_papers_numbers_beside_the_claims():
    papers = {(claim.text, claim.study): claim.printed() for claim in claims.CLAIMS}
    assert papers["E3VA is better than a frozen backbone", "detection"] == "Table 1: 86.5 against 83.6"
    assert papers["E3VA is near adapters inside the backbone", "segmentation"] == "Table 1: 49.64 against 50.78"
    assert papers["Parallel adapters are better than chained ones", "longer"] == "Table 5: 86.5 against 85.9"
    larger = "The larger backbone under E3VA is better than the smaller one fully tuned"
    assert papers[larger, "instances"] == "Table 2: 52.2 against 51.9"
    assert papers[larger, "detection"] == "our question"
    assert papers["Trained norms before the neck are better than fixed ones", "longer"] == "Table 6: not legible"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["reproduce", "--part", "cor"], "did you mean core"),
        (["report", "nothing.jsonl"], "holds no finished runs"),
        (["reproduce", "--arm", "loraa"], "did you mean lora"),
        (["reproduce", "--part", "core", "--arm", "lora"], "nothing to run"),
        (["reproduce", "--set", "detection.steps=3"], "--set is for studies on photographs"),
        (["reproduce", "--photographs", "detecton=."], "did you mean detection"),
        (["reproduce", "--photographs", "detection"], "write --photographs STUDY=ROOT"),
        (["reproduce", "--photographs", "vit=nowhere"], "there is no folder 'nowhere'"),
        (["reproduce", "--photographs", "vit=.", "--set", "detection.steps=3"], "STUDY out of vit"),
        (["reproduce", "--photographs", "vit=.", "--quick"], "--quick is for generated scenes"),
    ],
)
def test_bad_input(words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(cli, words)
    assert isinstance(result.exception, InputError) and message in str(result.exception)
    assert not list(tmp_path.iterdir())


def test_a_few_arms_with_more_seeds(tmp_path, monkeypatch):
    asked = {}
    monkeypatch.setattr(reproduce, "run_experiment", lambda parts, *rest: asked.update(parts=parts, seeds=rest[-1]))
    words = ["--part", "core", "--part", "instances", "--arm", "e3va", "--arm", "from scratch", "--seeds", "13"]
    words += ["--out", str(tmp_path / "runs.jsonl"), "--data", str(tmp_path / "data")]
    assert CliRunner().invoke(cli, ["reproduce", *words], catch_exceptions=False).exit_code == 0
    assert asked["seeds"] == 13
    assert [[(study.name, arm) for study, arm in part] for part in asked["parts"]] == [
        [("detection", "e3va"), ("segmentation", "e3va")],
        [("instances", "e3va"), ("instances", "from scratch")],
    ]


@pytest.fixture(scope="module")
def voc(tmp_path_factory):
    """A VOC-shaped folder of 20 + 3 images."""
    root = tmp_path_factory.mktemp("photographs") / "voc"
    write_scenes(root, "voc", 20, 3, seed=0, size=64)
    return root


@pytest.fixture
def on_photographs(voc, monkeypatch):
    """Studies on photographs with next to no steps: by kind."""
    for module in (reproduce, studies):
        monkeypatch.setattr(module, "RATES", (3e-4, 1e-3, 3e-3))
    monkeypatch.setattr(studies, "SEEDS", 2)
    fields = {"steps": "1", "batch": "1", "train_split": "train", "eval_split": "val", "min_size": "64"}
    fields |= {"max_size": "64", "canvas": "64", "name": "shapes"}
    return photograph_studies({"detection": voc}, {f"detection.{key}": value for key, value in fields.items()})


def test_photographs_to_choose_on_are_neither_trained_nor_tested_on_then(on_photographs):
    whole, few = on_photographs["photographs, detection"], on_photographs["photographs, few"]
    assert (whole.name, few.name) == ("shapes", "shapes, a tenth of the images")
    names = whole.lists
    assert {part: len(files) for part, files in names.items()} == {"train": 20, "choose": 4, "test": 3}
    assert set(names["choose"]) < set(names["train"]) and not set(names["train"]) & set(names["test"])
    assert len(few.lists["train"]) == 2 and few.lists["choose"] == names["choose"]
    for study in (whole, few):
        shown, judged, _ = study.datasets(study.recipe("full", "choose"), "choose")
        trained = {shown.dataset.paths[i] for i in shown.indices}
        assert trained and not trained & set(judged.paths) and not shown.dataset.images[0].path.is_symlink()
        assert {path.relative_to(study.root).as_posix() for path in trained} <= set(study.lists["train"])


def test_neck_and_heads_get_the_rate_that_a_frozen_backbone_chooses(on_photographs):
    study = on_photographs["photographs, detection"]
    pairs = [(study, arm) for arm in ("fixed", "e3va", "full")]
    first = list(next_runs(pairs, []))
    assert {run.arm for run in first} == {"fixed"} and all(run.recipe().head_lr == run.lr for run in first)
    assert {run.arm for run in next_runs(pairs[1:], [])} == {"fixed"}  # also where a part has no frozen backbone
    lines = [{**run.key(), "score": 0.2 + (run.lr == 1e-3)} for run in first]
    then = list(next_runs(pairs, lines))
    others = [run for run in then if run.purpose == "choose"]
    assert {(run.arm, run.head_lr, run.recipe().head_lr) for run in others} == {
        ("e3va", 1e-3, 1e-3),
        ("full", 1e-3, 1e-3),
    }
    assert {run.arm: run.lr for run in reversed(others)} == {"e3va": 3e-4, "full": 3e-4}
    lines += [{**run.key(), "score": 0.1} for run in others]
    assert [(run.arm, run.seed) for run in next_runs(pairs, lines)] == [
        (arm, seed) for seed in range(2) for arm in ("fixed", "e3va", "full")
    ]
    more = [(run.arm, run.seed) for run in next_runs(pairs, lines, seeds=3)]
    assert more == [(arm, seed) for seed in range(3) for arm in ("fixed", "e3va", "full")]
    elsewhere = [{**line, "head_lr": 3e-3} for line in lines if "head_lr" in line]
    assert {run.arm for run in next_runs(pairs, [*lines[:3], *elsewhere]) if run.purpose == "choose"} == {
        "e3va",
        "full",
    }


def test_photographs_from_the_command_line(on_photographs, voc, tmp_path):
    study, file = on_photographs["photographs, detection"], tmp_path / "runs.jsonl"
    write_lists(on_photographs.values(), tmp_path / "images.json")
    run_experiment([[(study, "fixed"), (study, "e3va")]], [], file, tmp_path, torch.device("cpu"), 2)
    lines = read_lines(file)
    assert len(lines) == 10 and {line["status"] for line in lines} == {"done"}
    listed = json.loads((tmp_path / "images.json").read_text())
    for line in lines:
        assert (line["study"], line["kind"]) == ("shapes", "photographs, detection") and str(voc) not in json.dumps(
            line
        )
        assert all(listed["lists"][part["sha256"]][0].startswith("JPEGImages/") for part in line["images"].values())
        assert line["recipe"]["steps"] == 1 and line["images"]["train"]["count"] == 20
    assert listed["studies"]["shapes"]["test"]["count"] == 3
    for line in lines:
        del line["recipe"]["detections"]  # as if the field were newer than the line
    assert all(reproduce._is_ours(line, {"shapes": study}) for line in lines)
    swapped = {"detection.train_split": "val", "detection.eval_split": "train", "detection.name": "shapes"}
    other = photograph_studies({"detection": voc}, swapped)
    assert not any(reproduce._is_ours(line, {"shapes": other["photographs, detection"]}) for line in lines)


def test_weights_are_named_by_their_content(voc, tmp_path):
    from safetensors.torch import save_file

    from e3va_lite.backbones.swin import create_swin

    save_file(create_swin("swin_nano").state_dict(), tmp_path / "mine.safetensors")
    own = {"detection.weights": str(tmp_path / "mine.safetensors")}
    own |= {"detection.train_split": "train", "detection.eval_split": "val"}
    study = photograph_studies({"detection": voc}, own)["photographs, detection"]
    said = {arm: reproduce.setting(Run(study, arm, "test", 1e-3, 0)) for arm in ("full", "from scratch")}
    assert said["full"]["weights"] and said["from scratch"]["weights"] is None
    assert (
        Run(study, "full", "test", 1e-3, 0).recipe().weights
        and not Run(study, "from scratch", "test", 1e-3, 0).recipe().weights
    )
    assert "mine.safetensors" not in json.dumps(said)
