"""Weights files: one .safetensors that holds a network, and in its header all that is needed to build it again."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pydantic
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from keyreid.config import ClipConfig, ModelConfig
from keyreid.errors import CheckpointError

FORMAT = "keyreid-weights-1"


@dataclass(frozen=True)
class WeightsHeader:
    """What a network is: its configuration and what its outputs stand for.

    Attributes:
        identities: training identities in the order of the classifier's rows.
        cameras: the dataset's cameras in the order of the camera embedding's rows.
        about: whatever else is worth knowing (step, scores, data), for people.
    """

    model: ModelConfig
    clip: ClipConfig
    identities: Sequence[int]
    cameras: Sequence[int]
    about: Mapping[str, object]


def write_weights(path: Path, tensors: Mapping[str, torch.Tensor], header: WeightsHeader) -> None:
    """Write tensors (names as in `KeyReID.state_dict()`) and header."""
    metadata = {
        "format": FORMAT,
        "model": header.model.model_dump_json(),
        "clip": header.clip.model_dump_json(),
        "identities": json.dumps(list(header.identities)),
        "cameras": json.dumps(list(header.cameras)),
        "about": json.dumps(dict(header.about)),
    }
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, str(path), metadata)


def read_header(path: Path) -> WeightsHeader:
    """The header alone.

    Raises:
        CheckpointError: the file is missing, is not safetensors, or was not written by `write_weights`.
    """
    with _open(path) as file:
        metadata = file.metadata() or {}
    if metadata.get("format") != FORMAT:
        raise CheckpointError(
            f"{path}: a safetensors file, but not one of keyreid's (format {metadata.get('format')!r}, expected "
            f"{FORMAT!r}); give pretrained backbones as model.weights"
        )
    try:
        return WeightsHeader(
            model=ModelConfig.model_validate_json(metadata["model"]),
            clip=ClipConfig.model_validate_json(metadata["clip"]),
            identities=json.loads(metadata["identities"]),
            cameras=json.loads(metadata["cameras"]),
            about=json.loads(metadata["about"]),
        )
    except (KeyError, ValueError, pydantic.ValidationError) as error:
        raise CheckpointError(f"{path}: damaged header: {error}") from None


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """All tensors, on the CPU."""
    with _open(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping


def _open(path: Path):
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    try:
        return safe_open(str(path), framework="pt", device="cpu")
    except SafetensorError as error:
        raise CheckpointError(f"{path}: not a whole safetensors file: {error}") from None
