"""What the runs of :mod:`e3va_lite.experiments.reproduce` say: the paper's tables, its claims with a verdict each.

Everything is computed from the lines of finished runs. Two points (.02) of AP or mIoU are the margin below which two
methods count as near each other; the p-values of all claims are corrected together (Holm), and so are those of
all premises; a run that diverged counts with a score of 0.

What was not written down before the experiment's own runs: the world of the scenes, which was changed after a first one
in which E3VA did nothing (its lines are in ``data/results/reproduce-cluttered.jsonl``); and the study ``longer``, added
when detection and segmentation had shown E3VA near a frozen backbone after 250 steps. The ablations, none of which had
been run, moved there, for variants of something that does nothing cannot be told apart.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ..analysis.plots import neighbours_figure, trade_offs
from ..analysis.text_table import percent
from ..recipes.schema import load_recipe
from .paper_tables import printed_value
from .reproduce import chosen_rate
from .significance import LEVEL, Difference, difference, holm, interval
from .studies import ABLATIONS, ARMS, CONTROLS, LARGER, METHODS, NEIGHBOURS, PAPERS_WIDTHS, STUDIES

NEAR, ROOM = 0.02, 0.05
METRICS = {
    "detection": "AP at IoU .5",
    "few images": "AP at IoU .5",
    "segmentation": "mIoU",
    "instances": "AP of boxes, IoU .50:.95",
    "longer": "AP at IoU .5",
    "quick": "AP at IoU .5",
}


TWO_BRANCHES = """One low-rank branch of twice the rank against two branches: outputs and updates are the same, which
`tests/test_adapters.py` shows. No run can tell them apart."""


@dataclass(frozen=True)
class Claim:
    """Something that can hold or not: in ``study``, the score of ``a`` exceeds that of ``b`` by more than ``margin``.

    Attributes:
        margin: Negative where a may be a little worse.
        evidence: The paper's table, its rows for a and b, and the column; None for a question of our own.
    """

    text: str
    study: str
    a: str
    b: str
    margin: float = 0.0
    evidence: tuple[str, str, str, str] | None = None

    def printed(self) -> str:
        """The paper's two numbers."""
        if self.evidence is None:
            return "our question"
        table, *rows, column = self.evidence
        first, second = (_printed((table, column), row) for row in rows)
        found = f"{first} against {second}" if first and second else "not legible"
        return f"Table {table[-1]}: {found}"


#: The paper's table and column for each study; it calls Pascal VOC a small data set.
PLACES = {
    "detection": ("table1", "ap_voc"),
    "few images": ("table1", "ap_voc"),
    "segmentation": ("table1", "miou_ade20k"),
    "instances": ("table2", "ap_box"),
    "longer": ("table1", "ap_voc"),
}
#: What E3VA is compared with in the longer detection: claim, the other arm, margin, rows of the paper's table.
DESIGN = (
    (
        "Low-rank adapters are better than standard ones of as many parameters",
        "standard, as many parameters",
        0.0,
        ("table5", "low-rank", "standard"),
    ),
    ("Parallel adapters are better than stacked ones", "stacked", 0.0, ("table5", "parallel", "stacked")),
    ("Parallel adapters are better than chained ones", "chained", 0.0, ("table5", "parallel", "stacked")),
    (
        "Inherited reductions are near trainable ones",
        "trainable reductions",
        -NEAR,
        ("table6", "reductions inherited", "reductions trainable"),
    ),
    (
        "Trained norms before the neck are better than fixed ones",
        "fixed norms",
        0.0,
        ("table6", "norms trainable", "norms fixed"),
    ),
    ("Norm(e) is better than Norm(e + l)", "e + l", 0.0, None),
    ("A start at the identity is better than a random one", "random start", 0.0, None),
)


