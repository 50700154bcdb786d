"""The result of :mod:`e3va_lite.experiments.bench` for a terminal."""

from ..analysis.fit_on_gpu import MIB
from ..analysis.text_table import percent, text_table

TRIAL = "numbers of a CPU are only a trial of this command, with small models and images: it is meant for a GPU"


def as_text(result: dict) -> str:
    """All that was measured, what failed and what was not reached."""
    found, checks, ledger = result["environment"], result["correctness"], result["ledger"]
    lines = [f"{found['device']}, torch {found['versions']['torch']}, {found['date']}; random weights"]
    lines.append(f"correctness: {sum(row['ok'] for row in checks)} of {len(checks)} checks are within their bounds")
    for row in checks:
        if not row["ok"]:
            errors = ", ".join(f"{key} {row.get(key)} (bound {bound})" for key, bound in row["bounds"].items())
            lines.append(f"  NOT {row['check']}: {row.get('failed') or errors}")
    for entry in result["costs"]:
        if entry["rows"]:
            lines += ["", *_cost_lines(entry)]
    if ledger.get("compared"):
        share, where = (
            f"{100 * ledger['largest_difference']:.2f} %",
            f"({ledger['where']}), {ledger['compared']} compared",
        )
        lines += ["", f"the ledger's count and the allocator's peak differ by at most {share} {where}"]
    if result["fit"]:
        lines += ["", *_fit_lines(result["fit"])]
    lines += ["", *(f"not reached: {part}" for part in result["not_reached"])]
    return "\n".join([*lines, f"{result['seconds'] / 60:.1f} minutes"])


def _cost_lines(entry: dict) -> list[str]:
    batch, (height, width), rows = entry["batch_size"], entry["size"], entry["rows"]
    lines = [f"{entry['backbone']}, RetinaNet, {batch} x {height}x{width}, {entry['precision']}"]
    for tried in entry["fell_back"]:
        lines.append(f"  not {tried['batch_size']} x {tried['size'][0]}x{tried['size'][1]}: {tried['because']}")
    header = ["method", "peak, MiB", "of full", "step, ms", "quartiles", "of full"]
    lines.append(text_table(header, [[row["method"], *_cost_cells(row)] for row in rows]))
    lines += [f"  {row['method']}: {row['failed']}" for row in rows if "failed" in row]
    sweeps = {row["method"]: row["step_by_sweep"] for row in rows if "step_by_sweep" in row}
    if noisy := ", ".join(method for method, medians in sweeps.items() if max(medians) > 1.1 * min(medians)):
        lines.append(f"  the two sweeps' times differ by more than 10 % for {noisy}: the machine was not quiet")
    return lines


def _cost_cells(row: dict) -> list[str]:
    if "failed" in row:
        return ["-", "", "-", "", ""]
    step, low, high = (f"{1000 * seconds:.1f}" for seconds in (row["step"], *row["quartiles"]))
    memory = [f"{row['peak'] / MIB:.0f}", percent(row["peak_of_full"])]
    return [*memory, step, f"{low}-{high}", percent(row["step_of_full"])]


def _fit_lines(fit: dict) -> list[str]:
    if "failed" in fit:
        return [f"largest batches: {fit['failed']}"]
    settings, rows = fit["settings"], []
    for row in fit["rows"]:
        tried = [str(row.get("measured", "-")), str(row.get("too_large") or "-"), row.get("because") or ""]
        rows.append([row["method"], str(row["predicted"]), *tried])
    images = "{}x{}".format(*settings["size"])
    where = f"{settings['backbone']}, {images}, {settings['precision']}, in {settings['bytes'] / MIB:.0f} MiB"
    header = ["method", "predicted", "runs", "does not run", "because"]
    return [f"largest batch of {where}", text_table(header, rows)]
