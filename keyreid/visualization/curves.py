"""CMC curves, by matplotlib."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from keyreid.files import writing

LINES = ("-", "--", "-.", ":")  # curves that coincide can still be told apart


def draw_cmc(scores: Mapping[str, Mapping[str, Any]], title: str, path: Path) -> None:
    """One curve for each named evaluation (`Scores.as_dict`), with mAP and valid queries in the legend, as a PNG."""
    figure = Figure(figsize=(7, 5 + 0.24 * len(scores)), dpi=130, layout="constrained")
    axes = figure.add_subplot()
    longest, lowest = 1, 1.0
    for number, (name, score) in enumerate(scores.items()):
        curve = score["cmc"]
        longest, lowest = max(longest, len(curve)), min(lowest, curve[0])
        label = f"{name}: mAP {score['mAP']:.1%}, rank-1 {curve[0]:.1%}, {score['valid_queries']} valid queries"
        look = {"color": f"C{number}", "linestyle": LINES[number % 4], "marker": "o", "markersize": 3.5}
        axes.plot(range(1, len(curve) + 1), curve, label=label, **look)
    axes.set(title=title, xlabel="rank", ylabel="queries with a match up to this rank", xlim=(0.5, longest + 0.5))
    axes.set_ylim(max(0.0, lowest - 0.25), 1.02)  # no narrower, or a tick stands above 100 %
    axes.set_xticks([1, *range(5, longest + 1, 5)])
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center")
    figure.get_layout_engine().set(w_pad=0.15, h_pad=0.15)  # inches
    with writing(path):
        figure.savefig(path, format="png")