def _claims() -> Iterator[Claim]:
    for study, (table, column) in PLACES.items():
        few = study == "few images"  # there the paper's claim is that full fine-tuning overfits
        about_full = "better than" if few else "near"
        for text, b, margin in (
            ("E3VA is better than a frozen backbone", "fixed", 0.0),
            ("E3VA is near adapters inside the backbone", "adapter", -NEAR),
            (f"E3VA is {about_full} full fine-tuning", "full", 0.0 if few else -NEAR),
        ):
            yield Claim(text, study, "e3va", b, margin, (table, "e3va", b, column))
        text = "E3VA is better than a frozen backbone with trained norms before the neck"
        yield Claim(text, study, "e3va", "fixed, norms trained")
    for study in ("detection", "segmentation", "longer"):
        table, column = PLACES[study]
        for a, b in (("e3va+", "e3va"), ("e3va++", "e3va+")):
            yield Claim(f"{a} is better than {b}", study, a, b, 0.0, (table, a, b, column))
    for study in ("detection", "instances"):
        text = "The larger backbone under E3VA is better than the smaller one fully tuned"
        evidence = ("table2", "e3va on Swin-L", "full", "ap_box") if study == "instances" else None
        yield Claim(text, study, "larger backbone, e3va", "full", 0.0, evidence)
    for name in NEIGHBOURS:
        yield Claim(f"E3VA is better than {name} of as many parameters", "longer", "e3va", name)
    for text, b, margin, rows in DESIGN:
        yield Claim(text, "longer", "e3va", b, margin, None if rows is None else (*rows, "ap_voc"))


def _premises() -> Iterator[Claim]:
    for study in ("detection", "segmentation", "instances", "longer"):
        yield Claim("A frozen pretrained backbone is better than training from scratch", study, "fixed", "from scratch")
        text = "A pretrained backbone, fully tuned, is better than training from scratch"
        yield Claim(text, study, "full", "from scratch")
        text = f"A frozen backbone leaves {100 * ROOM:.0f} points or more to full fine-tuning"
        yield Claim(text, study, "full", "fixed", ROOM)


CLAIMS = tuple(_claims())
#: What has to hold for the comparison to mean anything: pretraining is worth something here, and so is tuning.
PREMISES = tuple(_premises())


def summarise(lines: list[dict]) -> dict:
    """Scores, costs and claims as plain numbers.

    Args:
        lines: Of finished runs and measured costs.

    Returns:
        ``studies``: per study and arm the chosen learning rate, scores by seed, mean, half of the 95 % interval,
        trained parameters, and peak and seconds where they were measured; ``premises`` and ``claims``: see
        :func:`judged`; ``failed``: runs that diverged; ``runs``: how many lines there are; ``measured``: devices,
        versions and dates.
    """
    runs = [line for line in lines if line.get("purpose") in ("choose", "test")]
    costs = {
        (line["study"], row["arm"]): row for line in lines if line.get("purpose") == "cost" for row in line["rows"]
    }
    studies: dict[str, dict] = {}
    for study in STUDIES:
        arms = {arm: _arm(runs, study, arm) for arm in ARMS}
        studies[study] = {
            arm: {**found, **costs.get((study, arm), {})} for arm, found in arms.items() if found is not None
        }
    measured = {(line["device"], line["versions"]["torch"], line["precision"], line["date"]) for line in runs}
    return {
        "studies": studies,
        "premises": judged(PREMISES, studies),
        "claims": judged(CLAIMS, studies),
        "failed": [f"{x['study']}, {x['arm']}, lr {x['lr']}" for x in runs if x["status"] == "failed"],
        "runs": len(runs),
        "measured": sorted(measured),
    }


def _arm(runs: list[dict], study: str, arm: str) -> dict | None:
    """What the runs of an arm came to; None before two of them were judged."""
    own = [run for run in runs if (run["study"], run["arm"]) == (study, arm)]
    tried = {run["lr"]: run["score"] for run in own if run["purpose"] == "choose"}
    if not tried:
        return None
    lr = chosen_rate(tried)
    tested = {run["seed"]: run for run in own if run["purpose"] == "test" and run["lr"] == lr}
    if len(tested) < 2:
        return None
    scores = [tested[seed]["score"] for seed in sorted(tested)]
    mean, half = interval(scores)
    return {
        "lr": lr,
        "tried": {str(rate): score for rate, score in sorted(tried.items())},
        "scores": dict(zip(map(str, sorted(tested)), scores, strict=True)),
        "mean": mean,
        "half": half,
        "trainable": next(iter(tested.values()))["trainable"],
    }


