"""Checkpoints on disk: folders that exist whole or not at all, verified before they are used.

    RUN/checkpoints/step-00000120/    weights.safetensors, ema.safetensors, training.safetensors, state.json,
                                      manifest.json (size and SHA-256 of each of the others)
    RUN/checkpoints/latest, best      names of such folders

A folder is written under another name, synced to disk and renamed; then `latest` and `best` follow. The newest whole
folder's state decides what these two name: after a kill at any moment, `settle` puts them right. What a folder holds
fits any number of ranks and any ZeRO stage (see keyreid/training/snapshot.py).
"""

import contextlib
import hashlib
import json
import logging
import re
import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from keyreid.checkpoints.weights_file import WeightsHeader, read_weights, write_weights
from keyreid.errors import CheckpointError
from keyreid.files import replace_bytes, replace_text, sha256, sync

WEIGHTS, EMA, TRAINING = "weights.safetensors", "ema.safetensors", "training.safetensors"
STATE, MANIFEST = "state.json", "manifest.json"
PARTIAL = ".partial"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingState:
    """Where a run stands. Sample order, augmentations and stochastic depth follow from `step` alone."""

    step: int = 0  # optimizer steps taken, over all epochs
    steps_per_epoch: int = 0
    best_score: float | None = None  # best evaluation so far
    best_step: int | None = None
    evaluated_step: int | None = None  # of the newest evaluation; a run stopped just before one does it on resuming
    bad_steps: int = 0  # that were not applied because the loss was not finite
    loss_scale: Mapping[str, float] = field(default_factory=dict)  # state of the fp16 loss scaler
    keep: bool = False  # for ever (`training.keep_every_epochs`)
    recipe: Mapping[str, Any] = field(default_factory=dict)  # what makes the run: see keyreid/training/recipe.py

    def evaluated(self, score: float) -> "TrainingState":
        """The state after an evaluation."""
        state = replace(self, evaluated_step=self.step)
        better = self.best_score is None or score > self.best_score
        return replace(state, best_score=score, best_step=self.step) if better else state


@dataclass(frozen=True)
class Snapshot:
    """All of a run at one step, on the CPU of the first rank."""

    state: TrainingState
    header: WeightsHeader
    weights: dict[str, torch.Tensor]  # parameters and buffers
    ema: dict[str, torch.Tensor]  # averaged, if the run keeps them
    training: dict[str, torch.Tensor]  # optimizer states and centre tables


def folder_name(step: int) -> str:
    """`step-00000120`."""
    return f"step-{step:08d}"


def save(root: Path, snapshot: Snapshot) -> Path:
    """Write one checkpoint; what was there before stays as it was if a full disk or the like raises CheckpointError.

    No folder is written over: one of this step can only be another run's.
    """
    final = root / folder_name(snapshot.state.step)
    partial = final.with_name(final.name + PARTIAL)
    if final.exists():
        raise CheckpointError(f"{final}: is there, and not of this run: move it away, or give the run another name")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        write_weights(partial / WEIGHTS, snapshot.weights, snapshot.header)
        if snapshot.ema:
            write_weights(partial / EMA, snapshot.ema, snapshot.header)
        save_file(snapshot.training, str(partial / TRAINING))
        (partial / STATE).write_bytes(_encoded(snapshot.state))
        files = {}
        for path in sorted(partial.iterdir()):
            sync(path)
            files[path.name] = {"size": path.stat().st_size, "sha256": sha256(path)}
        replace_text(partial / MANIFEST, _manifest_text(files))
        partial.rename(final)
        sync(root)
        replace_text(root / "latest", final.name)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(f"{final}: cannot be saved: {error}; the checkpoint before it is whole") from error
    return final


def put_state(root: Path, state: TrainingState) -> None:
    """Replace the state in the checkpoint of its step. In between, the manifest has both: it is whole at any moment."""
    folder = root / folder_name(state.step)
    before, after = (folder / STATE).read_bytes(), _encoded(state)
    old, new = ({"size": len(text), "sha256": hashlib.sha256(text).hexdigest()} for text in (before, after))
    files = json.loads((folder / MANIFEST).read_text())["files"]
    replace_text(folder / MANIFEST, _manifest_text(files | {STATE: new | {"before": old}}))
    replace_bytes(folder / STATE, after)
    replace_text(folder / MANIFEST, _manifest_text(files | {STATE: new}))


def settle(root: Path, state: TrainingState, keep: int) -> None:
    """What follows from the newest checkpoint, of `state`: what `latest` and `best` name, and what is pruned."""
    for name, step in (("latest", state.step), ("best", state.best_step)):
        if step is None:
            (root / name).unlink(missing_ok=True)
        elif not (root / name).is_file() or (root / name).read_text(errors="replace") != folder_name(step):
            replace_text(root / name, folder_name(step))
    prune(root, keep)


def named(root: Path, name: str) -> Path | None:
    """The folder that `latest` or `best` names; None where there is no such file, or (with a warning) no such folder.

    Raises:
        CheckpointError: the file holds anything but the name of a checkpoint beside it.
    """
    try:
        step = (root / name).read_text(errors="replace").strip()
    except OSError:
        return None
    if not re.fullmatch(r"step-\d+", step):
        raise CheckpointError(f"{root / name}: {step[:80]!r} is no checkpoint of this folder; remove or correct it")
    if (root / step).is_dir():
        return root / step
    log.warning("%s names %s, which is not there", root / name, step)
    return None


