"""A small packed dataset, a small network and its weights file, for tests of evaluation and pictures."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from packed import make_config, make_dataset, pack_dataset

from keyreid.checkpoints.weights_file import WeightsHeader, write_weights
from keyreid.config import Config
from keyreid.model import KeyReID, build_model
from keyreid.shards.shard_set import ShardSet

CAMERAS = 3


def toy_shards(root: Path, splits: int = 0) -> ShardSet:
    """8 identities x 4 tracklets of 2 to 9 frames from 3 cameras; `splits` test 4 identities each."""
    dataset = make_dataset(root / "pictures")
    if splits:
        halves = []
        for number in range(splits):
            test = tuple(sorted((number + offset) % 8 for offset in (0, 1, 2, 5)))
            halves.append((tuple(i for i in range(8) if i not in test), test))
        tracklets = tuple(replace(tracklet, split="all") for tracklet in dataset.tracklets)
        dataset = replace(dataset, tracklets=tracklets, splits=tuple(halves), query_camera=1)
    return pack_dataset(dataset, root / "pictures", root / "shards")


def toy_config(shards: ShardSet, **overrides) -> Config:
    """Clips of 2 frames, 5 clips a batch, full precision, one picture of a kind."""
    settings = {
        "data__workers": 1,
        "model__backbone": "vit_tiny_patch16_224",
        "model__depth": 2,
        "clip__frames": 2,
        "evaluation__clips_per_batch": 5,
        "evaluation__pictures": 1,
        "training__precision": "fp32",
    }
    return make_config(shards.location, **(settings | overrides))


def toy_model(config: Config, seed: int = 0) -> KeyReID:
    """Random weights, with neck statistics that are not 0 and 1."""
    torch.manual_seed(seed)
    model = build_model(config.model, config.clip, num_identities=4, num_cameras=CAMERAS)
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if "running" in name:
                buffer.uniform_(0.5, 1.5)
    return model.eval()


def save_weights(model: KeyReID, config: Config, shards: ShardSet, path: Path) -> Path:
    """A weights file as training and export write it."""
    header = WeightsHeader(config.model, config.clip, [0, 1, 2, 3], list(shards.camera_index), {"dataset": "toy"})
    write_weights(path, model.state_dict(), header)
    return path


def toy_network(folder: Path) -> tuple[ShardSet, Config, KeyReID, Path]:
    """Shards, configuration, network, and its weights file `weights.safetensors`."""
    shards = toy_shards(folder)
    config = toy_config(shards)
    model = toy_model(config)
    return shards, config, model, save_weights(model, config, shards, folder / "weights.safetensors")