def judged(claims: Iterable[Claim], studies: dict[str, dict]) -> list[dict]:
    """The claims whose two arms were run: the difference with its interval, the corrected p-value and the verdict.

    A verdict is ``holds``, ``does not`` (the opposite is significant) or ``undecided``.
    """
    found: list[tuple[Claim, Difference]] = []
    for claim in claims:
        arms = studies.get(claim.study, {})
        if claim.a in arms and claim.b in arms:
            a, b = arms[claim.a]["scores"], arms[claim.b]["scores"]
            seeds = sorted(a.keys() & b.keys())
            found.append((claim, difference([a[s] for s in seeds], [b[s] for s in seeds])))
    one_sided = [(d.p_more(claim.margin), d.p_less(claim.margin)) for claim, d in found]
    corrected = holm([min(1.0, 2 * min(pair)) for pair in one_sided])
    return [
        {
            "claim": claim.text,
            "study": claim.study,
            "margin": claim.margin,
            "a": claim.a,
            "b": claim.b,
            "paper": claim.printed(),
            "difference": d.mean,
            "interval95": [d.low, d.high],
            "detectable": d.detectable,
            "seeds": d.seeds,
            "p": p,
            "verdict": "undecided" if p >= LEVEL else "holds" if more < less else "does not",
        }
        for (claim, d), (more, less), p in zip(found, one_sided, corrected, strict=True)
    ]


def as_markdown(summary: dict) -> str:
    """The report: tables beside the paper's, then the claims."""
    studies = summary["studies"]
    detection, longer = studies.get("detection", {}), studies.get("longer", {})
    widths = [name for arm in PAPERS_WIDTHS for name in (arm.split(",")[0], arm)]
    longer_title = f"Tables 5 and 6, ranks and open readings: detection in {STUDIES['longer'].steps} steps"
    ablated = ("full", "fixed", "fixed, norms trained", "adapter", "e3va", "e3va+", "e3va++", *ABLATIONS)
    sections = {
        "Premises: pretraining matters here, and so does tuning": claim_table(summary["premises"]),
        "Table 1: detection and segmentation": _methods(studies, "detection", "segmentation", "few images"),
        "Table 2: instances": _methods(studies, "instances"),
        "The quick subset": _methods(studies, "quick") if studies.get("quick") else "",
        "Table 3: time of a training step": _times(studies),
        "The baselines' widths, ours and the paper's: detection": _variants(detection, widths),
        longer_title: f"{_variants(longer, ablated)}\n\n{TWO_BRANCHES}",
        "Neighbours that cut the backward pass, too": _variants(longer, ("full", "fixed", "e3va", *NEIGHBOURS, "lora")),
        "A larger backbone in the memory of a smaller one": _larger(studies),
        "Claims": claim_table(summary["claims"]),
    }
    titled = [f"## {title}\n\n{text}" for title, text in sections.items() if text]
    return "\n\n".join(["# The paper in miniature", _setting(summary), _rates_of_heads(studies), *titled]) + "\n"


def _setting(summary: dict) -> str:
    devices = sorted({device for device, *_ in summary["measured"]})
    dates = sorted({date for *_, date in summary["measured"]})
    failed = "; ".join(summary["failed"]) or "none"
    return (
        f"{summary['runs']} runs on {', '.join(devices)}, {dates[0]} to {dates[-1]}. Scores are percent on test "
        "scenes: mean over seeds, half of the 95 % interval (Student's t), number of seeds. Learning rates were chosen "
        f"per method on other scenes. Diverged, counted as 0: {failed}."
    )


def _rates_of_heads(studies: dict) -> str:
    """How far the rate that neck and heads share suits a frozen backbone better or worse than the one it chose."""
    said = []
    for study, arms in studies.items():
        if (fixed := arms.get("fixed")) is None:
            continue
        shared, own = load_recipe(STUDIES[study].base).head_lr, fixed["lr"]
        said.append(f"{study} {shared:g}")
        if own != shared and str(shared) in fixed["tried"]:
            ahead = 100 * (fixed["tried"][str(own)] - fixed["tried"][str(shared)])
            said[-1] += f" (`fixed` itself chose {own:g}, {ahead:.1f} points better on the scenes to choose on)"
    return f"Neck and heads learn at one rate in all methods but `fixed`, which chooses it: {'; '.join(said)}."


def _table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table, or a sentence where it would have no rows."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) if rows else "Not run yet."


def _score(arm: dict | None) -> str:
    return "" if arm is None else f"{100 * arm['mean']:.1f} ± {100 * arm['half']:.1f} ({len(arm['scores'])})"


def _mib(arm: dict | None) -> str:
    return f"{arm['peak'] / 2**20:.0f}" if arm and "peak" in arm else ""


