"""The paper's Tables 1 to 4 beside ours.

Memory is predicted by dry runs of the literal equations in float32, for two images of one size per task, plus a fixed
overhead for what a counted step does not hold: the CUDA context, the libraries' workspaces, fragmentation. Size and
overhead are conventions. Both were chosen on Table 2 alone (``data/results/paper-conventions.json``); Tables 1 and 4
are predictions.
The hours of Table 3 become shares of full fine-tuning, beside measured shares of a training step's time.
"""

import json
import warnings
from functools import cache, partial
from pathlib import Path

import torch
import yaml

from ..analysis.fit_on_gpu import CARDS, GIB, MIB, dry_peak, in_parallel
from ..analysis.text_table import text_table
from ..backbones.base import trainable_parameters
from ..methods.registry import METHODS, build_backbone
from ..recipes.schema import load_recipe

SWIN_L, SWIN_B = "swin_large_patch4_window7_224", "swin_base_patch4_window7_224"

# The conventions. Height and width of a training image: VOC's is the stand-in's only one, COCO's is the one among the
# stand-in's that brings Table 2's megabytes nearest; padded to multiples of 32, as detectors do.
SIZES = {"voc": (608, 1024), "coco": (800, 1344)}
OVERHEAD = 1050 * MIB  # at that size it brings Table 2's savings nearest
BATCH = 2  # "experiments are conducted with batch size 2" (section 4.2)

TOLERANCE = 6  # percentage points of savings; what differs by more has a note
TIMES = Path("data/results")  # measured steps, one or more files time-TASK*.json: what `e3va time --json` prints

WHAT_IS_TRAINED = {
    "full": "everything, with the FPN norms",
    "fixed": "nothing: neck and head only",
    "bitfit": 'every parameter with "bias" in its name, relative-position bias tables too',
    "norm": "every norm, with the FPN norms",
    "partial1": "the last block",
    "adapter": "two adapters per block, middle dimension 64",
    "lora": "rank 64 on q and v",
    "adaptformer": "as adapter, beside attention and MLP, with a scale each",
    "lorand": "our reading: 2 branches of rank 8 with a shared kernel, middle dimension C/2",
    "e3va": "rank 8, with the FPN norms",
    "e3va+": "rank 16, with the FPN norms",
    "e3va++": "rank 32, with the FPN norms",
}


@cache
def printed() -> dict[str, dict]:
    """What the paper prints: ``table1`` to ``table6``, each its ``columns`` and a list per row.

    Then what is known about cells of Tables 1 and 2: ``contradictions`` and ``differences``, by table and row.
    """
    return yaml.safe_load((Path(__file__).parent / "paper.yaml").read_text())


def printed_value(table: str, column: str, row: str) -> float | None:
    """One number of the paper; None where the paper has no such row, or the number is not legible."""
    values = printed()[table].get(row)
    return None if values is None else values[printed()[table]["columns"].index(column)]


def parameter_table(backbone: str) -> dict:
    """Trainable parameters of the twelve methods on a backbone, all four stages consumed.

    Nothing is allocated: the models are built on the meta device.

    Returns:
        ``{"backbone": name, "rows": [{"method", "trainable", "paper_millions", "note"}, ...]}``; ``paper_millions`` is
        null where the paper has no such backbone.

    Raises:
        InputError: For an unknown backbone.
    """
    table = {SWIN_L: "table1", SWIN_B: "table2"}.get(backbone.split(".")[0])
    rows = []
    for method in METHODS:
        count = _trainable(backbone, method)
        millions = printed_value(table, "parameters", method) if table else None
        note = WHAT_IS_TRAINED[method]
        if millions is not None and abs(count / 1e6 - millions) > 0.0051:  # more than rounding to two places can hide
            note += f"; {100 * (count / 1e6 / millions - 1):+.1f} % from the printed number, unexplained"
        rows.append({"method": method, "trainable": count, "paper_millions": millions, "note": note})
    return {"backbone": backbone, "rows": rows}


