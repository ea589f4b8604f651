"""Checkpoint folders: whole or absent, verified, pruned."""

import random
import resource
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from keyreid.checkpoints import folder as checkpoints
from keyreid.checkpoints import manifest
from keyreid.checkpoints.folder import BackgroundWriter, Snapshot, TrainingState
from keyreid.checkpoints.run_folder import find_weights
from keyreid.checkpoints.saved import read_tensors
from keyreid.checkpoints.weights_file import WeightsHeader, read_header, read_weights
from keyreid.cli import app
from keyreid.config import ClipConfig, ModelConfig
from keyreid.errors import CheckpointError

HEADER = WeightsHeader(ModelConfig(parts=3), ClipConfig(frames=2), identities=[3, 9], cameras=[1, 4], about={"a": "b"})


def snapshot(step, **state):
    value = torch.full((3, 2), float(step))
    return Snapshot(TrainingState(step=step, **state), HEADER, {"w": value}, {"w": value / 2}, {"w/momentum": value})


def save_all(root, *snapshots, keep=2):
    writer = BackgroundWriter(root, keep)
    for taken in snapshots:
        writer.write(taken)
    writer.wait()


def test_what_is_read_is_what_was_saved(tmp_path):
    folder = checkpoints.save(tmp_path, snapshot(7, best_score=0.5, loss_scale={"cur_scale": 4.0}))
    assert checkpoints.newest_whole(tmp_path) == folder == checkpoints.named(tmp_path, "latest")
    assert checkpoints.read_state(folder) == snapshot(7, best_score=0.5, loss_scale={"cur_scale": 4.0}).state
    assert torch.equal(read_tensors(folder, manifest.EMA)["w"], torch.full((3, 2), 3.5))
    assert read_header(folder / manifest.WEIGHTS) == HEADER
    assert torch.equal(read_weights(folder / manifest.WEIGHTS)["w"], torch.full((3, 2), 7.0))


def test_newest_best_and_marked_ones_are_kept(tmp_path):
    save_all(
        tmp_path,
        snapshot(10, keep=True),
        snapshot(20, best_score=0.9, best_step=20),
        *(snapshot(step, best_score=0.9, best_step=20) for step in (30, 40, 50)),
    )
    kept = [folder.name for folder in checkpoints.checkpoints(tmp_path)]
    assert kept == [checkpoints.folder_name(step) for step in (10, 20, 40, 50)]
    assert checkpoints.named(tmp_path, "best").name == checkpoints.folder_name(20)
    (tmp_path / "best").write_bytes(b"\xff")  # the pointer is lost: the best one is still known
    assert checkpoints.folder_name(20) not in [folder.name for folder in checkpoints.prune(tmp_path, 1)]


def test_every_single_flipped_byte_is_found_and_named(tmp_path):
    save_all(tmp_path, snapshot(1), snapshot(2))
    folder = checkpoints.checkpoints(tmp_path)[-1]
    draw = random.Random(0)
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        for place in draw.sample(range(len(content)), min(len(content), 60)):
            damaged = bytearray(content)
            damaged[place] ^= 1 << draw.randrange(8)
            path.write_bytes(damaged)
            assert any(path.name in fault for fault in manifest.verify(folder)), (path.name, place)
        warnings = []
        assert checkpoints.newest_whole(tmp_path, warnings.append) == checkpoints.checkpoints(tmp_path)[0]
        assert path.name in warnings[0]
        path.write_bytes(content[:-1])
        assert manifest.verify(folder)
        path.unlink()
        assert manifest.verify(folder)
        path.write_bytes(content)
    assert manifest.verify(folder) == []


def test_no_whole_checkpoint_is_an_error_not_a_new_start(tmp_path):
    assert checkpoints.newest_whole(tmp_path) is None
    folder = checkpoints.save(tmp_path, snapshot(1))
    (folder / manifest.STATE).write_text("{}")
    with pytest.raises(CheckpointError, match="no checkpoint is whole"):
        checkpoints.newest_whole(tmp_path)


def test_a_manifest_cannot_point_out_of_its_folder(tmp_path):
    folder = checkpoints.save(tmp_path, snapshot(1))
    (tmp_path / "outside").write_text("secret")
    text = (folder / manifest.MANIFEST).read_text().replace(manifest.STATE, "../outside")
    (folder / manifest.MANIFEST).write_text(text)
    assert manifest.verify(folder)


@pytest.mark.parametrize("text", ["../..", "step-00000001/..", "/tmp", ".", "", "step-1.partial", "\0", "latest"])
def test_best_and_latest_cannot_lead_out_of_their_folder(tmp_path, text):
    save_all(tmp_path, snapshot(1, best_score=0.9, best_step=1), snapshot(2, best_score=0.9, best_step=1), keep=5)
    for name in ("best", "latest"):
        (tmp_path / name).write_text(text)
        with pytest.raises(CheckpointError, match=rf"{name}: .* is no checkpoint of this folder"):
            checkpoints.named(tmp_path, name)
    with pytest.raises(CheckpointError, match=r"best: .* is no checkpoint of this folder"):
        find_weights(tmp_path)
    assert checkpoints.prune(tmp_path, 1) == []  # the best one is known from the states
    listed = CliRunner().invoke(app, ["checkpoints", str(tmp_path)])
    assert "step-00000002" in listed.output and "latest" not in listed.output
    assert isinstance(listed.exception, CheckpointError) and "/best: " in str(listed.exception)


def test_a_best_that_is_not_there_is_said(tmp_path, caplog):
    save_all(tmp_path, snapshot(1), snapshot(2))
    (tmp_path / "best").write_text("step-00000007")
    assert checkpoints.named(tmp_path, "best") is None
    assert "best names step-00000007, which is not there" in caplog.text
    assert find_weights(tmp_path) == tmp_path / "step-00000002" / manifest.EMA


def test_a_write_that_fails_leaves_the_one_before(tmp_path):
    checkpoints.save(tmp_path, snapshot(1))
    big = replace(snapshot(2), training={"momentum": torch.zeros(100_000)})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))  # as a full disk: no file grows beyond this
    try:
        writer = BackgroundWriter(tmp_path, keep=1)
        writer.write(big)
        with pytest.raises(CheckpointError, match=r"step-00000002: cannot be saved: .*File too large"):
            writer.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [folder.name for folder in checkpoints.checkpoints(tmp_path)] == [checkpoints.folder_name(1)]
    assert checkpoints.newest_whole(tmp_path).name == checkpoints.folder_name(1)
    assert not list(tmp_path.glob("*.partial"))
