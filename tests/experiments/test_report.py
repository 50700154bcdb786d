"""What the report makes of runs on photographs, whole or in part."""

import json

import pytest
from click.testing import CliRunner
from scipy import stats

from e3va_lite.cli import cli
from e3va_lite.experiments import report, report_text
from e3va_lite.experiments.claims import PHOTOGRAPH_CLAIMS, PHOTOGRAPH_PREMISES

DETECTION, SEGMENTATION = "photographs, detection", "photographs, segmentation"
NAMES = {DETECTION: "my cars", SEGMENTATION: "my roads"}
FIXED, E3VA, FULL = [0.11, 0.12, 0.10, 0.11], [0.115, 0.125, 0.107, 0.115], [0.15, 0.155, 0.14, 0.15]


def lines_of(arms):
    """Lines as an experiment on photographs would leave them: scores of judged runs by kind and arm."""
    lines = []
    about = {"device": "a CPU", "versions": {"torch": "2"}, "precision": "float32", "date": "2026-01-01"}
    about |= {"status": "done", "trainable": 7}
    for (kind, arm), scores in arms.items():
        own = {"study": NAMES.get(kind, kind), "arm": arm, **({"kind": kind} if kind in NAMES else {}), **about}
        images = {"train": {"count": 1345, "sha256": "aa" * 32}}
        choose, test = (
            {**images, part: {"count": n, "sha256": part * 12}} for part, n in (("choose", 200), ("test", 9))
        )
        lines += [{**own, "purpose": "choose", "lr": 1e-3, "seed": 1000, "score": 0.1, "images": choose}]
        lines += [
            {**own, "purpose": "test", "lr": 1e-3, "seed": seed, "score": score, "images": test}
            for seed, score in enumerate(scores)
        ]
    return lines


def costs_of(kind, **peaks):
    rows = [{"arm": arm, "peak": peak * 2**20} for arm, peak in peaks.items()]
    return {"purpose": "cost", "study": NAMES[kind], "kind": kind, "rows": rows}


ARMS = {(DETECTION, "fixed"): FIXED, (DETECTION, "e3va"): E3VA, (DETECTION, "full"): FULL}
ARMS |= {(DETECTION, "from scratch"): [0.03, 0.04, 0.03, 0.035], (SEGMENTATION, "fixed"): [0.2, 0.21]}


def test_claims_on_photographs():
    found = report.summarise(lines_of(ARMS))["photographs"]
    said = {x["claim"]: x["verdict"] for x in found["claims"]}
    assert said == {"E3VA is better than a frozen backbone": "holds", "E3VA is near full fine-tuning": "does not"}
    premises = {x["claim"]: x["verdict"] for x in found["premises"]}
    assert premises == {
        "A frozen pretrained backbone is better than training from scratch": "holds",
        "Full fine-tuning is better than a frozen backbone": "holds",
    }
    assert found["names"] == NAMES and found["images"][DETECTION]["choose"]["count"] == 200


@pytest.mark.parametrize(
    ("extra", "verdict"),
    [
        ((0.0010, -0.0010, 0.0008, -0.0009), "level"),
        ((0.0030, 0.0031, 0.0029, 0.0030), "holds"),  # small, but sure
        ((0.0150, -0.0100, 0.0200, -0.0200), "undecided"),
    ],
)
def test_level_is_what_is_neither_better_nor_worse_by_what_counts(extra, verdict):
    e3va = [score + more for score, more in zip(FIXED, extra, strict=True)]
    (claim,) = report.summarise(lines_of({(DETECTION, "fixed"): FIXED, (DETECTION, "e3va"): e3va}))["photographs"][
        "claims"
    ]
    assert claim["verdict"] == verdict and (claim["p"] < 0.05) == (verdict != "undecided")


def test_of_a_study_the_newest_photographs_count():
    old = lines_of({(DETECTION, "fixed"): [0.9, 0.9]})
    lines = [{**line, "study": "others"} for line in old] + lines_of(ARMS)
    assert report.summarise(lines)["studies"][DETECTION]["fixed"]["mean"] == pytest.approx(0.11)


