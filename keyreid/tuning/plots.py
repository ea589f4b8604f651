"""Pictures of a search, by matplotlib: each parameter against the score, all parameters at once, learning curves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from keyreid.tuning.records import TrialRecord, describe
from keyreid.tuning.space import Parameter, Space

COLUMNS = 3
COLOURS = matplotlib.colormaps["viridis"]
BEST = "crimson"
MARKERS = {"finished": "o", "stopped": "v", "failed": "x"}
CUT_SHORT, OTHER_MARKER = "cut short", "s"  # by the end of the search
LOG_TICKS = 4
TICK_LETTERS = 36  # that fit below each other's side


def draw_all(
    trials: Sequence[TrialRecord], best: TrialRecord, space: Space, metric: str, folder: Path
) -> dict[str, Path]:
    """Write PNGs of the trials that have a score; gives {title: path}."""
    folder.mkdir(parents=True, exist_ok=True)
    scored = [trial for trial in trials if not math.isnan(trial.score)]
    pictures = {
        f"{metric} against each parameter (one dot a trial, its last score)": _parameters(scored, best, space, metric),
        "All parameters of each trial": _parallel(scored, best, space, metric),
        "Learning curves": _curves(scored, best, metric),
    }
    paths = {}
    for name, (title, figure) in zip(("parameters", "parallel", "curves"), pictures.items(), strict=True):
        paths[title] = folder / f"{name}.png"
        figure.savefig(paths[title], dpi=110)
    return paths


def _parameters(trials: Sequence[TrialRecord], best: TrialRecord, space: Space, metric: str) -> Figure:
    columns = min(COLUMNS, len(space))
    rows = math.ceil(len(space) / columns)
    figure = Figure(figsize=(4.2 * columns, 3.4 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True).flat
    for (key, parameter), axes in zip(space.items(), grid, strict=False):
        having = [trial for trial in trials if key in trial.point]
        for ending in (*MARKERS, CUT_SHORT):
            some = [trial for trial in having if _ending(trial) == ending]
            if not some:
                continue
            places = [_place(parameter, trial.point[key]) for trial in some]
            colours = [BEST if trial is best else "steelblue" for trial in some]
            scores = [trial.score for trial in some]
            axes.scatter(places, scores, c=colours, marker=MARKERS.get(ending, OTHER_MARKER), label=ending, alpha=0.85)
        axes.set(xlabel=key, ylabel=metric if axes.get_subplotspec().is_first_col() else "")
        _scale(axes, parameter)
        axes.grid(alpha=0.3)
    for axes in list(grid):
        axes.set_visible(False)
    figure.axes[0].legend(title=f"best ({best.name}) in red", fontsize="small", title_fontsize="small")
    return figure


def _parallel(trials: Sequence[TrialRecord], best: TrialRecord, space: Space, metric: str) -> Figure:
    figure = Figure(figsize=(max(6.0, 2.2 * (len(space) + 1)), 4.6), layout="constrained")
    axes = figure.add_subplot()
    scores = [trial.score for trial in trials]
    norm = Normalize(min(scores), max(*scores, min(scores) + 1e-3))
    for trial in sorted(trials, key=lambda trial: trial is best):
        heights = [
            _height(parameter, trial.point[key]) if key in trial.point else np.nan for key, parameter in space.items()
        ]
        line = [*heights, norm(trial.score)]
        colour, width = (BEST, 2.6) if trial is best else (COLOURS(norm(trial.score)), 1.2)
        axes.plot(range(len(line)), line, color=colour, linewidth=width, marker="o", markersize=3, alpha=0.85)
    for position, (_key, parameter) in enumerate(space.items()):
        axes.axvline(position, color="0.6", linewidth=0.8)
        for height, text in _ticks(parameter):
            axes.annotate(
                text, (position, height), xytext=(5, 0), textcoords="offset points", fontsize=7, va="center", zorder=5,
                bbox={"facecolor": "white", "alpha": 0.75, "linewidth": 0, "pad": 1},
            )  # fmt: skip
    axes.set_xticks(range(len(space) + 1), [*space, metric], fontsize=8)
    axes.set_yticks([])
    axes.set_ylim(-0.06, 1.06)
    figure.colorbar(ScalarMappable(norm, COLOURS), ax=axes, label=f"{metric} (best: {best.name}, red)")
    return figure


def _curves(trials: Sequence[TrialRecord], best: TrialRecord, metric: str) -> Figure:
    figure = Figure(figsize=(8, 4.8), layout="constrained")
    axes = figure.add_subplot()
    for trial in sorted(trials, key=lambda trial: trial is best):
        epochs = sorted(trial.reports)
        scores = [trial.reports[epoch].score for epoch in epochs]
        style = {"color": BEST, "linewidth": 2.4, "label": f"best: {trial.name}"} if trial is best else {"alpha": 0.7}
        marker = MARKERS.get(trial.status, OTHER_MARKER)
        axes.plot(epochs, scores, marker=marker, markersize=4, markevery=[-1], **style)
        taken = [epoch for epoch in epochs if trial.reports[epoch].donor]
        axes.plot(taken, [trial.reports[epoch].score for epoch in taken], "k+", markersize=8)
    axes.set(xlabel="epoch", ylabel=metric, title="o finished, v stopped early, + after taking over another's weights")
    axes.title.set_fontsize("small")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    return figure


def _ending(trial: TrialRecord) -> str:
    return trial.status if trial.status in MARKERS else CUT_SHORT


def _place(parameter: Parameter, value: Any) -> float:
    """Where a value lies on the parameter's own axis."""
    return value if parameter.bounds else parameter.values.index(value)


def _height(parameter: Parameter, value: Any) -> float:
    """The same from 0 to 1."""
    if not parameter.bounds:
        return parameter.values.index(value) / max(1, len(parameter.values) - 1)
    least, most = parameter.bounds
    if parameter.loguniform:
        return math.log(value / least) / math.log(most / least)
    return (value - least) / (most - least)


def _scale(axes: Axes, parameter: Parameter) -> None:
    """The whole range of the parameter, with so few ticks that none covers another."""
    if parameter.loguniform:
        least, most = parameter.loguniform
        margin = (most / least) ** 0.05
        axes.set_xscale("log")
        axes.set_xlim(least / margin, most * margin)
        ticks = np.geomspace(least, most, LOG_TICKS)
        axes.set_xticks(ticks, [f"{tick:.2g}" for tick in ticks])
        axes.minorticks_off()
    elif not parameter.bounds:
        texts = [_text(value) for value in parameter.values]
        slanted = sum(max(map(len, text.split("\n"))) for text in texts) > TICK_LETTERS
        axes.set_xticks(range(len(texts)), texts, fontsize=8, rotation=30 if slanted else 0)
        axes.set_xlim(-0.5, len(texts) - 0.5)


def _ticks(parameter: Parameter) -> list[tuple[float, str]]:
    values = list(parameter.bounds) if parameter.bounds else parameter.values
    return [(_height(parameter, value), _text(value)) for value in values]


def _text(value: Any) -> str:
    """As in the table; a mapping in several lines."""
    text = describe({"": value})[1:]
    return text.strip("{}").replace(" ", "\n") if isinstance(value, Mapping) else text
