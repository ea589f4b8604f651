"""Weights files: one .safetensors that holds a network, what is needed to build it again, and its own SHA-256.

Everything but the tensors is one JSON text under the metadata key FORMAT: several keys would be written in random
order, and the same weights shall be the same bytes. Its first entry, `sha256`, is that of the file with 64 zeros in its
place, so that a change of any byte shows.
"""

import hashlib
import json
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from pydantic.dataclasses import dataclass
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from keyreid.config import ClipConfig, ModelConfig
from keyreid.errors import CheckpointError

FORMAT = "keyreid-weights-2"
UNSIGNED = "0" * 64


@dataclass(frozen=True)
class WeightsHeader:
    """What a network is: its configuration and what its outputs stand for."""

    model: ModelConfig
    clip: ClipConfig
    identities: Sequence[int]  # of training, in the order of the classifier's rows
    cameras: Sequence[int]  # the dataset's, in the order of the camera embedding's rows
    about: Mapping[str, Any]  # whatever else is worth knowing (step, scores, data), for people


HEADER = TypeAdapter(WeightsHeader)


def write_weights(path: Path, tensors: Mapping[str, torch.Tensor], header: WeightsHeader, ranks: int = 1) -> None:
    """Write tensors (names as in `KeyReID.state_dict()`) and header; of several ranks, the part of the first."""
    several = {"ranks": ranks} if ranks > 1 else {}
    text = json.dumps({"sha256": UNSIGNED, **several, **HEADER.dump_python(header, mode="json")})
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, {FORMAT: text})
    with path.open("r+b") as file:
        file.seek(file.read(4096).index(UNSIGNED.encode()))
        file.write(_unsigned_sha256(path, UNSIGNED).encode())


def read_header(path: Path, foreign: bool = False) -> WeightsHeader | None:
    """The header alone; `foreign` gives None for a file of another program.

    Raises:
        CheckpointError: the file is missing, is not safetensors, or was not written by `write_weights`.
    """
    fields = _fields(path)
    if fields is None and foreign:
        return None
    if fields is None:
        raise CheckpointError(f"{path}: not one of keyreid's files; give pretrained backbones as model.weights")
    try:
        return HEADER.validate_python(fields)
    except ValueError as error:
        raise CheckpointError(f"{path}: damaged header: {error}") from None


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a .safetensors or a torch file, on the CPU; nothing in the file is executed.

    Raises:
        CheckpointError: the file is missing, damaged, or holds more than tensors.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such weights file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:  # torch's own words advise to load it all the same
        raise CheckpointError(
            f"{path}: holds more than tensors, which would run its code on loading; save its state_dict alone"
        ) from None
    except (SafetensorError, RuntimeError, EOFError, OSError, ValueError) as error:
        why = str(error).partition("weights_only")[0].partition("\n")[0]
        raise CheckpointError(f"{path}: not a whole weights file: {why}") from None
    for wrapper in ("state_dict", "model", "teacher"):
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    named = content.items() if isinstance(content, dict) else ()
    state = {str(name).removeprefix("module."): value for name, value in named if isinstance(value, torch.Tensor)}
    if not state:
        raise CheckpointError(f"{path}: holds no named tensors")
    return state


def written_by(path: Path) -> int:
    """How many ranks wrote a weights file, with others beside it that have the rest; 1: it is whole."""
    fields = _fields(path) if path.suffix == ".safetensors" else None
    return int((fields or {}).get("ranks", 1))


def check_sha256(path: Path) -> None:
    """Compare a weights file with its own SHA-256; files of other programs and of the first format have none.

    Raises:
        CheckpointError: a byte of it was altered.
    """
    written = (_fields(path) or {}).get("sha256")
    if written is not None and _unsigned_sha256(path, str(written)) != written:
        raise CheckpointError(f"{path}: SHA-256 does not fit, the file was changed or damaged")


def _fields(path: Path) -> dict[str, Any] | None:
    """What the metadata says; None where the file is not one of ours."""
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
        if FORMAT in metadata:
            return {"sha256": "", **json.loads(metadata[FORMAT])}
        if metadata.get("format") == "keyreid-weights-1":  # a key for each field, no SHA-256
            return {name: json.loads(text) for name, text in metadata.items() if name != "format"}
    except SafetensorError as error:
        raise CheckpointError(f"{path}: not a whole safetensors file: {error}") from None
    except (ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path}: damaged header: {error}") from None
    return None


def _unsigned_sha256(path: Path, written: str) -> str:
    """SHA-256 of a file with UNSIGNED in the place of the one that is written in its header."""
    with path.open("rb") as file:
        size = file.read(8)
        header = file.read(int.from_bytes(size, "little"))
        content = hashlib.sha256(size + header.replace(written.encode(errors="replace"), UNSIGNED.encode(), 1))
        return hashlib.file_digest(file, lambda: content).hexdigest()
