"""The report of an experiment as Markdown: the numbers of :func:`e3va_lite.experiments.report.summarise` in tables."""

from collections.abc import Iterable

from ..analysis.text_table import percent
from ..recipes.schema import load_recipe
from .claims import (
    DETECTION,
    NEAR_ON_PHOTOGRAPHS,
    NEAR_ON_SCENES,
    PHOTOGRAPH_CLAIMS,
    PHOTOGRAPH_PLACES,
    PHOTOGRAPH_PREMISES,
    PLACES,
    SEGMENTATION,
    Claim,
    printed,
)
from .cost_claims import COST_CLAIMS, CostClaim
from .paper_tables import printed_value
from .significance import MOST_SEEDS
from .studies import (
    ABLATIONS,
    ARMS,
    CONTROLS,
    FEW_KIND,
    LARGER,
    METHODS,
    NEIGHBOURS,
    ON_PHOTOGRAPHS,
    PAPERS_WIDTHS,
    STUDIES,
    VIT_KIND,
)

METRICS = {
    "detection": "AP at IoU .5",
    "few images": "AP at IoU .5",
    "segmentation": "mIoU",
    "instances": "AP of boxes, IoU .50:.95",
    "longer": "AP at IoU .5",
    "quick": "AP at IoU .5",
    "photographs, detection": "AP at IoU .5",
    "photographs, segmentation": "mIoU",
    "photographs, instances": "AP of boxes, IoU .50:.95",
    FEW_KIND: "AP at IoU .5",
    VIT_KIND: "AP at IoU .5",
}
TWO_BRANCHES = """One low-rank branch of twice the rank against two branches: outputs and updates are the same, which
`tests/test_adapters.py` shows. No run can tell them apart."""
PARTS_OF_IMAGES = {"train": "to train on", "choose": "of these, to choose rates on", "test": "to test on"}


def as_markdown(summary: dict) -> str:
    """The report: tables beside the paper's, then the claims; photographs first."""
    parts = ["# The paper in miniature", _setting(summary)]
    if summary["photographs"]["names"]:
        parts += _on_photographs(summary)
        if any(summary["studies"][study] for study in STUDIES):
            parts += _on_scenes_in_short(summary)
    else:
        parts += _on_scenes(summary)
    return "\n\n".join(parts) + "\n"


def _titled(sections: dict[str, str], before: str = "") -> list[str]:
    """The sections that have something to show, and the names of the others."""
    shown = [f"## {before}{title}\n\n{text}" for title, text in sections.items() if text]
    missing = "; ".join(f"{before}{title}" for title, text in sections.items() if not text)
    return [*shown, f"Not run yet: {missing}."] if missing else shown


def _on_photographs(summary: dict) -> list[str]:
    """What the runs on photographs say."""
    found, studies = summary["photographs"], summary["studies"]
    names, near = found["names"], NEAR_ON_PHOTOGRAPHS
    called = {kind: name for kind, (_, name, _) in ON_PHOTOGRAPHS.items()} | {FEW_KIND: "a tenth of the images"} | names
    detection, vit = studies[DETECTION], studies[VIT_KIND]
    variants = ("full", "fixed", "fixed, norms trained", "e3va", "e3va+", "e3va++", *ABLATIONS)
    neighbours = ("full", "fixed", "e3va", *NEIGHBOURS, "lora") if detection.keys() & NEIGHBOURS.keys() else ()
    sections = {
        "premises": claim_table(found["premises"], called, PHOTOGRAPH_PREMISES, near),
        "which images": _images(found, studies),
        "methods": _methods(studies, *PHOTOGRAPH_PLACES, names=names),
        f"variants of E3VA, {called[DETECTION]}": _variants(detection, variants),
        f"variants of E3VA, {called[SEGMENTATION]}": _variants(studies[SEGMENTATION], variants, METRICS[SEGMENTATION]),
        "neighbours that cut the backward pass, too": _variants(detection, neighbours),
        called[VIT_KIND]: _variants(vit, ("full", "fixed", "e3va", "lora")),
        "claims about memory and time": cost_table(found["costs"], called, COST_CLAIMS),
        "claims about accuracy": claim_table(found["claims"], called, PHOTOGRAPH_CLAIMS, near),
        "noise": _noise({called[kind]: summary["noise"][kind] for kind in called if kind in summary["noise"]}),
    }
    return _titled(sections, "On photographs: ")


