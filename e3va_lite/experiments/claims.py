"""The paper's claims as something that runs can decide, and questions of our own beside them.

The p-values of all claims are corrected together (Holm), and so are those of all premises; those on photographs and
those on generated scenes are two families. Two methods are *near* each other within two points of AP or mIoU on scenes,
where tuning is worth ten, and one point on photographs, where it is worth little more; in instances, whose AP is a
quarter of detection's or less, a quarter of a point.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from .paper_tables import printed_value
from .significance import LEVEL, Difference, difference, holm, noise
from .studies import CAPACITY, FEW_KIND, NEIGHBOURS, VIT_KIND

ROOM = 0.05
DETECTION, SEGMENTATION, INSTANCES = (f"photographs, {task}" for task in ("detection", "segmentation", "instances"))
NEAR_ON_SCENES, NEAR_ON_PHOTOGRAPHS, NEAR_IN_INSTANCES = 0.02, 0.01, 0.0025


def near_in(study: str) -> float:
    """The difference below which two methods are near each other."""
    if study == INSTANCES:
        return NEAR_IN_INSTANCES
    return NEAR_ON_PHOTOGRAPHS if study.startswith("photographs") else NEAR_ON_SCENES


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
        first, second = (printed((table, column), row) for row in rows)
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
        -NEAR_ON_SCENES,
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
            ("E3VA is near adapters inside the backbone", "adapter", -NEAR_ON_SCENES),
            (f"E3VA is {about_full} full fine-tuning", "full", 0.0 if few else -NEAR_ON_SCENES),
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


#: The same for studies on photographs.
PHOTOGRAPH_PLACES = {
    DETECTION: ("table1", "ap_voc"),
    SEGMENTATION: ("table1", "miou_ade20k"),
    INSTANCES: ("table2", "ap_box"),
    FEW_KIND: ("table1", "ap_voc"),
}


def _photograph_claims() -> Iterator[Claim]:
    for study, (table, column) in PHOTOGRAPH_PLACES.items():
        few, near = study == FEW_KIND, near_in(study)
        about_full = "better than" if few else "near"
        for text, b, margin in (
            ("E3VA is better than a frozen backbone", "fixed", 0.0),
            ("E3VA is near adapters inside the backbone", "adapter", -near),
            ("E3VA is near LoRA", "lora", -near),
            (f"E3VA is {about_full} full fine-tuning", "full", 0.0 if few else -near),
        ):
            yield Claim(text, study, "e3va", b, margin, (table, "e3va", b, column))
        text = "E3VA is better than a frozen backbone with trained norms before the neck"
        yield Claim(text, study, "e3va", "fixed, norms trained")
    for study in (DETECTION, SEGMENTATION):
        table, column = PHOTOGRAPH_PLACES[study]
        for a, b in (("e3va+", "e3va"), ("e3va++", "e3va+")):
            yield Claim(f"{a} is better than {b}", study, a, b, 0.0, (table, a, b, column))
    for study, asked in ((DETECTION, DESIGN[:5]), (SEGMENTATION, [row for row in DESIGN if row[1] in CAPACITY])):
        for text, b, margin, rows in asked:
            near = -NEAR_ON_PHOTOGRAPHS if margin else 0.0
            yield Claim(text, study, "e3va", b, near, (*rows, PHOTOGRAPH_PLACES[study][1]))
    for name in NEIGHBOURS:
        yield Claim(f"E3VA is better than {name} of as many parameters", DETECTION, "e3va", name)
    yield Claim("E3VA is better than a frozen backbone", VIT_KIND, "e3va", "fixed")
    yield Claim("E3VA is near LoRA", VIT_KIND, "e3va", "lora", -NEAR_ON_PHOTOGRAPHS)
    yield Claim("E3VA is near full fine-tuning", VIT_KIND, "e3va", "full", -NEAR_ON_PHOTOGRAPHS)


def _photograph_premises() -> Iterator[Claim]:
    for study, (table, column) in PHOTOGRAPH_PLACES.items():
        yield Claim("A frozen pretrained backbone is better than training from scratch", study, "fixed", "from scratch")
        text = "Full fine-tuning is better than a frozen backbone"
        yield Claim(text, study, "full", "fixed", 0.0, (table, "full", "fixed", column))


CLAIMS, PHOTOGRAPH_CLAIMS = tuple(_claims()), tuple(_photograph_claims())
#: What has to hold for the comparison to mean anything: pretraining is worth something here, and so is tuning.
PREMISES, PHOTOGRAPH_PREMISES = tuple(_premises()), tuple(_photograph_premises())


def printed(place: tuple[str, str], row: str) -> str:
    """The paper's number in a table's column and row, or nothing."""
    value = printed_value(*place, row)
    return "" if value is None else f"{value:g}"


def judged(claims: Iterable[Claim], studies: dict[str, dict]) -> list[dict]:
    """The claims whose two arms were run: the difference with its interval, the corrected p-value and the verdict.

    The noise is that of all arms of a study, see :func:`.significance.noise`. A verdict is ``holds``, ``does not`` (the
    opposite is significant), ``level`` (neither, where one method is said to be better, but the difference is smaller
    than :func:`near_in`, either way; these p-values are corrected by themselves) or ``undecided``. ``seeds_needed`` is
    how many seeds would decide it if the difference is as large as was seen, see
    :meth:`.significance.Difference.seeds_needed`.
    """
    found: list[tuple[Claim, Difference]] = []
    for claim in claims:
        arms = studies.get(claim.study, {})
        if claim.a in arms and claim.b in arms:
            a, b = arms[claim.a]["scores"], arms[claim.b]["scores"]
            seeds = sorted(a.keys() & b.keys())
            shared = noise(arm["scores"] for arm in arms.values())
            found.append((claim, difference([a[s] for s in seeds], [b[s] for s in seeds], shared)))
    one_sided = [(d.p_more(claim.margin), d.p_less(claim.margin)) for claim, d in found]
    corrected = holm([min(1.0, 2 * min(pair)) for pair in one_sided])
    level = _level(found)
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
            "seeds_needed": d.seeds_needed(claim.margin, len(found), 0.0 if claim.margin else near_in(claim.study)),
            **_verdict(more < less, p, level.get(claim)),
        }
        for (claim, d), (more, less), p in zip(found, one_sided, corrected, strict=True)
    ]


def _level(found: list[tuple[Claim, Difference]]) -> dict[Claim, float]:
    """The p-value, corrected together, of each claim without a margin that the two methods are level."""
    asked = [(claim, d) for claim, d in found if not claim.margin]
    ps = holm([min(1.0, 2 * d.p_level(near_in(claim.study))) for claim, d in asked])
    return {claim: p for (claim, _), p in zip(asked, ps, strict=True)}


def _verdict(more: bool, p: float, level: float | None) -> dict:
    """Whether one is better comes first: a difference may be sure and small."""
    if p >= LEVEL and level is not None and level < LEVEL:
        return {"p": level, "verdict": "level"}
    return {"p": p, "verdict": "undecided" if p >= LEVEL else "holds" if more else "does not"}
