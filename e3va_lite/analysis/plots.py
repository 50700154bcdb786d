"""Figures that can be read without the text around them.

Every function returns a ``matplotlib.figure.Figure``: a notebook shows it, ``figure.savefig`` writes it.
"""

import re
from collections import Counter
from collections.abc import Iterator

import numpy as np
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure

from ..methods.registry import METHODS
from .memory import CATEGORIES, PHASES, Ledger
from .text_table import setting

#: The last for all that train inside the backbone.
COLOURS = {"full": "#8c8c8c", "from scratch": "#8c8c8c", "fixed": "#7f9fcb", "adapter": "#e0a458"}
COLOURS |= dict.fromkeys(("lst", "losa"), "#8f6bb3")
HIGHWAY = "#2a7f62"
MIB = 2**20
DPI = 150
# Seaborn's look inside the functions below only: the settings of the user's session stay what they are.
STYLE = sns.axes_style("white", rc={"font.sans-serif": ["DejaVu Sans"]})  # which matplotlib brings along
FONTS = sns.plotting_context("notebook", font_scale=0.9)

CATEGORY_COLOURS = dict(zip(CATEGORIES, ("#4c5b6b", "#c44e52", "#8172b3", "#e0a458", "#d9d9d9"), strict=True))
# What the figures of the experiment show, and its shape, which differs within a colour: colours stand for families.
MARKED = dict(zip((*METHODS, "lst", "losa", "fixed, norms trained", "from scratch"), "osv<>DhsXo^sPHdX", strict=True))
MODEL_MARKERS = "oDs^vP"  # of the bench's models
FARTHEST = 150  # percent of full fine-tuning: what is beyond is written, so that all else keeps its room
TABLE_FIGURES = ("savings.png", "hours.png", "figure1.png")

# Key of a row, title, unit, format, and which way is better.
PANELS = (
    ("ap50", "AP at IoU .5", 1, "{:.3f}", "higher is better"),
    ("trainable", "Trained parameters of the backbone", 1e6, "{:.2f} M", "lower is better"),
    ("peak_bytes", "Peak memory of a training step", MIB, "{:.0f} MiB", "lower is better"),
    ("step_seconds", "Time of a training step", 1, "{:.2f} s", "lower is better"),
)


def colour(method: str) -> str:
    """The method's colour in all figures."""
    return HIGHWAY if method.startswith("e3va") else COLOURS.get(re.split("[:,]", method)[0], COLOURS["adapter"])


@STYLE
@FONTS
def compare_figure(result: dict) -> Figure:
    """The table of ``e3va compare`` as bars: one panel per column, each bar with its value and its share of full."""
    rows = result["rows"]
    names = [row["method"] for row in rows]
    colours = [colour(name) for name in names]
    figure = Figure(figsize=(3.3 * len(PANELS), 0.55 * len(rows) + 1.7), dpi=DPI)
    axes = figure.subplots(1, len(PANELS), sharey=True)
    for axis, (key, title, unit, form, direction) in zip(axes, PANELS, strict=True):
        values = [row[key] / unit for row in rows]
        sns.barplot(x=values, y=names, hue=names, palette=colours, saturation=1, legend=False, ax=axis)
        ends = values
        if key == "ap50" and len(rows[0]["ap50_by_seed"]) > 1:  # a point per seed
            seeds = [(row["method"], x) for row in rows for x in row["ap50_by_seed"]]
            sns.stripplot(x=[x for _, x in seeds], y=[name for name, _ in seeds], color="0.2", size=3, ax=axis)
            ends = [max(row["ap50_by_seed"]) for row in rows]
        for y, (row, x, end) in enumerate(zip(rows, values, ends, strict=True)):
            share = row.get(f"{key}_of_full")
            label = form.format(x) + ("" if share is None or row["method"] == "full" else f" ({100 * share:.0f} %)")
            axis.text(end + 0.03 * max(values), y, label, va="center", fontsize=9)
        axis.set_title(title, fontsize=10.5, loc="left")
        axis.set_xlabel(direction, fontsize=9, color="0.4")
        axis.set_xlim(0, 1.55 * max(values) or 1)
        axis.set_xticks([])
        sns.despine(ax=axis, bottom=True)
    recipe = result["recipe"]
    model = f"{recipe['backbone']}, RetinaNet, {recipe['max_size']} px, batch {recipe['batch']}"
    figure.suptitle(f"One detector ({model}), {len(rows)} fine-tuning methods", x=0.01, ha="left", fontsize=12)
    measured = f"{result['device']}, {result['precision']}, {result['date']}."
    if any("ap50_of_full" in row for row in rows):
        measured = f"(%) is the share of full fine-tuning. {measured}"
    figure.text(0.01, 0.01, measured, fontsize=8, color="0.4")
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    return figure