def _methods(studies: dict, *columns: str) -> str:
    """The paper's methods and the controls, a column of scores and one of peaks per study that was run."""
    present = [study for study in columns if studies.get(study)]
    header = ["method", "trained"]
    for study in present:
        header += [f"{study}: {METRICS[study]}", "peak, MiB", *(["printed"] if study in PLACES else [])]
    rows = []
    for arm in (*METHODS, *CONTROLS):
        found = {study: studies[study].get(arm) for study in present}
        if not any(found.values()):
            continue
        trained = dict.fromkeys(f"{cell['trainable']:,}" for cell in found.values() if cell)  # tasks differ in stages
        row = [f"`{ARMS[arm].spec}`" if arm in METHODS else arm, " / ".join(trained)]
        for study, cell in found.items():
            row += [_score(cell), _mib(cell), *([_printed(PLACES[study], arm)] if study in PLACES else [])]
        rows.append(row)
    return _table(header, rows)


def _printed(place: tuple[str, str], row: str) -> str:
    value = printed_value(*place, row)
    return "" if value is None else f"{value:g}"


def _times(studies: dict) -> str:
    columns = {"detection": "voc", "segmentation": "ade20k", "instances": "coco"}
    present = [study for study in columns if any("seconds_of_full" in row for row in studies.get(study, {}).values())]
    if not present:
        return "Not measured yet."
    header = ["method"] + [text for study in present for text in (f"{study}, of full", "printed")]
    rows = []
    for arm in METHODS:
        row = [f"`{ARMS[arm].spec}`"]
        for study in present:
            hours, whole = (printed_value("table3", columns[study], method) for method in (arm, "full"))
            row += [percent(studies[study].get(arm, {}).get("seconds_of_full")), percent(hours / whole)]
        rows.append(row)
    return _table(header, rows)


def _variants(arms: dict, names: Iterable[str]) -> str:
    rows = []
    for name, arm in ((name, arms[name]) for name in names if name in arms):
        speed = f"{arm['images_per_second']:.1f}" if "images_per_second" in arm else ""
        rows.append([name, f"`{ARMS[name].spec}`", f"{arm['trainable']:,}", _score(arm), _mib(arm), speed])
    header = ["", "options", "trained", METRICS["detection"], "peak, MiB", "images/s, inference"]
    return _table(header, rows if len(rows) > 1 else [])


def _larger(studies: dict) -> str:
    rows = [
        [name, study, f"{arm['trainable']:,}", _score(arm), _mib(arm)]
        for study in STUDIES
        if (arms := studies.get(study, {})).keys() & LARGER.keys()
        for name in ("full", "fixed", "e3va", *LARGER)
        if (arm := arms.get(name))
    ]
    return _table(["", "study", "trained", "score", "peak, MiB"], rows)


def claim_table(claims: list[dict]) -> str:
    """Claims or premises of a summary as a Markdown table: the paper's numbers, ours, and the verdicts."""
    if not claims:
        return "Nothing to judge yet."
    rows = []
    for claim in claims:
        low, high = (100 * bound for bound in claim["interval95"])
        ours = f"{100 * claim['difference']:+.1f} ({low:+.1f} to {high:+.1f}), {claim['seeds']} seeds"
        p = "< .001" if claim["p"] < 0.001 else f"{claim['p']:.3f}"
        row = [claim["claim"], claim["study"], claim["paper"], ours, f"{100 * claim['detectable']:.1f}", p]
        rows.append([*row, f"**{claim['verdict']}**"])
    header = ["claim", "study", "the paper", "ours, points (95 %)", "detectable", "p, corrected", "verdict"]
    return f"""{_table(header, rows)}

*Near*: not worse by {100 * NEAR:.0f} points or more. *Detectable*: the difference that so many seeds find with a
probability of 80 %. p-values are two-sided, corrected after Holm."""


def write(lines: list[dict], folder: Path, costs: dict | None = None) -> dict:
    """``report.md``, ``report.json`` and the figures into a folder; the summary.

    Args:
        costs: Of :func:`e3va_lite.analysis.cost.time_table`, costs at full size: for a figure of neighbours.
    """
    folder.mkdir(parents=True, exist_ok=True)
    summary = summarise(lines)
    (folder / "report.md").write_text(as_markdown(summary), encoding="utf-8")
    (folder / "report.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    if figure := trade_offs(summary["studies"], METRICS):
        figure.savefig(folder / "trade-offs.png")
    if costs and (figure := neighbours_figure(summary["studies"].get("longer", {}), costs)):
        figure.savefig(folder / "neighbours.png")
    return summary