def paper_tables(numbers: list[int], times: Path = TIMES) -> dict:
    """Tables of the paper beside ours.

    Args:
        numbers: Out of 1, 2, 3 and 4.
        times: The folder of measured times, for Table 3.

    Returns:
        ``{"conventions": {...}, "table1": {"title", "rows": [{"row", "cells": {...}, "note"}, ...]}, ...}``, a cell per
        column being ``{"printed", "ours", "difference", "how"}``. ``ours`` is null where it was not measured, and
        ``how`` says so. Memory is in MB of 2**20 bytes, savings and shares in percent of ``full``, their differences in
        percentage points. Cells of Table 4 are true or false; ``table4`` has ``agree`` and ``cells``, counts, and each
        of its rows ``need_mb``.
    """
    counted = [
        (_body(t, row), row.split()[0]) for t in ("table1", "table2") if int(t[-1]) in numbers for row in _rows(t)
    ]
    peaks, counts = _dry_runs(_jobs(numbers), counted)
    tables: dict = {
        "conventions": {
            "sizes": {task: list(size) for task, size in SIZES.items()},
            "batch_size": BATCH,
            "overhead_mb": OVERHEAD // MIB,
            "precision": "float32",
            "equations": "literal",
        }
    }
    if 1 in numbers:
        rows = _memory_rows("table1", "voc", peaks, counts)
        tables["table1"] = {"title": "Table 1: Swin-L, memory of RetinaNet on VOC", "rows": rows}
    if 2 in numbers:
        rows = _memory_rows("table2", "coco", peaks, counts)
        tables["table2"] = {"title": "Table 2: Swin-B, Cascade Mask R-CNN on COCO", "rows": rows}
    if 3 in numbers:
        tables["table3"] = {"title": "Table 3: training time, percent of full fine-tuning", "rows": _time_rows(times)}
    if 4 in numbers:
        rows = _fit_rows(peaks)
        agree = [cell["difference"] == 0 for row in rows for cell in row["cells"].values()]
        title = "Table 4: which cards train Swin-L with Cascade Mask R-CNN"
        tables["table4"] = {"title": title, "agree": sum(agree), "cells": len(agree), "rows": rows}
    return tables


def as_text(tables: dict) -> str:
    """The tables for a terminal: printed value, ours, difference."""
    sizes = ", ".join(f"{task} {h}x{w}" for task, (h, w) in tables["conventions"]["sizes"].items())
    lines = [
        f"memory: dry runs, float32, literal equations, batch {BATCH}, {sizes}, and {OVERHEAD // MIB} MB of overhead; "
        "size and overhead were chosen on Table 2 alone"
    ]
    for table in (value for key, value in tables.items() if key.startswith("table")):
        every = list(dict.fromkeys(column for row in table["rows"] for column in row["cells"]))
        missing = [c for c in every if all(row["cells"].get(c, {}).get("ours") is None for row in table["rows"])]
        columns = [c for c in every if c not in missing]
        header = ["row", *(f"{column} printed/ours/diff" for column in columns)]
        rows = [
            [row["row"], *(_cell_text(row["cells"][c]) if c in row["cells"] else "" for c in columns)]
            for row in table["rows"]
        ]
        lines += ["", table["title"], text_table(header, rows)]
        if "agree" in table:
            lines.append(f"{table['agree']} of {table['cells']} cells as printed")
        if missing:
            lines.append(f"not measured: {', '.join(missing)}")
        lines += [f"{row['row']}: {row['note']}" for row in table["rows"] if row["note"]]
    return "\n".join(lines)


def _cell_text(cell: dict) -> str:
    if isinstance(cell["printed"], bool):
        said = {True: "yes", False: "no"}
        return f"{said[cell['printed']]}/{said[cell['ours']]}" + ("" if cell["difference"] == 0 else " (!)")
    if cell["ours"] is None:
        return f"{cell['printed']}/-"
    return f"{cell['printed']:g}/{cell['ours']:g}/{cell['difference']:+g}"


def _cell(printed: float | bool, ours: float | bool | None, how: str, digits: int = 2) -> dict:
    difference = None if ours is None else round(float(ours) - float(printed), digits)
    return {"printed": printed, "ours": ours, "difference": difference, "how": how}


Job = tuple[str, str, str, int]  # task, backbone, method, batch


def _jobs(numbers: list[int]) -> list[Job]:
    jobs: list[Job] = []
    if 2 in numbers or 4 in numbers:  # Table 4 is explained with the figures of Table 2
        jobs += [("coco", _body("table2", row), row.split()[0], BATCH) for row in _rows("table2")]
    if 4 in numbers:
        jobs += [("coco", SWIN_L, method, batch) for method in _rows("table4") for batch in (1, 2)]
    if 1 in numbers:
        jobs += [("voc", SWIN_L, method, BATCH) for method in _rows("table1")]
    return list(dict.fromkeys(jobs))


def _dry_runs(jobs: list[Job], counted: list[tuple[str, str]]) -> tuple[dict[Job, float], dict[tuple[str, str], int]]:
    """MB of each job's training step, without the overhead; trainable parameters of each backbone and method."""
    calls = []
    for task, backbone, method, batch in jobs:
        literal = {"memory": "reference"} if method.startswith("e3va") else {}
        recipe = load_recipe(task, {"backbone": backbone, "method": method, "options": literal})
        calls.append(partial(dry_peak, recipe, SIZES[task], batch))
    found = in_parallel([*calls, *(partial(_trainable, *pair) for pair in counted)], "dry runs")
    peaks = {job: peak / MIB for job, peak in zip(jobs, found[: len(jobs)], strict=True)}
    return peaks, dict(zip(counted, found[len(jobs) :], strict=True))