def memory_figure(table: dict) -> Figure:
    """What ``e3va memory`` prints: the categories at the peak, and the live bytes over the step."""
    return _memory(table["rows"], setting(table["settings"]))


def ledgers_figure(ledgers: dict[str, Ledger], title: str) -> Figure:
    """As :func:`memory_figure`, for ledgers by name; shares are of the one called ``full``, where there is one."""
    full = ledgers.get("full")
    share = {name: None if full is None else found.peak / full.peak for name, found in ledgers.items()}
    rows = [{"method": name, **found.as_row(), "share_of_full": share[name]} for name, found in ledgers.items()]
    return _memory(rows, title)


@STYLE
@FONTS
def _memory(rows: list[dict], title: str) -> Figure:
    names = [row["method"] for row in rows]
    figure = Figure(figsize=(12, max(3.4, 0.45 * len(rows) + 1.8)), dpi=DPI)
    bars, curves = figure.subplots(1, 2, width_ratios=(1.15, 1))
    start = [0.0] * len(rows)
    for category in CATEGORIES:
        values = [row[category] / MIB for row in rows]
        bars.barh(names, values, left=start, color=CATEGORY_COLOURS[category], label=category)
        start = [a + b for a, b in zip(start, values, strict=True)]
    digits = 0 if max(start) >= 10 else 2
    for y, row in enumerate(rows):
        share = "" if row["share_of_full"] is None else f" ({100 * row['share_of_full']:.0f} %)"
        bars.text(start[y] + 0.01 * max(start), y, f"{start[y]:.{digits}f}{share}", va="center", fontsize=9)
    bars.set_xlim(0, 1.25 * max(start))
    bars.invert_yaxis()
    bars.set_title("At the peak, MiB (share of full)", loc="left", fontsize=10.5)
    bars.legend(loc="upper center", bbox_to_anchor=(0.45, -0.1), ncols=5, frameon=False, fontsize=8.5, columnspacing=1)
    for row, style in zip(rows, _styles(names), strict=True):
        # The methods' steps have different numbers of events: each phase is drawn as long as any other.
        ends = [0.0, *(row["ends"][phase] for phase in PHASES)]
        x = np.interp((np.arange(len(row["curve"])) + 0.5) / len(row["curve"]), ends, range(len(ends)))
        curves.plot(x, np.array(row["curve"]) / MIB, label=row["method"], **style)
    for number, phase in enumerate(PHASES):
        curves.axvline(number, color="0.85", lw=1, zorder=0)
        curves.text(number + 0.5, 1.02, phase, transform=curves.get_xaxis_transform(), ha="center", fontsize=9)
    curves.set_xlim(0, len(PHASES))
    curves.set_ylim(0)
    curves.set_xticks([])
    curves.set_ylabel("live MiB over one training step")
    curves.legend(loc="upper center", bbox_to_anchor=(0.5, -0.04), ncols=4, frameon=False, fontsize=8.5)
    sns.despine(ax=bars, bottom=True)
    sns.despine(ax=curves)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    figure.tight_layout()
    return figure


