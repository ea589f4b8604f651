"""Weights files: one .safetensors that holds a network, what is needed to build it again, and its own SHA-256.

Everything but the tensors is one JSON text under the metadata key FORMAT: several keys would be written in random
order, and the same weights shall be the same bytes. Its first entry, `sha256`, is that of the file with 64 zeros in its
place, so that a change of any byte shows.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from pydantic.dataclasses import dataclass
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from keyreid.config import ClipConfig, ModelConfig
from keyreid.errors import CheckpointError

FORMAT = "keyreid-weights-2"
UNSIGNED = "0" * 64


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
    about: Mapping[str, Any]


HEADER = TypeAdapter(WeightsHeader)


def write_weights(path: Path, tensors: Mapping[str, torch.Tensor], header: WeightsHeader) -> None:
    """Write tensors (names as in `KeyReID.state_dict()`) and header."""
    text = json.dumps({"sha256": UNSIGNED, **HEADER.dump_python(header, mode="json")})
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, {FORMAT: text})
    with path.open("r+b") as file:
        place = file.read(4096).index(UNSIGNED.encode())
        file.seek(place)
        file.write(_unsigned_sha256(path, UNSIGNED).encode())


def read_header(path: Path) -> WeightsHeader:
    """The header alone.

    Raises:
        CheckpointError: the file is missing, is not safetensors, or was not written by `write_weights`.
    """
    fields = _fields(path)
    if fields is None:
        raise CheckpointError(f"{path}: not one of keyreid's files; give pretrained backbones as model.weights")
    try:
        return HEADER.validate_python(fields)
    except ValueError as error:
        raise CheckpointError(f"{path}: damaged header: {error}") from None


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """All tensors, on the CPU."""
    with _open(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping


def check_sha256(path: Path) -> None:
    """Compare a weights file with its own SHA-256; files of other programs and of the first format have none.

    Raises:
        CheckpointError: a byte of it was altered.
    """
    fields = _fields(path)
    if fields is None or (written := fields.get("sha256")) is None:
        return
    if _unsigned_sha256(path, written) != written:
        raise CheckpointError(f"{path}: SHA-256 does not fit, the file was changed or damaged")


def _fields(path: Path) -> dict[str, Any] | None:
    """What the metadata says; None where the file is not one of ours."""
    with _open(path) as file:
        metadata = file.metadata() or {}
    try:
        if FORMAT in metadata:
            return {"sha256": "", **json.loads(metadata[FORMAT])}
        if metadata.get("format") == "keyreid-weights-1":  # a key for each field, no SHA-256
            return {name: json.loads(text) for name, text in metadata.items() if name != "format"}
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: damaged header: {error}") from None
    return None


def _unsigned_sha256(path: Path, written: str) -> str:
    """SHA-256 of a file with UNSIGNED in the place of the one that is written in its header."""
    with path.open("rb") as file:
        size = file.read(8)
        header = file.read(int.from_bytes(size, "little"))
        content = hashlib.sha256(size + header.replace(written.encode(), UNSIGNED.encode(), 1))
        return hashlib.file_digest(file, lambda: content).hexdigest()


def _open(path: Path):
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    try:
        return safe_open(str(path), framework="pt", device="cpu")
    except SafetensorError as error:
        raise CheckpointError(f"{path}: not a whole safetensors file: {error}") from None