def _images(found: dict, studies: dict) -> str:
    """On which images the studies were run, by the hash of the list of their files."""
    rows = []
    for kind, parts in found["images"].items():
        cells = [f"{parts[x]['count']:,} (`{parts[x]['sha256'][:12]}`)" if x in parts else "" for x in PARTS_OF_IMAGES]
        rows.append(
            [found["names"][kind], *cells, f"{studies[kind]['fixed']['lr']:g}" if "fixed" in studies[kind] else ""]
        )
    table = _table(["study", *PARTS_OF_IMAGES.values(), "rate of neck and heads"], rows)
    return f"""{table}

In brackets: the beginning of the SHA-256 of the list of file names, one a line. The lists lie beside the runs, in the
file that ends in `-images.json`. Learning rates are chosen in shorter runs that are judged on a part of the training
images and do not train on it; neck and heads learn at the rate that a frozen backbone chooses."""


def _noise(studies: dict[str, dict]) -> str:
    """How far the scores of one method differ between seeds, by the name of a study."""
    if not studies:
        return ""
    rows = []
    for name, found in studies.items():
        equal = "" if found["equal"] is None else f"{found['equal']:.2f}"
        rows.append([name, str(found["methods"]), f"{100 * found['deviation']:.2f}", str(found["freedom"]), equal])
    header = ["study", "methods", "standard deviation, points", "degrees of freedom", "Levene's test, p"]
    return f"""{_table(header, rows)}

The standard deviation of one score when what is common to all runs of a method, and to all runs of a seed, is taken
away. Intervals and p-values of differences use it. It is estimated from all methods of a study together, which is right
if they have equally much noise; Levene's test would say so, with a small p, if they had not."""


def _on_scenes_in_short(summary: dict) -> list[str]:
    """What the runs on generated scenes still tell beside those on photographs."""
    studies = summary["studies"]
    decided = [claim for claim in summary["claims"] if claim["verdict"] != "undecided"]
    undecided = len(summary["claims"]) - len(decided)
    sections = {
        "methods": _methods(studies, "detection", "longer", "segmentation", "instances"),
        "premises": claim_table(summary["premises"]),
        f"claims that were decided ({undecided} more are undecided)": claim_table(decided)
        or ("None." if undecided else ""),
        "noise": _noise({study: summary["noise"][study] for study in STUDIES if study in summary["noise"]}),
    }
    return _titled(sections, "On generated scenes: ")


def _on_scenes(summary: dict) -> list[str]:
    """What the runs on generated scenes say."""
    studies = summary["studies"]
    detection, longer = studies.get("detection", {}), studies.get("longer", {})
    widths = [name for arm in PAPERS_WIDTHS for name in (arm.split(",")[0], arm)]
    longer_title = f"Tables 5 and 6, ranks and open readings: detection in {STUDIES['longer'].steps} steps"
    ablated = ("full", "fixed", "fixed, norms trained", "adapter", "e3va", "e3va+", "e3va++", *ABLATIONS)
    variants = _variants(longer, ablated)
    sections = {
        "Premises: pretraining matters here, and so does tuning": claim_table(summary["premises"]),
        "Table 1: detection and segmentation": _methods(studies, "detection", "segmentation", "few images"),
        "Table 2: instances": _methods(studies, "instances"),
        **({"The quick subset": _methods(studies, "quick")} if studies.get("quick") else {}),
        "Table 3: time of a training step": _times(studies),
        "The baselines' widths, ours and the paper's: detection": _variants(detection, widths),
        longer_title: f"{variants}\n\n{TWO_BRANCHES}" if variants else "",
        "Neighbours that cut the backward pass, too": _variants(longer, ("full", "fixed", "e3va", *NEIGHBOURS, "lora")),
        "A larger backbone in the memory of a smaller one": _larger(studies),
        "Claims": claim_table(summary["claims"]),
        "Noise": _noise({study: found for study, found in summary["noise"].items() if study in STUDIES}),
    }
    return [_rates_of_heads(studies), *_titled(sections)]