@STYLE
@FONTS
def memory_trade_off(studies: dict[str, dict], metrics: list[str]) -> Figure | None:
    """Accuracy over the peak memory of a training step, a panel per study, a point with its interval per method.

    Args:
        studies: Arms by the title of their study, see :func:`e3va_lite.experiments.report.summarise`.
        metrics: The score's name per study.

    Returns:
        None where no memory was measured; a study with one method alone has no panel.
    """
    panels = []
    for (title, arms), metric in zip(studies.items(), metrics, strict=True):
        if len(names := [name for name in MARKED if "peak" in arms.get(name, {})]) > 1:
            panels.append((title, metric, {name: arms[name] for name in names}))
    if not panels:
        return None
    columns = 2 if len(panels) == 4 else min(len(panels), 3)  # four make a square
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(max(4.5, 2.7 * columns), 0.7 + 2.6 * rows), dpi=DPI)
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for unused in axes[len(panels) :]:
        unused.axis("off")
    handles = {}
    for axis, (title, metric, arms) in zip(axes[: len(panels)], panels, strict=True):
        for name, arm in arms.items():
            handles[name] = _score(axis, name, arm["peak"] / MIB, arm, ms=7.5, mec="white", mew=0.7, capsize=2)
        axis.set_title(f"{title}\n{metric}, %", loc="left", fontsize=10)
        _cost_axis(axis, "peak of a training step, MiB")
        axis.set_xlim(right=1.12 * axis.get_xlim()[1])
    names = [name for name in MARKED if name in handles]
    columns = 4 if len(panels) > 1 else 3
    style = {"loc": "lower center", "frameon": False, "fontsize": 9, "columnspacing": 1.2}
    figure.legend([handles[name] for name in names], names, ncols=columns, **style)
    figure.tight_layout(rect=(0, 0.23 * -(-len(names) // columns) / figure.get_figheight(), 1, 1))
    return figure


@STYLE
@FONTS
def neighbours_figure(arms: dict, costs: dict) -> Figure | None:
    """Accuracy in miniature over the cost at full size and over trained parameters, a point with its
    interval per method.

    Args:
        arms: A study of :func:`e3va_lite.experiments.report.summarise`.
        costs: Of :func:`e3va_lite.analysis.cost.time_table`. Its rows stand for the arms of the same method;
            checkpointing changes the cost alone.

    Returns:
        None where fewer than two of them were run.
    """
    named = [(row, row["method"].partition(":")[0]) for row in costs["rows"]]
    found = [(row, name, arms[name]) for row, name in named if name in arms]
    if len(found) < 2:
        return None
    settings = costs["settings"]
    model = f"{settings['backbone']}, {settings['size'][0]}x{settings['size'][1]}"
    panels = (
        (f"peak of a training step, of full\n({model})", lambda row, arm: row["of_full"]["peak"]),
        (f"time of a training step, of full\n({model})", lambda row, arm: row["of_full"]["step"]),
        ("trained in the backbone, thousands\n(in miniature)", lambda row, arm: arm["trainable"] / 1e3),
    )
    figure = Figure(figsize=(13, 4.4), dpi=DPI)
    axes = figure.subplots(1, 3, sharey=True)
    for axis, (label, cost) in zip(axes, panels, strict=True):
        for row, name, arm in found:
            style = {"label": name}
            if "checkpointing" in row["method"]:
                style = {"label": f"{name}, checkpointed", "mfc": "white"}
            _score(axis, name, cost(row, arm), arm, ms=7, **style)
        _cost_axis(axis, label, logarithmic="trained" in label)
    axes[2].set_xlim(-2, 2 * max(10.0, *(arm["trainable"] / 1e3 for _, _, arm in found)))  # room at both ends
    axes[0].set_ylabel("AP at IoU .5 in miniature, %", fontsize=9)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=len(found), frameon=False, fontsize=9)
    figure.tight_layout(rect=(0, 0.08, 1, 1))
    return figure


@STYLE
@FONTS
def bench_figure(result: dict) -> Figure:
    """What ``e3va bench`` measured: memory and time of each method as shares of full fine-tuning, a mark per model, and
    the largest batches that ran, beside those predicted."""
    models = [entry for entry in result["costs"] if entry["rows"]]
    names = list(dict.fromkeys(row["method"] for entry in models for row in entry["rows"]))
    fits = {row["method"]: row for row in result["fit"].get("rows", ()) if "measured" in row}
    figure = Figure(figsize=(13, 0.29 * max(len(names), 6) + 1.7 + 0.12 * len(models)), dpi=DPI)
    axes = figure.subplots(1, 3 if fits else 2, width_ratios=(1, 1, 0.7) if fits else (1, 1))
    _shares(axes[0], models, names, "peak")
    _shares(axes[1], models, names, "step")
    titles = ["Peak memory of a training step, % of full", "Time of a training step, % of full"]
    if fits:
        settings = result["fit"]["settings"]
        titles.append(f"Largest batch of {_model(settings)}")
        _largest_batches(axes[2], [(y, fits[name]) for y, name in enumerate(names) if name in fits])
        memory = f"{settings['size'][0]}x{settings['size'][1]} in {settings['bytes'] / 2**30:.3g} GiB"
        axes[2].set_xlabel(f"images, {memory}\n(dark mark: predicted by dry runs)", fontsize=9, color="0.3")
    for axis, title in zip(axes, titles, strict=True):
        axis.set_yticks(range(len(names)), [_short(name) for name in names] if axis is axes[0] else [])
        axis.set_ylim(len(names) - 0.4, -0.6)
        axis.set_title(title, loc="left", fontsize=10.5)
    marks = zip(MODEL_MARKERS, models, strict=False)
    handles = [axes[0].plot([], [], marker, color="0.35", ms=6, label=_absolute(entry))[0] for marker, entry in marks]
    layout = {"ncols": 2, "frameon": False, "fontsize": 8.5, "labelspacing": 0.3}
    figure.legend(handles=handles, loc="lower left", bbox_to_anchor=(0.01, 0), **layout)
    found = result["environment"]
    title = f"One training step of RetinaNet on {found['device']}, torch {found['versions']['torch']}, {found['date']}"
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    figure.tight_layout(rect=(0, 0.21 * (-(-len(models) // 2) + 0.6) / figure.get_figheight(), 1, 1))
    return figure


def _shares(axis: Axes, models: list[dict], names: list[str], key: str) -> None:
    """A line per method with a mark per model; what is far beyond full fine-tuning is written at the edge."""
    for y, name in enumerate(names):
        rows = [next((row for row in entry["rows"] if row["method"] == name), {}) for entry in models]
        shares = [None if (x := row.get(f"{key}_of_full")) is None else 100 * x for row in rows]
        if inside := [min(x, FARTHEST) for x in shares if x is not None]:
            axis.plot([min(inside), max(inside)], [y, y], color=colour(name), lw=5, alpha=0.25, solid_capstyle="round")
        else:
            reason = next((row["failed"] for row in rows if "failed" in row), "full fine-tuning did not run")
            axis.text(2, y, reason[:45], va="center", fontsize=8, color="0.5")
        for marker, x in zip(MODEL_MARKERS, shares, strict=False):
            if x is not None:
                axis.plot(min(x, FARTHEST), y, marker, color=colour(name), ms=6.5, mec="white", mew=0.6)
        if beyond := [f"{x:.0f}" for x in shares if x is not None and x > FARTHEST]:
            axis.text(FARTHEST + 4, y, ", ".join(beyond), va="center", fontsize=8.5)
            axis.set_xlim(right=FARTHEST * 1.15)
    axis.set_xlim(0, max(axis.get_xlim()[1], 104))
    axis.grid(axis="x", color="0.92")
    sns.despine(ax=axis, left=True)


def _largest_batches(axis: Axes, rows: list[tuple[int, dict]]) -> None:
    """Bars of what ran at their places, a mark at what was predicted."""
    farthest = max(1, *(row[key] for _, row in rows for key in ("measured", "predicted")))
    for y, row in rows:
        axis.barh(y, row["measured"], color=colour(row["method"]), height=0.6)
        axis.plot(row["predicted"], y, "D", ms=4.5, color="0.1")
        axis.text(max(row["measured"], row["predicted"]) + 0.04 * farthest, y, row["measured"], va="center", fontsize=9)
    axis.set_xlim(0, 1.2 * farthest)
    sns.despine(ax=axis)


def _short(method: str) -> str:
    """``e3va:memory=recompute`` as ``e3va, recompute``; options of size are left out."""
    modes = re.findall(r"memory=(\w+)", method)
    return ", ".join([method.partition(":")[0], *modes])


def _model(settings: dict) -> str:
    return settings["backbone"].partition("_patch")[0]


def _absolute(entry: dict) -> str:
    """A model of the bench, and what full fine-tuning of it takes."""
    full = next((row for row in entry["rows"] if row["method"] == "full"), {})
    takes = (
        f"{full['peak'] / MIB:,.0f} MiB, {1000 * full['step']:.0f} ms" if "step" in full else full.get("failed", "-")
    )
    images = f"{entry['batch_size']} x {entry['size'][0]}x{entry['size'][1]}"
    return f"{_model(entry)}, {images}, {entry['precision']} (full: {takes})"


def _score(axis: Axes, name: str, cost: float, arm: dict, **style: object) -> ErrorbarContainer:
    """A method's score in percent with its interval, over what it costs."""
    style |= {"fmt": MARKED[name], "color": colour(name), "elinewidth": 0.8}
    return axis.errorbar(cost, 100 * arm["mean"], 100 * arm["half"], **style)


def _cost_axis(axis: Axes, label: str, logarithmic: bool = False) -> None:
    if logarithmic:
        axis.set_xscale("symlog", linthresh=10)
    axis.set_xlim(left=-2 if logarithmic else 0)  # room for those that train nothing
    axis.set_xlabel(label, fontsize=9)
    sns.despine(ax=axis)


def _styles(names: list[str]) -> list[dict]:
    """Colours and dashes that tell methods of one colour apart."""
    dashes = ("-", "--", ":", "-.")
    seen: Counter[str] = Counter()
    styles = []
    for shade in map(colour, names):
        styles.append({"color": shade, "ls": dashes[seen[shade] % 4], "lw": 1.6 if seen[shade] < 4 else 0.9})
        seen[shade] += 1
    return styles


def table_figures(tables: dict) -> Iterator[tuple[str, Figure]]:
    """What ``e3va tables`` prints, as far as its tables are there: names out of :data:`TABLE_FIGURES`, and figures."""
    for name, draw in zip(TABLE_FIGURES, (_savings, _hours, _figure1), strict=True):
        with STYLE, FONTS:
            if (figure := draw(tables)) is not None:
                figure.tight_layout()
        if figure is not None:
            yield name, figure


def _savings(tables: dict) -> Figure | None:
    panels = []
    for table in (tables[name] for name in ("table1", "table2") if name in tables):
        rows = [row for row in table["rows"] if "saved" in row["cells"]]
        panels.append((table["title"], rows, "saved", "memory saved, % of full"))
    return _panels(panels, 5.6, 4.6)


def _hours(tables: dict) -> Figure | None:
    rows = tables.get("table3", {}).get("rows", [])
    tasks = [task for task in (rows[0]["cells"] if rows else ()) if rows[0]["cells"][task]["ours"] is not None]
    return _panels([(f"Table 3: {task}", rows, task, "time, % of full") for task in tasks], 4.6, 4.8)


def _panels(panels: list[tuple[str, list[dict], str, str]], width: float, height: float) -> Figure | None:
    """A panel per title, rows of a table, their column and its label; None without any."""
    if not panels:
        return None
    figure = Figure(figsize=(width * len(panels), height), dpi=DPI)
    axes = figure.subplots(1, len(panels), squeeze=False)
    for axis, (title, rows, column, label) in zip(axes[0], panels, strict=True):
        _beside(axis, rows, column, label)
        axis.set_title(title, loc="left", fontsize=10.5, pad=26)
    return figure


def _figure1(tables: dict) -> Figure | None:
    """The right half of the paper's Figure 1: memory and time of three methods, and the cards that are enough."""
    if any(table not in tables for table in ("table1", "table3", "table4")):
        return None
    methods = ("full", "adapter", "e3va")
    figure = Figure(figsize=(13, 3.4), dpi=DPI)
    axes = figure.subplots(1, 3, width_ratios=(1, 1, 1.5))
    for axis, table, column, label in (
        (axes[0], "table1", "memory", "MB, Swin-L on VOC"),
        (axes[1], "table3", "voc", "training time on VOC, % of full"),
    ):
        rows = {row["row"]: row for row in tables[table]["rows"]}
        if rows["full"]["cells"][column]["ours"] is None:
            return None
        _beside(axis, [rows[method] for method in methods], column, label)
    need = {row["row"]: row["need_mb"] / 1024 for row in tables["table4"]["rows"]}
    chosen = [f"{method}, batch {batch}" for method in methods for batch in (1, 2)]
    axes[2].barh(chosen, [need[row] for row in chosen], color=[colour(row.split(",")[0]) for row in chosen])
    axes[2].invert_yaxis()
    for card, gigabytes in (("1080 Ti", 11), ("P100", 16), ("3090", 24), ("V100", 32)):
        axes[2].axvline(gigabytes, color="0.35", lw=1, ls="--")
        axes[2].text(gigabytes, -0.75, f"{card}\n{gigabytes} GB", ha="center", fontsize=8.5)
    axes[2].set_xlim(0, 34)
    axes[2].set_xlabel("GB, Swin-L with Cascade Mask R-CNN (ours)", fontsize=9, color="0.3")
    sns.despine(ax=axes[2])
    return figure


def _beside(axis: Axes, rows: list[dict], column: str, label: str) -> None:
    """Bars of ours, a mark at the printed value."""
    names, cells = [row["row"] for row in rows], [row["cells"][column] for row in rows]
    axis.barh(names, [cell["ours"] or 0 for cell in cells], color=[colour(name) for name in names], label="ours")
    axis.plot([cell["printed"] for cell in cells], names, "D", ms=5, color="0.1", label="printed")
    axis.invert_yaxis()
    axis.set_xlabel(label, fontsize=9, color="0.3")
    axis.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False, fontsize=8.5)
    sns.despine(ax=axis)
