"""Pictures of the benchmarks: panels, the axis of batch sizes, error bars, provenance in the title, files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def pyplot() -> Any:
    """matplotlib.pyplot without a display, or None with a message where it is not installed."""
    try:
        import matplotlib
    except ImportError:
        print(
            "no pictures: matplotlib is not installed here (pip install 'vllm-dejavu[train]'); the CSV files"
            " have everything"
        )
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def panels(
    pyplot: Any, rows: int, columns: int, width: float = 4.5, height: float = 4.0, **options: Any
) -> tuple[Any, Any]:
    """(figure, axes [rows, columns]). width, height: of a panel; options: of `subplots`."""
    size = (width * columns, height * rows)
    return pyplot.subplots(rows, columns, figsize=size, squeeze=False, **{"layout": "constrained", **options})


def batch_axis(axis: Any, rows: Sequence[dict[str, str]]) -> None:
    """Logarithmic, with a tick at every batch size of the rows."""
    batches = sorted({int(r["batch"]) for r in rows})
    axis.set_xscale("log", base=2)
    axis.set_xticks(batches, [str(b) for b in batches])
    axis.minorticks_off()


def bars(middle: Sequence[float], low: Sequence[float], high: Sequence[float]) -> list[list[float]]:
    """What `errorbar` takes, of the ends of the bars; rounding may put an end on the wrong side."""
    return [
        [max(0.0, m - end) for m, end in zip(middle, low, strict=True)],
        [max(0.0, end - m) for m, end in zip(middle, high, strict=True)],
    ]


def provenance(rows: Sequence[dict[str, str]]) -> str:
    """Devices and commits."""
    devices, commits = (", ".join(sorted({r[k] for r in rows})) for k in ("device", "commit"))
    return f"{devices}; commit {commits}"


def dry_run(rows: Sequence[dict[str, str]]) -> str:
    """What a title begins with."""
    return "DRY RUN, NO MEASUREMENT; " if any(r.get("dry_run") == "True" for r in rows) else ""


def save(figure: Any, path: Path, title: str = "", *, fontsize: int = 9, dpi: int = 130) -> Path:
    from matplotlib import pyplot

    if title:
        figure.suptitle(title, fontsize=fontsize)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=dpi)
    pyplot.close(figure)
    return path


def save_measured(figure: Any, path: Path, title: str, rows: Sequence[dict[str, str]]) -> None:
    """With what the rows say of themselves in the title; prints the path."""
    real = {r.get("synthetic") == "False" for r in rows}
    kind = {(False,): "synthetic weights and selections", (True,): "real weights and text"}.get(
        tuple(real), "synthetic and real weights"
    )
    print(save(figure, path, f"{dry_run(rows)}{title}\n{kind}\n{provenance(rows)}"))
