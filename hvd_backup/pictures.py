"""Pictures of a recording: who arrives when, who is late where, and what the k-th arrival costs. Needs matplotlib.

Each function draws one picture and returns it as PNG. Readable when printed in grey: lines differ in style, and the
colours of the heat map go from light to dark.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from hvd_backup.arrivals import Arrivals, Floats
from hvd_backup.errors import UsageError
from hvd_backup.planning import Plan

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["arrivals_by_rank", "lateness_map", "plan_picture", "time_to_kth"]

WIDTH = 8.0  # inches
MOST_TICKS = 24
MOST_COLUMNS = 400  # of the heat map: a column may stand for several steps


def arrivals_by_rank(times: Arrivals) -> bytes:
    """Box plots: milliseconds from the opening of a step to each rank's arrival."""
    figure, axes = _figure(height=max(2.5, min(8.0, 1.2 + 0.35 * times.size)))
    usable = times.arrived[~times.first] * 1e3
    columns = [column[~np.isnan(column)] for column in usable.T]
    axes.boxplot(columns, orientation="horizontal", whis=(1, 99), positions=range(times.size), **_BOXES)
    decided = float(np.median(times.decided[~times.first])) * 1e3 if np.any(~times.first) else 0.0
    axes.axvline(decided, color="black", linestyle="--", linewidth=1, label=f"median decision ({decided:.1f} ms)")
    axes.set(xlabel="ms after the step could begin", ylabel="rank")
    axes.set_title("When gradients arrive", loc="left")
    known = usable[~np.isnan(usable)]
    right = 1.2 * float(np.quantile(known, 0.99)) if len(known) else 1.0  # a single stall must not squeeze the rest
    axes.set_xlim(0, max(right, 1.1 * decided))
    beyond = int(np.sum(known > axes.get_xlim()[1]))
    _rank_ticks(axes, times.size, axis="y")
    axes.invert_yaxis()
    axes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), frameon=False)  # above the boxes, which may be anywhere
    outside = f"; {beyond} of {len(known)} arrivals lie outside the picture" if beyond else ""
    _note(figure, f"box: middle half of the steps, with the median; whiskers: 1 % to 99 %; dots: beyond{outside}")
    return _png(figure)


def lateness_map(times: Arrivals) -> bytes:
    """A heat map over step and rank: milliseconds after the middle rank."""
    figure, axes = _figure(height=max(2.5, min(8.0, 1.4 + 0.3 * times.size)))
    shown = _columns(np.where(np.isnan(times.lateness), np.nan, np.maximum(times.lateness, 0)) * 1e3)
    colours = _pyplot().colormaps["viridis_r"].with_extremes(bad="lightgrey")
    known = shown[~np.isnan(shown)]
    top = max(float(np.quantile(known, 0.99)), 1e-3) if len(known) else 1.0
    first, last = int(times.steps[0]), int(times.steps[-1])
    image = axes.imshow(
        shown.T, aspect="auto", interpolation="nearest", cmap=colours, vmin=0, vmax=top,
        extent=(first - 0.5, last + 0.5, times.size - 0.5, -0.5),
    )  # fmt: skip
    figure.colorbar(image, ax=axes, label="ms after the middle rank", extend="max")
    axes.set(title="Who is late, and when", xlabel="step", ylabel="rank")
    _rank_ticks(axes, times.size, axis="y")
    merged = "" if len(times.steps) <= MOST_COLUMNS else "; a column is the mean of several steps"
    _note(figure, f"grey: the rank did not compute this step, being busy with an older one{merged}")
    return _png(figure)


def time_to_kth(times: Arrivals) -> bytes:
    """Lines: milliseconds until k ranks have arrived, for k = 1..n."""
    figure, axes = _figure(height=4.0)
    sorted_ms = times.time_to_kth() * 1e3
    complete = sorted_ms[:, ~np.all(np.isnan(sorted_ms), axis=0)] if len(sorted_ms) else sorted_ms
    ks = np.arange(1, complete.shape[1] + 1)
    lines: list[tuple[str, str, Callable[[Floats], Floats]]] = [
        ("p99", ":", lambda values: np.nanquantile(values, 0.99, axis=0)),
        ("p90", "-.", lambda values: np.nanquantile(values, 0.9, axis=0)),
        ("mean", "-", lambda values: np.nanmean(values, axis=0)),
        ("median", "--", lambda values: np.nanmedian(values, axis=0)),
    ]
    for label, style, of in lines:
        axes.plot(ks, of(complete), style, marker="o" if len(ks) <= MOST_TICKS else None, markersize=4, label=label)
    axes.set(title="How long it takes until k ranks have arrived", xlabel="k", ylabel="ms after the step could begin")
    axes.set_ylim(bottom=0)
    _whole_numbers(axes)
    axes.grid(alpha=0.3)
    axes.legend()
    known = np.mean(~np.isnan(complete), axis=0)
    if len(known) and known[-1] < 0.99:
        _note(figure, f"the last of them arrived in {known[-1]:.0%} of the steps: late ranks skip some")
    return _png(figure)


