"""What a start that is refused leaves as it was, and what a run that starts over keeps of the one before."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from packed import make_dataset, pack_dataset
from training_runs import logged, newest_tensors, printed, run, start, toy_config, toy_shards, train

from keyreid.checkpoints import folder as checkpoints
from keyreid.config import Config
from keyreid.ownership import owned

pytestmark = pytest.mark.slow
SHORT = {"epochs": 2, "warmup_epochs": 0, "steps_per_epoch": 1}
JUDGED = {"every_epochs": 1, "pictures": 0}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_shards(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def finished(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A run that has ended."""
    config = toy_config(shards, tmp_path_factory.mktemp("runs"), schedule=SHORT, evaluation=JUDGED)
    run(train, config)
    return config


def content(config: Config) -> dict[str, bytes]:
    """Every file of a run and of MLflow, but for the logs."""
    files = (path for path in config.run_dir.rglob("*") if path.is_file() and path.parent.name != "logs")
    return {str(path): path.read_bytes() for path in [*files, config.run_dir.parent / "mlflow.db"]}


def changed(config: Config, **sections: object) -> Config:
    values = {"schedule": SHORT, "evaluation": JUDGED} | sections
    return toy_config(Path(config.data.shards), config.run_dir.parent, **values)


def resumed(config: Config, *change: str) -> None:
    from keyreid.training.run import train

    train(config, change=change)


def anew(config: Config) -> None:
    from keyreid.training.run import train

    train(config, resume=False)


def refused(target: Callable, config: Config, ranks: int, *arguments: str) -> str:
    """What is printed by the ranks of a start that fails, all of them."""
    before = len(printed(config))
    codes = start(target, config, ranks, *arguments).wait()
    assert 0 not in codes
    return printed(config)[before:] if ranks == 1 else printed(config)


