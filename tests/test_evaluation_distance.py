"""Distances in blocks against the definitions; nearest neighbours of a memory-mapped gallery; re-ranking."""

import numpy as np
import pytest
import torch

from keyreid.embedding.distance import Embeddings, distance_blocks, nearest, pair_distances, pairwise
from keyreid.embedding.reranking import rerank
from keyreid.errors import ConfigError

PARTS, GLOBAL, PART = 3, 4, 5


def made(count, seed, spread=1.0):
    rng = np.random.default_rng(seed)
    vectors = rng.standard_normal((count, GLOBAL + PARTS * PART), dtype=np.float32) * spread + 7
    return Embeddings(vectors, rng.integers(0, 5, (count, PARTS)).astype(np.float32) / 4, GLOBAL)


def definition(query, gallery, metric):
    q, g = (side.vectors.astype(np.float64) for side in (query, gallery))
    if metric == "cosine":
        return 1 - (q @ g.T) / np.linalg.norm(q, axis=1)[:, None] / np.linalg.norm(g, axis=1)
    difference = q[:, None] - g[None]
    if metric == "euclidean":
        return np.linalg.norm(difference, axis=2)
    result = np.linalg.norm(difference[..., :GLOBAL], axis=2)
    weights = np.ones_like(result)
    for part in range(PARTS):
        weight = query.visibility[:, None, part] * gallery.visibility[None, :, part]
        start = GLOBAL + part * PART
        result += weight * np.linalg.norm(difference[..., start : start + PART], axis=2)
        weights += weight
    return result / weights


@pytest.mark.parametrize("metric", ["euclidean", "cosine", "visible"])
@pytest.mark.parametrize("block_bytes", [2**28, 4000])
def test_pairwise_is_the_definition(metric, block_bytes):
    query, gallery = made(17, 1), made(53, 2)
    expected = definition(query, gallery, metric)
    assert pairwise(query, gallery, metric, block_bytes=block_bytes) == pytest.approx(expected, abs=2e-6)
    left, right = np.array([0, 3, 16]), np.array([52, 0, 7])
    assert pair_distances(query, gallery, left, right, metric) == pytest.approx(expected[left, right], abs=2e-6)


def test_a_part_that_either_side_does_not_see_does_not_count():
    query, gallery = made(2, 1), made(3, 2)
    gallery.visibility[:] = 0
    gallery.vectors[:, GLOBAL:] = 1e3
    expected = np.linalg.norm(query.vectors[:, None, :GLOBAL] - gallery.vectors[None, :, :GLOBAL], axis=2)
    assert pairwise(query, gallery, "visible") == pytest.approx(expected, abs=1e-5)


def test_nearest_is_exact_and_gives_ties_to_the_smaller_index():
    rng = np.random.default_rng(0)
    half, entries = (rng.integers(0, 3, (count, 4)).astype(np.float32) for count in (5, 400))
    # Whole numbers around zero: equal distances are equal to the last bit.
    query, gallery = Embeddings(np.concatenate([half, -half])), Embeddings(entries)
    distance = pairwise(query, gallery)
    expected = np.argsort(distance, axis=1, kind="stable")[:, :30]
    for block_bytes in (2**28, 4000):
        distances, indices = nearest(query, gallery, 30, block_bytes=block_bytes)
        assert np.array_equal(indices, expected)
        assert np.array_equal(distances, np.take_along_axis(distance, expected, axis=1))


def test_nearest_leaves_out_the_own_group():
    query, gallery = made(4, 0), made(6, 1)
    query_group, gallery_group = np.array([0, 0, 1, 2]), np.array([0, 1, 1, 1, 0, 1])
    distances, indices = nearest(query, gallery, 5, query_group=query_group, gallery_group=gallery_group)
    assert (indices >= 0).sum(axis=1).tolist() == [4, 4, 2, 5]
    assert np.array_equal(np.isinf(distances), indices < 0)
    for row, group in enumerate(query_group):
        assert group not in gallery_group[indices[row][indices[row] >= 0]]