def test_the_report_begins_with_photographs(tmp_path):
    lines = [*lines_of(ARMS), costs_of(DETECTION, fixed=30, e3va=34, full=116)]
    scenes = lines_of(
        {("detection", "fixed"): [0.2, 0.2], ("detection", "e3va"): [0.2, 0.3], ("longer", "e3va"): [1, 1]}
    )
    for name, some in (("photographs", lines), ("scenes", scenes)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in some))
    words = ["report", *(str(tmp_path / f"{name}.jsonl") for name in ("photographs", "scenes"))]
    done = CliRunner().invoke(cli, words)
    assert done.exit_code == 0, done.exception
    assert "holds: E3VA is better than a frozen backbone (my cars)" in done.output
    text = (tmp_path / "photographs" / "report.md").read_text()
    titles = [line for line in text.splitlines() if line.startswith("## ")]
    assert titles[0] == "## On photographs: premises" and titles[-2].startswith("## On generated scenes: claims that")
    assert "| my cars | 1,345 (`aaaaaaaaaaaa`) | 200 (`choosechoose`) | 9 (`testtesttest`) | 0.001 |" in text
    low, high = report.summarise(lines)["photographs"]["claims"][0]["interval95"]
    half = 100 * (high - low) / 2 / 2**0.5  # of a mean, where that of a difference is as wide as two together
    assert f"| `e3va:rank=2` | 7 | 11.5 ± {half:.1f} (4) | 34 | 86.5 |" in text
    assert text.count("| not run |") == len(PHOTOGRAPH_CLAIMS) + len(PHOTOGRAPH_PREMISES) - 4
    assert (tmp_path / "photographs" / "photographs.png").stat().st_size > 10_000


def test_undecided_claims_say_how_many_seeds_would_decide():
    noise = {(DETECTION, "fixed"): [0.1, 0.2, 0.1], (DETECTION, "e3va"): [0.2, 0.15, 0.16]}
    (claim,) = report.summarise(lines_of(noise))["photographs"]["claims"]
    assert claim["verdict"] == "undecided" and claim["seeds_needed"] > 3
    assert claim["p"] == pytest.approx(stats.ttest_rel(*noise.values()).pvalue)  # two-sided
    assert f"**undecided**; {claim['seeds_needed']} seeds would decide" in report_text.claim_table([claim])


def test_claims_about_memory_and_time():
    rows = [
        {"arm": "e3va", "peak": 50, "by_round": [1.0, 1.1, 0.9, 1.0, 1.0, 1.1]},
        {"arm": "full", "peak": 100, "by_round": [2.0, 2.3, 1.8, 1.9, 2.0, 2.2]},
        {"arm": "adapter", "peak": 40, "by_round": [1.0, 1.0, 1.0, 1.0, 1.1, 0.9]},
    ]
    arms = {(DETECTION, "fixed"): FIXED}  # costs are judged without the methods' scores
    costs = {"purpose": "cost", "study": NAMES[DETECTION], "kind": DETECTION, "rows": rows}
    summary = report.summarise([*lines_of(arms), costs])
    found = {(claim["of"], claim["other"]): claim for claim in summary["photographs"]["costs"]}
    assert {key: claim["verdict"] for key, claim in found.items()} == {
        ("memory", "full"): "holds",
        ("memory", "adapter"): "does not",
        ("time", "full"): "holds",
        ("time", "adapter"): "undecided",
    }
    memory, time = found["memory", "full"], found["time", "full"]
    assert memory["share"] == 0.5 and memory["paper"] == pytest.approx(4819 / 15679)
    assert time["interval95"][0] < 0.5 < time["interval95"][1] < 0.55 and time["p"] < 0.001
    text = report_text.as_markdown(summary)
    assert "| E3VA needs less memory than full fine-tuning | my cars | 31 % | 50 % | counted | **holds** |" in text
    assert "| E3VA needs less memory than LoRA | my cars | 48 % |  |  | not measured |" in text
