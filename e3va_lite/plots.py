"""Figures that can be read without the text around them."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import seaborn as sns

COLOURS = {"full": "#8c8c8c", "fixed": "#b7c9e2", "adapter": "#e0a458"}  # all others: the highway's
HIGHWAY = "#2a7f62"

PANELS = (
    ("ap50", "AP at IoU .5", lambda row: row["ap50"], "{:.3f}", "higher is better"),
    (
        "trainable",
        "Trained parameters of the backbone",
        lambda row: row["trainable"] / 1e6,
        "{:.2f} M",
        "lower is better",
    ),
    (
        "peak_bytes",
        "Peak memory of a training step",
        lambda row: row["peak_bytes"] / 2**20,
        "{:.0f} MiB",
        "lower is better",
    ),
    ("step_seconds", "Time of a training step", lambda row: row["step_seconds"], "{:.2f} s", "lower is better"),
)


def compare_figure(result: dict, path: Path) -> None:
    """The table of ``e3va compare`` as bars: one panel per column, each bar with its value and its share of full."""
    rows = result["rows"]
    names = [row["method"] for row in rows]
    colours = [COLOURS.get(name.split(":")[0], HIGHWAY) for name in names]
    sns.set_theme(style="white", font_scale=0.9)
    figure, axes = plt.subplots(1, len(PANELS), figsize=(3.3 * len(PANELS), 0.55 * len(rows) + 1.7), sharey=True)
    for axis, (key, title, value, form, direction) in zip(axes, PANELS, strict=True):
        values = [value(row) for row in rows]
        axis.barh(names, values, color=colours)
        for y, (row, x) in enumerate(zip(rows, values, strict=True)):
            share = row.get(f"{key}_of_full")
            label = form.format(x) + ("" if share is None or row["method"] == "full" else f" ({100 * share:.0f} %)")
            axis.text(x + 0.02 * max(values), y, label, va="center", fontsize=9)
        axis.set_title(title, fontsize=10.5, loc="left")
        axis.set_xlabel(direction, fontsize=9, color="0.4")
        axis.set_xlim(0, 1.55 * max(values) or 1)
        axis.set_xticks([])
        sns.despine(ax=axis, bottom=True)
    axes[0].invert_yaxis()
    recipe = result["recipe"]
    setting = f"{recipe['backbone']}, RetinaNet, {recipe['max_size']} px, batch {recipe['batch']}"
    figure.suptitle(f"One detector ({setting}), tuned in {len(rows)} ways", x=0.01, ha="left", fontsize=12)
    measured = f"{result['device']}, {result['precision']}, {result['date']}."
    if any("ap50_of_full" in row for row in rows):
        measured = f"(%) is the share of full fine-tuning. {measured}"
    figure.text(0.01, 0.01, measured, fontsize=8, color="0.4")
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    figure.savefig(path, dpi=150)
    plt.close(figure)
