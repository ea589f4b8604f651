"""Vectors of tracklets: the mean over their clips, whatever batches and ranks they were computed in."""

import os
import pickle
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch
from evaluation_toys import save_weights, toy_config, toy_model, toy_shards

from keyreid.embedding.features import _batches_of, _mean_by_tracklet, _shares, extract
from keyreid.embedding.vectors import VectorFiles, Vectors
from keyreid.errors import DataError
from keyreid.model.inputs import prepare
from keyreid.shards import open_reader
from keyreid.shards.plan import evaluation_clips


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    shards = toy_shards(tmp_path_factory.mktemp("toy"))
    config = toy_config(shards)
    return shards, config, toy_model(config)


def clip_by_clip(shards, config, model, position):
    """The tracklet's vector, one clip at a time."""
    clips = [[clip] for clip in evaluation_clips(shards, [position], config.clip.frames, mode=model.guidance)]
    reader = open_reader(shards, iter(clips), config, workers=0)
    vectors, seen = [], []
    with torch.no_grad():
        for batch in reader:
            vectors.append(model.embed(*prepare(batch, model.guidance), batch.cameras)[0].double())
            seen.append(batch.visibility[0])
    reader.close()
    return torch.stack(vectors).mean(0).numpy(), torch.stack(seen).mean(0).numpy()


def test_a_tracklets_vector_is_the_mean_over_its_clips(toy):
    shards, config, model = toy
    positions = [17, 3, 30, 9, 8]
    found = extract(model, shards, positions, config)
    assert found.keys.tolist() == [shards.tracklets[position].key for position in positions]
    assert found.frames.tolist() == [shards.tracklets[position].frames for position in positions]
    for row, position in enumerate(positions):
        vector, seen = clip_by_clip(shards, config, model, position)
        assert found.vectors[row] == pytest.approx(vector, abs=2e-5)
        assert found.visibility[row] == pytest.approx(seen, abs=1e-6)
    assert not model.training


@pytest.mark.parametrize("training", [True, False])
def test_a_network_is_left_in_the_mode_that_it_was_in(toy, training):
    """A training that evaluates goes on with stochastic depth and the batch's statistics."""
    shards, config, model = toy
    model.train(training)
    found = extract(model, shards, [3], config)
    assert model.training == training
    model.eval()
    np.testing.assert_array_equal(found.vectors, extract(model, shards, [3], config).vectors)


def test_cameras_that_the_network_does_not_know(toy):
    shards, config, model = toy
    known, unknown = (extract(model, shards, [3, 8], config, cameras_known=flag) for flag in (True, False))
    assert np.abs(known.vectors - unknown.vectors).max() > 1e-3
    with torch.no_grad():
        was = model.backbone.camera.clone()
        model.backbone.camera[:] = was.mean(0)
    as_mean = extract(model, shards, [3, 8], config)
    with torch.no_grad():
        model.backbone.camera[:] = was
    assert unknown.vectors == pytest.approx(as_mean.vectors, abs=1e-5)


