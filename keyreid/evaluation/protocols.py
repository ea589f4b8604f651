"""From a distance matrix to mAP, mINP and CMC, under the protocols of video re-identification, by name.

All protocols rank the gallery of a query by distance, leave out the entries of the query's own identity from its own
camera, and call the entries of its identity from other cameras matches. They differ in what else they do:

- `torchreid`: the gallery is given without the queries; AP is the mean precision at the matches (rectangular).
- `official`: the evaluation of the MARS authors (liangzheng06/MARS-evaluation): queries stay in the gallery, identity
  -1 is left out of every ranking, AP is the area under the precision-recall curve by trapezoids.
- `inclusive`: queries stay in the gallery; rectangular AP.
- `released`: what the published evaluator of KeyRe-ID computes. It keeps one identity a tracklet but one camera for
  every frame that its loader yields (clips of 4, the last one padded, at most 41), so that its filter reads, for
  tracklet i, the i-th frame's camera. Only to compare with numbers published that way.

Ties: of two gallery entries at the same distance the one with the smaller index comes first.
Queries without a match are not valid: they count in no average.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from keyreid.datasets.tracklet import DISTRACTOR_IDENTITY, JUNK_IDENTITY
from keyreid.errors import ConfigError, DataError

CMC_RANKS = (1, 5, 10, 20)
COUNTS = ("queries", "valid_queries", "gallery", "junk", "distractors")
RELEASED_CLIP_FRAMES, RELEASED_MAX_CLIPS = 4, 41


@dataclass(frozen=True)
class Protocol:
    """What distinguishes a protocol from the others.

    Attributes:
        junk_left_out: gallery entries of identity -1 are left out of every ranking.
        trapezoid: AP by trapezoids instead of rectangles.
        cameras_by_frame: the published evaluator's camera arrays, see `cameras_as_released`.
    """

    summary: str
    queries_in_gallery: bool = False
    junk_left_out: bool = False
    trapezoid: bool = False
    cameras_by_frame: bool = False


_OFFICIAL = "queries in the gallery, identity -1 left out, trapezoid AP"
_FAULTY = "the published evaluator with its faulty camera filter: only to compare with numbers published that way"
PROTOCOLS = {
    "torchreid": Protocol("gallery without the queries, rectangular AP"),
    "official": Protocol(_OFFICIAL, queries_in_gallery=True, junk_left_out=True, trapezoid=True),
    "inclusive": Protocol("queries in the gallery, rectangular AP", queries_in_gallery=True),
    "released": Protocol(_FAULTY, cameras_by_frame=True),
}


def protocol_named(name: str) -> Protocol:
    """The protocol of that name.

    Raises:
        ConfigError: there is none; names those there are.
    """
    if name not in PROTOCOLS:
        raise ConfigError(f"unknown protocol {name!r}; there are {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]


@dataclass(frozen=True)
class Side:
    """The queries, or the gallery, in the order of the distance matrix.

    Attributes:
        identities, cameras: int64 [N].
        frames: int64 [N], frames of each tracklet; only `released` needs it.
    """

    identities: np.ndarray
    cameras: np.ndarray
    frames: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.identities)

    def __getitem__(self, rows: np.ndarray) -> "Side":
        return Side(self.identities[rows], self.cameras[rows], None if self.frames is None else self.frames[rows])


@dataclass(frozen=True)
class Scores:
    """What a protocol says of a distance matrix; fractions from 0 to 1.

    Attributes:
        average_precision: float64 [Q], NaN for queries that are not valid.
        first_match: int64 [Q], rank of the first match from 1; 0 for queries that are not valid.
        mean_ap, mean_inp: over the valid queries. INP is the number of matches over the rank of the last one.
        gallery: entries of the gallery, junk that is left out not counted.
        junk: gallery entries of identity -1; `junk_left_out` says whether the protocol leaves them out.
        distractors: gallery entries of identity 0.
    """

    protocol: str
    average_precision: np.ndarray
    first_match: np.ndarray
    mean_ap: float
    mean_inp: float
    gallery: int
    junk: int
    distractors: int

    @property
    def queries(self) -> int:
        """All queries."""
        return len(self.first_match)

    @property
    def valid_queries(self) -> int:
        """Queries with at least one match."""
        return int((self.first_match > 0).sum())

    def cmc(self, ranks: int) -> np.ndarray:
        """float64 [ranks]: the share of valid queries whose first match is at rank 1, 2, ... `ranks` or before."""
        first = self.first_match[self.first_match > 0]
        return np.searchsorted(np.sort(first), np.arange(1, ranks + 1), side="right") / len(first)

    def as_dict(self) -> dict[str, Any]:
        """The scores by the names that tables, JSON files and MLflow use; `cmc` is the curve up to the last rank."""
        cmc = self.cmc(max(CMC_RANKS))
        return {
            "protocol": self.protocol,
            "mAP": self.mean_ap,
            "mINP": self.mean_inp,
            **{f"rank{rank}": float(cmc[rank - 1]) for rank in CMC_RANKS},
            **{name: getattr(self, name) for name in COUNTS},
            "cmc": cmc.tolist(),
        }


def judge(distance: np.ndarray, query: Side, gallery: Side, protocol: str) -> Scores:
    """Judge a distance matrix. The gallery is taken as it is: which tracklets it holds is up to the caller.

    Memory beside the matrix: a few of its rows; it may be memory-mapped. Time: one sort of each row.

    Args:
        distance: real [Q, G], smaller is closer.
        protocol: a name in PROTOCOLS.

    Raises:
        DataError: shapes do not fit each other, a distance is NaN, or no query has a match.
    """
    if distance.shape != (len(query), len(gallery)):
        sides = f"{len(query)} queries and {len(gallery)} gallery entries"
        raise DataError(f"distance {distance.shape} does not fit {sides}")
    answers = Answers(query, gallery, protocol)
    for row in range(len(query)):
        ranking = _comparable(distance, row, answers.columns)
        if answers.valid[row]:
            answers.score(row, _positions(ranking, answers.own(row)))
    return answers.scores()


class Answers:
    """Which gallery entries a protocol takes for right answers, and the scores that follow from where they stand.

    Attributes:
        columns: int64, the gallery entries that are ranked; None: all.
        valid: bool [Q], queries with a match. Known by counting: no distances, no pairs.
    """

    def __init__(self, query: Side, gallery: Side, protocol: str) -> None:
        """Raise ConfigError where the protocol is unknown."""
        self.protocol, self._rules = protocol, protocol_named(protocol)
        if self._rules.cameras_by_frame:
            sides = ((query, "query"), (gallery, "gallery"))
            query, gallery = (cameras_as_released(side, name) for side, name in sides)
        junk = gallery.identities == JUNK_IDENTITY
        self._junk = int(junk.sum())
        self.columns = np.flatnonzero(~junk) if self._rules.junk_left_out and junk.any() else None
        self._query, self._all = query, gallery
        self._gallery = gallery if self.columns is None else gallery[self.columns]
        # Entries of one identity are one run of `_order`, and in it those of one camera.
        identity, camera = (
            np.unique(np.concatenate([getattr(query, name), getattr(self._gallery, name)]), return_inverse=True)[1]
            for name in ("identities", "cameras")
        )
        cameras = int(camera.max(initial=0)) + 1
        asked, there = np.split(identity * cameras + camera, [len(query)])
        self._order = np.argsort(there, kind="stable")
        first = asked // cameras * cameras
        self._start, same, same_end, self._end = (
            np.searchsorted(there, codes, sorter=self._order) for codes in (first, asked, asked + 1, first + cameras)
        )
        self.valid = self._end - self._start > same_end - same
        self._counts = np.zeros((3, len(query)))  # of each query: AP, INP, first match

    def check(self) -> int:
        """How many queries are valid; DataError where none is."""
        if not self.valid.any():
            what = f"none of {len(self._query)} queries has an entry of its identity from another camera"
            there = f"among {len(self._gallery)} gallery entries"
            raise DataError(f"no query has a match under protocol {self.protocol}: {what} {there}")
        return int(self.valid.sum())

    def own(self, row: int) -> np.ndarray:
        """int64 [n]: the entries of a query's identity, ascending, among those that are ranked."""
        return np.sort(self._order[self._start[row] : self._end[row]])

    def score(self, row: int, position: np.ndarray) -> None:
        """Take down where the entries `own(row)` of a valid query stand, from 0, all ranked entries counted."""
        matches = self._gallery.cameras[self.own(row)] != self._query.cameras[row]
        self._counts[:, row] = _score(position, matches, self._rules.trapezoid)

    def scores(self) -> Scores:
        """Once all valid queries are taken down; DataError where there are none."""
        self.check()
        precision, inp, first_match = self._counts
        average_precision = np.where(self.valid, precision, np.nan)
        means = float(precision[self.valid].mean()), float(inp[self.valid].mean())
        entries, distractors = len(self._gallery), int((self._gallery.identities == DISTRACTOR_IDENTITY).sum())
        ranks = first_match.astype(np.int64)
        return Scores(self.protocol, average_precision, ranks, *means, entries, self._junk, distractors)

    def judged(self, row: int, entries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of any gallery entries, what the protocol says for a query: bool, is ranked; bool, is a match."""
        identities = self._all.identities[entries]
        same = identities == self._query.identities[row]
        ranked = ~(same & (self._all.cameras[entries] == self._query.cameras[row]))
        return (ranked & (identities != JUNK_IDENTITY) if self._rules.junk_left_out else ranked), same


def cameras_as_released(side: Side, name: str = "tracklets") -> Side:
    """The side with the cameras that the published evaluator reads: the first N of the per-frame array.

    Raises:
        DataError: frame counts are missing.
    """
    if side.frames is None:
        raise DataError(f"protocol released needs the number of frames of every tracklet: {name}_frames is missing")
    tracklet = np.searchsorted(np.cumsum(released_entries(side.frames)), np.arange(len(side)), side="right")
    return Side(side.identities, side.cameras[tracklet], side.frames)


def released_entries(frames: np.ndarray) -> np.ndarray:
    """Frames that the published loader yields for tracklets of so many frames: int64 [N] -> int64 [N]."""
    clips = -(-np.asarray(frames, np.int64) // RELEASED_CLIP_FRAMES)
    return RELEASED_CLIP_FRAMES * np.minimum(clips, RELEASED_MAX_CLIPS)


def _comparable(distance: np.ndarray, row: int, columns: np.ndarray | None) -> np.ndarray:
    """A row in a type that sorts fast, without loss; refuses NaN, which has no place in an order."""
    values = distance[row] if columns is None else distance[row, columns]
    if values.dtype.itemsize < 4:
        values = values.astype(np.float32)  # every float16, int16 and bool is one
    if values.dtype.kind == "f" and np.isnan(values).any():
        column = np.flatnonzero(np.isnan(values))[0]
        raise DataError(f"distance[{row}, {column if columns is None else columns[column]}] is not a number")
    return values


def _positions(distances: np.ndarray, entries: np.ndarray) -> np.ndarray:
    """Where entries stand in a query's ranking, from 0, all entries counted: int64 [n].

    Sorting values is several times faster than sorting indices, and tells the position wherever a value is unique.
    """
    values, ordered = distances[entries], np.sort(distances)
    position = np.searchsorted(ordered, values)
    if (np.searchsorted(ordered, values, side="right") - position > 1).any():  # tied: the index decides
        rank = np.empty(len(distances), np.int64)
        rank[np.argsort(distances, kind="stable")] = np.arange(len(distances))
        position = rank[entries]
    return position


def _score(position: np.ndarray, matches: np.ndarray, trapezoid: bool) -> tuple[float, float, int]:
    """AP, INP and the first match's rank of one query.

    Args:
        position: of the entries of its identity, see `_positions`.
        matches: bool, those from other cameras, at least one; the others are taken out of the ranking.
    """
    order = np.argsort(position)
    matches = matches[order]
    rank = (position[order] + 1 - np.cumsum(~matches))[matches]
    nth = np.arange(1, len(rank) + 1)
    precision = nth / rank
    if trapezoid:
        before = np.where(rank > 1, (nth - 1) / np.maximum(rank - 1, 1), 1.0)
        precision = (precision + before) / 2
    return np.cumsum(precision)[-1] / len(rank), len(rank) / rank[-1], rank[0]
