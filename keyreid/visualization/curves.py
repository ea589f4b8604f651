"""CMC curves, by matplotlib."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from keyreid.evaluation.protocols import Scores

RANKS = 20


def draw_cmc(scores: Mapping[str, Scores], title: str, path: Path) -> None:
    """One curve for each named evaluation, with its mAP and valid queries in the legend, as a PNG."""
    figure = Figure(figsize=(7, 5), dpi=130, layout="constrained")
    axes = figure.add_subplot()
    lowest = 1.0
    for name, score in scores.items():
        curve = score.cmc(RANKS)
        lowest = min(lowest, curve[0])
        label = f"{name}: mAP {score.mean_ap:.1%}, rank-1 {curve[0]:.1%}, {score.valid_queries} valid queries"
        axes.plot(range(1, RANKS + 1), curve, marker="o", markersize=3.5, label=label)
    axes.set(title=title, xlabel="rank", ylabel="queries with a match up to this rank", xlim=(0.5, RANKS + 0.5))
    axes.set_ylim(max(0.0, lowest - 0.1), 1.02)
    axes.set_xticks([1, 5, 10, 15, 20])
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(path)
