"""The demo's picture: how long each update took, over the time of the run, one panel for each run, on shared axes.

Shared axes make two things visible at a glance: the height of a curve is the time of an update, its end the length of
the run. Panels, rather than three colours in one, because two of the curves lie on each other, and so that it prints.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import MaxNLocator

COLOURS = ("#0072B2", "#D55E00", "#009E73")  # Okabe and Ito: told apart with any colour vision


@dataclass(frozen=True)
class Curve:
    """One run: what to write above it, the seconds of each update, and what to write where it ends."""

    title: str
    update_s: Sequence[float]
    end_note: str


def draw(path: Path, title: str, curves: Sequence[Curve]) -> None:
    """Writes the picture to `path` (its suffix says the format)."""
    figure, axes = plt.subplots(len(curves), 1, sharex=True, sharey=True, figsize=(9, 1.0 + 1.65 * len(curves)))
    longest = max(sum(curve.update_s) for curve in curves)
    highest = max(max(curve.update_s[1:]) for curve in curves) * 1e3
    for axis, curve, colour in zip(axes, curves, COLOURS, strict=False):
        ends = list(accumulate(curve.update_s))
        heights = [seconds * 1e3 for seconds in curve.update_s]
        # Each update is a bar as wide and as high as it took long.
        axis.fill_between([0.0, *ends], [heights[0], *heights], step="pre", color=colour, alpha=0.35, linewidth=0)
        axis.step([0.0, *ends], [heights[0], *heights], where="pre", color=colour, linewidth=1.2)
        axis.plot([ends[-1]] * 2, [0, highest * 1.1], color="black", linewidth=1.2)
        is_long = ends[-1] > 0.6 * longest
        axis.annotate(
            curve.end_note,
            (ends[-1], highest * (0.35 if is_long else 0.6)),
            xytext=(-8 if is_long else 8, 0),
            textcoords="offset points",
            ha="right" if is_long else "left",
            va="center",
            fontsize=10,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1.5},
        )
        axis.set_title(curve.title, loc="left", fontsize=11, fontweight="bold", color=colour)
        axis.spines[["top", "right"]].set_visible(False)
        axis.yaxis.set_major_locator(MaxNLocator(4, integer=True))
        axis.grid(axis="y", color="0.88", linewidth=0.8)
        axis.set_axisbelow(True)
    axes[0].set_ylim(0, highest * 1.15)
    axes[0].set_xlim(0, longest * 1.03)
    axes[0].xaxis.set_major_locator(MaxNLocator(10, integer=longest > 5))
    axes[-1].set_xlabel("time spent in updates [s]")
    figure.supylabel("time per update [ms]", fontsize=10)
    figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold")
    figure.tight_layout(rect=(0, 0, 1, 0.985))
    figure.savefig(path, dpi=150)
    plt.close(figure)
