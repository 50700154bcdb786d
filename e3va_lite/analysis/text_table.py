"""Tables for a terminal."""


def text_table(header: list[str], rows: list[list[str]]) -> str:
    """Columns aligned for a terminal: the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [
        [cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))]
        for row in [header, ["-" * w for w in widths], *rows]
    ]
    return "\n".join("  ".join(line).rstrip() for line in lines)


def percent(share: float | None) -> str:
    """A share as whole percent; nothing for None."""
    return "" if share is None else f"{100 * share:.0f} %"


def setting(settings: dict) -> str:
    """The task, model and images of a table of costs, and how it was obtained, in one line."""
    height, width = settings["size"]
    kept = ", gradient checkpointing" if settings["checkpointing"] else ""
    how = settings.get("measured") or f"{settings['rounds']} rounds"
    images = f"{settings['batch_size']} x {height}x{width}, {settings['precision']}"
    return f"{settings['task']}, {settings['backbone']}, {images}{kept}; {how}"
