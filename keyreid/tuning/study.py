"""What is known of each trial, kept with Ray Tune's state, and what comes out of a search, in its folder and in MLflow.

A study's finished trials cannot change any more, which a search that resumes from an earlier state must be able to do.
So the Optuna study, for optuna-dashboard and the pictures, is written from the records.
"""

import base64
import csv
import json
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import optuna
import yaml
from jinja2 import Environment, StrictUndefined

from keyreid.config import Config
from keyreid.files import replace_text
from keyreid.pages import Section, write_page
from keyreid.tracking import Tracker
from keyreid.tuning.search import Search, with_point
from keyreid.tuning.space import Point, label

BEST, TABLE, RECORDS = "best.yaml", "trials.csv", "trials.json"
STUDY, PAGE, PLOTS = "study.db", "report.html", "plots"
IMPORTANCE_TRIALS = 4  # with fewer, all parameters matter equally
OPTUNA_STATES = {"finished": "COMPLETE", "stopped": "PRUNED", "failed": "FAIL"}


@dataclass
class TrialRecord:
    """One trial.

    Attributes:
        reports: by epoch, a repeated one as it was last: `score` (NaN where the training broke off), `numbers` (all
            metrics), `point` (the values then, which population based training changes), `donor` (whose checkpoint
            this part of the training began with, if another trial's) and `seconds` of the search so far.
        failures: times that a process of it died.
        fault: why it failed, where it did.
        donor: the last checkpoint of another trial that it took over.
    """

    name: str
    point: Point
    status: Literal["waiting", "running", "paused", "finished", "stopped", "failed"] = "waiting"
    reports: dict[int, dict[str, Any]] = field(default_factory=dict)
    failures: int = 0
    fault: str | None = None
    donor: str | None = None

    @property
    def epoch(self) -> int:
        """Epochs reported."""
        return max(list(self.reports), default=0)  # a copy: a terminal's table is drawn in another thread

    @property
    def score(self) -> float:
        """The last score; NaN before the first, or where the training broke off."""
        return self.reports[self.epoch]["score"] if self.reports and not self.fault else math.nan


def best_trial(trials: Iterable[TrialRecord], mode: Literal["max", "min"]) -> TrialRecord | None:
    """The trial with the best last score: among those that trained to the end, or among all where none did."""
    scored = [trial for trial in trials if not math.isnan(trial.score)]
    whole = [trial for trial in scored if trial.status == "finished"]
    sign = 1 if mode == "max" else -1
    return max(whole or scored, key=lambda trial: sign * trial.score, default=None)


def describe(point: Mapping[str, Any]) -> str:
    """`loss.alpha=0.6 optimizer.lr=0.001`."""
    return " ".join(f"{key}={_short(value)}" for key, value in point.items())


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{{{describe(value)}}}" if isinstance(value, Mapping) else str(value)


def trial_table(search: Search, trials: Sequence[TrialRecord]) -> list[list[str]]:
    """A head and a row for each trial."""
    rows = [["trial", "status", "epoch", search.metric, *search.space, "died", "fault"]]
    for trial in trials:
        score = "" if math.isnan(trial.score) else f"{trial.score:.4f}"
        values = [_short(trial.point.get(key, "")) for key in search.space]
        died, fault = str(trial.failures or ""), trial.fault or ""
        rows.append([trial.name, trial.status, str(trial.epoch), score, *values, died, fault])
    return rows


def write(
    search: Search, base: Config, trials: list[TrialRecord], folder: Path, tracker: Tracker
) -> TrialRecord | None:
    """Write the files and log them to the search's MLflow run; gives the best trial, None where none has a score."""
    _write_table(search, trials, folder / TABLE)
    replace_text(folder / RECORDS, json.dumps([asdict(trial) for trial in trials], indent=1))
    save_study(search, trials, folder / STUDY)
    if not (best := best_trial(trials, search.mode)):
        return None
    replace_text(folder / BEST, best_configuration(search, base, best, folder))
    pictures = _draw_study(search, trials, folder / PLOTS)
    how = search.algorithm if search.scheduler == "none" else f"{search.algorithm}, stopped by {search.scheduler}"
    judged = f"{search.metric} ({search.mode}) of training identities that were held out of training"
    score = f"Best: {best.name} with {best.score:.4f} after epoch {best.epoch}."
    sections = [
        Section(text=[f"{judged}; {len(trials)} trials by {how}.", score]),
        Section("Trials", table=trial_table(search, trials), highlight=trials.index(best) + 1),
        Section("Pictures", pictures=pictures),
        Section(BEST, preformatted=(folder / BEST).read_text()),
    ]
    write_page(folder / PAGE, f"Search {search.name}", sections)
    for name in (BEST, TABLE, RECORDS, STUDY, PAGE):
        tracker.artifact(folder / name)
    tracker.artifact(folder / PLOTS, PLOTS)
    tracker.tag("keyreid.best", best.name)
    return best


