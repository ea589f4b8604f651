"""Checkpoints of several ranks: parts of tensors, who writes and reads what, damages, and a kill of any rank."""

from __future__ import annotations

import itertools
import json
import math
import os
import resource
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from kills import Killer
from training_runs import together

from keyreid.checkpoints import folder as checkpoints
from keyreid.checkpoints import manifest
from keyreid.checkpoints.folder import BackgroundWriter, Snapshot, TrainingState
from keyreid.checkpoints.manifest import EMA, KINDS, TRAINING, WEIGHTS, verify
from keyreid.checkpoints.saved import Saved, read_network, read_tensors
from keyreid.checkpoints.weights_file import WeightsHeader
from keyreid.config import ClipConfig, ModelConfig
from keyreid.distributed import parts
from keyreid.distributed.parts import Held, Part, shared_out
from keyreid.distributed.ranks import Ranks
from keyreid.errors import CheckpointError
from keyreid.files import sha256

HEADER = WeightsHeader(ModelConfig(parts=3), ClipConfig(frames=2), identities=[3, 9], cameras=[1, 4], about={})
SHAPE = (2, 7, 6)
PARTS = [
    Part.whole(SHAPE),
    *(Part.whole(SHAPE).cut(84 * r // 5, 84 * (r + 1) // 5) for r in range(5)),
    *(Part.rows(SHAPE, r, every) for every in (2, 3, 4, 9) for r in range(every)),
    *(Part.rows(SHAPE, r, 2).cut(12 * half, 12 * half + 12) for r in range(2) for half in range(4)),
    Part.rows(SHAPE, 1, 3).cut(5, 20),
    Part.whole(SHAPE).cut(9, 9),
]


def numbers(part: Part) -> list[int]:
    """Which of the whole a part has, in order, one by one."""
    tables = np.arange(math.prod(part.shape)).reshape(part.shape)
    every = tables.ravel() if part.every == 1 else tables[..., part.first :: part.every, :].ravel()
    return every[part.start : part.stop].tolist()


@pytest.mark.parametrize("block", [4, 1000])
def test_what_two_parts_have_in_common_is_copied(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(parts, "_BLOCK", block)
    for own, other in itertools.product(PARTS, PARTS):
        mine, theirs = numbers(own), numbers(other)
        assert (len(mine), own.is_sound) == (len(own), True)
        found = torch.full((len(own),), -1)
        for piece in other.blocks():
            own.fill(found, piece, torch.tensor(numbers(piece), dtype=torch.int64))
        assert found.tolist() == [number if number in theirs else -1 for number in mine], (own, other)
        assert own.meets(other) or not set(mine) & set(theirs)
        assert sum(len(piece) for piece in other.blocks()) == len(other)


@pytest.mark.parametrize(
    "numbers",
    [((4, 3), 0, 13), ((4, 3), 5, 4), ((4, 3), -1, 2), ((4, 3), 0, 6, 2, 2), ((4,), 0, 1, 0, 2), ((4, 3), 0, 1, 0, 0)],
)
def test_no_tensor_has_such_a_part(numbers: tuple) -> None:
    assert not Part(*numbers).is_sound


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_what_ranks_hold_alike_is_saved_once_and_shared_out_evenly(ranks: int) -> None:
    shapes = (3,), (5, 9), (4,), (), (11, 2)
    own = [shared_out(Held(Part.whole(shape), torch.Tensor, rank, ranks) for shape in shapes) for rank in range(ranks)]
    for shape, *of_ranks in zip(shapes, *own, strict=True):
        assert [number for part in of_ranks for number in numbers(part)] == list(range(math.prod(shape)))
    sizes = [sum(map(len, of_rank)) for of_rank in own]
    assert max(sizes) - min(sizes) <= 1


def state_of(rank: int, ranks: int) -> dict[str, dict[str, Held]]:
    """What a rank holds: tensors that all have, rows of tables in two groups if there are four, and a run."""
    size = 2 if ranks == 4 else ranks
    whole = {
        "shared": torch.arange(90.0).view(9, 10),
        "small": torch.tensor(7),
        "classes": torch.arange(84.0).view(SHAPE) * 3,
        "run": torch.arange(50.0) * 5,
    }
    rows = Part.rows(SHAPE, rank % size, size)
    run = Part.whole((50,)).cut(50 * rank // ranks, 50 * (rank + 1) // ranks)
    held = {
        "shared": Held(Part.whole((9, 10)), whole["shared"].clone, rank, ranks),
        "small": Held(Part.whole(()).cut(0, rank == 0), whole["small"].clone),
        "classes": Held(rows, lambda: whole["classes"][:, rank % size :: size], rank // size, ranks // size),
        "run": Held(run, lambda: whole["run"][run.start : run.stop]),
    }
    return {WEIGHTS: held, EMA: {}, TRAINING: {f"{name}/x": each for name, each in held.items()}}


def taken(rank: int, ranks: int, state: TrainingState) -> Snapshot:
    """As training/snapshot.py takes it."""
    held = [(kind, name, each) for kind, named in state_of(rank, ranks).items() for name, each in named.items()]
    tensors, own = {kind: {} for kind in KINDS}, {kind: {} for kind in KINDS[::2]}
    for (kind, name, each), part in zip(held, shared_out(each for *_, each in held), strict=True):
        if len(part):
            values = each.get().flatten()[part.start - each.part.start : part.stop - each.part.start].clone()
            tensors[kind][name] = values.view(part.shape) if part.is_whole else values
            own[kind] |= {} if part.is_whole else {name: part}
    return Snapshot(state, HEADER, *(tensors[kind] for kind in KINDS), own)


def place() -> Ranks:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    return Ranks(rank, ranks, rank, torch.device("cpu"), dist.group.WORLD)


def write(root: Path) -> None:
    ranks = place()
    checkpoints.save(root, taken(ranks.rank, ranks.world_size, TrainingState(step=1)), ranks)


def read(root: Path) -> None:
    """Each rank opens its files only, and gets what it holds."""
    parts._BLOCK, ranks, opened = 16, place(), set()
    manifest.sha256 = lambda path: opened.add(path.name) or sha256(path)
    folder = checkpoints.newest_whole(root, ranks=ranks)
    found, broadcasts, broadcast = Saved(folder, ranks), [], dist.broadcast
    dist.broadcast = lambda *given: broadcasts.append(given) or broadcast(*given)
    for kind, held in state_of(ranks.rank, ranks.world_size).items():
        assert found.shapes(kind) == {name: each.part.shape for name, each in held.items()}
        for name, values in found.read(kind, {name: each.part for name, each in held.items()}):
            expected = held[name].get().flatten()
            assert torch.equal(values, expected[: len(values)]) and values.dtype == expected.dtype, name
    assert bool(broadcasts) == (ranks.world_size > 1)
    if len(manifest.read_manifest(folder)) > 3:  # several wrote it
        assert set(found._open) == opened - {"state.json"}
        read = sum((folder / name).stat().st_size for name in opened)
        whole = sum(path.stat().st_size for path in folder.iterdir())
        assert read < (1 / ranks.world_size + 0.25) * whole  # most of these small files are headers


@pytest.mark.parametrize(
    ("writers", "readers"),
    [
        (2, (2, 3)),
        (1, (2,)),
        pytest.param(4, (4, 1, 2), marks=pytest.mark.slow),
        pytest.param(3, (2, 4), marks=pytest.mark.slow),
    ],
)
def test_other_ranks_read_what_some_wrote(tmp_path: Path, writers: int, readers: tuple[int, ...]) -> None:
    together(write, writers, tmp_path)
    (folder,) = checkpoints.checkpoints(tmp_path)
    assert verify(folder) == []
    held = state_of(0, 1)
    for kind in KINDS:
        assert {name: value.tolist() for name, value in read_tensors(folder, kind).items()} == {
            name: each.get().tolist() for name, each in held[kind].items()
        }
    assert read_network(folder / WEIGHTS, without=["classes"]).keys() == held[WEIGHTS].keys() - {"classes"}
    for ranks in readers:
        together(read, ranks, tmp_path)


def test_nothing_travels_to_ranks_that_find_their_own(tmp_path: Path) -> None:
    together(write, 2, tmp_path)
    together(read_own, 2, tmp_path)


def read_own(root: Path) -> None:
    ranks, broadcasts, broadcast = place(), [], dist.broadcast
    found = Saved(root / "step-00000001", ranks)
    dist.broadcast = lambda *given: broadcasts.append(given) or broadcast(*given)
    held = state_of(ranks.rank, 2)[TRAINING]
    for name, values in found.read(TRAINING, {name: held[name].part for name in ("classes/x", "run/x", "small/x")}):
        assert torch.equal(values, held[name].get().flatten()[: len(values)])
    assert broadcasts == []


@pytest.fixture
def of_two(tmp_path: Path) -> Path:
    """A checkpoint of two ranks, and an older one."""
    together(write, 2, tmp_path)
    folder = tmp_path / "step-00000001"
    shutil.copytree(folder, tmp_path / "step-00000000")
    return folder


def choose(root: Path) -> None:
    warnings: list[str] = []
    assert checkpoints.newest_whole(root, warnings.append, place()) == root / "step-00000000"
    assert len(warnings) == 1 and "training-00001-of-00002.safetensors: SHA-256 does not fit" in warnings[0]


def test_a_damage_that_one_rank_finds_sends_all_to_the_one_before(of_two: Path) -> None:
    path = of_two / "training-00001-of-00002.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    together(choose, 2, of_two.parent)
    assert [fault.split(":")[0] for fault in verify(of_two)] == [str(path)]


def test_a_part_alone_and_forged_parts_are_refused(of_two: Path, tmp_path: Path) -> None:
    shutil.copy(of_two / WEIGHTS, tmp_path / "alone.safetensors")
    with pytest.raises(CheckpointError, match=r"alone\.safetensors: one of 2 parts, and the others are not beside it"):
        read_network(tmp_path / "alone.safetensors")
    files = json.loads((of_two / manifest.MANIFEST).read_text())["files"]
    for change in (
        lambda tensors: tensors["shared"].__setitem__(3, 9999),
        lambda tensors: tensors["shared"].__setitem__(0, "load"),
        lambda tensors: tensors["classes"].__setitem__(5, 0),
        lambda tensors: tensors.pop("classes"),
        lambda tensors: tensors.__setitem__("shared", 3),
        lambda tensors: tensors["shared"].__setitem__(0, "int64"),
    ):
        forged = json.loads(json.dumps(files))
        change(forged[WEIGHTS]["tensors"])
        (of_two / manifest.MANIFEST).write_text(manifest.manifest_text(forged))
        with pytest.raises(CheckpointError, match="step-00000001"):
            read_tensors(of_two, WEIGHTS)


def fill_one_disk(root: Path) -> None:
    """The second rank cannot write: both say so, and go on saying so."""
    ranks, before = place(), resource.getrlimit(resource.RLIMIT_FSIZE)
    writer = BackgroundWriter(root, 1, ranks)
    new = taken(ranks.rank, 2, TrainingState(step=2))
    if not ranks.first:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    for _ in range(2):
        writer.write(new)
        with pytest.raises(CheckpointError, match=r"step-00000002: cannot be saved: .*File too large"):
            writer.wait()
    writer.close()
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_where_one_rank_cannot_write_none_has_written(of_two: Path) -> None:
    together(fill_one_disk, 2, of_two.parent)
    assert sorted(path.name for path in of_two.parent.iterdir()) == ["latest", "step-00000000", "step-00000001"]


def train(run: Path, victim: int | None, at: int | None, torn: bool) -> None:
    """Two saves and what is pruned after them, on each rank; the victim is killed at its `at`-th file operation."""
    os.fsync = lambda _: None
    ranks, root = place(), run / "checkpoints"
    killer = Killer(run, at if ranks.rank == victim else None, torn)
    writer = BackgroundWriter(root, 1, ranks)
    folder = checkpoints.newest_whole(root, ranks=ranks)
    state = checkpoints.read_state(folder) if folder else TrainingState()
    if folder and ranks.first:
        checkpoints.settle(root, state, 1)
    for step in range(state.step + 1, 3):
        state = replace(state, step=step)
        writer.write(taken(ranks.rank, 2, state))
    if victim is None:
        writer.wait()
        (run.parent / f"count-{ranks.rank}").write_text(str(killer.done))
    writer.close()


def ending(run: Path) -> dict[str, bytes]:
    return {str(path.relative_to(run)): path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("kills", [2, pytest.param(1000, marks=pytest.mark.slow)])
def test_a_kill_of_any_rank_at_any_file_operation_changes_nothing(tmp_path: Path, kills: int) -> None:
    whole = tmp_path / "whole" / "run"
    together(train, 2, whole, None, None, False)
    expected = ending(whole)
    assert expected["checkpoints/latest"] == b"step-00000002" and len(expected) == 7
    for victim in (0, 1):
        operations = int((whole.parent / f"count-{victim}").read_text())
        assert operations >= 8
        for at in range(operations, 0, -max(operations // kills, 1)):
            run = tmp_path / f"{victim}-{at}" / "run"
            ended = [0, 0]
            ended[victim] = -9
            together(train, 2, run, victim, at, at % 2 > 0, ending=ended)
            assert all(verify(folder) == [] for folder in checkpoints.checkpoints(run / "checkpoints"))
            together(train, 2, run, None, None, False)
            assert ending(run) == expected, f"rank {victim} killed at operation {at} of {operations}"
            shutil.rmtree(run)
