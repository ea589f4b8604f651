"""Whether a network and shards number the same people and cameras: two datasets both have a camera 1."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from keyreid.checkpoints.weights_file import WeightsHeader, read_header
from keyreid.errors import CheckpointError
from keyreid.shards.shard_set import ShardSet

log = logging.getLogger(__name__)


def data_about(card: Mapping[str, Any]) -> dict[str, Any]:
    """What a weights file says of the data that it was trained on, from the dataset's card."""
    cameras = card.get("names", {}).get("camera", {})
    return {"dataset": card["name"], "by_split": card["by_split"], "camera_names": cameras}


def same_data(header: WeightsHeader | None, classes: int, card: Mapping[str, Any]) -> bool:
    """Whether numbers of identities and cameras stand for the same in a network's data and in a card's.

    They do if the splits that both have are as large, or if the cameras have the same names (numbers are no names).
    Files of earlier versions, and published checkpoints (no header, so many `classes`), say too little: they are
    believed only of datasets with numbers of their own, such as MARS.
    """
    named = any(card.get("names", {}).values())
    if header is None:
        splits = (len(split["train"]) for split in card["splits"])
        return not named and classes in (card["by_split"].get("train", {}).get("identities"), *splits)
    about, now = header.about, data_about(card)
    if about.get("dataset") != now["dataset"] or "by_split" not in about:
        return about.get("dataset") == now["dataset"] and not named
    if about.get("camera_names") == now["camera_names"] and not all(map(str.isdigit, now["camera_names"])):
        return True
    shared = about["by_split"].keys() & now["by_split"].keys()
    return bool(shared) and all(about["by_split"][split] == now["by_split"][split] for split in shared)


def keep_known(state: dict[str, torch.Tensor], weights: str, shards: ShardSet, classifier: str, cameras: str) -> bool:
    """Whether a network's classifiers fit the people of shards; cameras that it does not know become their mean."""
    try:
        header = read_header(Path(weights).expanduser()) if weights.endswith(".safetensors") else None
    except CheckpointError:  # of another program
        header = None
    classes = state[classifier].shape[1] if classifier in state else 0
    same = same_data(header, classes, shards.card)
    if cameras in state and not (same and (header is None or [*header.cameras] == [*shards.camera_index])):
        log.info("%s: not known to be of these cameras: each starts as the mean of its own", weights)
        state[cameras] = state[cameras].mean(0, keepdim=True)
    return same and (header is None or [*header.identities] == shards.training_identities().tolist())
