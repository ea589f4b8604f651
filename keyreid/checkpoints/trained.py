"""From a run, a checkpoint, a weights file or a published checkpoint to a network and its configuration."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from keyreid.backbones.backbone import Source
from keyreid.checkpoints.released import from_released, is_released, released_model
from keyreid.checkpoints.run_folder import RunFolder, check_whole, find_weights
from keyreid.checkpoints.same_data import same_data
from keyreid.checkpoints.saved import read_network
from keyreid.checkpoints.start import load_network
from keyreid.checkpoints.weights_file import WeightsHeader, read_header
from keyreid.config import ClipConfig, Config, ModelConfig, check_config, load_config, merge_overrides
from keyreid.errors import CheckpointError, ConfigError
from keyreid.model import KeyReID, build_model
from keyreid.model.sharded_classes import CLASSIFIERS
from keyreid.shards.shard_set import ShardSet


@dataclass(frozen=True)
class Trained:
    """A network and what is known of it."""

    network: KeyReID
    config: Config  # of the run, the file or the defaults; its model and clip are the network's own
    header: WeightsHeader | None  # what the weights file says; None for a published checkpoint
    file: Path  # the weights file itself
    run: RunFolder | None  # that they belong to, if any

    def knows_cameras(self, shards: ShardSet) -> bool:
        """Whether the camera embeddings belong to the cameras of these shards."""
        if not same_data(self.header, self.network.num_identities, shards.card):
            return False
        if self.header is None:
            return len(shards.camera_index) == self.network.num_cameras
        return list(self.header.cameras) == list(shards.camera_index)

    def trained_on(self, shards: ShardSet, positions: Sequence[int]) -> set[int]:
        """Identities of these tracklets that the network was trained on, as far as its file tells."""
        if self.header is None or not same_data(self.header, self.network.num_identities, shards.card):
            return set()
        return set(self.header.identities) & set(shards.identities[positions].tolist())


def open_trained(
    location: str | Path,
    config: Path | None = None,
    overrides: Sequence[str] = (),
    shards: str | None = None,
    verify: bool = True,
) -> Trained:
    """Load weights and find their configuration.

    Args:
        location, verify: as for `load_trained`.
        config: a configuration file; default the run's own, else the defaults.
        overrides: `section.key=value`; not of `model` and `clip`, which come with the weights.
        shards: instead of the configuration's `data.shards`.

    Raises:
        CheckpointError: the weights cannot be used.
        ConfigError: the configuration cannot, or none names shards.
    """
    if fixed := [text for text in overrides if text.split(".")[0] in ("model", "clip")]:
        raise ConfigError(f"override {fixed[0]!r}: model and clip come with the weights")
    file = find_weights(location)
    network, header = load_trained(file, verify)
    run = RunFolder.holding(file)
    settings = open_config(config or (run and run.config_file), overrides, shards)
    own = header or header_of(network, file)
    return Trained(network, settings.model_copy(update={"model": own.model, "clip": own.clip}), header, file, run)


def open_config(path: Path | None, overrides: Sequence[str], shards: str | None) -> Config:
    """The configuration for work that needs no network; arguments as for `open_trained`."""
    overrides = [*overrides, *([] if shards is None else [f"data.shards={json.dumps(shards)}"])]
    if path is not None:
        return load_config(path, overrides)
    if not any(text.startswith("data.shards=") for text in overrides):
        raise ConfigError("name the shards to evaluate on: --shards FOLDER")
    return check_config(merge_overrides({}, overrides), "command line")


def load_trained(location: str | Path, verify: bool = True) -> tuple[KeyReID, WeightsHeader | None]:
    """A network in evaluation mode and what its file says of it: nothing, if it is a published checkpoint.

    Args:
        location: a run's folder (its best checkpoint), a checkpoint, a .safetensors of keyreid, a published .pth.
        verify: refuse weights of which a byte was altered.

    Raises:
        CheckpointError: there are no weights, or they are damaged or of an unknown kind.
    """
    file, tensors, header = _load(location, verify, classes=False)
    if header is None:
        if not is_released(tensors):
            raise CheckpointError(f"{file}: not a published KeyRe-ID checkpoint, nor a keyreid .safetensors")
        return released_model(tensors).eval(), None
    own = header.model.model_copy(update={"weights": None})
    network = build_model(own, header.clip, len(header.identities), len(header.cameras))
    load_network(network, tensors, Source(str(file), network.patch_grid), keep_classifiers=True)
    return network.eval(), header


def header_of(network: KeyReID, file: Path) -> WeightsHeader:
    """A header for a published checkpoint; its identities and cameras are counted, not named."""
    height, width = network.image_size
    return WeightsHeader(
        model=ModelConfig(guidance=network.guidance.name, parts=network.parts),
        clip=ClipConfig(frames=network.frames, height=height, width=width),
        identities=list(range(network.num_identities)),
        cameras=list(range(network.num_cameras)),
        about={"converted_from": file.name},
    )


def load_state(location: str | Path, verify: bool = True) -> tuple[dict[str, torch.Tensor], WeightsHeader | None]:
    """The tensors alone, in our names; also of a bare state dict."""
    file, tensors, header = _load(location, verify)
    if header is None and is_released(tensors):
        tensors = from_released(tensors)
    if CLASSIFIERS[0] not in tensors:
        raise CheckpointError(f"{file}: not a KeyRe-ID network, or one that was exported without its classifiers")
    return tensors, header


def _load(
    location: str | Path, verify: bool, classes: bool = True
) -> tuple[Path, dict[str, torch.Tensor], WeightsHeader | None]:
    """The one way in for weights: the file, its tensors as they are named there, and its header if it is ours.

    Args:
        classes: False leaves out classifiers that ranks share out, where a process alone has no network for them.
    """
    file = find_weights(location)
    if verify:
        check_whole(file)
    header = read_header(file) if file.suffix == ".safetensors" else None
    shared_out = not classes and header is not None and header.model.classifiers == "sharded"
    return file, read_network(file, CLASSIFIERS if shared_out else ()), header
