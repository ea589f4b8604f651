"""A checkpoint of which one byte was altered, in any of its files, is used by no command."""

import logging

import pytest
import torch
import yaml
from evaluation_toys import toy_config, toy_model, toy_shards
from typer.testing import CliRunner

from keyreid.checkpoints import folder as checkpoints
from keyreid.checkpoints.folder import Snapshot, TrainingState
from keyreid.checkpoints.manifest import EMA, MANIFEST, STATE, TRAINING, WEIGHTS
from keyreid.checkpoints.run_folder import RunFolder
from keyreid.checkpoints.trained import load_state, load_trained, open_trained
from keyreid.checkpoints.weights_file import WeightsHeader
from keyreid.cli import app
from keyreid.config import save_config
from keyreid.errors import CheckpointError

FILES = (WEIGHTS, EMA, TRAINING, STATE, MANIFEST)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with its configuration and one checkpoint, as training leaves them."""
    folder = tmp_path_factory.mktemp("altered")
    shards = toy_shards(folder)
    config = toy_config(shards, tracking__system_metrics=False).model_copy(update={"output": str(folder / "runs")})
    run = RunFolder(config.run_dir)
    tensors = toy_model(config).state_dict()
    header = WeightsHeader(config.model, config.clip, [0, 1, 2, 3], list(shards.camera_index), {"dataset": "toy"})
    taken = Snapshot(TrainingState(step=3), header, tensors, tensors, {"momentum": torch.ones(50)})
    checkpoints.save(run.checkpoints, taken)
    save_config(config, run.config_file)
    return run


@pytest.fixture(params=FILES)
def altered(run, request):
    """The run while one bit in the middle of a file is flipped, and that file."""
    file = checkpoints.named(run.checkpoints, "latest") / request.param
    content = file.read_bytes()
    place = len(content) // 2
    file.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    yield run, file
    file.write_bytes(content)


@pytest.fixture(autouse=True)
def own_logging():
    """Training in this process takes the package's log for itself; later tests get it back."""
    log = logging.getLogger("keyreid")
    before = log.handlers[:], log.level, log.propagate
    yield
    for handler in set(log.handlers) - set(before[0]):
        handler.close()
    log.handlers[:], log.level, log.propagate = before


COMMANDS = {
    "evaluate": ["evaluate", "--ranks=1", "--out={out}", "{run}"],
    "evaluate a file": ["evaluate", "--ranks=1", "--out={out}", "{weights}"],
    "embed": ["embed", "--ranks=1", "--out={out}/x.parquet", "{run}", "{shards}"],
    "visualize": ["visualize", "attention", "--out={out}/x.png", "{run}"],
    "export weights": ["export", "weights", "{run}", "{out}/x.safetensors"],
    "export onnx": ["export", "onnx", "{run}", "{out}/x.onnx"],
    "export released": ["export", "released", "{run}", "{out}/x.pth"],
    "train, resuming": ["train", "{run}/config.yaml", "--ranks=1"],
    "train from it": ["train", "{run}/config.yaml", "--dry-run", "model.weights={weights}"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_refuses_and_names_the_file(altered, tmp_path, command):
    run, file = altered
    places = {"run": run.path, "out": tmp_path, "weights": file.with_name(WEIGHTS)}
    places["shards"] = yaml.safe_load(run.config_file.read_text())["data"]["shards"]
    result = CliRunner().invoke(app, [word.format(**places) for word in COMMANDS[command]])
    assert isinstance(result.exception, CheckpointError), (result.exception, result.output)
    assert str(file) in str(result.exception)
    assert not list(tmp_path.iterdir())


def test_the_check_can_be_left_out(altered, tmp_path):
    run, file = altered
    for load in (load_state, load_trained, open_trained):
        with pytest.raises(CheckpointError, match=file.name):
            load(run.path)
    if file.name == TRAINING:  # the weights are whole
        assert (
            load_state(run.path, verify=False)[0].keys() == load_trained(run.path, verify=False)[0].state_dict().keys()
        )
        assert open_trained(run.path, verify=False).run == run
        words = ["export", "weights", str(run.path), str(tmp_path / "x.safetensors"), "--no-verify"]
        assert CliRunner().invoke(app, words).exit_code == 0


def test_tensors_that_the_manifest_does_not_name_are_refused(run):
    folder = checkpoints.named(run.checkpoints, "latest")
    strange = folder / "other.safetensors"
    strange.write_bytes((folder / WEIGHTS).read_bytes())
    try:
        with pytest.raises(CheckpointError, match=r"other\.safetensors: not of this checkpoint"):
            load_trained(run.path)
    finally:
        strange.unlink()
