"""From a run, a checkpoint or a weights file to a network and the configuration to use it with."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from keyreid.checkpoints.trained import find_weights, load_trained
from keyreid.checkpoints.weights_file import WeightsHeader
from keyreid.config import Config, ModelConfig, check_config, load_config, merge_overrides
from keyreid.errors import ConfigError
from keyreid.model import KeyReID
from keyreid.shards.index import ShardSet

RUN_CONFIG = "config.yaml"


@dataclass(frozen=True)
class Trained:
    """A network and what is known of it.

    Attributes:
        config: of the run, the file or the defaults; its model and clip are the network's own.
        header: what the weights file says; None for a published checkpoint.
        file: the weights file itself.
    """

    network: KeyReID
    config: Config
    header: WeightsHeader | None
    file: Path

    @property
    def run(self) -> Path | None:
        """The run's folder, if the weights lie in one."""
        own = _run_config(self.file)
        return own and own.parent

    def knows_cameras(self, shards: ShardSet) -> bool:
        """Whether the camera embeddings belong to the cameras of these shards."""
        if self.header is None:
            return len(shards.camera_index) == self.network.num_cameras
        same_dataset = self.header.about.get("dataset") in (None, shards.card["name"])
        return same_dataset and list(self.header.cameras) == list(shards.camera_index)

    def trained_on(self, shards: ShardSet, positions: Sequence[int]) -> set[int]:
        """Identities of these tracklets that the network was trained on, as far as its file tells."""
        if self.header is None or self.header.about.get("dataset") != shards.card["name"]:
            return set()
        return set(self.header.identities) & {shards.tracklets[position].identity for position in positions}


def open_trained(
    location: str | Path, config: Path | None = None, overrides: Sequence[str] = (), shards: str | None = None
) -> Trained:
    """Load weights and find their configuration.

    Args:
        location: a run's folder (its best checkpoint), a checkpoint, a .safetensors of keyreid, a published .pth.
        config: a configuration file; default the run's own, else the defaults.
        overrides: `section.key=value`; not of `model` and `clip`, which come with the weights.
        shards: instead of the configuration's `data.shards`.

    Raises:
        CheckpointError: the weights cannot be used.
        ConfigError: the configuration cannot, or none names shards.
    """
    fixed = [text for text in overrides if text.split(".")[0] in ("model", "clip")]
    if fixed:
        raise ConfigError(f"override {fixed[0]!r}: model and clip come with the weights")
    network, header = load_trained(Path(location))
    file = find_weights(Path(location))
    settings = _configuration(config or _run_config(file), overrides, shards)
    return Trained(network, _with_network(settings, network, header), header, file)


def open_config(location: Path | None, overrides: Sequence[str], shards: str | None) -> Config:
    """The configuration for work that needs no network; arguments as for `open_trained`."""
    return _configuration(location, overrides, shards)


def _run_config(file: Path) -> Path | None:
    """RUN/config.yaml of RUN/checkpoints/step-.../weights.safetensors."""
    candidates = [parent / RUN_CONFIG for parent in file.resolve().parents[:3]]
    return next((path for path in candidates if path.is_file()), None)


def _configuration(path: Path | None, overrides: Sequence[str], shards: str | None) -> Config:
    if path is not None:
        return load_config(path, [*overrides, *_shards_override(shards)])
    if shards is None and not any(text.startswith("data.shards=") for text in overrides):
        raise ConfigError("name the shards to evaluate on: --shards FOLDER")
    values = merge_overrides({}, [*overrides, *_shards_override(shards)])
    return check_config(values, "command line")


def _shards_override(shards: str | None) -> list[str]:
    return [] if shards is None else [f"data.shards={json.dumps(shards)}"]


def _with_network(config: Config, network: KeyReID, header: WeightsHeader | None) -> Config:
    if header is not None:
        return config.model_copy(update={"model": header.model, "clip": header.clip})
    height, width = network.image_size
    clip = config.clip.model_copy(update={"frames": network.frames, "height": height, "width": width})
    model = ModelConfig(guidance=network.guidance.name, parts=network.parts)
    return config.model_copy(update={"clip": clip, "model": model})