def checkpoints(root: Path) -> list[Path]:
    """All checkpoint folders, oldest first; without those that were never finished."""
    return sorted(path for path in root.glob("step-*") if re.fullmatch(r"step-\d+", path.name) and path.is_dir())


def verify(folder: Path) -> list[str]:
    """What is wrong with a checkpoint, one line for each file; empty when it is whole."""
    try:
        text = (folder / MANIFEST).read_text()
        files = json.loads(text)["files"]
        pairs = {name: (entry, entry.get("before", entry)) for name, entry in files.items()}  # see put_state
        expected = {name: [(each["size"], each["sha256"]) for each in pair] for name, pair in pairs.items()}
        if text != _manifest_text(files):
            return [f"{folder / MANIFEST}: its own SHA-256 does not fit, the file was changed or damaged"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return [f"{folder / MANIFEST}: {error}"]
    faults = []
    for name, either in expected.items():
        path = folder / name
        if Path(name).name != name or not path.is_file():
            faults.append(f"{path}: missing")
        elif (size := path.stat().st_size) not in dict(either):
            faults.append(f"{path}: {size} bytes, expected {either[0][0]}")
        elif (size, sha256(path)) not in either:
            faults.append(f"{path}: SHA-256 does not fit, the file was changed or damaged")
    strange = sorted(path for path in folder.glob("*.safetensors") if path.name not in expected)
    return faults + [f"{path}: not of this checkpoint, its manifest does not name it" for path in strange]


def newest_whole(root: Path, warn=print) -> Path | None:
    """The newest checkpoint that verifies; those that do not are named through `warn`.

    Raises:
        CheckpointError: there are checkpoints, but none is whole.
    """
    faults = []
    for folder in reversed(checkpoints(root)):
        found = verify(folder)
        if not found:
            return folder
        faults += found
        warn(f"checkpoint {folder.name} is damaged ({'; '.join(found)}): trying the one before")
    if faults:
        raise CheckpointError(f"{root}: no checkpoint is whole: {'; '.join(faults)}")
    return None


def read_state(folder: Path) -> TrainingState:
    """The state of a verified checkpoint."""
    try:
        values = json.loads((folder / STATE).read_text())
        if unknown := sorted(set(values) - {each.name for each in fields(TrainingState)}):
            raise ValueError(f"{', '.join(unknown)}: of a newer version of keyreid; resume with that one")
        return TrainingState(**values)
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{folder / STATE}: {error}") from None


def read_tensors(folder: Path, name: str) -> dict[str, torch.Tensor]:
    """WEIGHTS, EMA or TRAINING of a checkpoint; empty where it has none."""
    return read_weights(folder / name) if (folder / name).exists() else {}


def prune(root: Path, keep: int) -> list[Path]:
    """Remove all but the newest `keep`, the best, and those kept for ever; gives what was removed.

    The best is the one that `best` names, and the one that the newest state remembers, should that file be lost.
    """
    folders = checkpoints(root)
    kept, best_step = set(folders[-keep:]), None
    for folder in folders:
        with contextlib.suppress(CheckpointError):  # damaged: good for nothing
            state = read_state(folder)
            best_step = state.best_step
            if state.keep:
                kept.add(folder)
    if best_step is not None:
        kept.add(root / folder_name(best_step))
    try:
        kept.add(named(root, "best"))
    except CheckpointError as error:
        log.warning("%s", error)
    removed = [folder for folder in folders if folder not in kept]
    for leftover in root.glob(f"step-*{PARTIAL}"):
        shutil.rmtree(leftover, ignore_errors=True)
    for folder in removed:  # whole or absent to the last
        shutil.rmtree(folder.rename(folder.with_name(folder.name + PARTIAL)))
    for leftover in root.rglob(f".*{PARTIAL}"):
        leftover.unlink(missing_ok=True)
    return removed


class BackgroundWriter:
    """Writes checkpoints in a thread while training goes on, one at a time; after a failure nothing more is written."""

    def __init__(self, root: Path, keep: int) -> None:
        self.root, self.keep = root, keep
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._last: Future[None] | None = None

    @property
    def error(self) -> BaseException | None:
        """Why the last one could not be written."""
        return self._last.exception() if self._last is not None and self._last.done() else None

    def write(self, new: Snapshot | TrainingState) -> None:
        """Wait for the one before, then start; a failure shows in `error`.

        Args:
            new: a checkpoint; or the state alone of one that was saved before it was evaluated.
        """
        if self._last is None or self._last.exception() is None:
            self._last = self._thread.submit(self._write, new)

    def wait(self) -> None:
        """Until what was begun is on disk; a CheckpointError says why it could not be written."""
        if self._last is not None:
            self._last.result()

    def _write(self, new: Snapshot | TrainingState) -> None:
        state = new.state if isinstance(new, Snapshot) else new
        try:
            save(self.root, new) if isinstance(new, Snapshot) else put_state(self.root, new)
            settle(self.root, state, self.keep)
        except CheckpointError:
            raise
        except Exception as error:  # of pruning, or unforeseen: training must hear of it
            raise CheckpointError(f"{self.root}: {type(error).__name__}: {error}") from error


def _encoded(state: TrainingState) -> bytes:
    return json.dumps(asdict(state), indent=1).encode()


def _manifest_text(files: object) -> str:
    """The only text that a manifest of these files can have, so that a change of any byte shows."""
    own = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
    return json.dumps({"files": files, "sha256": own}, indent=1)
