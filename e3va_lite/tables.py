"""Trainable parameters of every method, beside what the paper prints (Tables 1 and 2)."""

import warnings

import torch
from torch import nn

from .methods import METHODS, build_backbone

# Millions, as printed: Table 1 for Swin-L, Table 2 for Swin-B.
PAPER_MILLIONS = {
    "swin_large_patch4_window7_224": {
        "full": 198.58, "fixed": 0.00, "bitfit": 0.30, "norm": 0.09, "partial1": 28.34, "adapter": 4.66, "lora": 4.57,
        "adaptformer": 4.66, "lorand": 1.31, "e3va": 1.79, "e3va+": 3.53, "e3va++": 7.00,
    },
    "swin_base_patch4_window7_224": {
        "full": 86.75, "fixed": 0.00, "bitfit": 0.20, "norm": 0.06, "partial1": 12.60, "adapter": 3.11, "lora": 3.03,
        "adaptformer": 3.11, "lorand": 1.20, "e3va": 1.20, "e3va+": 2.35, "e3va++": 4.66,
    },
}  # fmt: skip

WHAT_IS_TRAINED = {
    "full": "everything, with the FPN norms",
    "fixed": "nothing: neck and head only",
    "bitfit": 'every parameter with "bias" in its name, relative-position bias tables too',
    "norm": "every norm, with the FPN norms",
    "partial1": "the last Swin block",
    "adapter": "two adapters per block, middle dimension 64",
    "lora": "rank 64 on q and v",
    "adaptformer": "as adapter, beside attention and MLP, with a scale each",
    "lorand": "our reading: 2 branches of rank 8 with a shared kernel, middle dimension C/2",
    "e3va": "rank 8, with the FPN norms",
    "e3va+": "rank 16, with the FPN norms",
    "e3va++": "rank 32, with the FPN norms",
}


def trainable_parameters(module: nn.Module) -> int:
    """Numbers that an optimiser may change, shared ones counted once."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def parameter_table(backbone: str) -> dict:
    """Trainable parameters of the twelve methods on a backbone, all four stages consumed.

    Nothing is allocated: the models are built on the meta device.

    Returns:
        ``{"backbone": name, "rows": [{"method", "trainable", "paper_millions", "note"}, ...]}``; ``paper_millions`` is
        null where the paper has no such backbone.

    Raises:
        InputError: For an unknown backbone.
    """
    paper = PAPER_MILLIONS.get(backbone.split(".")[0], {})
    rows = []
    for method in METHODS:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # a rank that is not low counts all the same
            count = trainable_parameters(build_backbone(method, backbone))
        printed = paper.get(method)
        rows.append(
            {"method": method, "trainable": count, "paper_millions": printed, "note": _note(method, count, printed)}
        )
    return {"backbone": backbone, "rows": rows}


def _note(method: str, count: int, printed: float | None) -> str:
    note = WHAT_IS_TRAINED[method]
    if printed is None or abs(count / 1e6 - printed) < 0.0051:  # what rounding to two places can hide
        return note
    return f"{note}; {100 * (count / 1e6 / printed - 1):+.1f} % from the printed number, unexplained"


def text_table(header: list[str], rows: list[list[str]]) -> str:
    """Columns aligned for a terminal: the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [[cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))]
             for row in [header, ["-" * w for w in widths], *rows]]  # fmt: skip
    return "\n".join("  ".join(line).rstrip() for line in lines)
