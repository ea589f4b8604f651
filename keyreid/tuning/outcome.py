"""What comes out of a search: the best configuration, a table, pictures and a page, in its folder and in MLflow."""

from __future__ import annotations

import base64
import csv
import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from jinja2 import Environment

from keyreid.config import Config
from keyreid.files import replace_text
from keyreid.tracking import Tracker
from keyreid.tuning.records import TrialRecord, best_trial
from keyreid.tuning.search import Search, with_point
from keyreid.tuning.trial import Plan

BEST, TABLE, RECORDS, PAGE, PLOTS = "best.yaml", "trials.csv", "trials.json", "report.html", "plots"
MLFLOW_STATUS = {"finished": "FINISHED", "stopped": "FINISHED", "failed": "FAILED"}


@dataclass(frozen=True)
class Outcome:
    """The best trial and the files about all."""

    best: TrialRecord
    config: Path
    page: Path


def close_trials(trials: Sequence[TrialRecord], plan: Plan, cut_short: bool) -> None:
    """Say in each trial's MLflow run how it ended, after its processes; what they could not send is sent now.

    Args:
        cut_short: trials without an end may go on later.
    """
    for trial in trials:
        run_dir = plan.folder / trial.name
        if not (run_dir / "tracking").is_dir():
            continue
        config = plan.base.tracking.model_copy(update={"uri": plan.tracking_uri, "system_metrics": False})
        tracker = Tracker(config, plan.folder, run_dir, trial.name)
        tracker.tag("keyreid.status", trial.status)
        tracker.tag("keyreid.failures", str(trial.failures))
        if trial.fault:
            tracker.tag("keyreid.fault", trial.fault[:4000])
        for epoch, report in sorted(trial.reports.items()):
            tracker.metrics({"search/score": report.score} | _numbers(report.point), epoch)
        tracker.close(MLFLOW_STATUS.get(trial.status, "KILLED" if cut_short else "FINISHED"))


def write(
    search: Search, base: Config, trials: Sequence[TrialRecord], folder: Path, trial_folder: Path, tracker: Tracker
) -> Outcome | None:
    """Write the files and log them to the search's MLflow run; None where no trial has a score yet."""
    _write_table(search, trials, folder / TABLE)
    records = [dataclasses.asdict(trial) for trial in trials]
    replace_text(folder / RECORDS, json.dumps(records, indent=1))
    best = best_trial(trials, search.mode)
    if best is None:
        return None
    replace_text(folder / BEST, best_configuration(search, base, best, trial_folder))
    from keyreid.tuning.plots import draw_all  # matplotlib only now

    pictures = draw_all(trials, best, search.space, search.metric, folder / PLOTS)
    replace_text(folder / PAGE, _page(search, trials, best, (folder / BEST).read_text(), pictures))
    for name in (BEST, TABLE, RECORDS, PAGE):
        tracker.artifact(folder / name)
    tracker.artifact(folder / PLOTS, PLOTS)
    tracker.tag("keyreid.best", best.name)
    return Outcome(best, folder / BEST, folder / PAGE)


