"""The files of a checkpoint: who writes and reads which, what each holds, and whether they are as they were written.

One rank writes weights.safetensors, ema.safetensors and training.safetensors. Of several the first writes its part
under these names, the others theirs as weights-00001-of-00004.safetensors and so on, and the manifest says which
numbers of which tensors are where.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from keyreid.distributed.ranks import Ranks
from keyreid.files import sha256

KINDS = WEIGHTS, EMA, TRAINING = "weights.safetensors", "ema.safetensors", "training.safetensors"
STATE, MANIFEST = "state.json", "manifest.json"
_ALONE = Ranks.alone()


def part_name(kind: str, rank: int, ranks: int) -> str:
    """The file of a kind that a rank writes."""
    return kind.replace(".", f"-{rank:05}-of-{ranks:05}.") if rank else kind


def kind_of(name: str) -> str | None:
    """The kind of a file, None of one without tensors."""
    kind = re.sub(r"-\d{5}-of-\d{5}\.safetensors$", ".safetensors", name)
    return kind if kind in KINDS else None


def reader_of(name: str, entry: Mapping[str, Any], ranks: int) -> int:
    """Which of so many ranks reads a file: its writer where there are as many."""
    if number := re.search(r"-(\d{5})-of-\d{5}\.safetensors$", name):
        return int(number[1]) % ranks
    return KINDS.index(name) % ranks if name in KINDS and "tensors" not in entry else 0


def manifest_text(files: object) -> str:
    """The only text that a manifest of these files can have, so that a change of any byte shows."""
    own = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
    return json.dumps({"files": files, "sha256": own}, indent=1)


def read_manifest(folder: Path) -> dict[str, dict[str, Any]]:
    """The files of a checkpoint: each one's size and SHA-256, and where several ranks wrote, its tensors.

    Raises:
        ValueError: its own SHA-256 does not fit; OSError and others where it is no manifest at all.
    """
    text = (folder / MANIFEST).read_text()
    files = json.loads(text)["files"]
    if text != manifest_text(files):
        raise ValueError("its own SHA-256 does not fit, the file was changed or damaged")
    return files


def verify(folder: Path, ranks: Ranks = _ALONE) -> list[str]:
    """What is wrong with a checkpoint's files that this rank reads, one line for each; empty when they are whole."""
    try:
        files = read_manifest(folder)
        read = {name: reader_of(name, entry, ranks.world_size) == ranks.rank for name, entry in files.items()}
        pairs = {name: (entry, entry.get("before", entry)) for name, entry in files.items()}  # see folder.put_state
        expected = {name: [(each["size"], each["sha256"]) for each in pair] for name, pair in pairs.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return [f"{folder / MANIFEST}: {error}"]
    faults = []
    for name, either in expected.items():
        path = folder / name
        if not read[name]:
            continue
        if Path(name).name != name or not path.is_file():
            faults.append(f"{path}: missing")
        elif (size := path.stat().st_size) not in dict(either):
            faults.append(f"{path}: {size} bytes, expected {either[0][0]}")
        elif (size, sha256(path)) not in either:
            faults.append(f"{path}: SHA-256 does not fit, the file was changed or damaged")
    strange = sorted(path for path in folder.glob("*.safetensors") if path.name not in expected and ranks.first)
    return faults + [f"{path}: not of this checkpoint, its manifest does not name it" for path in strange]
