"""What the paper claims about memory and time: E3VA's training step needs less than other methods'.

Peaks are counted to the byte; there is nothing to test. Times are measured in rounds in which the methods take turns:
the share of the other method's time is that of the same round, and p-values of all claims about time are corrected
together.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from .claims import DETECTION, INSTANCES, SEGMENTATION
from .paper_tables import printed_value
from .significance import LEVEL, difference, holm
from .studies import PHOTOGRAPH_PARTS, VIT_KIND

OTHERS = {"full": "full fine-tuning", "adapter": "adapters inside the backbone", "lora": "LoRA"}
#: The paper's tables and columns of memory and time for each study; its memory on ADE20K is not printed.
PLACES: dict[str, tuple[tuple[str, str] | None, tuple[str, str] | None]] = {
    DETECTION: (("table1", "memory"), ("table3", "voc")),
    SEGMENTATION: (None, ("table3", "ade20k")),
    INSTANCES: (("table2", "memory"), ("table3", "coco")),
    VIT_KIND: (None, None),
}


@dataclass(frozen=True)
class CostClaim:
    """In ``study``, a training step of E3VA needs less ``of`` something (memory or time) than one of ``other``.

    Attributes:
        place: Table and column where the paper prints it.
    """

    study: str
    of: str
    other: str
    place: tuple[str, str] | None

    @property
    def text(self) -> str:
        return f"E3VA needs less {self.of} than {OTHERS[self.other]}"

    def printed(self) -> float | None:
        """The paper's share, of the other method's."""
        if self.place is None:
            return None
        own, other = (printed_value(*self.place, row) for row in ("e3va", self.other))
        return own / other


COMPARED = {pair for pairs in PHOTOGRAPH_PARTS.values() for pair in pairs}
COST_CLAIMS = tuple(
    CostClaim(study, of, other, place)
    for study, places in PLACES.items()
    for of, place in zip(("memory", "time"), places, strict=True)
    for other in OTHERS
    if (study, other) in COMPARED
)


def judged_costs(studies: dict[str, dict]) -> list[dict]:
    """The claims whose costs were measured: the share of the other method's, and a verdict as in :mod:`.claims`.

    Args:
        studies: By study and arm ``peak`` and ``by_round``, see :func:`.reproduce.measure_costs`.

    Returns:
        A dictionary per claim. ``interval95`` and ``p``, corrected, are those of times.
    """
    found = [row for claim in COST_CLAIMS for row in _measured(claim, studies.get(claim.study, {}))]
    timed = [row for row in found if row["p"] is not None]
    for row, p in zip(timed, holm([row["p"] for row in timed]), strict=True):
        row["p"] = p
    for row in found:
        undecided = row["p"] is not None and row["p"] >= LEVEL
        row["verdict"] = "undecided" if undecided else "holds" if row["share"] < 1 else "does not"
    return found


def _measured(claim: CostClaim, arms: dict) -> Iterator[dict]:
    about = {"claim": claim.text, "study": claim.study, "of": claim.of, "other": claim.other, "paper": claim.printed()}
    e3va, other = arms.get("e3va", {}), arms.get(claim.other, {})
    if claim.of == "memory" and "peak" in e3va and "peak" in other:
        yield {**about, "share": e3va["peak"] / other["peak"], "interval95": None, "p": None}
    elif claim.of == "time" and "by_round" in e3va and "by_round" in other:
        d = difference(*([math.log(x) for x in arm["by_round"]] for arm in (e3va, other)))
        share, low, high = (math.exp(x) for x in (d.mean, d.low, d.high))
        yield {**about, "share": share, "interval95": [low, high], "p": min(1.0, 2 * min(d.p_more(), d.p_less()))}