def plan_picture(plan: Plan) -> bytes:
    """Time per update and updates needed over b, and the speed-up that they make."""
    figure, (above, below) = _pyplot().subplots(
        2, 1, figsize=(WIDTH, 5.5), sharex=True, layout="constrained", height_ratios=(1, 1)
    )
    b = [choice.backup_workers for choice in plan.choices]
    marker = "o" if len(b) <= MOST_TICKS else None
    none = plan.choices[0]
    time = [choice.update_s / none.update_s for choice in plan.choices]
    above.plot(b, time, "-", marker=marker, label=f"time per update (b = 0: {none.update_s * 1e3:.1f} ms)")
    above.plot(b, [choice.updates for choice in plan.choices], "--", marker=marker, label="updates needed")
    above.set(title=f"Which number of backup workers pays ({len(plan.choices[0].contributed)} ranks)")
    above.set_ylabel("relative to b = 0")
    above.set_ylim(bottom=0, top=min(above.get_ylim()[1], 4.0))
    low = [choice.interval[0] for choice in plan.choices]
    high = [choice.interval[1] for choice in plan.choices]
    below.plot(b, [choice.speedup for choice in plan.choices], "-", color="black", marker=marker, label="speed-up")
    below.fill_between(b, low, high, color="black", alpha=0.15, linewidth=0, label="5 % to 95 %")
    best = plan.best
    below.plot(
        best.backup_workers,
        best.speedup,
        "*",
        color="tab:red",
        markersize=14,
        label=f"best: b = {b[best.backup_workers]}",
    )
    below.axhline(1.0, color="grey", linewidth=0.8)
    below.set(xlabel="b, backup workers", ylabel="progress per second\nrelative to b = 0")
    _whole_numbers(below)
    for axes in (above, below):
        axes.grid(alpha=0.3)
        axes.legend()
    _note(figure, plan.noise())
    return _png(figure)


_BOXES: dict[str, Any] = {
    "flierprops": {"marker": ".", "markersize": 2, "alpha": 0.5},
    "medianprops": {"color": "black", "linewidth": 1.5},
    "patch_artist": True,
    "boxprops": {"facecolor": "lightsteelblue"},
}


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError:
        raise UsageError("pictures need matplotlib: pip install 'hvd_backup[report]'") from None
    matplotlib.use("agg")
    from matplotlib import pyplot

    return pyplot


def _figure(height: float) -> tuple[Figure, Axes]:
    figure, axes = _pyplot().subplots(figsize=(WIDTH, height), layout="constrained")
    return figure, axes


def _rank_ticks(axes: Axes, size: int, axis: str) -> None:
    every = -(-size // MOST_TICKS)
    ticks = range(0, size, every)
    (axes.set_yticks if axis == "y" else axes.set_xticks)(list(ticks), [str(tick) for tick in ticks])


def _whole_numbers(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _note(figure: Figure, text: str) -> None:
    figure.supxlabel(text, fontsize=8, color="dimgrey", x=0.01, ha="left")


def _columns(values: Floats) -> Floats:
    """At most MOST_COLUMNS rows: means of consecutive ones."""
    each = -(-len(values) // MOST_COLUMNS)
    if each <= 1:
        return values
    parts = np.array_split(values, -(-len(values) // each))
    known = [np.sum(~np.isnan(part), axis=0) for part in parts]
    sums = [np.nansum(part, axis=0) for part in parts]
    return np.array([np.where(k > 0, s / np.maximum(k, 1), np.nan) for k, s in zip(known, sums, strict=True)])


def _png(figure: Figure) -> bytes:
    target = io.BytesIO()
    figure.savefig(target, format="png", dpi=150)
    _pyplot().close(figure)
    return target.getvalue()
