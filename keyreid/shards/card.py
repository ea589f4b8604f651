"""The dataset card, `dataset.json`: what is in a set of shards, and the SHA-256 of everything else."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from keyreid.errors import DataError
from keyreid.files import read_whole
from keyreid.shards import schema
from keyreid.shards.members import VERSION, decode_json, refusing

CARD_NAME = "dataset.json"
LARGEST_CARD = 1 << 30  # bytes


def encode_card(card: dict[str, Any]) -> bytes:
    """A card as readable JSON."""
    return (json.dumps(card, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()


def card_digest(card: dict[str, Any]) -> str:
    """SHA-256 of a card without its own entry for it."""
    rest = {name: value for name, value in card.items() if name != "card_sha256"}
    return hashlib.sha256(encode_card(rest)).hexdigest()


def read_card(folder: Path) -> dict[str, Any]:
    """Read and check a dataset card; DataError where there is none, or it is not one."""
    path = folder / CARD_NAME
    try:
        card = decode_json(read_whole(path, LARGEST_CARD))
    except FileNotFoundError:
        tars = len(list(folder.glob("*.tar"))) if folder.is_dir() else 0
        unfinished = f"{tars} shards are there, so packing has not finished: run `keyreid shard` again"
        hint = unfinished if tars else "make the shards with `keyreid shard`"
        raise DataError(f"{path}: no dataset card; {hint}") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not a dataset card ({error}); pack the dataset again") from None
    kind = card.get("format") if isinstance(card, dict) else None
    if kind != f"keyreid-dataset/{VERSION}":
        raise DataError(f"{path}: dataset format {kind!r:.80}; this version reads keyreid-dataset/{VERSION}")
    try:
        return _checked(card)
    except ValueError as error:
        raise DataError(f"{path}: the card is damaged: {error}; delete it and pack the dataset again") from None


@refusing
def _checked(card: dict[str, Any]) -> dict[str, Any]:
    """The same card, or ValueError where it lacks what readers need, or is not what was written."""
    names = [name for shard in schema.check(schema.CARD, card)["shards"] for name in (shard["file"], shard["index"])]
    for name in names:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,250}", name) or name == CARD_NAME:
            raise ValueError(f"{name!r:.80} is not the name of a shard")
    if len(set(names)) < len(names):
        raise ValueError("it names a file twice")
    if card.get("card_sha256", digest := card_digest(card)) != digest:  # early cards do not state it
        raise ValueError("its SHA-256 is not the one it states")
    return card