def _trainable(backbone: str, method: str) -> int:
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a rank that is not low counts all the same
        return trainable_parameters(build_backbone(method, backbone))


def _rows(table: str) -> list[str]:
    return [row for row in printed()[table] if row != "columns"]


def _body(table: str, row: str) -> str:
    return SWIN_L if table == "table1" or "Swin-L" in row else SWIN_B


def _memory_rows(table: str, task: str, peaks: dict[Job, float], counts: dict[tuple[str, str], int]) -> list[dict]:
    backbone, overhead = _body(table, "full"), OVERHEAD / MIB
    whole, whole_printed = peaks[task, backbone, "full", BATCH] + overhead, printed_value(table, "memory", "full")
    rows = []
    for row in _rows(table):
        method, body = row.split()[0], _body(table, row)
        ours = peaks[task, body, method, BATCH] + overhead
        parameters, memory, *scores = printed()[table][row]
        cells = {
            "parameters": _cell(parameters, round(counts[body, method] / 1e6, 2), "counted, millions"),
            "memory": _cell(memory, round(ours), "dry run, MB"),
        }
        note = ""
        if body == backbone and method != "full":
            saved, saved_printed = (round(100 * (1 - x), 1) for x in (ours / whole, memory / whole_printed))
            cells["saved"] = _cell(saved_printed, saved, "dry run, percent of full", 1)
            note = _why(table, row, cells["saved"]["difference"])
        for column, score in zip(printed()[table]["columns"][2:], scores, strict=True):
            cells[column] = _cell(score, None, "not measured: takes the dataset and weeks")
        rows.append({"row": row, "cells": cells, "note": note})
    return rows


def _why(table: str, row: str, difference: float) -> str:
    """What is known about a saving that is not the paper's."""
    if known := printed()["contradictions"].get(table, {}).get(row):
        return known
    known = printed()["differences"][table].get(row, "unexplained.")
    return f"{difference:+.1f} points; {known}" if abs(difference) > TOLERANCE else ""


def _fit_rows(peaks: dict[Job, float]) -> list[dict]:
    overhead = OVERHEAD / MIB
    rows = []
    for method in _rows("table4"):
        for batch, fits in zip((1, 2), printed()["table4"][method], strict=True):
            need = peaks["coco", SWIN_L, method, batch] + overhead
            # The same model's printed memory on Swin-B, times what Swin-L and this batch need more of it.
            growth = need / (peaks["coco", SWIN_B, method, BATCH] + overhead)
            from_table2 = printed_value("table2", "memory", method) * growth
            if method == "e3va" and batch == BATCH:
                from_table2 = printed_value("table2", "memory", "e3va on Swin-L")
            cells, wrong = {}, []
            for card, yes in zip(printed()["table4"]["columns"], fits, strict=True):
                room = CARDS[card] * GIB / MIB
                cells[card] = _cell(yes, need <= room, f"dry run: {need:.0f} of {room:.0f} MB")
                if cells[card]["difference"]:
                    agrees = (from_table2 <= room) == (need <= room)
                    wrong.append(f"{card} ({room:.0f} MB): Table 2 {'says so too' if agrees else 'says otherwise'}")
            note = (
                f"we need {need:.0f} MB; Table 2's figure, carried over to Swin-L and this batch, is "
                f"{from_table2:.0f} MB. {'; '.join(wrong)}."
            )
            row = {"row": f"{method}, batch {batch}", "cells": cells, "note": note if wrong else ""}
            rows.append(row | {"need_mb": round(need)})
    return rows


def _time_rows(folder: Path) -> list[dict]:
    shares: dict[str, dict[str, tuple[float, str]]] = {}
    for task in printed()["table3"]["columns"]:
        shares[task] = {}
        for file in sorted(folder.glob(f"time-{task}*.json")):
            table = json.loads(file.read_text())
            s = table["settings"]
            images = f"{s['batch_size']} x {s['size'][0]}x{s['size'][1]}"
            how = f"measured: {s['backbone']}, {images}, {s['device']} ({file.name})"
            for row in table["rows"]:
                if row["of_full"]:
                    shares[task].setdefault(row["method"], (row["of_full"]["step"], how))
    rows = []
    for method in _rows("table3"):
        cells = {}
        for task in printed()["table3"]["columns"]:
            hours, whole = (printed_value("table3", task, row) for row in (method, "full"))
            ours, how = shares[task].get(method, (None, "not measured: run e3va time"))
            cells[task] = _cell(round(100 * hours / whole, 1), None if ours is None else round(100 * ours, 1), how, 1)
            cells[task]["hours"] = hours
        rows.append({"row": method, "cells": cells, "note": ""})
    return rows