def _setting(summary: dict) -> str:
    devices = sorted({device for device, *_ in summary["measured"]})
    dates = sorted({date for *_, date in summary["measured"]})
    failed = "; ".join(summary["failed"]) or "none"
    return (
        f"{summary['runs']} runs on {', '.join(devices)}, {dates[0]} to {dates[-1]}. Scores are percent on test "
        "images: mean over seeds, half of the 95 % interval, number of seeds. The interval is for comparing the "
        "methods of a study: it is made of the noise that they share, without what all have in common in a seed. "
        f"Learning rates were chosen per method on other images. Diverged, counted as 0: {failed}."
    )


def _rates_of_heads(studies: dict) -> str:
    """How far the rate that neck and heads share suits a frozen backbone better or worse than the one it chose."""
    said = []
    for study, arms in studies.items():
        if study not in STUDIES or (fixed := arms.get("fixed")) is None:
            continue
        shared, own = load_recipe(STUDIES[study].base).head_lr, fixed["lr"]
        said.append(f"{study} {shared:g}")
        if own != shared and str(shared) in fixed["tried"]:
            ahead = 100 * (fixed["tried"][str(own)] - fixed["tried"][str(shared)])
            said[-1] += f" (`fixed` itself chose {own:g}, {ahead:.1f} points better on the scenes to choose on)"
    return f"Neck and heads learn at one rate in all methods but `fixed`, which chooses it: {'; '.join(said)}."


def _table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; empty where it would have no rows."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) if rows else ""


def _score(arm: dict | None) -> str:
    return "" if arm is None else f"{100 * arm['mean']:.1f} ± {100 * arm['half']:.1f} ({len(arm['scores'])})"


def _mib(arm: dict | None) -> str:
    return f"{arm['peak'] / 2**20:.0f}" if arm and "peak" in arm else ""


def _methods(studies: dict, *columns: str, names: dict[str, str] | None = None) -> str:
    """The paper's methods and the controls, a column of scores and one of peaks per study that was run.

    Args:
        names: What people call the studies, where that is something else.
    """
    present = [study for study in columns if studies.get(study)]
    places = PLACES | PHOTOGRAPH_PLACES
    header = ["method", "trained"]
    for study in present:
        title = f"{(names or {}).get(study, study)}: {METRICS[study]}"
        header += [title, "peak, MiB", *(["printed"] if study in places else [])]
    rows = []
    for arm in (*METHODS, *CONTROLS):
        found = {study: studies[study].get(arm) for study in present}
        if not any(found.values()):
            continue
        trained = dict.fromkeys(f"{cell['trainable']:,}" for cell in found.values() if cell)  # tasks differ in stages
        specs = dict.fromkeys(f"`{cell['spec']}`" for cell in found.values() if cell)
        row = [" / ".join(specs) if arm in METHODS else arm, " / ".join(trained)]
        for study, cell in found.items():
            row += [_score(cell), _mib(cell), *([printed(places[study], arm)] if study in places else [])]
        rows.append(row)
    return _table(header, rows)


def _times(studies: dict) -> str:
    columns = {"detection": "voc", "segmentation": "ade20k", "instances": "coco"}
    present = [study for study in columns if any("seconds_of_full" in row for row in studies.get(study, {}).values())]
    if not present:
        return ""
    header = ["method"] + [text for study in present for text in (f"{study}, of full", "printed")]
    rows = []
    for arm in METHODS:
        row = [f"`{ARMS[arm].spec}`"]
        for study in present:
            hours, whole = (printed_value("table3", columns[study], method) for method in (arm, "full"))
            row += [percent(studies[study].get(arm, {}).get("seconds_of_full")), percent(hours / whole)]
        rows.append(row)
    return _table(header, rows)