def test_a_memory_mapped_gallery_is_read_in_blocks_of_the_bound(tmp_path):
    bound = 2**20
    gallery = np.lib.format.open_memmap(tmp_path / "gallery.npy", "w+", np.float16, (2**14, 256))
    gallery[:] = np.random.default_rng(0).standard_normal(gallery.shape, dtype=np.float32)
    gallery.flush()
    query = Embeddings(np.array(gallery[[5, 7000, 16383]], np.float32))
    mapped = Embeddings(np.load(tmp_path / "gallery.npy", mmap_mode="r"))
    sizes = [block.nbytes for *_, block in distance_blocks(query, mapped, "euclidean", block_bytes=bound)]
    assert len(sizes) > 8  # of float32 rows the gallery holds 16 times the bound
    assert nearest(query, mapped, 3, block_bytes=bound)[1][:, 0].tolist() == [5, 7000, 16383]


def naive_rerank(query, gallery, k1, k2, weight):
    """The paper's encoding written down tracklet by tracklet."""
    everyone = np.concatenate([query, gallery]).astype(np.float64)
    original = np.linalg.norm(everyone[:, None] - everyone[None], axis=2) ** 2
    original /= original.max(axis=1, keepdims=True)
    rank = np.argsort(original, axis=1, kind="stable")

    def reciprocal(i, k):
        return {j for j in rank[i, : k + 1] if i in rank[j, : k + 1]}

    encoding = np.zeros_like(original)
    for i in range(len(everyone)):
        members = reciprocal(i, k1)
        expanded = set(members)
        for candidate in members:
            theirs = reciprocal(candidate, round(k1 / 2))
            if len(theirs & members) > 2 / 3 * len(theirs):
                expanded |= theirs
        for j in expanded:
            encoding[i, j] = np.exp(-original[i, j])
        encoding[i] /= encoding[i].sum()
    encoding = np.stack([encoding[rank[i, :k2]].mean(axis=0) for i in range(len(everyone))])
    result = np.empty((len(query), len(gallery)))
    for q in range(len(query)):
        for g in range(len(gallery)):
            pair = encoding[q], encoding[len(query) + g]
            jaccard = 1 - np.minimum(*pair).sum() / np.maximum(*pair).sum()
            result[q, g] = (1 - weight) * jaccard + weight * original[q, len(query) + g]
    return result


@pytest.mark.parametrize(("k1", "k2", "weight"), [(20, 6, 0.3), (7, 1, 0.0), (5, 3, 0.5)])
def test_reranking_is_the_naive_form(k1, k2, weight):
    rng = np.random.default_rng(k1)
    centres = rng.standard_normal((8, 6)) * 2
    query, gallery = (
        (centres[rng.integers(0, 8, n)] + rng.standard_normal((n, 6))).astype(np.float32) for n in (15, 70)
    )
    for block_bytes in (2**28, 4000):
        found = rerank(Embeddings(query), Embeddings(gallery), k1=k1, k2=k2, weight=weight, block_bytes=block_bytes)
        assert found == pytest.approx(naive_rerank(query, gallery, k1, k2, weight), abs=2e-6)


def test_reranking_of_fewer_tracklets_than_neighbours():
    found = rerank(Embeddings(np.zeros((1, 2), np.float32)), Embeddings(np.eye(2, dtype=np.float32)))
    assert found.shape == (1, 2)
    assert np.isfinite(found).all()


def test_vectors_that_cannot_be_compared_are_refused():
    with pytest.raises(ConfigError, match=r"\(2, 19\) and \(2, 3\) differ in width"):
        pairwise(made(2, 0), Embeddings(np.zeros((2, 3), np.float32)))
    with pytest.raises(ConfigError, match="visible needs the parts' visibility"):
        pairwise(*[Embeddings(np.zeros((2, 3), np.float32))] * 2, "visible")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_same_on_a_gpu():
    query, gallery = made(17, 1), made(530, 2)
    for metric in ("euclidean", "cosine", "visible"):
        assert pairwise(query, gallery, metric, "cuda") == pytest.approx(pairwise(query, gallery, metric), abs=2e-6)
        assert np.array_equal(nearest(query, gallery, 5, metric, "cuda")[1], nearest(query, gallery, 5, metric)[1])
