"""Our configuration and DeepSpeed's: merged, or a contradiction that is named."""

import json
import pydoc
from pathlib import Path

import pytest
import torch

from keyreid.config import load_config
from keyreid.errors import ConfigError
from keyreid.training.engine_config import check_precision, deepspeed_config

FILES = Path(__file__).parents[1] / "configs" / "deepspeed"


@pytest.fixture
def configure(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("data: {shards: here}\n")
    return lambda *overrides: load_config(path, overrides)


def test_ours_reaches_deepspeed(configure):
    values = deepspeed_config(
        configure("training.zero_stage=2", "training.clip_gradient_norm=3", "training.precision=bf16")
    )
    assert values["zero_optimization"]["stage"] == 2
    assert values["gradient_clipping"] == 3
    assert values["torch_autocast"] == {"enabled": True, "dtype": "torch.bfloat16"}
    cast = deepspeed_config(configure("training.precision=bf16", "training.casting=engine"))
    assert cast["bf16"]["enabled"] and "torch_autocast" not in cast


def test_theirs_is_kept_and_auto_is_filled(configure, tmp_path):
    file = tmp_path / "ds.json"
    file.write_text(
        json.dumps({"zero_optimization": {"stage": "auto", "reduce_bucket_size": 1000}, "dump_state": True})
    )
    values = deepspeed_config(configure(f"training.deepspeed={file}", "training.zero_stage=3"))
    assert values["zero_optimization"]["stage"] == 3
    assert values["zero_optimization"]["reduce_bucket_size"] == 1000
    assert values["dump_state"] is True


@pytest.mark.parametrize(
    ("inline", "message"),
    [
        ("{zero_optimization: {stage: 3}}", "zero_optimization.stage = 3, the rest of the configuration says 1"),
        ("{gradient_accumulation_steps: 4}", "sets gradient_accumulation_steps, which training.accumulation says"),
        ("{optimizer: {type: Adam}}", "sets optimizer, which optimizer says"),
        ("{scheduler: {type: WarmupLR}}", "sets scheduler, which schedule says"),
        ("{train_batch_size: 64}", "sets train_batch_size, which data.identities x data.tracklets says"),
        ("{fp16: {enabled: true}}", "fp16.enabled = True"),
        ("{gradient_clipping: 1.0}", "gradient_clipping = 1.0, the rest of the configuration says 0.0"),
    ],
)
def test_a_contradiction_is_an_error(configure, inline, message):
    with pytest.raises(ConfigError, match=message):
        deepspeed_config(configure(f"training.deepspeed={inline}"))


@pytest.mark.parametrize("file", sorted(FILES.glob("*.json")), ids=lambda file: file.stem)
def test_our_files_want_the_stage_of_their_name(configure, file):
    stage = file.stem.removeprefix("zero")[0]
    values = deepspeed_config(configure(f"training.deepspeed={file}", f"training.zero_stage={stage}"))
    assert values["zero_optimization"]["stage"] == int(stage)
    with pytest.raises(ConfigError, match=f"zero_optimization.stage = {stage}, the rest of the configuration says 1"):
        deepspeed_config(configure(f"training.deepspeed={file}"))


def test_a_broken_file_is_named(configure, tmp_path):
    (tmp_path / "ds.json").write_text("{")
    with pytest.raises(ConfigError, match=r"ds\.json: not JSON"):
        deepspeed_config(configure(f"training.deepspeed={tmp_path / 'ds.json'}"))
    with pytest.raises(ConfigError, match=r"absent\.json"):
        deepspeed_config(configure("training.deepspeed=absent.json"))


@pytest.mark.parametrize(
    ("overrides", "device", "message"),
    [
        (["training.precision=fp16"], "cpu", "needs a GPU"),
        (["training.precision=fp16", "training.zero_stage=1"], "cuda", "casting=engine"),
        (["training.precision=bf16", "training.casting=engine", "training.zero_stage=0"], "cpu", "zero_stage=1"),
        (["training.precision=bf16", "training.casting=engine", "training.ema_decay=0.9"], "cpu", "ema_decay"),
        (("training.compile=true", "training.zero_stage=3"), "cpu", "no graph can hold"),
    ],
)
def test_what_cannot_work_is_refused(configure, overrides, device, message):
    with pytest.raises(ConfigError, match=message):
        check_precision(configure(*overrides).training, torch.device(device))


def test_gradients_in_half_precision_and_beside_the_backward_pass(configure):
    """By one key of ours; autocast's own choice is which modules' gradients travel so."""
    from keyreid.model.heads import Classifiers

    values = deepspeed_config(configure("training.gradients=bf16", "training.precision=bf16"), cuda=True)
    assert values["communication_data_type"] == "bf16"
    half = values["torch_autocast"]["lower_precision_safe_modules"]
    assert {pydoc.locate(name) for name in half} == {torch.nn.Linear, torch.nn.Conv2d, Classifiers}
    assert values["zero_optimization"]["overlap_comm"] and values["zero_optimization"]["reduce_bucket_size"] < 10**8
    exact = deepspeed_config(configure("training.gradients=fp32", "training.precision=bf16"))
    assert exact["torch_autocast"]["lower_precision_safe_modules"] == []
    assert not exact["zero_optimization"]["overlap_comm"]
    theirs = configure("training.deepspeed={zero_optimization: {overlap_comm: false, reduce_bucket_size: 7}}")
    kept = deepspeed_config(theirs, cuda=True)["zero_optimization"]
    assert (kept["overlap_comm"], kept["reduce_bucket_size"]) == (False, 7)
    assert "communication_data_type" not in deepspeed_config(configure())