WRONG = {
    "missing shards": ({"data": {"shards": "nowhere"}}, "no dataset card"),
    "precision": ({"training": {"precision": "fp16"}}, "needs a GPU"),
    "another network": ({"model": {"depth": 3, "backbone": "vit_tiny_patch16_224"}}, "model.depth is 2 there and 3"),
    "a backbone that is none": ({"model": {"backbone": "vit_of_nobody"}}, "vit_of_nobody"),
    "weights that are not there": ({"model": {"weights": "none.pth"}}, "model.weights was None and is now 'none.pth'"),
    "deepspeed": ({"training": {"deepspeed": {"optimizer": {}}}}, "training.deepspeed sets optimizer"),
    "fewer epochs": ({"schedule": SHORT | {"epochs": 1}}, "schedule.epochs was 2 and is now 1"),
    "seed": ({"seed": 7}, "seed was 1234 and is now 7"),
    "sampler": ({"data": {"sampler": "camera"}}, "data.sampler was 'identity' and is now 'camera'"),
    "batch shape": ({"data": {"identities": 2, "tracklets": 4}}, "data.identities was 4 and is now 2"),
    "optimizer": ({"optimizer": {"name": "adamw"}}, "optimizer.name was 'sgd' and is now 'adamw'"),
    "loss": ({"loss": {"alpha": 0.5}}, "loss.alpha was 0.75 and is now 0.5"),
    "what is judged": ({"evaluation": JUDGED | {"protocol": "official"}}, "evaluation.protocol was 'torchreid'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_refused_start_changes_nothing(finished: Config, case: str) -> None:
    sections, message = WRONG[case]
    before = content(finished)
    text = refused(train, changed(finished, **sections), 1)
    assert message in text
    assert content(finished) == before


def test_a_typing_error_in_change_is_named(finished: Config) -> None:
    before = content(finished)
    assert "--change optimiser: optimiser is no setting" in refused(resumed, finished, 1, "optimiser")
    assert "--change data.workers: data.workers may change anyway" in refused(resumed, finished, 1, "data.workers")
    assert content(finished) == before


def test_all_ranks_end_where_the_first_is_refused(shards: Path, tmp_path: Path) -> None:
    config = toy_config(shards, tmp_path)
    with owned(config.run_dir, "keyreid train"):
        text = refused(train, config, 2)
    assert text.count("keyreid train (pid ") >= 2
    assert not (config.run_dir / "checkpoints").exists()


def test_two_trainings_in_one_folder_at_once(shards: Path, tmp_path: Path) -> None:
    config = toy_config(shards, tmp_path, schedule={"epochs": 6})
    codes = [start(train, config, 1) for _ in range(2)]
    assert sorted(ranks.wait()[0] for ranks in codes) == [0, 1]
    assert [step for step, _ in logged(config, "train/loss")] == list(range(1, 31))
    assert len(json.loads((config.run_dir / "provenance.json").read_text())) == 1


def copy(finished: Config, folder: Path, **sections: object) -> Config:
    """A copy of the finished run, under a configuration with changes."""
    shutil.copytree(finished.run_dir, folder / "toy")
    return changed(finished, **sections).model_copy(update={"output": str(folder)})


def test_what_does_not_make_the_run_may_change(finished: Config, tmp_path: Path) -> None:
    shutil.copytree(finished.data.shards, tmp_path / "shards")
    training = {"zero_stage": 2, "accumulation": 2, "log_every_steps": 3, "keep_checkpoints": 5}
    data = {"shards": str(tmp_path / "shards"), "reader": "plain", "workers": 2}
    config = copy(finished, tmp_path, training=training, data=data, tracking={"sinks": []})
    run(train, config)
    assert not list(config.run_dir.glob("earlier-*"))


@pytest.mark.parametrize(
    ("change", "sections"),
    [
        ("optimizer", {"optimizer": {"name": "adamw", "lr": 1e-3}}),
        ("loss.centres", {"loss": {"centres": "released"}}),
        ("training.ema_decay", {"training": {"ema_decay": 0.9}}),
        ("model.drop_path", {"model": {"drop_path": 0.0}}),
        ("data.sampler", {"data": {"sampler": "camera"}}),
    ],
)
def test_a_change_is_allowed_by_name_and_logged(
    finished: Config, tmp_path: Path, change: str, sections: dict[str, object]
) -> None:
    config = copy(finished, tmp_path, **sections, schedule=SHORT | {"epochs": 3})
    text = refused(resumed, config, 1, "schedule.epochs")
    assert change in text
    assert "--change" in text
    run(resumed, config, 1, change, "schedule.epochs")
    text = printed(config)
    assert "schedule.epochs: 3 from here on, before 2 (--change)" in text
    assert ("the optimizer's state starts anew" in text) == (change == "optimizer")
    assert json.loads((config.run_dir / "provenance.json").read_text())[-1]["changed schedule.epochs"] == "2 -> 3"
    assert "keyreid.changed.schedule.epochs" in (config.run_dir / "tracking" / "events.jsonl").read_text()
    state = checkpoints.read_state(checkpoints.newest_whole(config.run_dir / "checkpoints"))
    assert (state.step, state.recipe["schedule.epochs"]) == (3, 3)
    run(train, config)  # from now on this is the run


def test_a_change_that_no_weights_fit_is_refused_by_name_too(finished: Config, tmp_path: Path) -> None:
    config = copy(finished, tmp_path, model={"depth": 3})
    assert "do not fit this network" in refused(resumed, config, 1, "model")


def test_other_shards_with_the_same_identities_are_refused(finished: Config, tmp_path: Path) -> None:
    pack_dataset(make_dataset(tmp_path / "p", identities=12, frames=(3, 8)), tmp_path / "p", tmp_path / "shards")
    config = copy(finished, tmp_path, data={"shards": str(tmp_path / "shards")})
    assert "data.fingerprint was " in refused(train, config, 1)
    run(resumed, config, 1, "data")


def test_a_checkpoint_without_a_recipe_resumes_with_a_warning(finished: Config, tmp_path: Path) -> None:
    """As keyreid 0.1 wrote them."""
    config = copy(finished, tmp_path, schedule=SHORT | {"epochs": 3})
    root = config.run_dir / "checkpoints"
    for folder in checkpoints.checkpoints(root):
        checkpoints.put_state(root, replace(checkpoints.read_state(folder), recipe={}))
    other = copy(finished, tmp_path / "other", optimizer={"name": "adamw"})
    shutil.rmtree(other.run_dir / "checkpoints")
    shutil.copytree(root, other.run_dir / "checkpoints")
    assert "optimizer.name was 'sgd' and is now 'adamw'" in refused(train, other, 1)
    run(train, config)
    assert "is of keyreid 0.1" in printed(config)
    assert checkpoints.read_state(checkpoints.newest_whole(root)).recipe["schedule.epochs"] == 3


def test_starting_over_keeps_what_was_there_aside(finished: Config, tmp_path: Path) -> None:
    config = copy(finished, tmp_path, seed=7)
    before = content(finished)
    run(anew, config)
    fresh = toy_config(Path(config.data.shards), tmp_path / "fresh", schedule=SHORT, evaluation=JUDGED, seed=7)
    run(train, fresh)
    ours, theirs = newest_tensors(config), newest_tensors(fresh)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert logged(config, "train/loss") == logged(fresh, "train/loss")
    aside = config.run_dir / "earlier-1"
    assert {str(finished.run_dir / path.relative_to(aside)) for path in aside.rglob("*") if path.is_file()} == set(
        before
    ) - {str(finished.run_dir.parent / "mlflow.db")}
    assert all(
        path.read_bytes() == before[str(finished.run_dir / path.relative_to(aside))]
        for path in aside.rglob("*")
        if path.is_file()
    )
    assert "moved to" in printed(config)
    run(anew, config)
    assert (config.run_dir / "earlier-2" / "checkpoints").is_dir()


def test_a_start_before_the_first_checkpoint_of_another_seed_is_not_continued(shards: Path, tmp_path: Path) -> None:
    """Its event log has steps that this run will take otherwise."""
    config = toy_config(shards, tmp_path, schedule=SHORT)
    run(train, config)
    shutil.rmtree(config.run_dir / "checkpoints")
    other = toy_config(shards, tmp_path, schedule=SHORT, seed=7)
    run(train, other)
    assert len(logged(other, "train/loss")) == 2
    assert (config.run_dir / "earlier-1" / "tracking" / "events.jsonl").is_file()
