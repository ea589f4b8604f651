"""What makes a run itself. A checkpoint records it; a run resumes with another only where that is allowed by name."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from keyreid.config import Config
from keyreid.errors import CheckpointError, ConfigError
from keyreid.shards.shard_set import ShardSet

DATA = "data.fingerprint"
# The only settings and sections that do not make the run, and why.
FREE = {
    **dict.fromkeys(("name", "output"), "where the run is kept"),
    **dict.fromkeys(("data.shards", "data.cache_dir"), f"where the data is; {DATA} says what"),
    **dict.fromkeys(("data.remote", "data.cache_gigabytes"), "how it comes from there"),
    **dict.fromkeys(("data.reader", "data.workers", "data.prefetch"), "who reads; what is read is the same"),
    **dict.fromkeys(("data.on_fault", "data.max_faults", "training.max_bad_steps"), "when a run gives up"),
    **dict.fromkeys(("training.zero_stage", "training.deepspeed", "training.accumulation"), "the same step, otherwise"),
    **dict.fromkeys(("training.activation_checkpointing", "training.compile"), "the same step, otherwise"),
    "training.vote_every_steps": "when it hears of a stop signal",
    **dict.fromkeys(("training.log_every_steps", "training.profile_steps", "tracking"), "what is told, and to whom"),
    **dict.fromkeys(("training.checkpoint_every_steps", "training.checkpoint_every_epochs"), "when it is saved"),
    **dict.fromkeys(("training.keep_checkpoints", "training.keep_every_epochs"), "what stays of what is saved"),
    **dict.fromkeys(("evaluation.every_epochs", "evaluation.clips_per_batch"), "when it is judged, how much at once"),
    "evaluation.pictures": "what is drawn of it",
    "training.class_group": "the same step, otherwise",
}


def settings(config: Config) -> dict[str, Any]:
    """Every setting that makes a run, by its key."""
    return {key: value for key, value in flatten(config.model_dump(mode="json")).items() if not below(key, FREE)}


def recipe(config: Config, shards: ShardSet, steps_per_epoch: int) -> dict[str, Any]:
    """What a checkpoint records."""
    return settings(config) | {"schedule.steps_per_epoch": steps_per_epoch, DATA: fingerprint(shards)}


def fingerprint(shards: ShardSet) -> str:
    """A SHA-256 of the shards' own, and of how cameras and splits are chosen."""
    known = [shards.card.get(name) for name in ("cameras", "splits", "query_camera", "shards")]
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()


def changes(
    source: object, before: Mapping[str, Any], now: Mapping[str, Any], allowed: Sequence[str]
) -> dict[str, tuple[Any, Any]]:
    """{key: (before, now)} of what differs; keys that only one of the two knows are of another version of keyreid.

    Args:
        source: what `before` is from, for messages.
        allowed: keys and sections that may differ.

    Raises:
        CheckpointError: another one does; names keys and values.
        ConfigError: `allowed` names what makes no run.
    """
    if wrong := [name for name in allowed if not any(below(key, (name,)) for key in now)]:
        why = "may change anyway" if below(wrong[0], FREE) else "is no setting, nor a section of settings"
        raise ConfigError(f"--change {wrong[0]}: {wrong[0]} {why}")
    different = {key: (before[key], value) for key, value in now.items() if key in before and before[key] != value}
    if refused := {key: values for key, values in different.items() if not below(key, allowed)}:
        what = "; ".join(f"{key} was {old!r} and is now {new!r}" for key, (old, new) in refused.items())
        allow = " ".join(f"--change {key}" for key in refused)
        raise CheckpointError(f"{source} is of another run: {what}. Give this one another name, or allow it: {allow}")
    return different


def below(key: str, sections: Sequence[str] | Mapping[str, Any]) -> bool:
    """Whether a key is one of these, or in a section that is."""
    return any(key == section or key.startswith(f"{section}.") for section in sections)


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values of nested mappings by dotted key."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat
