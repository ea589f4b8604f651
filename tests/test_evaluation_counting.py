"""Answers counted in strips, on one rank and on three, against the judge of a whole matrix."""

import numpy as np
import pytest
from evaluation_toys import toy_config
from packed import index_only
from training_runs import together

from keyreid.distributed.ranks import Ranks
from keyreid.embedding import reranking, vectors
from keyreid.embedding.distance import Embeddings
from keyreid.embedding.vectors import Vectors, VectorsAbout, description
from keyreid.errors import ConfigError, DataError, KeyreidError
from keyreid.evaluation import counting
from keyreid.evaluation.counting import Comparison, judge_strips, nearest_entries
from keyreid.evaluation.judging import check_judgeable
from keyreid.evaluation.protocols import PROTOCOLS, Answers, Side, judge
from keyreid.evaluation.ranking import Reranked
from keyreid.evaluation.scores import RATES

QUERIES, GALLERY, GLOBAL, PARTS, PART = 70, 333, 4, 2, 3
METRICS = ["euclidean", "cosine", "visible"]


class Columns:
    """Some columns of a matrix as strips of five queries."""

    def __init__(self, matrix, entries):
        self.matrix, self.entries = matrix.astype(np.float32), entries

    def strips(self, wanted=None):
        for rows in counting.row_blocks(len(self.matrix), 5, wanted):
            yield rows, self.matrix[rows, self.entries]


def sides(seed, queries=QUERIES, gallery=GALLERY, identities=9):
    rng = np.random.default_rng(seed)
    made = []
    for count, low in ((queries, 1), (gallery, -1)):
        who = rng.integers(low, identities, count)
        where = np.where(who == 3, 2, rng.integers(1, 5, count))  # identity 3 is seen by one camera alone
        made.append(Side(who, where, rng.integers(1, 300, count)))
    return made


def same_scores(one, other):
    assert one.as_dict() == other.as_dict()
    np.testing.assert_array_equal(one.average_precision, other.average_precision)
    np.testing.assert_array_equal(one.first_match, other.first_match)


@pytest.mark.parametrize("levels", [1, 7, 10**6])
@pytest.mark.parametrize("identities", [3, 40])  # of more than _FEW entries, and of fewer
def test_strips_are_judged_as_the_matrix_is(levels, identities):
    rng = np.random.default_rng(levels)
    query, gallery = sides(levels, identities=identities)
    matrix = rng.integers(0, levels, (QUERIES, GALLERY))
    answers = [Answers(query, gallery, name) for name in PROTOCOLS]
    found = judge_strips(Columns(matrix, np.arange(GALLERY)), answers, Ranks.alone())
    for name, scores in zip(PROTOCOLS, found, strict=True):
        same_scores(scores, judge(matrix, query, gallery, name))


def test_a_distance_that_is_no_number_is_refused():
    matrix = np.zeros((QUERIES, GALLERY))
    matrix[8, 3] = np.nan
    with pytest.raises(DataError, match="query 8: its distances are not all numbers"):
        judge_strips(Columns(matrix, np.arange(GALLERY)), [Answers(*sides(0), "torchreid")], Ranks.alone())


def test_valid_queries_are_counted_without_pairs():
    """A matrix of these queries and entries would take 10 GB, and their pairs of one identity 8 GB."""
    rng = np.random.default_rng(0)
    count = 50_000
    who, where = rng.integers(1, 6, 2 * count), rng.integers(1, 3, 2 * count)
    where[who == 2] = 1
    shards = index_only(who, where, np.full(2 * count, 2))
    shards.select = lambda split, *_: np.arange(count) + (0 if split == "query" else count)
    shards.tracklets = None  # no object a tracklet
    assert check_judgeable(shards, toy_config(shards)) == (who[:count] != 2).sum()


def made(seed=0):
    """Everybody's vectors, of whole numbers for every third, so that there are ties; who queries, and the gallery."""
    rng = np.random.default_rng(seed)
    total = QUERIES + GALLERY
    numbers = rng.standard_normal((total, GLOBAL + PARTS * PART), dtype=np.float32)
    numbers[::3] = numbers[::3].round()
    everyone = Embeddings(numbers, rng.integers(0, 5, (total, PARTS)).astype(np.float32) / 4, GLOBAL)
    order = rng.permutation(total)
    return everyone, order[:QUERIES], order[QUERIES:]


def comparison(metric, owner, ranks):
    """What this rank compares, if `owner` [N] says whose the vectors are."""
    everyone, query, gallery = made()
    own = np.flatnonzero(owner == ranks.rank)
    place = np.full(len(everyone), -1)
    place[own] = np.arange(len(own))
    return Comparison(everyone[own], place[query], place[gallery], metric, ranks)


