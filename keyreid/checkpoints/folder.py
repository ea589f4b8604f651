"""Checkpoints on disk: folders that exist whole or not at all, verified before they are used.

    RUN/checkpoints/step-00000120/    weights.safetensors, ema.safetensors, training.safetensors and the parts of other
                                      ranks, state.json, manifest.json (size and SHA-256 of each of the others)
    RUN/checkpoints/latest, best      names of such folders

A folder is written under another name, synced to disk and renamed, when all ranks have written their files; then
`latest` and `best` follow. The newest whole folder's state decides what these two name: after a kill at any moment,
`settle` puts them right. What a folder holds fits any number of ranks and any ZeRO stage (saved.py).
"""

import contextlib
import hashlib
import json
import logging
import re
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, astuple, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import save_file

from keyreid.checkpoints.manifest import (
    EMA,
    MANIFEST,
    STATE,
    TRAINING,
    WEIGHTS,
    manifest_text,
    part_name,
    verify,
)
from keyreid.checkpoints.weights_file import WeightsHeader, write_weights
from keyreid.distributed.parts import Part
from keyreid.distributed.ranks import Ranks
from keyreid.errors import CheckpointError
from keyreid.files import replace_bytes, replace_text, sha256, sync

PARTIAL = ".partial"
T = TypeVar("T")
_ALONE = Ranks.alone()

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
    """A rank's part of a run at one step, on the CPU."""

    state: TrainingState
    header: WeightsHeader
    weights: dict[str, torch.Tensor]  # parameters and buffers
    ema: dict[str, torch.Tensor]  # averaged, if the run keeps them
    training: dict[str, torch.Tensor]  # optimizer states and centre tables
    parts: Mapping[str, Mapping[str, Part]] = field(default_factory=dict)  # by kind and name, where one is not whole


def folder_name(step: int) -> str:
    """`step-00000120`."""
    return f"step-{step:08d}"


def save(root: Path, snapshot: Snapshot, ranks: Ranks = _ALONE) -> Path:
    """Write one checkpoint, each rank its files; a collective. What was there before stays as it was if that fails.

    No folder is written over: one of this step can only be another run's.

    Raises:
        CheckpointError: on all ranks, whichever could not write (a full disk, or the like).
    """
    final = root / folder_name(snapshot.state.step)
    partial = final.with_name(final.name + PARTIAL)
    try:
        _together(ranks, final, lambda: _begin(final, partial) if ranks.first else None)
        of_ranks = _together(ranks, final, lambda: _write_own(partial, snapshot, ranks))
        files = dict(sorted((name, about) for written in of_ranks for name, about in written.items()))
        _together(ranks, final, lambda: _finish(final, partial, files) if ranks.first else None)
    except CheckpointError:
        if ranks.first:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    return final


def _together(ranks: Ranks, final: Path, work: Callable[[], T]) -> list[T]:
    """What each rank's work gives, or the same error on all; a collective."""
    try:
        found = work()
    except CheckpointError as error:
        found = error
    except Exception as error:  # also what is unforeseen: the others wait for this rank
        found = CheckpointError(f"{final}: cannot be saved: {error}; the checkpoint before it is whole")
    of_ranks = ranks.from_all(found)
    if failed := [each for each in of_ranks if isinstance(each, CheckpointError)]:
        raise failed[0]
    return of_ranks


def _begin(final: Path, partial: Path) -> None:
    if final.exists():
        raise CheckpointError(f"{final}: is there, and not of this run: move it away, or give the run another name")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)


