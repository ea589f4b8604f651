"""Vector files, embedding in parts on any ranks, and search: exact, by index, within a memory bound."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pytest
import torch
from packed import HEIGHT, WIDTH, make_dataset, pack_dataset
from typer.testing import CliRunner

from keyreid.checkpoints.trained import open_trained
from keyreid.checkpoints.weights_file import WeightsHeader, write_weights
from keyreid.cli import app
from keyreid.config import ClipConfig, ModelConfig
from keyreid.embedding import job, vectors
from keyreid.embedding.description import numbered_frames
from keyreid.embedding.distance import Embeddings
from keyreid.embedding.features import extract
from keyreid.embedding.job import EmbeddingJob, EmbedSettings, cut
from keyreid.embedding.reranking import rerank
from keyreid.embedding.vectors import VectorFiles, Vectors, VectorsAbout, description, write_vectors
from keyreid.errors import ConfigError, DataError
from keyreid.model import build_model
from keyreid.retrieval import search
from keyreid.retrieval.index import GalleryIndex
from keyreid.retrieval.search import SearchSettings

ROWS_A_GROUP = 7


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("embed")
    shards = pack_dataset(make_dataset(folder / "pictures", identities=4), folder / "pictures", folder / "shards")
    return folder / "shards", shards


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    model = ModelConfig(backbone="vit_tiny_patch16_224", depth=2, local_heads=6)
    clip = ClipConfig(frames=2, height=HEIGHT, width=WIDTH)
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    network = build_model(model, clip, num_identities=4, num_cameras=3)
    header = WeightsHeader(model, clip, [1, 2, 3, 4], [1, 2, 3], {"run": "tiny", "step": 5, "dataset": "elsewhere"})
    write_weights(path, network.state_dict(), header)
    return path


def job_of(weights, packed, out, settings=None) -> EmbeddingJob:
    location, shards = packed
    trained = open_trained(weights, overrides=["data.reader=plain"], shards=str(location))
    return EmbeddingJob(trained, shards, shards.select("all"), out, settings or EmbedSettings())


@pytest.fixture(scope="module")
def embedded(packed, weights, tmp_path_factory):
    """The vector file of one rank, in parts of a few tracklets."""
    out = tmp_path_factory.mktemp("vectors") / "vectors.parquet"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "PART_FRAMES", 20)
        one = job_of(weights, packed, out)
        assert len(one.parts) > 3
        one.run()
        assert one.join() == 16
    return out


def test_rows_are_what_evaluation_computes(embedded, packed, weights):
    _, shards = packed
    files = VectorFiles([embedded])
    trained = job_of(weights, packed, embedded).trained
    expected = extract(trained.network, shards, shards.select("all"), trained.config, cameras_known=False)
    rows = next(files.blocks(files.about.schema.names))[1]
    assert rows["key"].to_pylist() == [record.key for record in shards.tracklets]
    found = vectors.embeddings_of(rows, files.about)
    np.testing.assert_allclose(found.vectors, expected.vectors, atol=1e-5)
    np.testing.assert_allclose(found.visibility, expected.visibility, atol=1e-6)
    assert rows["frames"].to_pylist() == [record.frames for record in shards.tracklets]
    assert rows["first_frame"].to_pylist() == [0] * 16  # pictures are called 000.jpg, 001.jpg, ...
    assert rows["last_frame"].to_pylist() == [record.frames - 1 for record in shards.tracklets]
    assert rows["camera_name"].to_pylist() == [str(record.camera) for record in shards.tracklets]
    for content in rows["picture"].to_pylist():
        picture = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR)
        assert picture.shape == (HEIGHT, WIDTH, 3)
    assert files.about.weights["name"] == "tiny step 5"
    assert not embedded.with_name("vectors.parquet.parts").exists()


def test_any_ranks_and_interruptions_give_the_same_file(embedded, packed, weights, tmp_path, monkeypatch):
    monkeypatch.setattr(job, "PART_FRAMES", 20)
    out = tmp_path / "again.parquet"
    first, second = (job_of(weights, packed, out) for _ in range(2))
    assert len(first.parts) == 4
    assert first.run(rank=0, world_size=2) == 2  # parts 0 and 2
    assert first.join() is None and not out.exists()  # the other rank's are missing
    (first.folder / "part-00000.parquet").write_bytes(b"cut off")
    # One rank more: of parts 0 and 3 both, part 1, and part 2 is kept.
    assert [second.run(rank=rank, world_size=3) for rank in range(3)] == [2, 1, 0]
    assert second.join() == 16
    assert out.read_bytes() == embedded.read_bytes()
    assert job_of(weights, packed, out).done and job_of(weights, packed, out).run() == 0
    other = job_of(weights, packed, out, EmbedSettings(features="global"))
    assert not other.done and other.about.width == 192


def test_parts_cover_all_tracklets_in_order():
    rng = np.random.default_rng(0)
    for count, size in ((0, 5), (1, 5), (40, 1), (200, 64), (200, 10**6)):
        frames = rng.integers(1, 50, count).tolist()
        parts = cut(frames, size)
        assert [row for part in parts for row in part] == list(range(count))
        assert all(len(part) for part in parts)
        assert all(sum(frames[row] for row in part) <= size + 50 for part in parts)
    assert numbered_frames({"video_frames": [3, 9]}) == (3, 9)
    assert numbered_frames({"source": {"folder": "a", "files": ["x17.jpg", "x21.jpg"]}}) == (17, 21)
    assert numbered_frames({"source": {"file": "a/000008.jpg"}}) == (8, 8)  # a tracklet of one picture
    assert numbered_frames({"source": {"file": "clip"}}) == (None, None)


def about(width: int = 8, weights: str = "w") -> VectorsAbout:
    return VectorsAbout(width, 2, 4, "toy", {"name": weights, "sha256": weights}, fingerprint="f")


def make_rows(keys, cameras, numbers, visibility=None, weights: str = "w"):
    columns = {
        **{"key": keys, "camera": cameras, "camera_name": [f"cam {c}" for c in cameras], "frames": [3] * len(keys)},
        **{"identity": [int(key[1:]) // 3 for key in keys]},
    }
    seen = np.ones((len(keys), 2), np.float32) if visibility is None else visibility
    return Vectors(about(numbers.shape[1], weights), description(columns), numbers, seen).table


@pytest.fixture(scope="module")
def gallery(tmp_path_factory):
    """Two files of 40 and 25 rows in row groups of 7, and all their content in memory."""
    folder = tmp_path_factory.mktemp("gallery")
    rng = np.random.default_rng(3)
    numbers = rng.normal(size=(65, 8)).astype(np.float32)
    visibility = rng.uniform(size=(65, 2)).astype(np.float32)
    cameras = rng.integers(1, 4, 65).tolist()
    keys = [f"k{number}" for number in range(65)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vectors, "ROW_GROUP_BYTES", ROWS_A_GROUP * 8 * 4)
        for name, rows in (("a", slice(0, 40)), ("b", slice(40, 65))):
            table = make_rows(keys[rows], cameras[rows], numbers[rows], visibility[rows])
            assert write_vectors(folder / f"{name}.parquet", about(), iter([table])) == len(table)
    return folder, keys, np.array(cameras), Embeddings(numbers, visibility, 4)


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(vectors, "ROW_GROUP_BYTES", ROWS_A_GROUP * 8 * 4)


def test_files_are_read_in_pieces(gallery, small_blocks):
    folder, keys, _, everything = gallery
    files = VectorFiles([folder])  # all .parquet of a folder
    assert len(files) == 65 and [path.name for path in files.paths] == ["a.parquet", "b.parquet"]
    blocks = list(files.blocks(["key", "vector"]))
    assert max(len(table) for _, table in blocks) == ROWS_A_GROUP
    assert [key for _, table in blocks for key in table["key"].to_pylist()] == keys
    rows = np.array([64, 3, 41, 3, 0])
    taken = files.take(rows, ["key", "vector", "visibility"])
    assert taken["key"].to_pylist() == [keys[row] for row in rows]
    np.testing.assert_array_equal(vectors.embeddings_of(taken, files.about).vectors, everything.vectors[rows])
    assert files.rows_of(["k41", "k0"]).tolist() == [41, 0]
    with pytest.raises(DataError, match=r"no tracklet has the key 'k411' \(1 are missing\); the nearest key is k41"):
        files.rows_of(["k411"])
    half = VectorsAbout(8, 2, 4, "toy", dtype="float16")
    assert half.schema.field("vector").type == pa.list_(pa.float16(), 8)


@pytest.mark.parametrize("metric", ["euclidean", "cosine", "visible"])
@pytest.mark.parametrize("other_cameras", [False, True])
def test_exact_search_is_brute_force(gallery, small_blocks, metric, other_cameras):
    from keyreid.embedding.distance import pairwise

    folder, keys, cameras, everything = gallery
    files = VectorFiles([folder])
    rows = np.array([5, 50, 64])
    found = list(search.search(files, rows, files, SearchSettings(6, metric, other_cameras)))
    distance = pairwise(everything[rows], everything, metric)
    distance[np.arange(3), rows] = np.inf  # a tracklet does not find itself
    if other_cameras:
        distance[cameras[rows][:, None] == cameras[None]] = np.inf
    for result, expected in zip(found, distance, strict=True):
        best = np.argsort(expected, kind="stable")[:6]
        assert [hit["key"] for hit in result.hits] == [keys[row] for row in best]
        np.testing.assert_allclose([hit["distance"] for hit in result.hits], expected[best], atol=1e-5)
        assert [hit["row"] for hit in result.hits] == best.tolist()


def test_reranking_among_the_candidates(gallery, small_blocks):
    folder, keys, _, everything = gallery
    files = VectorFiles([folder])
    (found,) = search.search(files, np.array([5]), files, SearchSettings(4, rerank=True))
    again = rerank(everything[5:6], everything)[0]  # fewer than 200: all are candidates
    expected = [row for row in np.argsort(again, kind="stable") if row != 5][:4]
    assert {hit["key"] for hit in found.hits} == {keys[row] for row in expected}


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("other_cameras", [False, True])
@pytest.mark.parametrize("kind", ["graph", "lists"])
def test_an_index_that_looks_at_everything_is_exact_to_half_precision(gallery, tmp_path, metric, other_cameras, kind):
    pytest.importorskip("faiss")
    files = VectorFiles([gallery[0]])
    index = GalleryIndex.build(files, tmp_path / "index.faiss", metric, kind)
    assert (index.kind, index.lists) == (kind, 8 if kind == "lists" else 0)
    index = GalleryIndex(tmp_path / "index.faiss", files, metric, probes=index.lists or 65)
    assert search.recall(files, index) > 0.95
    settings = SearchSettings(5, metric, other_cameras)
    rows = np.arange(len(files))
    exact = search.search(files, rows, files, settings)
    for one, other in zip(exact, search.search(files, rows, files, settings, index), strict=True):
        np.testing.assert_allclose(
            [hit["distance"] for hit in other.hits], [hit["distance"] for hit in one.hits], atol=5e-3
        )
        assert len({hit["key"] for hit in one.hits} & {hit["key"] for hit in other.hits}) >= 4  # near ties may swap


def test_an_index_of_other_vectors_is_refused(gallery, tmp_path):
    pytest.importorskip("faiss")
    files = VectorFiles([gallery[0]])
    path = tmp_path / "index.faiss"
    GalleryIndex.build(files, path, "euclidean")
    with pytest.raises(DataError, match="no index of these vectors by cosine"):
        GalleryIndex(path, files, "cosine")
    with pytest.raises(DataError, match="no index of these vectors"):
        GalleryIndex(path, VectorFiles([gallery[0] / "a.parquet"]), "euclidean")
    with pytest.raises(ConfigError, match="cannot be indexed"):
        GalleryIndex.build(files, path, "visible")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DataError, match="not a whole index"):
        GalleryIndex(path, files, "euclidean")


def test_bad_files_are_named(gallery, tmp_path):
    with pytest.raises(DataError, match="no such file"):
        VectorFiles([tmp_path / "nothing.parquet"])
    (tmp_path / "cut.parquet").write_bytes((gallery[0] / "a.parquet").read_bytes()[:-50])
    with pytest.raises(DataError, match=r"cut\.parquet: not a whole Parquet file"):
        VectorFiles([tmp_path / "cut.parquet"])
    pa.parquet.write_table(pa.table({"a": [1]}), tmp_path / "other.parquet")
    with pytest.raises(DataError, match="not a file of vectors"):
        VectorFiles([tmp_path / "other.parquet"])
    theirs = about(weights="other")
    write_vectors(
        tmp_path / "theirs.parquet", theirs, iter([make_rows(["k1"], [1], np.zeros((1, 8)), weights="other")])
    )
    with pytest.raises(DataError, match="vectors of different networks cannot be compared"):
        VectorFiles([gallery[0], tmp_path / "theirs.parquet"])
    with pytest.raises(DataError, match="vectors of different networks"):
        next(
            search.search(VectorFiles([tmp_path / "theirs.parquet"]), None, VectorFiles([gallery[0]]), SearchSettings())
        )


def test_weights_are_told_apart_by_their_hash_not_by_their_name(gallery, tmp_path):
    theirs = replace(about(), weights={"name": "w", "sha256": "another"})
    write_vectors(tmp_path / "theirs.parquet", theirs, [make_rows(["k1"], [1], np.zeros((1, 8)))])
    with pytest.raises(DataError, match="vectors of different networks cannot be compared"):
        VectorFiles([gallery[0], tmp_path / "theirs.parquet"])
    with pytest.raises(DataError, match=r"embedded by w, .* by w: vectors of different networks"):
        next(
            search.search(VectorFiles([tmp_path / "theirs.parquet"]), None, VectorFiles([gallery[0]]), SearchSettings())
        )


def test_the_nearest_is_found_in_every_part_of_a_gallery(tmp_path):
    """Rows 1,000 at a time, as they are written and read; each part holds a row that is nearer than those before."""
    rng = np.random.default_rng(0)
    nearest_of_3 = np.zeros(768, np.float32)

    def tables():
        for start in range(0, 6000, 1000):
            vectors = rng.standard_normal((1000, 768), np.float32)
            if start:
                vectors[77] = nearest_of_3 + (7000 - start) / 10000
            else:
                nearest_of_3[:] = vectors[3]
            yield make_rows([f"k{number}" for number in range(start, start + 1000)], [1] * 1000, vectors)

    write_vectors(tmp_path / "large.parquet", about(768), tables())
    files = VectorFiles([tmp_path / "large.parquet"])
    found = list(search.search(files, np.arange(5), files, SearchSettings(3)))
    assert [hit["key"] for hit in found[3].hits] == ["k5077", "k4077", "k3077"]


def run_command(*words) -> str:
    result = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_commands_from_shards_to_a_ranked_picture(packed, weights, tmp_path):
    file, found, picture = (tmp_path / name for name in ("v.parquet", "found.json", "found.png"))
    embed = ["embed", weights, packed[0], "data.reader=plain", "--out", file, "--ranks", "1", "--features", "global"]
    assert "16 vectors of 192 numbers" in run_command(*embed)
    assert "nothing to do" in run_command(*embed)
    key = packed[1].tracklets[2].key
    text = run_command(
        *("search", file, "--query", key, "--top", "3", "--other-cameras", "--json", found, "--picture", picture)
    )
    assert f"query {key}" in text and "1 queries" in text
    (result,) = json.loads(found.read_text())["results"]
    assert result["query"]["key"] == key and len(result["hits"]) == 3
    assert all(hit["camera"] != result["query"]["camera"] for hit in result["hits"])
    distances = [hit["distance"] for hit in result["hits"]]
    assert distances == sorted(distances)
    image = cv2.imread(str(picture))
    assert image.shape[0] > 250 and image.shape[1] > 400
    text = run_command("search", file, "--query", file, "--top", "1")
    assert "16 queries; of 16 whose person is known" in text


def test_evaluate_and_search_take_each_others_vectors(packed, weights, tmp_path):
    def scores(*words):
        out = tmp_path / "scores.json"
        run_command("evaluate", "--shards", packed[0], "--ranks", "1", "--json", out, *words)
        return json.loads(out.read_text())["protocols"]

    def found(gallery, query):
        words = ["--json", tmp_path / "found.json", "--other-cameras", "--top", "16"]
        run_command("search", gallery, "--query", query, *words)
        results = json.loads((tmp_path / "found.json").read_text())["results"]
        distances = [hit["distance"] for result in results for hit in result["hits"]]
        return [[result["query"]["key"], *(hit["key"] for hit in result["hits"])] for result in results], distances

    plain = ["--", "data.reader=plain", "evaluation.pictures=0", "training.precision=fp32"]
    expected = scores("--out", tmp_path / "out", "--protocol", "inclusive", weights, *plain)
    judged, embedded = tmp_path / "out" / "vectors.parquet", tmp_path / "embedded.parquet"
    run_command("embed", weights, packed[0], "--out", embedded, "--ranks", "1", *plain)
    vectors_alone = ["--protocol", "inclusive", "--out", tmp_path / "again", "--", "evaluation.pictures=0"]
    for file in (embedded, judged):
        again = scores("--vectors", file, *vectors_alone)
        assert again["inclusive"]["mAP"] == pytest.approx(expected["inclusive"]["mAP"], abs=1e-9)
        assert again["inclusive"]["cmc"] == expected["inclusive"]["cmc"]
    assert VectorFiles([judged]).about.weights == VectorFiles([embedded]).about.weights
    keys, distances = found(judged, judged)
    test_set = {record.key for record in packed[1].tracklets if record.split in ("query", "gallery")}
    assert {row[0] for row in keys} == test_set
    # One's queries in the other's gallery: the same network made both.
    for gallery, query in ((judged, embedded), (embedded, judged)):
        theirs = {row[0]: row[1:] for row in found(gallery, query)[0]}
        for key, *hits in keys:
            assert [hit for hit in theirs[key] if hit in test_set][: len(hits)] == hits
    assert len(distances) and (np.diff(distances[: len(keys[0]) - 1]) >= 0).all()

    kept = Vectors.load(judged)  # as the last version wrote it
    names = ("keys", "identities", "cameras", "frames", "vectors", "visibility")
    arrays = {name: getattr(kept, name) for name in names}
    np.savez(tmp_path / "vectors.npz", **arrays, global_width=kept.about.global_width, dataset="toy")
    assert scores("--vectors", tmp_path / "vectors.npz", *vectors_alone) == expected
    assert found(tmp_path / "vectors.npz", tmp_path / "vectors.npz") == (keys, distances)
    with pytest.raises(DataError, match=r"embedded by unknown weights of vectors\.npz"):
        found(judged, tmp_path / "vectors.npz")


def test_a_folder_is_packed_on_the_way(packed, weights, tmp_path):
    pictures = Path(packed[0]).parent / "pictures"
    layout = ["--option", "layout=tracklet", "--ranks", "1"]
    out = tmp_path / "v.parquet"
    text = run_command("embed", weights, pictures, "data.reader=plain", "--out", out, *layout)
    assert "16 vectors of 2496 numbers" in text
    assert sorted(path.name for path in tmp_path.iterdir() if not path.name.startswith(".")) == ["v.parquet"]
    assert VectorFiles([out]).column("identity_name").tolist() == [None] * 16


@pytest.mark.slow
def test_the_example_from_street_pictures_to_matches(shared, tmp_path):
    """Real pedestrians, two pictures a tracklet: even random weights find the same person's next two pictures."""
    street = shared / "data" / "mot17_mini" / "train" / "MOT17-11-FRCNN"
    script = Path(__file__).resolve().parents[1] / "examples" / "own_video.sh"
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    words = [str(script), str(tmp_path / "out"), str(street)]
    result = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "PATH": path}, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    results = json.loads((tmp_path / "out" / "found.json").read_text())["results"]
    first = [found["hits"][0]["identity"] == found["query"]["identity"] for found in results]
    assert len(first) >= 20 and np.mean(first) > 0.8
    assert (tmp_path / "out" / "found.png").stat().st_size > 50_000