def best_configuration(search: Search, base: Config, best: TrialRecord, trial_folder: Path) -> str:
    """The best trial's configuration as YAML that `keyreid train` takes, with what it does and how it was found."""
    config = with_point(base, best.point, best.name).model_copy(update={"name": f"{search.name}-best"})
    ranks = f" --ranks {search.resources.ranks}" if search.resources.ranks > 1 else ""
    head = [
        f"The best of search {search.name}: {best.name}, {search.metric} {best.score:.6f} after epoch {best.epoch}",
        f"of the {config.data.holdout:.0%} of the training identities that were held out.",
    ]
    if search.algorithm == "pbt":
        head += [
            "Population based training changed the values while it trained: these are the last ones. The network that",
            f"has this score is {trial_folder / best.name}; its history is in {TABLE}.",
        ]
    elif best.epoch < config.schedule.epochs:
        head += [f"The search ended before this trial did: a whole training has {config.schedule.epochs} epochs."]
    else:
        head += [f"Trained again it has the same score: keyreid train {BEST}{ranks}"]
    head += [
        "To train on all training identities and judge by the test set:",
        f"keyreid train {BEST} -- data.holdout=0 name=NAME",
    ]
    return "".join(f"# {line}\n" for line in head) + yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _write_table(search: Search, trials: Sequence[TrialRecord], path: Path) -> None:
    """A row for each report; a trial's last row has its last score."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(
            ["trial", "status", "failures", "epoch", search.metric, *search.space, "from", "seconds", "fault"]
        )
        for trial in trials:
            for epoch, report in sorted(trial.reports.items()):
                values = [report.point.get(key, "") for key in search.space]
                row = [trial.name, trial.status, trial.failures, epoch, report.score, *values, report.donor or ""]
                writer.writerow([*row, f"{report.seconds:.1f}", ""])
            if not trial.reports or trial.fault:
                values = [trial.point.get(key, "") for key in search.space]
                writer.writerow([trial.name, trial.status, trial.failures, "", "", *values, "", "", trial.fault or ""])


def _numbers(point: dict) -> dict[str, float]:
    """What MLflow can draw of a point that changes."""
    return {f"search/{key}": float(value) for key, value in point.items() if isinstance(value, (int, float))}


def _page(
    search: Search, trials: Sequence[TrialRecord], best: TrialRecord, best_yaml: str, pictures: dict[str, Path]
) -> str:
    sign = -1 if search.mode == "max" else 1
    ordered = sorted(trials, key=lambda trial: (trial is not best, math.isnan(trial.score), sign * trial.score))
    images = {title: base64.b64encode(path.read_bytes()).decode() for title, path in pictures.items()}
    template = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(_TEMPLATE)
    return template.render(
        search=search, trials=ordered, best=best, best_yaml=best_yaml, images=images, isnan=math.isnan
    )


_TEMPLATE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>Search {{ search.name }}</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em; color: #111827; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid #e5e7eb; padding: .25em .7em; text-align: left; }
.best { background: #fef2f2; font-weight: 600; }
img { max-width: 100%; }
pre { background: #f3f4f6; padding: 1em; overflow-x: auto; }
</style>
<h1>Search {{ search.name }}</h1>
<p>{{ search.metric }} ({{ search.mode }}) of training identities that were held out of training; {{ trials | length }}
trials by {{ search.algorithm }}{% if search.scheduler != "none" %}, stopped by {{ search.scheduler }}{% endif %}. Best:
<strong>{{ best.name }}</strong> with {{ "%.4f" | format(best.score) }} after epoch {{ best.epoch }}.</p>
{% for title, image in images.items() %}
<h2>{{ title }}</h2>
<img alt="{{ title }}" src="data:image/png;base64,{{ image }}">
{% endfor %}
<h2>Trials</h2>
<table>
<tr><th>trial</th><th>status</th><th>epoch</th><th>{{ search.metric }}</th>
{% for key in search.space %}<th>{{ key }}</th>{% endfor %}<th>died</th></tr>
{% for trial in trials %}
<tr{% if trial is sameas best %} class="best"{% endif %}>
<td>{{ trial.name }}</td><td>{{ trial.status }}{% if trial.fault %}: {{ trial.fault }}{% endif %}</td>
<td>{{ trial.epoch }}</td><td>{% if not isnan(trial.score) %}{{ "%.4f" | format(trial.score) }}{% endif %}</td>
{% for key in search.space %}<td>{{ trial.point.get(key, "") }}</td>{% endfor %}<td>{{ trial.failures or "" }}</td></tr>
{% endfor %}
</table>
<h2>best.yaml</h2>
<pre>{{ best_yaml }}</pre>
</html>
"""
