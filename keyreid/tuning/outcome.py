"""What comes out of a search: the best configuration, tables, pictures and a page, in its folder and in MLflow."""

import base64
import csv
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import yaml

from keyreid.config import Config
from keyreid.files import replace_text
from keyreid.pages import Section, write_page
from keyreid.tracking import Tracker
from keyreid.tuning.search import Search, with_point
from keyreid.tuning.study import STUDY, TrialRecord, best_trial, draw_study, save_study, trial_table
from keyreid.tuning.trial import TrialSetting

BEST, TABLE, RECORDS, PAGE, PLOTS = "best.yaml", "trials.csv", "trials.json", "report.html", "plots"
MLFLOW_STATUS = {"finished": "FINISHED", "stopped": "FINISHED", "failed": "FAILED"}


def close_trials(trials: Sequence[TrialRecord], setting: TrialSetting, cut_short: bool) -> None:
    """Say in each trial's MLflow run how it ended, after its processes; what they could not send is sent now.

    Args:
        cut_short: trials without an end may continue later.
    """
    for trial in trials:
        run_dir = setting.folder / trial.name
        if not (run_dir / "tracking").is_dir():
            continue
        config = setting.base.tracking.model_copy(update={"uri": setting.tracking_uri, "system_metrics": False})
        tracker = Tracker(config, setting.folder, run_dir, trial.name)
        tags = {"status": trial.status, "failures": trial.failures, "fault": trial.fault}
        for name, value in tags.items():
            if value is not None:
                tracker.tag(f"keyreid.{name}", str(value)[:4000])
        for epoch, report in sorted(trial.reports.items()):
            numbers = {key: value for key, value in report["point"].items() if isinstance(value, (int, float))}
            tracker.metrics({f"search/{key}": value for key, value in numbers.items()}, epoch)
            tracker.metrics({"search/score": report["score"]}, epoch)
        tracker.close(MLFLOW_STATUS.get(trial.status, "KILLED" if cut_short else "FINISHED"))


def write(
    search: Search, base: Config, trials: Sequence[TrialRecord], folder: Path, tracker: Tracker
) -> TrialRecord | None:
    """Write the files and log them to the search's MLflow run; gives the best trial, None where none has a score."""
    _write_table(search, trials, folder / TABLE)
    replace_text(folder / RECORDS, json.dumps([dataclasses.asdict(trial) for trial in trials], indent=1))
    save_study(search, trials, folder / STUDY)
    best = best_trial(trials, search.mode)
    if best is None:
        return None
    replace_text(folder / BEST, best_configuration(search, base, best, folder))
    pictures = draw_study(search, trials, folder / PLOTS)
    stopped = "" if search.scheduler == "none" else f", stopped by {search.scheduler}"
    summary = [
        f"{search.metric} ({search.mode}) of training identities that were held out of training; {len(trials)} trials "
        f"by {search.algorithm}{stopped}.",
        f"Best: {best.name} with {best.score:.4f} after epoch {best.epoch}.",
    ]
    sections = [
        Section(text=summary),
        Section("Trials", table=trial_table(search, trials), highlight=trials.index(best) + 1),
        Section("Pictures", pictures=[(_inline(path), title) for title, path in pictures.items()]),
        Section(BEST, preformatted=(folder / BEST).read_text()),
    ]
    write_page(folder / PAGE, f"Search {search.name}", sections)
    for name in (BEST, TABLE, RECORDS, STUDY, PAGE):
        tracker.artifact(folder / name)
    tracker.artifact(folder / PLOTS, PLOTS)
    tracker.tag("keyreid.best", best.name)
    return best


def _inline(picture: Path) -> str:
    """A PNG as a URL that holds it, so that the page is whole in MLflow too."""
    return f"data:image/png;base64,{base64.b64encode(picture.read_bytes()).decode()}"


def best_configuration(search: Search, base: Config, best: TrialRecord, folder: Path) -> str:
    """The best trial's configuration as YAML that `keyreid train` takes, with what it does and how it was found."""
    config = with_point(base, {**best.point, "name": f"{search.name}-best"}, best.name)
    ranks = f" --ranks {search.resources.ranks}" if search.resources.ranks > 1 else ""
    if search.algorithm == "pbt":
        again = (
            "Population based training changed the values while it trained: these are the last ones. The network with\n"
            f"this score is in {folder / 'trials' / best.name}; its history is in {TABLE}."
        )
    elif best.epoch < config.schedule.epochs:
        again = f"The search ended before this trial did: a whole training has {config.schedule.epochs} epochs."
    else:
        again = f"Trained again it has the same score: keyreid train {BEST}{ranks}"
    head = (
        f"The best of search {search.name}: {best.name}, {search.metric} {best.score:.6f} after epoch {best.epoch}\n"
        f"of the {config.data.holdout:.0%} of the training identities that were held out.\n{again}\n"
        "To train on all training identities and judge by the test set:\n"
        f"keyreid train {BEST} -- data.holdout=0 name=NAME"
    )
    comment = "".join(f"# {line}\n" for line in head.splitlines())
    return comment + yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _write_table(search: Search, trials: Sequence[TrialRecord], path: Path) -> None:
    """A row for each report, with the values then; and one for each fault, and each trial without a report."""
    columns = ["trial", "status", "failures", "epoch", search.metric, *search.space, "from", "seconds", "fault"]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        for trial in trials:
            about = {"trial": trial.name, "status": trial.status, "failures": trial.failures}
            for epoch, report in sorted(trial.reports.items()):
                numbers = {search.metric: report["score"], "from": report["donor"], "seconds": report["seconds"]}
                writer.writerow(about | {"epoch": epoch} | report["point"] | numbers)
            if not trial.reports or trial.fault:
                writer.writerow(about | trial.point | {"fault": trial.fault})