def _write_own(partial: Path, snapshot: Snapshot, ranks: Ranks) -> dict[str, dict[str, Any]]:
    """This rank's files; gives what the manifest says of them."""
    written = {}
    for kind, tensors in ((WEIGHTS, snapshot.weights), (EMA, snapshot.ema), (TRAINING, snapshot.training)):
        parts = snapshot.parts.get(kind, {})
        if kind == EMA and not tensors and EMA not in snapshot.parts:  # the run keeps none
            continue
        path = partial / part_name(kind, ranks.rank, ranks.world_size)
        if ranks.first and kind != TRAINING:
            write_weights(path, tensors, snapshot.header, ranks.world_size)
        else:
            save_file(tensors, str(path))
        written[path] = {}
        if ranks.world_size > 1:
            own = {name: (value.dtype, parts.get(name) or Part.whole(value.shape)) for name, value in tensors.items()}
            listed = {name: [str(dtype).removeprefix("torch."), *astuple(part)] for name, (dtype, part) in own.items()}
            written[path]["tensors"] = listed
    if ranks.first:
        (partial / STATE).write_bytes(_encoded(snapshot.state))
        written[partial / STATE] = {}
    for path, about in written.items():
        sync(path)
        about |= {"size": path.stat().st_size, "sha256": sha256(path)}
    return {path.name: about for path, about in written.items()}


def _finish(final: Path, partial: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    """All is written: make it the newest checkpoint."""
    replace_text(partial / MANIFEST, manifest_text(files))
    partial.rename(final)
    sync(final.parent)
    replace_text(final.with_name("latest"), final.name)


def put_state(root: Path, state: TrainingState) -> None:
    """Replace the state in the checkpoint of its step. In between, the manifest has both: it is whole at any moment."""
    folder = root / folder_name(state.step)
    before, after = (folder / STATE).read_bytes(), _encoded(state)
    old, new = ({"size": len(text), "sha256": hashlib.sha256(text).hexdigest()} for text in (before, after))
    files = json.loads((folder / MANIFEST).read_text())["files"]
    replace_text(folder / MANIFEST, manifest_text(files | {STATE: new | {"before": old}}))
    replace_bytes(folder / STATE, after)
    replace_text(folder / MANIFEST, manifest_text(files | {STATE: new}))


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


def newest_whole(root: Path, warn=print, ranks: Ranks = _ALONE) -> Path | None:
    """The newest checkpoint of which each rank finds its files whole; others are named through `warn`; a collective.

    Raises:
        CheckpointError: there are checkpoints, but none is whole.
    """
    faults = []
    for name in ranks.from_first([folder.name for folder in reversed(checkpoints(root))]):
        found = [fault for of_rank in ranks.from_all(verify(root / name, ranks)) for fault in of_rank]
        if not found:
            return root / name
        faults += (found := list(dict.fromkeys(found)))
        warn(f"checkpoint {name} is damaged ({'; '.join(found)}): trying the one before")
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
    """Writes checkpoints in a thread while training goes on, one at a time; after a failure nothing more is written.

    Args:
        ranks: that write together; all make one of these, a collective.
    """

    def __init__(self, root: Path, keep: int, ranks: Ranks = _ALONE) -> None:
        self.root, self.keep, self._ranks = root, keep, ranks.apart()
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._last: Future[None] | None = None

    @property
    def error(self) -> BaseException | None:
        """Why the last one could not be written."""
        return self._last.exception() if self._last is not None and self._last.done() else None

    def write(self, new: Snapshot | TrainingState) -> None:
        """Wait for the one before, then start; a failure shows in `error`.

        Args:
            new: a checkpoint, on all ranks; or, on the first, the state alone of one that was saved before it was
                evaluated.
        """
        self._last = self._thread.submit(self._write, new, self._last and self._last.exception())

    def wait(self) -> None:
        """Until what was begun is on disk; a CheckpointError says why it could not be written."""
        if self._last is not None:
            self._last.result()

    def close(self) -> None:
        """Wait, without a word of failures, before the ranks part: they write together."""
        self._thread.shutdown()

    def _write(self, new: Snapshot | TrainingState, failed: CheckpointError | None) -> None:
        try:
            if isinstance(new, Snapshot):
                if failed := next(filter(None, self._ranks.from_all(failed)), None):
                    raise failed
                save(self.root, new, self._ranks)
            elif failed:
                raise failed
            else:
                put_state(self.root, new)
            if self._ranks.first:
                settle(self.root, new.state if isinstance(new, Snapshot) else new, self.keep)
        except CheckpointError:
            raise
        except Exception as error:  # of pruning, or unforeseen: training must hear of it
            raise CheckpointError(f"{self.root}: {type(error).__name__}: {error}") from error


def _encoded(state: TrainingState) -> bytes:
    return json.dumps(asdict(state), indent=1).encode()
