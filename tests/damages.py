"""Ways to damage and to forge a set of shards, for tests that nothing of it passes."""

from __future__ import annotations

import hashlib
import io
import json
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from keyreid.shards.card import card_digest, encode_card

Arrays = dict[str, np.ndarray | bytes]


def write_card(folder: Path, card: dict) -> None:
    """A card that agrees with itself, whatever it says."""
    card["card_sha256"] = card_digest(card)
    (folder / "dataset.json").write_bytes(encode_card(card))


def agree(folder: Path, change: Callable[[Arrays, dict], None] = lambda arrays, header: None) -> None:
    """Make the first shard's index state its tar's hash, and the card both, after `change(arrays, header)`.

    Args:
        change: of the index: its arrays by name (or an array's file as bytes), and its header.
    """
    card = json.loads((folder / "dataset.json").read_text())
    shard = card["shards"][0]
    tar, index = (folder / shard[name] for name in ("file", "index"))
    with np.load(index) as opened:
        arrays = dict(opened)
    content = tar.read_bytes()
    header = json.loads(arrays.pop("header").tobytes())
    header |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    arrays["header"] = b""
    change(arrays, header)
    arrays["header"] = arrays["header"] or npy(np.frombuffer(json.dumps(header).encode(), np.uint8))
    index.write_bytes(written := zip_of(arrays))
    shard |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    shard |= {"index_bytes": len(written), "index_sha256": hashlib.sha256(written).hexdigest()}
    write_card(folder, card)


def npy(array: np.ndarray) -> bytes:
    """An array as a `.npy` file, with pickles where it must."""
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def zip_of(arrays: Arrays) -> bytes:
    """A `.npz` file of arrays, or of what stands for their files."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, array in arrays.items():
            archive.writestr(f"{name}.npy", array if isinstance(array, bytes) else npy(array))
    return stream.getvalue()


def npy_header(text: str, content: bytes = b"") -> bytes:
    """A `.npy` file with any header."""
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode() + content


def rewrite(folder: Path, change: Callable[[str, bytes, tarfile.TarInfo], bytes | None]) -> None:
    """Forge the first shard: each member's content and header by `change`; sizes, checksums and hashes all agree."""
    path = sorted(folder.glob("*.tar"))[0]
    out, sizes, crcs, offsets = io.BytesIO(), [], [], []
    with tarfile.open(path) as old, tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as new:
        for member in old.getmembers():
            content = old.extractfile(member).read()
            content = change(member.name, content, member) or content
            member.size = len(content)
            new.addfile(member, io.BytesIO(content))
            sizes.append(len(content))
            crcs.append(zlib.crc32(content))
            offsets.append(out.tell() - -(-len(content) // 512) * 512)
    path.write_bytes(out.getvalue())

    def fits(arrays: Arrays, header: dict) -> None:
        arrays |= {"size": np.array(sizes, "<u4"), "crc": np.array(crcs, "<u4"), "offset": np.array(offsets, "<i8")}

    agree(folder, fits)


MUTATIONS = "flip", "cut", "swap", "zero", "append", "insert"


def mutate(content: bytes, kind: str, place: int, size: int, filler: bytes = b"\0") -> bytes:
    """One change: a bit flipped, the end cut off, two blocks swapped, a range of zeros, bytes appended or inserted.

    Args:
        place: where, modulo what there is.
        size: bytes, and for `flip` the bit.
    """
    place %= len(content) + 1
    before, after = content[:place], content[place:]
    if kind == "flip":
        return before + bytes([byte ^ (1 << size % 8) for byte in after[:1]]) + after[1:]
    if kind == "swap":
        return before + after[size : 2 * size] + after[:size] + after[2 * size :]
    changed = {"cut": b"", "zero": bytes(len(after[:size])) + after[size:], "append": after + filler}
    return before + changed.get(kind, filler + after)


def damage(rng: np.random.Generator, folder: Path, doubled: str = "*") -> str | None:
    """One random damage to one file of a folder: what it was; None where it changed nothing.

    Args:
        doubled: the files that may be there twice.
    """
    files = sorted(path for path in folder.iterdir() if path.is_file())
    path = files[rng.integers(len(files))]
    kind = rng.choice([*MUTATIONS, "remove", "rename", *["double"] * path.match(doubled)])
    other = path.with_name(f"x{path.name}")
    if kind == "remove":
        path.unlink()
    elif kind == "rename":
        path.rename(other)
    elif kind == "double":
        other.write_bytes(path.read_bytes())
    else:
        before = path.read_bytes()
        place, size = int(rng.integers(len(before) + 1)), int(rng.integers(1, 600))
        after = mutate(before, kind, place, size, bytes(size) if rng.integers(2) else rng.bytes(size))
        if after == before:
            return None
        path.write_bytes(after)
    return f"{kind} {path.name}"
