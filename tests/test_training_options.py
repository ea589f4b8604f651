"""What a training does on request: an average of the weights, a profile, and precision as asked for."""

import itertools
import json

import pytest
import torch
from training_runs import logged, printed, run, toy_config, toy_shards, train

from keyreid.checkpoints import folder as checkpoints
from keyreid.checkpoints import manifest
from keyreid.checkpoints.saved import read_tensors
from keyreid.checkpoints.trained import load_trained
from keyreid.cli import app

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return toy_shards(tmp_path_factory.mktemp("data"))


def test_the_average_is_that_of_the_weights_and_is_judged_and_exported(shards, tmp_path, capsys):
    """At ZeRO 3 each rank averages its shard; a checkpoint of every step tells what the average must be."""
    training = {"ema_decay": 0.6, "zero_stage": 3, "checkpoint_every_steps": 1, "keep_checkpoints": 10}
    config = toy_config(shards, tmp_path, training=training, schedule={"epochs": 1})
    run(train, config, 2)
    folders = checkpoints.checkpoints(config.run_dir / "checkpoints")
    assert len(folders) == 5
    saved = [[read_tensors(folder, file) for file in (manifest.WEIGHTS, manifest.EMA)] for folder in sorted(folders)]
    trained = [name for name in saved[0][0] if "running" not in name and "tracked" not in name]
    for (_, before), (weights, average) in itertools.pairwise(saved):
        for name in trained:
            expected = 0.6 * before[name].double() + 0.4 * weights[name].double()
            assert torch.allclose(average[name].double(), expected, atol=1e-6), name

    out = tmp_path / "network.safetensors"
    app(["export", "weights", str(config.run_dir), str(out)], standalone_mode=False)
    assert "averaged weights" in capsys.readouterr().out
    exported = load_trained(out)[0].state_dict()
    assert all(torch.equal(exported[name], saved[-1][1][name]) for name in trained)
    app(["evaluate", str(out), "--out", str(tmp_path / "judged"), f"data.shards={shards}"], standalone_mode=False)
    result = json.loads((config.run_dir / "result.json").read_text())
    assert result["mAP"] == pytest.approx(json.loads((tmp_path / "judged" / "scores.json").read_text())["mAP"])


def test_a_profile_is_recorded(shards, tmp_path):
    config = toy_config(shards, tmp_path, training={"profile_steps": 2})
    run(train, config)
    (trace,) = (config.run_dir / "profile").iterdir()
    events = json.loads(trace.read_text())["traceEvents"]
    assert any("addmm" in event.get("name", "") for event in events)
    logged_files = (config.run_dir / "tracking" / "events.jsonl").read_text()
    assert str(trace) in logged_files


@pytest.mark.parametrize("casting", ["autocast", "engine"])
def test_bf16_is_close_to_fp32(shards, tmp_path, casting):
    curves = []
    for name, training in (("fp32", {}), ("bf16", {"precision": "bf16", "casting": casting, "zero_stage": 2})):
        config = toy_config(shards, tmp_path / name, training=training, schedule={"epochs": 1})
        run(train, config, 2)
        curves.append([loss for _, loss in logged(config, "train/loss")])
        assert f"{name} by" in printed(config)
    assert curves[0] != curves[1]
    assert curves[1] == pytest.approx(curves[0], rel=0.02)
