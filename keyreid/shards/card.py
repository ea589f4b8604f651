"""The dataset card, `dataset.json`: what is in a set of shards, and the SHA-256 of everything else."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from keyreid.errors import DataError
from keyreid.shards.members import VERSION

CARD_NAME = "dataset.json"
_ENTRIES = {"name": str, "source": dict, "settings": dict, "counts": dict, "by_split": dict, "cameras": list}
_ENTRIES |= {"splits": list, "shards": list}
_SHARD_ENTRIES = {"file": str, "index": str, "sha256": str, "index_sha256": str, "bytes": int, "index_bytes": int}


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
        card = json.loads(path.read_bytes())
    except FileNotFoundError:
        tars = len(list(folder.glob("*.tar"))) if folder.is_dir() else 0
        unfinished = f"{tars} shards are there, so packing has not finished: run `keyreid shard` again"
        hint = unfinished if tars else "make the shards with `keyreid shard`"
        raise DataError(f"{path}: no dataset card; {hint}") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not a dataset card ({error}); pack the dataset again") from None
    kind = card.get("format") if isinstance(card, dict) else None
    if kind != f"keyreid-dataset/{VERSION}":
        raise DataError(f"{path}: dataset format {kind!r}; this version reads keyreid-dataset/{VERSION}")
    _check_entries(path, card, _ENTRIES)
    if not card["shards"]:
        raise DataError(f"{path}: the dataset has no shards")
    for shard in card["shards"]:
        _check_entries(path, shard, _SHARD_ENTRIES)
        for name in (shard["file"], shard["index"]):
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
                raise DataError(f"{path}: {name!r} is not the name of a shard")
    if card.get("card_sha256", digest := card_digest(card)) != digest:  # early cards do not state it
        raise DataError(f"{path}: the card is damaged: its SHA-256 is not the one it states; pack the dataset again")
    return card


def _check_entries(path: Path, values: Any, kinds: dict[str, type]) -> None:
    """Refuse a card that lacks what every reader needs."""
    for name, kind in kinds.items():
        if not isinstance(values, dict) or not isinstance(values.get(name), kind):
            what = f"{name!r} is missing or no {kind.__name__}"
            raise DataError(f"{path}: the card is damaged: {what}; delete it and pack the dataset again")
