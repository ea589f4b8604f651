"""Both readers deliver the right pictures and guidance, the same ones, from any step, and say what cannot be read."""

from __future__ import annotations

import dataclasses
import sys
import threading
import zlib
from itertools import islice
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from packed import HEIGHT, WIDTH, make_config, make_dataset, pack_dataset, read_code, read_named

from keyreid.datasets.tracklet import Dataset
from keyreid.errors import ConfigError, DataError
from keyreid.guidance import named
from keyreid.pose.heatmaps import render_heatmaps
from keyreid.pose.parts import flip_permutation
from keyreid.shards import open_reader
from keyreid.shards.batch import ClipBatch, ClipPlan
from keyreid.shards.fetch import Faults
from keyreid.shards.members import picture_member
from keyreid.shards.plan import TrainingPlan, evaluation_clips
from keyreid.shards.shard_set import ShardSet

READERS = ["dali", "plain"]


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> tuple[Dataset, ShardSet]:
    root = tmp_path_factory.mktemp("readers")
    dataset = make_dataset(root / "source", identities=8, tracklets=3)
    return dataset, pack_dataset(dataset, root / "source", root / "shards")


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> ShardSet:
    """Pictures of another size than the clip's."""
    root = tmp_path_factory.mktemp("large")
    dataset = make_dataset(root / "source", identities=4, tracklets=2, size=(50, 90))
    return pack_dataset(dataset, root / "source", root / "shards")


def planned(shards: ShardSet, config, seed: int = 3) -> TrainingPlan:
    return TrainingPlan(shards, config.data, config.clip, seed)


def read(shards: ShardSet, config, batches, workers: int | None = None) -> list[ClipBatch]:
    reader = open_reader(shards, iter(batches), config, workers=workers)
    try:
        return list(reader)
    finally:
        reader.close()


