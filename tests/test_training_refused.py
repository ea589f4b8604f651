"""What a start that is refused leaves as it was, and what a run that starts over keeps of the one before."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from training_runs import Ranks, StopAfter, logged, newest_tensors, printed, run, start, toy_config, toy_shards, train

from keyreid.checkpoints import folder as checkpoints
from keyreid.config import Config

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


def stopped(config: Config, steps: int) -> None:
    from keyreid.training.run import train

    train(config, stop=StopAfter(steps))


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
    data = {"shards": finished.data.shards, "workers": 1, "identities": 4, "tracklets": 2, "augment": {"pad_pixels": 3}}
    sections = {name: values for name, values in sections.items()}
    if "data" in sections:
        sections["data"] = data | sections["data"]
    before = content(finished)
    text = refused(train, changed(finished, **sections), 1)
    assert message in text
    assert "Traceback" not in text.split("Error: ")[-1]
    assert content(finished) == before
