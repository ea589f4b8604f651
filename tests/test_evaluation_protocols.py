"""Protocols against a naive loop, against trec_eval, and on the real MARS index."""

import numpy as np
import pytest
import pytrec_eval
import scipy.io

from keyreid.errors import ConfigError, DataError
from keyreid.evaluation.protocols import PROTOCOLS, Side, cameras_as_released, judge, released_entries


def naive(distance, query, gallery, protocol):
    """The definitions, one query and one gallery entry at a time."""
    if protocol == "released":
        expanded = []
        for side in (query, gallery):
            cameras = []
            for camera, frames in zip(side.cameras, side.frames, strict=True):
                clips = 0
                left = frames
                while left > 0 and clips < 41:
                    cameras += [camera] * 4
                    left -= 4
                    clips += 1
            expanded.append(cameras[: len(side)])
    else:
        expanded = [query.cameras, gallery.cameras]
    aps, inps, firsts = [], [], []
    for q in range(len(query)):
        order = sorted(range(len(gallery)), key=lambda g, q=q: (distance[q, g], g))
        hits = []
        for g in order:
            same = gallery.identities[g] == query.identities[q]
            if same and expanded[1][g] == expanded[0][q]:
                continue
            if protocol == "official" and gallery.identities[g] == -1:
                continue
            hits.append(bool(same))
        if not any(hits):
            continue
        ap, recall, precision, found = 0.0, 0.0, 1.0, 0
        for n, hit in enumerate(hits, 1):
            found += hit
            now_recall, now_precision = found / sum(hits), found / n
            height = (precision + now_precision) / 2 if protocol == "official" else now_precision
            ap += (now_recall - recall) * height
            recall, precision = now_recall, now_precision
        aps.append(ap)
        firsts.append(hits.index(True) + 1)
        inps.append(sum(hits) / (len(hits) - hits[::-1].index(True)))
    return np.mean(aps), np.mean(inps), [np.mean(np.array(firsts) <= k) for k in (1, 5, 10, 20)], len(aps)


def random_case(seed, queries=40, gallery=150, levels=30, identities=12):
    """Integer distances with many ties; junk, distractors, identities of one camera, queries without a match."""
    rng = np.random.default_rng(seed)

    def side(count, low, high):
        who = rng.integers(low, high, count)
        where = np.where(who == 3, 2, rng.integers(1, 5, count))  # identity 3 is seen by camera 2 alone
        return Side(who, where, rng.integers(1, 300, count))

    return rng.integers(0, levels, (queries, gallery)), side(queries, 1, identities + 3), side(gallery, -1, identities)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("seed", range(6))
def test_equal_to_a_naive_loop(protocol, seed):
    distance, query, gallery = random_case(seed, levels=(5, 30, 10**6)[seed % 3])
    scores = judge(distance.astype((np.int64, np.float32, np.float64)[seed % 3]), query, gallery, protocol)
    mean_ap, inp, cmc, valid = naive(distance, query, gallery, protocol)
    assert scores.mean_ap == pytest.approx(mean_ap, abs=1e-12)
    assert scores.mean_inp == pytest.approx(inp, abs=1e-12)
    assert [scores.as_dict()[f"rank{k}"] for k in (1, 5, 10, 20)] == pytest.approx(cmc, abs=1e-12)
    assert scores.valid_queries == valid < scores.queries
    assert scores.junk == (gallery.identities == -1).sum()
    assert scores.distractors == (gallery.identities == 0).sum()


@pytest.mark.parametrize("seed", range(4))
def test_equal_to_trec_eval(seed):
    """trec_eval's map and success are this field's rectangular mAP and CMC once the entries left out are not retrieved.

    It breaks ties by the document's name, descending, so the names descend with the index.
    """
    distance, query, gallery = random_case(seed, levels=20)
    relevant, run = {}, {}
    for q in range(len(query)):
        same = gallery.identities == query.identities[q]
        kept = ~(same & (gallery.cameras == query.cameras[q]))
        if (same & kept).any():
            relevant[f"q{q}"] = {f"d{9999 - g:04d}": int(same[g]) for g in np.flatnonzero(kept)}
            run[f"q{q}"] = {f"d{9999 - g:04d}": -float(distance[q, g]) for g in np.flatnonzero(kept)}
    results = pytrec_eval.RelevanceEvaluator(relevant, {"map", "success_1,5,10,20"}).evaluate(run)
    scores = judge(distance, query, gallery, "torchreid").as_dict()
    assert scores["valid_queries"] == len(results)
    assert scores["mAP"] == pytest.approx(np.mean([result["map"] for result in results.values()]), abs=1e-9)
    for rank in (1, 5, 10, 20):
        success = np.mean([result[f"success_{rank}"] for result in results.values()])
        assert scores[f"rank{rank}"] == pytest.approx(success, abs=1e-9)