def assert_same(one: ClipBatch, other: ClipBatch, tolerance: int = 0) -> None:
    assert one.keys == other.keys
    for name in ("guidance", "erase", "visibility", "labels", "identities", "cameras", "tracklets"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    assert (one.images.int() - other.images.int()).abs().max() <= tolerance


def assert_right(batch: ClipBatch, clips: list[ClipPlan], shards: ShardSet) -> int:
    """Every picture is the frame that the plan names, at its label; returns how many were checked."""
    images = batch.images.numpy()
    for row, clip in enumerate(clips):
        record = shards.tracklets[clip.tracklet]
        assert batch.keys[row] == record.key
        assert batch.labels[row] == clip.label
        assert batch.identities[row] == record.identity
        assert batch.cameras[row] == record.camera - 1
        for number, frame in enumerate(clip.frames):
            code = read_code(images[row, number], bool(clip.flip[number]), clip.crop[number])
            assert code == 64 * clip.tracklet + frame, (batch.keys[row], frame)
    return images.shape[0] * images.shape[1]


@pytest.mark.slow
@pytest.mark.parametrize("reader", READERS)
def test_every_sample_is_the_right_one_for_50_epochs_with_resumes(packed, reader):
    """The trap of resetting an iterator each epoch delivered wrong pictures in silence."""
    _, shards = packed
    config = make_config(shards.location, data__reader=reader)
    plan = planned(shards, config)
    total, done, checked = 50 * plan.steps_per_epoch, 0, 0
    for part in np.diff([0, *np.sort(np.random.default_rng(0).choice(np.arange(1, total), 3, False)), total]):
        epoch, step = divmod(done, plan.steps_per_epoch)
        batches = list(islice(plan.batches(epoch, step), int(part)))
        for batch, clips in zip(read(shards, config, batches), batches, strict=True):
            checked += assert_right(batch, clips, shards)
        done += int(part)
    assert checked == total * plan.batch_size * config.clip.frames


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("reader", READERS)
def test_any_number_of_ranks_and_workers_gives_the_same_batches(packed, reader):
    _, shards = packed
    config = make_config(shards.location, data__reader=reader)
    plan = planned(shards, config)
    reference = read(shards, make_config(shards.location), islice(plan.batches(0, 1), 4), workers=0)
    for world_size, workers in ((1, 4), (2, 2), (4, 1)):
        ranks = [
            read(shards, config, islice(plan.batches(0, 1, rank, world_size), 4), workers) for rank in range(world_size)
        ]
        for parts, whole in zip(zip(*ranks, strict=True), reference, strict=True):
            share = len(whole) // world_size
            for rank, part in enumerate(parts):
                assert_same(part, whole[rank * share : (rank + 1) * share])


def test_both_readers_give_the_same_after_a_resume_at_any_step(packed):
    _, shards = packed
    configs = {reader: make_config(shards.location, data__reader=reader) for reader in ("dali", "plain")}
    plan = planned(shards, configs["plain"])
    whole = read(shards, configs["dali"], islice(plan.batches(0, 0), 9))
    for done in (2, plan.steps_per_epoch, 7):
        epoch, step = divmod(done, plan.steps_per_epoch)
        for config in configs.values():
            resumed = read(shards, config, islice(planned(shards, config).batches(epoch, step), 2))
            for one, other in zip(resumed, whole[done : done + 2], strict=True):
                assert_same(one, other)


@pytest.mark.parametrize("guidance_from", ["heatmaps", "keypoints"])
@pytest.mark.parametrize(("guidance", "parts"), [("aligned", 6), ("aligned", 4), ("released", 6), ("released", 3)])
def test_readers_agree_in_every_mode(large, guidance, parts, guidance_from):
    overrides = {"model__guidance": guidance, "model__parts": parts, "data__guidance_from": guidance_from}
    batches = None
    results = []
    for reader in ("dali", "plain"):
        config = make_config(large.location, data__reader=reader, **overrides)
        batches = batches or list(islice(planned(large, config).batches(0, 0), 2))
        results.append(read(large, config, batches))
    for one, other in zip(*results, strict=True):
        assert one.guidance.shape == (4, 4, parts, 4, 2)
        assert_same(one, other, tolerance=1)  # bicubic resampling rounds differently
        assert (one.images != other.images).float().mean() < 0.25


@pytest.mark.parametrize("reader", READERS)
def test_guidance_is_the_heatmap_after_flip_crop_and_erasure(packed, reader):
    """Against the plain way: draw, mirror, pad, crop, erase, average."""
    dataset, shards = packed
    config = make_config(shards.location, data__reader=reader)
    clips = planned(shards, config).step(0, 0)
    assert any(clip.erase.any() for clip in clips)
    for mode in ("aligned", "released"):
        config = make_config(shards.location, data__reader=reader, model__guidance=mode)
        (batch,) = read(shards, config, [clips])
        for row, clip in enumerate(clips):
            visible = np.zeros(6)
            for number, frame in enumerate(clip.frames):
                picture = np.repeat(np.repeat(shards.heatmaps(clip.tracklet, frame) / 255, 2, 1), 2, 2)  # 128 x 64
                picture = picture.reshape(6, HEIGHT, 2, WIDTH, 2).mean((2, 4))
                seen = shards.tracklets[clip.tracklet].visible[frame]
                if clip.flip[number]:
                    picture = picture[:, :, ::-1]
                    if mode == "aligned":
                        picture, seen = picture[flip_permutation(6)], seen[flip_permutation(6)]
                visible += seen / 4
                padded = np.pad(picture, ((0, 0), (3, 3), (3, 3)))
                top, left = clip.crop[number] + 3
                picture = padded[:, top : top + HEIGHT, left : left + WIDTH].copy()
                top, left, height, width = clip.erase[number]
                picture[:, top : top + height, left : left + width] = 0
                expected = picture.reshape(6, 4, 16, 2, 16).mean((2, 4))
                np.testing.assert_allclose(batch.guidance[row, number].numpy(), expected, atol=1e-6)
            np.testing.assert_allclose(batch.visibility[row].numpy(), visible, atol=1e-6)
    assert dataset.tracklets[0].keypoints is not None


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("mode", ["aligned", "released"])
def test_visibility_changes_sides_with_a_flip(tmp_path, reader, mode):
    """A left arm that nobody sees is the right one of a flipped frame; not so in the published code."""
    dataset = make_dataset(tmp_path / "source", identities=4, tracklets=2)
    for record in dataset.tracklets:
        record.keypoints[..., 2] = 1
        record.keypoints[:, [7, 9], 2] = 0
    shards = pack_dataset(dataset, tmp_path / "source", tmp_path / "shards")
    config = make_config(shards.location, data__reader=reader, model__guidance=mode)
    clips = planned(shards, config).step(0, 0)
    (batch,) = read(shards, config, [clips])
    flips = np.array([clip.flip.mean() for clip in clips])
    assert flips.max() > 0
    assert flips.min() < 1
    assert (batch.visibility[:, [0, 1, 4, 5]] == 1).all()
    left, right = batch.visibility[:, 2].numpy(), batch.visibility[:, 3].numpy()
    np.testing.assert_allclose(left, flips if mode == "aligned" else 0 * flips)
    np.testing.assert_allclose(right, 1 - flips if mode == "aligned" else 1 + 0 * flips)


def test_guidance_from_keypoints_is_the_published_gaussian(large):
    config = make_config(large.location, data__guidance_from="keypoints")
    clips = evaluation_clips(large, [0], 4)[:1]
    (batch,) = read(large, config, [clips], workers=0)
    scaled = large.keypoints(0)[clips[0].frames] * np.array([WIDTH / 50, HEIGHT / 90, 1], np.float32)
    expected = render_heatmaps(scaled, WIDTH, HEIGHT).reshape(4, 6, 4, 16, 2, 16).mean((3, 5))
    np.testing.assert_allclose(batch.guidance[0].numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("reader", READERS)
def test_evaluation_streams_every_frame_of_whole_tracklets_in_order(packed, reader):
    _, shards = packed
    config = make_config(shards.location, data__reader=reader)
    positions = np.concatenate([shards.select("query"), shards.select("gallery")])
    clips = evaluation_clips(shards, positions, 4, mode=named("released"))
    batches = [clips[start : start + 5] for start in range(0, len(clips), 5)]
    results = read(shards, config, batches)
    assert [len(batch) for batch in results] == [len(batch) for batch in batches]
    for batch, chosen in zip(results, batches, strict=True):
        assert_right(batch, chosen, shards)
        for row, clip in enumerate(chosen):
            assert not batch.guidance[row, torch.from_numpy(clip.blank)].any()
            assert not batch.erased[row].any()
            seen = shards.tracklets[clip.tracklet].visible[clip.frames] & ~clip.blank[:, None]
            np.testing.assert_allclose(batch.visibility[row].numpy(), seen.mean(0))


@pytest.mark.parametrize("reader", READERS)
def test_clips_of_other_lengths_and_lists_longer_than_one_run(packed, reader, monkeypatch):
    _, shards = packed
    config = make_config(shards.location, data__reader=reader)
    if reader == "dali":
        monkeypatch.setattr("keyreid.shards.dali.MAX_FRAMES", 8)
    batches = [evaluation_clips(shards, range(3), frames) for frames in (2, 5, 1)]
    for batch, chosen, frames in zip(read(shards, config, batches), batches, (2, 5, 1), strict=True):
        assert batch.images.shape == (len(chosen), frames, 3, HEIGHT, WIDTH)
        assert_right(batch, chosen, shards)


@pytest.mark.parametrize("reader", READERS)
def test_png_and_jpeg_in_one_set(tmp_path, reader):
    dataset = make_dataset(tmp_path / "source", identities=2, suffix=".png")
    shards = pack_dataset(dataset, tmp_path / "source", tmp_path / "shards")
    clips = evaluation_clips(shards, range(4), 4)
    (batch,) = read(shards, make_config(shards.location, data__reader=reader), [clips])
    assert_right(batch, clips, shards)


# ---------------------------------------------------------------------------------------------- faults


@pytest.fixture
def damaged(tmp_path):
    """A set in which a byte of the second frame of the first tracklet's picture is flipped after it was opened."""
    dataset = make_dataset(tmp_path / "source", identities=4, tracklets=2, frames=(4, 4))
    shards = pack_dataset(dataset, tmp_path / "source", tmp_path / "shards")
    return shards, tmp_path / "shards"


def flip(shards: ShardSet, folder: Path, position: int, name: str) -> None:
    content = read_named(shards, position, name)
    for path in folder.glob("*.tar"):
        bytes_ = path.read_bytes()
        if content in bytes_:
            place = bytes_.index(content) + len(content) // 2
            path.write_bytes(bytes_[:place] + bytes([bytes_[place] ^ 64]) + bytes_[place + 1 :])


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("member", ["f0001.jpg", "f0001.hm.png"])
def test_a_damaged_member_stops_the_run_by_its_name(damaged, reader, member):
    shards, folder = damaged
    flip(shards, folder, 0, member)
    config = make_config(folder, data__reader=reader)
    reader = open_reader(
        ShardSet.open(folder), iter([evaluation_clips(shards, [2], 4), evaluation_clips(shards, [0], 4)]), config
    )
    with pytest.raises(DataError) as caught:
        list(reader)
    reader.close()
    for word in ("toy-00000.tar", shards.tracklets[0].key, member, "not those packed"):
        assert word in str(caught.value)


@pytest.mark.parametrize("reader", READERS)
def test_skipping_takes_the_nearest_frame_and_counts(damaged, reader):
    shards, folder = damaged
    flip(shards, folder, 0, "f0001.jpg")
    config = make_config(folder, data__reader=reader, data__on_fault="skip")
    opened = open_reader(ShardSet.open(folder), iter([evaluation_clips(shards, [0, 2], 4)] * 3), config)
    batches = list(opened)
    opened.close()
    assert len(opened.faults) == 1
    assert "f0001.jpg" in next(iter(opened.faults.messages.values()))
    for batch in batches:
        codes = [read_code(image, False, np.zeros(2)) for image in batch.images[0].numpy()]
        assert codes == [0, 0, 2, 3]


@pytest.mark.parametrize("reader", READERS)
def test_skipping_ends_at_the_limit(damaged, reader):
    shards, folder = damaged
    for name in ("f0000.jpg", "f0001.jpg", "f0002.jpg"):
        flip(shards, folder, 0, name)
    config = make_config(folder, data__reader=reader, data__on_fault="skip", data__max_faults=2)
    opened = open_reader(ShardSet.open(folder), iter([evaluation_clips(shards, [0], 4)]), config)
    with pytest.raises(DataError, match=r"3 members could not be read, data\.max_faults is 2"):
        list(opened)
    opened.close()


def test_a_tracklet_with_nothing_left_is_replaced_by_its_identitys_next_only_in_training(damaged):
    shards, folder = damaged
    for frame in range(4):
        flip(shards, folder, 0, f"f{frame:04d}.jpg")
    config = make_config(folder, data__on_fault="skip")
    shards = ShardSet.open(folder)
    (clip,) = evaluation_clips(shards, [0], 4)
    with pytest.raises(DataError, match="nothing is left to replace it"):
        read(shards, config, [[clip]], workers=0)
    training = ClipPlan(0, 0, clip.frames, clip.flip, clip.crop, clip.erase, clip.blank)
    (batch,) = read(shards, config, [[training]], workers=0)
    assert {read_code(image, False, np.zeros(2)) for image in batch.images[0].numpy()} == {64 * 1 + 2}
    assert batch.keys == [shards.tracklets[1].key]
    assert batch.cameras.tolist() == [shards.camera_index[shards.tracklets[1].camera]]


@pytest.mark.parametrize("reader", READERS)
def test_a_picture_that_was_packed_broken_is_named(damaged, reader):
    """Other packers may write what no decoder reads; the checksum is right then."""
    shards, folder = damaged
    number = picture_member(1)
    path = folder / shards.card["shards"][0]["file"]
    content = bytearray(path.read_bytes())
    ((offset, size, _),) = shards.index.members(0, number, 1)
    content[offset : offset + size] = b"\xff\xd8" + bytes(size - 4) + b"\xff\xd9"
    path.write_bytes(content)
    opened = ShardSet.open(folder)
    crc = opened.index.crc.copy()
    crc[number] = zlib.crc32(content[offset : offset + size])
    opened.index = dataclasses.replace(opened.index, crc=crc, path=None)
    config = make_config(folder, data__reader=reader)
    reader_ = open_reader(opened, iter([evaluation_clips(opened, [0], 4)]), config)
    with pytest.raises(DataError, match=rf"{opened.tracklets[0].key}: member f0001\.jpg: .*does not decode"):
        list(reader_)
    reader_.close()


def test_a_plan_that_fails_reaches_the_consumer(packed):
    _, shards = packed

    def batches():
        yield evaluation_clips(shards, [0], 4)
        raise ConfigError("no more")

    for name in ("dali", "plain"):
        with pytest.raises(ConfigError, match="no more"):
            list(open_reader(shards, batches(), make_config(shards.location, data__reader=name)))


def test_closing_ends_threads_and_processes_in_the_middle_of_an_endless_plan(packed):
    _, shards = packed
    own = psutil.Process()
    for name in ("dali", "plain"):
        config = make_config(shards.location, data__reader=name)
        # Another test's servers may run in the same process, and readers that it has not closed.
        before, threads = set(own.children(recursive=True)), set(threading.enumerate())
        reader = open_reader(shards, planned(shards, config).batches(0, 0), config)
        next(reader)
        assert reader.wait_seconds > 0
        reader.close()
        assert not [thread for thread in set(threading.enumerate()) - threads if thread.name.startswith("keyreid")]
        started = set(own.children(recursive=True)) - before
        workers = [process for process in started if process.ppid() != own.pid]  # of the server, which stays
        assert not psutil.wait_procs(workers, timeout=300)[1]


def test_parts_that_were_not_packed_are_refused(tmp_path):
    dataset = make_dataset(tmp_path / "source", identities=2, tracklets=1)
    shards = pack_dataset(dataset, tmp_path / "source", tmp_path / "shards", parts=4)
    with pytest.raises(ConfigError, match=r"model\.parts=6, but .* has heatmaps of 4 parts"):
        open_reader(shards, iter([]), make_config(shards.location))


def test_without_dali_the_plain_reader_is_named(packed, monkeypatch):
    _, shards = packed
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    with pytest.raises(ConfigError, match=r"data\.reader=plain"):
        open_reader(shards, iter([]), make_config(shards.location, data__reader="dali"))


def test_faults_count_members_once():
    faults = Faults("skip", 1)
    faults.add({"a 1": "one"})
    faults.add({"a 1": "one"})
    assert len(faults) == 1
    with pytest.raises(DataError, match="the last: two"):
        faults.add({"a 2": "two"})