@pytest.mark.parametrize("world_size", [1, 2, 3, 7, 50])
def test_ranks_share_all_tracklets_and_run_equally_many_batches(world_size):
    rng = np.random.default_rng(world_size)
    for _ in range(20):
        counts = rng.integers(1, rng.choice([2, 5, 60]), rng.integers(1, 40))
        share = _shares(counts, world_size)
        assert [tracklet for tracklets in share for tracklet in tracklets] == list(range(len(counts)))
        batches = _batches_of(share, counts, 4)
        assert len({len(own) for own in batches}) == 1
        first_clip = np.cumsum(counts) - counts
        for tracklets, own in zip(share, batches, strict=True):
            clips = [range(first_clip[tracklet], first_clip[tracklet] + counts[tracklet]) for tracklet in tracklets]
            assert set(own) == ({clip // 4 for each in clips for clip in each} or {0})
        longest = max(counts.max(), counts.sum() / world_size)
        assert max(counts[list(tracklets)].sum() for tracklets in share) <= counts.sum() / world_size + longest


def test_means_do_not_depend_on_the_ranks():
    rng = np.random.default_rng(0)
    counts = rng.integers(1, 30, 25)
    clips = torch.from_numpy(rng.standard_normal((counts.sum(), 9), dtype=np.float32))
    means = []
    for world_size in (1, 2, 5):
        share = _shares(counts, world_size)
        pieces = []
        for rank, batches in enumerate(_batches_of(share, counts, 4)):
            embedded = (clips[4 * number : 4 * number + 4] for number in batches)
            pieces.append(_mean_by_tracklet(embedded, batches, 4, counts, share[rank]))
        means.append(torch.cat(pieces))
    assert torch.equal(means[0], means[1])
    assert torch.equal(means[0], means[2])
    ends = np.cumsum(counts)
    expected = np.stack([clips[end - count : end].numpy().mean(0) for end, count in zip(ends, counts, strict=True)])
    assert means[0].numpy() == pytest.approx(expected, abs=1e-6)


@pytest.mark.slow
def test_two_ranks_give_the_bits_of_one(toy, tmp_path):
    shards, config, model = toy
    weights = save_weights(model, config, shards, tmp_path / "weights.safetensors")
    settings = ["evaluation.clips_per_batch=5", "evaluation.pictures=0", "training.precision=fp32", "data.reader=plain"]
    for ranks in (1, 2):
        command = ["evaluate", f"--ranks={ranks}", f"--shards={shards.location}", "--protocol=inclusive"]
        command += [f"--out={tmp_path / str(ranks)}", str(weights), *settings]
        done = subprocess.run(
            [sys.executable, "-m", "keyreid.cli", *command],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        assert f"clips/s on {ranks} rank(s)" in done.stdout
    one, two = (tmp_path / str(ranks) for ranks in (1, 2))
    assert (one / "vectors.parquet").read_bytes() == (two / "vectors.parquet").read_bytes()
    assert (one / "scores.json").read_text() == (two / "scores.json").read_text()


def test_vectors_are_kept_and_read_again(toy, tmp_path, monkeypatch):
    shards, config, model = toy
    made = extract(model, shards, [4, 5, 6], config, weights={"name": "toy", "sha256": "t"})
    monkeypatch.setattr("keyreid.embedding.vectors.ROW_GROUP_BYTES", 2 * 4 * made.about.width)  # two groups
    made.save(tmp_path / "vectors.parquet")
    same(Vectors.load(tmp_path / "vectors.parquet"), made)
    read = Vectors.load(tmp_path / "vectors.parquet")
    assert read.about.fingerprint and replace(read.about, fingerprint="") == made.about
    assert (read.about.global_width, read.about.dataset, read.about.cameras_known) == (192, "toy", True)
    assert read.rows_of([made.keys[2], made.keys[0]]).tolist() == [2, 0]
    with pytest.raises(DataError, match=r"no tracklet has the key 'nobody' \(1 are missing\)"):
        read.rows_of(["nobody"])
    with pytest.raises(DataError, match=r"absent\.parquet: no such file"):
        Vectors.load(tmp_path / "absent.parquet")
    (tmp_path / "other.parquet").write_text("other")
    with pytest.raises(DataError, match=r"other\.parquet: not a whole Parquet file"):
        Vectors.load(tmp_path / "other.parquet")


def test_vectors_of_the_last_version_are_read(toy, tmp_path):
    shards, config, model = toy
    made = extract(model, shards, [4, 5, 6], config)
    somebody = pa.array([made.identities[0], None, made.identities[2]])
    made = replace(made, described=made.described.set_column(1, "identity", somebody))
    assert made.identities[1] == -2
    arrays = {name: getattr(made, name) for name in ("keys", "identities", "cameras", "frames", "visibility")}
    np.savez(tmp_path / "vectors.npz", **arrays, vectors=made.vectors, global_width=192, dataset="toy")
    read = Vectors.load(tmp_path / "vectors.npz")
    same(read, made)
    assert (read.about.global_width, read.about.dataset, read.about.cameras_known) == (192, "toy", None)
    files = VectorFiles([tmp_path / "vectors.npz"])
    assert files.take(np.array([2, 0]), ["key"])["key"].to_pylist() == [made.keys[2], made.keys[0]]
    made.save(tmp_path / "new.parquet")
    with pytest.raises(DataError, match="vectors of different networks cannot be compared"):
        VectorFiles([tmp_path / "vectors.npz", tmp_path / "new.parquet"])
    with pytest.raises(DataError, match=r"absent\.npz: no such file"):
        Vectors.load(tmp_path / "absent.npz")
    for content in ("other", pickle.dumps({"keys": 1})):
        (tmp_path / "other.npz").write_bytes(content.encode() if isinstance(content, str) else content)
        with pytest.raises(DataError, match=r"other\.npz: not an \.npz file of plain arrays") as error:
            Vectors.load(tmp_path / "other.npz")
        assert "unsafely" not in str(error.value)
    np.savez(tmp_path / "short.npz", **arrays, vectors=made.vectors[:2], global_width=192, dataset="toy")
    with pytest.raises(DataError, match=r"short\.npz: not a file of vectors: 2 vectors, 3 keys"):
        Vectors.load(tmp_path / "short.npz")


def same(one, other):
    for name in ("keys", "identities", "cameras", "frames", "vectors", "visibility"):
        assert np.array_equal(getattr(one, name), getattr(other, name))