def _write_table(search: Search, trials: Sequence[TrialRecord], path: Path) -> None:
    """A row for each report, with the values then; and one for each fault, and each trial without a report."""
    columns = ["trial", "status", "failures", "epoch", search.metric, *search.space, "from", "seconds", "fault"]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        for trial in trials:
            about = {"trial": trial.name, "status": trial.status, "failures": trial.failures}
            for epoch, report in sorted(trial.reports.items()):
                numbers = {search.metric: report["score"], "from": report["donor"], "seconds": report["seconds"]}
                writer.writerow(about | {"epoch": epoch} | report["point"] | numbers)
            if not trial.reports or trial.fault:
                writer.writerow(about | trial.point | {"fault": trial.fault})


def save_study(search: Search, trials: Sequence[TrialRecord], path: Path) -> None:
    """Write all trials as an Optuna study in SQLite, which optuna-dashboard opens; an earlier one is replaced."""
    path.unlink(missing_ok=True)
    study = optuna.create_study(study_name=search.name, storage=f"sqlite:///{path}", direction=f"{search.mode}imize")
    study.add_trials([_optuna_trial(search, trial, OPTUNA_STATES.get(trial.status, "RUNNING")) for trial in trials])


def _optuna_trial(search: Search, trial: TrialRecord, state: str) -> optuna.trial.FrozenTrial:
    state = "FAIL" if state in ("COMPLETE", "PRUNED") and math.isnan(trial.score) else state
    return optuna.trial.create_trial(
        state=optuna.trial.TrialState[state],
        value=trial.score if state in ("COMPLETE", "PRUNED") else None,
        params={key: label(value) for key, value in trial.point.items()},
        distributions={key: search.space[key].distribution() for key in trial.point},
        user_attrs={name: getattr(trial, name) for name in ("name", "status", "failures", "fault")},
        intermediate_values={epoch: report["score"] for epoch, report in trial.reports.items()},
    )


def _draw_study(search: Search, trials: Sequence[TrialRecord], folder: Path) -> list[tuple[str, str]]:
    """Write Optuna's pictures of the trials with a score; gives them as URLs that hold a PNG, with their titles."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot
    from optuna.visualization import matplotlib as drawn

    study = optuna.create_study(direction=f"{search.mode}imize")
    study.add_trials([_optuna_trial(search, trial, "COMPLETE") for trial in trials])
    target = {"target_name": search.metric}
    pictures = [
        ("history", f"Best {search.metric} so far", drawn.plot_optimization_history, target),
        ("parameters", f"{search.metric} against each parameter, one dot per trial", drawn.plot_slice, target),
        ("parallel", "All parameters of each trial", drawn.plot_parallel_coordinate, target),
        ("curves", "Learning curves", drawn.plot_intermediate_values, {}),
    ]
    if sum(trial.value is not None for trial in study.trials) >= IMPORTANCE_TRIALS:
        title = f"How much each parameter matters for {search.metric}"
        pictures.append(("importances", title, drawn.plot_param_importances, target))
    folder.mkdir(parents=True, exist_ok=True)
    inline = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # these functions count as experimental
        for name, title, draw, options in pictures:
            draw(study, **options)
            if name == "parallel":
                pyplot.gcf().set_size_inches(4 + 2 * len(search.space), 5)  # or labels cover each other
            pyplot.savefig(folder / f"{name}.png", dpi=110, bbox_inches="tight")
            pyplot.close("all")
            # In the page itself, so that it is whole in MLflow too.
            png = base64.b64encode((folder / f"{name}.png").read_bytes()).decode()
            inline.append((f"data:image/png;base64,{png}", title))
    return inline


def best_configuration(search: Search, base: Config, best: TrialRecord, folder: Path) -> str:
    """The best trial's configuration as YAML that `keyreid train` takes, with what it does and how it was found."""
    config = with_point(base, best.point | {"name": f"{search.name}-best"}, best.name)
    template = resources.files("keyreid").joinpath("assets/best.yaml.jinja").read_text(encoding="utf-8")
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, keep_trailing_newline=True)
    head = environment.from_string(template).render(search=search, config=config, best=best, folder=folder)
    return head + yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