def _variants(arms: dict, names: Iterable[str], metric: str = METRICS["detection"]) -> str:
    rows = []
    for name, arm in ((name, arms[name]) for name in names if name in arms):
        speed = f"{arm['images_per_second']:.1f}" if "images_per_second" in arm else ""
        rows.append([name, f"`{arm['spec']}`", f"{arm['trainable']:,}", _score(arm), _mib(arm), speed])
    header = ["", "options", "trained", metric, "peak, MiB", "images/s, inference"]
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


def claim_table(
    claims: list[dict], names: dict[str, str] | None = None, wanted: Iterable[Claim] = (), near: float = NEAR_ON_SCENES
) -> str:
    """Claims or premises of a summary as a Markdown table: the paper's numbers, ours, and the verdicts.

    Args:
        claims: Of :func:`summarise`.
        names: What people call the studies, where that is something else.
        wanted: All claims, of which those that were not run are rows, too.
        near: The margin below which two methods count as near each other.
    """
    names, rows = names or {}, []
    for claim in claims:
        low, high = (100 * bound for bound in claim["interval95"])
        ours = f"{100 * claim['difference']:+.1f} ({low:+.1f} to {high:+.1f}), {claim['seeds']} seeds"
        p = "< .001" if claim["p"] < 0.001 else f"{claim['p']:.3f}"
        row = [claim["claim"], names.get(claim["study"], claim["study"]), claim["paper"], ours]
        row += [f"{100 * claim['detectable']:.1f}", p, f"**{claim['verdict']}**"]
        if claim["verdict"] == "undecided":
            row[-1] += f"; {claim['seeds_needed'] or f'more than {MOST_SEEDS}'} seeds would decide"
        rows.append(row)
    run = {(claim["claim"], claim["study"]) for claim in claims}
    missing = [claim for claim in wanted if (claim.text, claim.study) not in run]
    rows += [[x.text, names.get(x.study, x.study), x.printed(), "", "", "", "not run"] for x in missing]
    if not rows:
        return ""
    header = ["claim", "study", "the paper", "ours, points (95 %)", "detectable", "p, corrected", "verdict"]
    points = "two points" if near == NEAR_ON_SCENES else "one point (in instances a quarter of a point)"
    return f"""{_table(header, rows)}

*Near*: not worse by {points} or more. *Level*: neither is surely better, and the difference is surely less than that.
*Detectable*: the difference that so many seeds find with a probability of 80 %. Seeds that *would decide*: they do so
with that probability, after the correction, if the difference is as large as the one seen. p-values are two-sided,
corrected after Holm; those of *level* by themselves."""


def cost_table(claims: list[dict], names: dict[str, str], wanted: Iterable[CostClaim] = ()) -> str:
    """Claims about memory and time as a Markdown table: the paper's shares, ours, and the verdicts.

    Args:
        claims: Of :func:`.cost_claims.judged_costs`.
        names: What people call the studies.
        wanted: All claims, of which those that were not measured are rows, too.
    """
    rows = []
    for claim in claims:
        p, ours = claim["p"], percent(claim["share"])
        if claim["interval95"]:
            ours += f" ({percent(claim['interval95'][0])} to {percent(claim['interval95'][1])})"
        said = "counted" if p is None else "< .001" if p < 0.001 else f"{p:.3f}"
        row = [claim["claim"], names[claim["study"]], _printed_share(claim["paper"]), ours, said]
        rows.append([*row, f"**{claim['verdict']}**"])
    run = {(claim["claim"], claim["study"]) for claim in claims}
    missing = [claim for claim in wanted if (claim.text, claim.study) not in run]
    rows += [[x.text, names[x.study], _printed_share(x.printed()), "", "", "not measured"] for x in missing]
    header = ["claim", "study", "the paper's share", "ours (95 %)", "p, corrected", "verdict"]
    return f"""{_table(header, rows)}

What E3VA's training step needs of the other method's: peak memory, and time in rounds in which methods take turns."""


def _printed_share(share: float | None) -> str:
    return "not printed" if share is None else percent(share)