def judged(ranks, owner):
    """All that ranks find out together, as arrays by name."""
    query, gallery = sides(1)
    answers = [Answers(query, gallery, name) for name in PROTOCOLS]
    result = {}
    for metric in (*METRICS, "reranked"):
        strips = comparison("euclidean" if metric == "reranked" else metric, owner, ranks)
        if metric == "reranked":
            strips = Reranked(strips, QUERIES, GALLERY, toy_config(index_only(*np.ones((3, 2), int))).evaluation, ranks)
        for scores in judge_strips(strips, answers, ranks):
            name = f"{metric} {scores.protocol}"
            result[name] = np.array([scores.as_dict()[rate] for rate in RATES])
            result[f"{name} ap"] = scores.average_precision
        shown = nearest_entries(strips, answers[1], np.array([0, 3, 69]), 12, ranks)
        result[f"{metric} shown"] = np.array(list(shown.values()))
    return result


def rows(first, stop):
    """Vectors by number."""
    keys = [f"k{number}" for number in range(first, stop)]
    columns = {"key": keys, "identity": range(first, stop), "camera": [1] * len(keys), "frames": [2] * len(keys)}
    numbers = np.arange(first * 3, stop * 3, dtype=np.float32).reshape(-1, 3)
    about = VectorsAbout(3, 1, 3, "made")
    return Vectors(about, description(columns), numbers, np.ones((len(numbers), 1), np.float32))


def on_a_rank(folder):
    import torch

    counting.MOST_ROWS, counting.MOST_COLUMNS, reranking._STEP = 32, 64, 100
    vectors.ROW_GROUP_BYTES = 7 * 3 * 4
    world = torch.distributed
    ranks = Ranks(world.get_rank(), world.get_world_size(), 0, torch.device("cpu"), world.group.WORLD)
    owner = np.random.default_rng(5).choice([0, 2], QUERIES + GALLERY)  # the second rank has none
    np.savez(folder / f"rank{ranks.rank}.npz", **judged(ranks, owner))
    cuts = [0, 9, 9, 40]
    rows(*cuts[ranks.rank : ranks.rank + 2]).save(folder / "together.parquet", ranks)

    def work():
        yield from range(2 + 3 * ranks.rank)
        if ranks.rank == 1:
            raise DataError("the second rank cannot go on")

    with pytest.raises(DataError, match="the second rank cannot go on"):
        ranks.in_step(work())
    with pytest.raises(KeyreidError, match="cannot be written"):
        rows(*cuts[ranks.rank : ranks.rank + 2]).save(folder / "together.parquet" / "below", ranks)


def test_three_ranks_find_the_bits_of_one_and_write_its_file(tmp_path, monkeypatch):
    together(on_a_rank, 3, tmp_path)
    for module, name, size in ((counting, "MOST_ROWS", 32), (counting, "MOST_COLUMNS", 64), (reranking, "_STEP", 100)):
        monkeypatch.setattr(module, name, size)
    alone = judged(Ranks.alone(), np.zeros(QUERIES + GALLERY, int))
    for rank in range(3):
        with np.load(tmp_path / f"rank{rank}.npz") as found:
            assert sorted(found) == sorted(alone)
            for name, values in alone.items():
                np.testing.assert_array_equal(found[name], values, err_msg=name)
    monkeypatch.setattr(vectors, "ROW_GROUP_BYTES", 7 * 3 * 4)
    rows(0, 40).save(tmp_path / "alone.parquet")
    assert (tmp_path / "together.parquet").read_bytes() == (tmp_path / "alone.parquet").read_bytes()


@pytest.mark.parametrize("metric", METRICS)
def test_blocks_of_any_size_give_the_matrix(metric, monkeypatch):
    from keyreid.embedding.distance import pairwise

    everyone, query, gallery = made()
    for size in (16, 4096):
        monkeypatch.setattr(counting, "MOST_ROWS", size)
        monkeypatch.setattr(counting, "MOST_COLUMNS", size)
        one = comparison(metric, np.zeros(len(everyone), int), Ranks.alone())
        strips = np.concatenate([strip.copy() for _, strip in one.strips()])
        np.testing.assert_allclose(strips, pairwise(everyone[query], everyone[gallery], metric), atol=2e-3)
        only = [rows for rows, _ in one.strips(np.array([69]))]
        assert [rows.stop for rows in only] == [QUERIES]


def test_reranking_says_what_it_costs_and_has_a_bound(monkeypatch, capsys):
    one = comparison("euclidean", np.zeros(QUERIES + GALLERY, int), Ranks.alone())
    evaluation = toy_config(index_only(*np.ones((3, 2), int))).evaluation
    Reranked(one, QUERIES, GALLERY, evaluation, Ranks.alone())
    assert f"re-ranking {QUERIES + GALLERY} tracklets: about" in capsys.readouterr().out
    monkeypatch.setattr(reranking, "MOST", 400)
    with pytest.raises(ConfigError, match=r"re-ranking 403 tracklets: .* leave out evaluation.rerank"):
        Reranked(one, QUERIES, GALLERY, evaluation, Ranks.alone())