def test_ties_go_to_the_smaller_index():
    query = Side(np.array([1]), np.array([1]))
    distance = np.zeros((1, 3))
    last = judge(distance, query, Side(np.array([2, 2, 1]), np.array([2, 2, 2])), "torchreid")
    first = judge(distance, query, Side(np.array([1, 2, 2]), np.array([2, 2, 2])), "torchreid")
    assert (last.first_match[0], first.first_match[0]) == (3, 1)


@pytest.fixture(scope="module")
def mars(shared):
    """Identities, cameras and frame counts of the test tracklets, and which are queries."""
    info = shared / "data" / "mars_info"
    rows = scipy.io.loadmat(info / "tracks_test_info.mat")["track_test_info"].astype(np.int64)
    queries = scipy.io.loadmat(info / "query_IDX.mat")["query_IDX"].ravel().astype(np.int64) - 1
    return Side(rows[:, 2], rows[:, 3], rows[:, 1] - rows[:, 0] + 1), queries


@pytest.mark.parametrize(
    ("protocol", "gallery", "valid"),
    [("torchreid", 9330, 1840), ("official", 11310, 1980), ("inclusive", 11310, 1980), ("released", 9330, 1518)],
)
def test_counts_on_the_real_mars_index(mars, protocol, gallery, valid):
    tracklets, queries = mars
    in_gallery = np.ones(len(tracklets), bool) if protocol == "official" else tracklets.identities != -1
    if not PROTOCOLS[protocol].queries_in_gallery:
        in_gallery[queries] = False
    entries = np.flatnonzero(in_gallery)
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((len(tracklets), 16), dtype=np.float32)
    distance = -vectors[queries] @ vectors[entries].T
    scores = judge(distance, tracklets[queries], tracklets[entries], protocol)
    assert (scores.queries, scores.gallery, scores.valid_queries) == (1980, gallery, valid)
    assert scores.distractors == 3248
    assert scores.junk == (870 if protocol == "official" else 0)


def test_camera_entries_of_the_published_loader_on_the_real_mars_index(mars):
    tracklets, queries = mars
    gallery = tracklets.identities != -1
    gallery[queries] = False
    assert released_entries(tracklets.frames[queries]).sum() == 110_860
    assert released_entries(tracklets.frames[gallery]).sum() == 512_048
    assert cameras_as_released(Side(np.array([5, 6]), np.array([1, 2]), np.array([3, 3]))).cameras.tolist() == [1, 1]


def test_equals_a_loop_over_queries_in_a_gallery_of_mars():
    """At a twentieth of MARS's queries, against the usual NumPy evaluator: argsort, then a loop over the queries."""
    rng = np.random.default_rng(2)
    query, gallery = (Side(rng.integers(1, 600, n), rng.integers(1, 7, n)) for n in (99, 11310))
    distance = rng.random((99, 11310), dtype=np.float32)
    precisions = []
    order = np.argsort(distance, axis=1)
    matches = gallery.identities[order] == query.identities[:, None]
    for q in range(len(query)):
        keep = ~(matches[q] & (gallery.cameras[order[q]] == query.cameras[q]))
        hits = matches[q][keep].astype(np.int32)
        if hits.any():
            precision = np.asarray([x / (i + 1.0) for i, x in enumerate(hits.cumsum())]) * hits
            precisions.append(precision.sum() / hits.sum())
    scores = judge(distance, query, gallery, "torchreid")
    assert scores.mean_ap == pytest.approx(np.mean(precisions), abs=1e-12)


def test_what_cannot_be_judged_is_refused():
    side = Side(np.array([1, 2]), np.array([1, 2]), np.array([4, 4]))
    with pytest.raises(ConfigError, match="unknown protocol 'market'; there are torchreid"):
        judge(np.zeros((2, 2)), side, side, "market")
    with pytest.raises(DataError, match=r"distance \(2, 3\) does not fit 2 queries and 2 gallery"):
        judge(np.zeros((2, 3)), side, side, "torchreid")
    with pytest.raises(DataError, match=r"distance\[1, 0\] is not a number"):
        judge(np.array([[0, 0], [np.nan, 0]]), side, side, "torchreid")
    with pytest.raises(DataError, match="no query has a match under protocol inclusive"):
        judge(np.zeros((2, 2)), side, side, "inclusive")
    with pytest.raises(DataError, match="gallery_frames is missing"):
        judge(np.zeros((2, 2)), side, Side(side.identities, side.cameras), "released")
