"""The configuration of DeepSpeed, made from ours and the user's."""

import copy
import json
from pathlib import Path
from typing import Any

import torch

from keyreid.config import Config, TrainingConfig
from keyreid.errors import ConfigError

# Sections of a DeepSpeed configuration that would do again, otherwise, what ours says, and where ours says it
SAID_ELSEWHERE = {
    "optimizer": "optimizer",
    "scheduler": "schedule",
    "train_batch_size": "data.identities x data.tracklets",
    "train_micro_batch_size_per_gpu": "data.identities x data.tracklets and training.accumulation",
    "gradient_accumulation_steps": "training.accumulation",
}

# Modules whose weights' gradients travel in half precision under autocast: nearly all
HALF = ["torch.nn.modules.linear.Linear", "torch.nn.modules.conv.Conv2d", "keyreid.model.heads.Classifiers"]
BUCKET = 50_000_000  # numbers that travel at once: DeepSpeed's 500 M leave little of a ViT to overlap


def check_precision(training: TrainingConfig, device: torch.device) -> None:
    """Refuse what the device cannot compute or the engine cannot checkpoint."""
    autocast = training.casting == "autocast"
    if training.precision == "fp16" and device.type == "cpu":
        raise ConfigError("training.precision=fp16 needs a GPU: on a CPU use bf16 or fp32")
    if training.precision != "fp32" and not autocast and training.zero_stage == 0:
        what = "training.casting=engine with zero_stage=0 keeps no float32 weights to save"
        raise ConfigError(f"{what}: use zero_stage=1 or casting=autocast")
    if training.precision == "fp16" and autocast and training.zero_stage > 0:
        raise ConfigError(
            "training.precision=fp16 with casting=autocast and ZeRO never lowers its loss scale after an overflow "
            "(DeepSpeed 0.19.8): use casting=engine, zero_stage=0, or precision=bf16"
        )
    if training.compile and training.zero_stage == 3:
        raise ConfigError(
            "training.compile with zero_stage=3: ZeRO 3 fetches each layer's weights in hooks that no graph can hold "
            "(DeepSpeed 0.19.8): use zero_stage 0, 1 or 2"
        )
    if training.ema_decay is not None and training.precision != "fp32" and not autocast:
        raise ConfigError("training.ema_decay averages float32 weights: use training.casting=autocast")


def check_classes(config: Config) -> None:
    """Refuse what cannot go together with sharded classes, or is nothing without."""
    training = config.training
    if config.model.classifiers == "replicated":
        alone = {
            "loss.negative_classes": config.loss.negative_classes < 1,
            "training.class_group": training.class_group,
        }
        if needless := [name for name, said in alone.items() if said]:
            raise ConfigError(f"{needless[0]} is a setting of model.classifiers=sharded: leave it out, or set that")
        return
    cast = training.casting == "engine" and training.precision != "fp32"
    for setting, said, why in (
        ("zero_stage=3", training.zero_stage == 3, "gathers and saves the weights that it shards, and no others"),
        ("precision=fp16", training.precision == "fp16", "looks for overflows in the engine's gradients only"),
        ("casting=engine", cast, "keeps float32 copies of the engine's weights only: use casting=autocast"),
        (
            f"clip_gradient_norm with zero_stage={training.zero_stage}",
            training.clip_gradient_norm and training.zero_stage,
            "clips by the norm of the engine's gradients only: use zero_stage=0",
        ),
    ):
        if said:
            raise ConfigError(f"model.classifiers=sharded: training.{setting} {why}")


def deepspeed_config(config: Config, cuda: bool = False) -> dict[str, Any]:
    """The DeepSpeed configuration of a run: the user's, and what our configuration says.

    Args:
        cuda: whether gradients can travel while the backward pass computes.

    Raises:
        ConfigError: the user's DeepSpeed configuration is missing, is not JSON, or says otherwise than ours.
    """
    merged = _read_user_configuration(config.training.deepspeed)
    for key, ours_of_it in SAID_ELSEWHERE.items():
        if merged.pop(key, "auto") != "auto":
            raise ConfigError(f"training.deepspeed sets {key}, which {ours_of_it} says: leave it out there")
    training = config.training
    values: dict[str, Any] = {
        # The reader gives each rank its clips; DeepSpeed uses these numbers only for its own counters.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        # We call step() when the batch is complete, after as many backward passes as accumulation needs.
        "managed_gradient_accumulation": False,
        # Without ZeRO, DeepSpeed clips and forgets the norm: our engine clips there, and reports it.
        "gradient_clipping": training.clip_gradient_norm if training.zero_stage else 0.0,
        "zero_optimization": {"stage": training.zero_stage},
        "zero_allow_untested_optimizer": True,  # SGD with momentum is element-wise, so sharding it is exact
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
        "bf16": {"enabled": False},
        "fp16": {"enabled": False},
    }
    if training.gradients:
        values["communication_data_type"] = training.gradients
    if training.precision != "fp32" and training.casting == "autocast":
        dtype = {"bf16": "torch.bfloat16", "fp16": "torch.float16"}[training.precision]
        values["torch_autocast"] = {"enabled": True, "dtype": dtype}
        if training.gradients:
            half = HALF if training.gradients == "bf16" else []
            values["torch_autocast"]["lower_precision_safe_modules"] = half
    elif training.precision != "fp32":
        values[training.precision] = {"enabled": True}
    _merge(merged, values, "")
    buckets = {"reduce_bucket_size": BUCKET, "allgather_bucket_size": BUCKET} if cuda else {}
    for key, value in {"overlap_comm": cuda, **buckets}.items():
        merged["zero_optimization"].setdefault(key, value)
    return merged


def _read_user_configuration(source: str | dict[str, Any] | None) -> dict[str, Any]:
    if source is None or isinstance(source, dict):
        return copy.deepcopy(source or {})
    path = Path(source)
    try:
        values = json.loads(path.expanduser().read_text())
    except (OSError, ValueError, RuntimeError) as error:  # no such home, nested without end
        what = error.strerror if isinstance(error, OSError) else f"not JSON: {error}"
        raise ConfigError(f"training.deepspeed: {path}: {what}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"training.deepspeed: {path}: expected an object of settings")
    return values


def _merge(theirs: dict[str, Any], ours: dict[str, Any], place: str) -> None:
    """Put our values into theirs in place; a value that they set differently is a contradiction."""
    for key, value in ours.items():
        name = f"{place}{key}"
        if isinstance(value, dict) and isinstance(theirs.get(key), dict):
            _merge(theirs[key], value, f"{name}.")
        elif key in theirs and theirs[key] not in (value, "auto"):
            raise ConfigError(
                f"training.deepspeed says {name} = {theirs[key]!r}, the rest of the configuration says {value!r}: "
                'leave it out of the DeepSpeed configuration (or say "auto") and set it in `training`'
            )
        else:
            theirs[key] = value
