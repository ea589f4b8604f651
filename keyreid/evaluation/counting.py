"""Where right answers stand among gallery entries that lie on several ranks, counted without a Q x G matrix.

A rank keeps the vectors that it embedded. Queries go round in blocks; a rank compares a block with its own entries
(a strip), and what travels are the distances of the queries' own identities and, for each, how many entries of a rank
stand before it. Ties go to the smaller index, as in `protocols.judge`.

One rank gives the bits of many: a matrix product may depend on its shape and on a row's place in it, so both are
fixed: query q is always row q mod ROWS of a block, entry g always column g mod COLUMNS; what another rank has, or
nobody, is 0.
"""

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
import torch

from keyreid.distributed.ranks import Ranks
from keyreid.embedding.distance import Embeddings, Metric, check_metric, compare, prepare
from keyreid.errors import DataError
from keyreid.evaluation.protocols import Answers, Scores

SIDE_BYTES, STRIP_BYTES = 64 * 2**20, 512 * 2**20  # of a block's vectors, and of a strip as long as the gallery
MOST_ROWS, MOST_COLUMNS = 1024, 4096
_ROW_STEP, _COLUMN_STEP = 16, 64  # no block has rows that a matrix product would treat as its rest
_FEW = 64  # more answers than these are counted by sorting: measured, 500,000 entries: 0.1 ms each, or 10 ms for all


class Strips(Protocol):
    """Distances of queries to the gallery entries that this rank looks after: `entries`, int64 [n], ascending."""

    entries: np.ndarray

    def strips(self, wanted: np.ndarray | None = None) -> Iterator[tuple[slice, np.ndarray]]:
        """Blocks of queries and float32 [b, n], which lasts until the next; all ranks take each together.

        Args:
            wanted: rows; only blocks that hold one.
        """
        ...


class Comparison:
    """Distances of vectors that lie on several ranks, as `Strips`; `rows`: queries at a time."""

    def __init__(self, own: Embeddings, query: np.ndarray, gallery: np.ndarray, metric: Metric, ranks: Ranks) -> None:
        """Say what memory it takes; a collective, like all that follows.

        Args:
            own: this rank's vectors.
            query, gallery: int64 [Q], [G], the row in `own` of each; -1 where another rank has it.
        """
        check_metric(own, own, metric)
        self._own, self._query, self._gallery, self._metric, self._ranks = own, query, gallery, metric, ranks
        self.entries = np.flatnonzero(gallery >= 0)
        self._rows_of = gallery[self.entries]
        width = own.vectors.shape[1]
        largest = SIDE_BYTES // (4 * width)
        self.rows = _fixed(min(MOST_ROWS, largest, STRIP_BYTES // (4 * len(gallery))), len(query), _ROW_STEP)
        self._columns = _fixed(min(MOST_COLUMNS, largest), len(gallery), _COLUMN_STEP)
        longest = max(ranks.from_all(len(self.entries)))
        # Vectors as they are, in float32 and a part's copy; a block of distances and two temporaries; the strip; and
        # what identities and cameras are sorted by.
        numbers = 3 * width * (self.rows + self._columns) + 3 * self.rows * self._columns + self.rows * longest
        numbers += 25 * (len(query) + len(gallery))
        if ranks.first:
            what = f"{len(query)} queries with {len(gallery)} gallery entries on {ranks.world_size} rank(s)"
            blocks = f"blocks of {self.rows} x {self._columns}"
            print(f"comparing {what}: {blocks}, {4 * numbers / 2**20:.0f} MiB a rank beside the vectors")
        middle = self._together(query[: self.rows], self.rows).vectors[: len(query)].mean(axis=0, dtype=np.float64)
        self._centre = torch.from_numpy(middle.astype(np.float32)).to(ranks.device)

    def strips(self, wanted: np.ndarray | None = None) -> Iterator[tuple[slice, np.ndarray]]:
        """See `Strips`."""
        numbers = self.entries // self._columns
        cuts = [0, *(np.flatnonzero(np.diff(numbers)) + 1).tolist(), len(numbers)]
        whole = np.empty((self.rows, len(self.entries)), np.float32)
        for rows in row_blocks(len(self._query), self.rows, wanted):
            block = self._together(self._query[rows], self.rows)
            left = prepare(block, self._metric, self._centre, self._ranks.device)
            strip = whole[: rows.stop - rows.start]
            for here in map(slice, cuts[:-1], cuts[1:]):
                places = self.entries[here] % self._columns
                side = _placed(self._own, self._rows_of[here], places, self._columns)
                block = compare(left, prepare(side, self._metric, self._centre, self._ranks.device), self._metric)
                strip[:, here] = block.cpu().numpy()[: len(strip), places]
            yield rows, strip

    def everyone(self) -> Embeddings | None:
        """The vectors of all queries and then of the gallery on the first rank, for what needs them all; else None."""
        rows, result = np.concatenate([self._query, self._gallery]), None
        for part in row_blocks(len(rows), self.rows):
            block = self._together(rows[part], part.stop - part.start)
            if self._ranks.first:
                if result is None:
                    sizes = [None if side is None else side.shape[1] for side in (block.vectors, block.visibility)]
                    sides = [size and np.empty((len(rows), size), np.float32) for size in sizes]
                    result = Embeddings(*sides, self._own.global_width)
                result.vectors[part] = block.vectors
                if result.visibility is not None:
                    result.visibility[part] = block.visibility
        return result

    def _together(self, rows: np.ndarray, size: int) -> Embeddings:
        """A block of rows, wherever they lie, on every rank."""
        places = np.flatnonzero(rows >= 0)
        block = _placed(self._own, rows[places], places, size)
        sides = [side if side is None else self._ranks.added(side) for side in (block.vectors, block.visibility)]
        return Embeddings(*sides, block.global_width)


def judge_strips(strips: Strips, answers: Sequence[Answers], ranks: Ranks) -> list[Scores]:
    """What `protocols.judge` says of a matrix, from its strips on any number of ranks; all ranks get the result.

    Raises:
        DataError: a distance is not a number.
    """
    for rows, strip in strips.strips():
        broken = ranks.added(np.isnan(strip.sum(axis=1)).astype(np.int64))
        if broken.any():
            raise DataError(f"query {rows.start + broken.argmax()}: its distances are not all numbers")
        for answer in answers:
            index, part = strips.entries, strip
            if answer.columns is not None:
                ranked = np.isin(index, answer.columns)
                index, part = index[ranked], strip[:, ranked]
            valid = rows.start + np.flatnonzero(answer.valid[rows])
            own = [answer.own(row) for row in valid]
            ends = np.cumsum([0, *map(len, own)])
            entries = np.concatenate([np.empty(0, np.int64), *own])
            entries = entries if answer.columns is None else answer.columns[entries]
            pieces = [(part[row - rows.start], slice(*ends[at : at + 2])) for at, row in enumerate(valid)]

            distances = np.zeros(len(entries), np.float32)
            place = np.searchsorted(index, entries)
            here = np.isin(entries, index)
            for values, piece in pieces:
                distances[piece][here[piece]] = values[place[piece][here[piece]]]
            ranks.added(distances)
            before = np.zeros(len(entries), np.int64)
            for values, piece in pieces:
                before[piece] = _before(values, index, distances[piece], entries[piece], place[piece])
            ranks.added(before)
            for at, row in enumerate(valid):
                answer.score(row, before[pieces[at][1]])
    return [answer.scores() for answer in answers]


def nearest_entries(
    strips: Strips, answers: Answers, rows: np.ndarray, top: int, ranks: Ranks
) -> dict[int, list[tuple[int, float, bool]]]:
    """What a protocol shows queries first: of each row, up to `top` gallery entries, nearest first.

    Returns:
        {row: [(entry, distance, is a match), ...]}, on all ranks.
    """
    found: dict[int, list[tuple[int, float, bool]]] = {}
    for block, strip in strips.strips(rows):
        for row in np.intersect1d(rows, np.arange(block.start, block.stop)).tolist():
            ranked, right = answers.judged(row, strips.entries)
            kept = np.flatnonzero(ranked)
            values = strip[row - block.start, kept]
            best = np.argsort(values, kind="stable")[:top]
            entries = strips.entries[kept[best]]
            own = zip(values[best].tolist(), entries.tolist(), right[kept[best]].tolist(), strict=True)
            best = sorted(tuple(hit) for hits in ranks.from_all(list(own)) for hit in hits)[:top]
            found[row] = [(entry, distance, match) for distance, entry, match in best]
    return found


def row_blocks(count: int, size: int, wanted: np.ndarray | None = None) -> Iterator[slice]:
    """Slices of `size` rows; of those that hold a `wanted` row, if given."""
    for start in range(0, count, size):
        stop = min(start + size, count)
        if wanted is None or ((wanted >= start) & (wanted < stop)).any():
            yield slice(start, stop)


def _fixed(largest: int, count: int, step: int) -> int:
    """A multiple of the step: as large as allowed, and no larger than is needed for so many."""
    return max(step, min(largest // step * step, -(-count // step) * step))


def _placed(own: Embeddings, rows: np.ndarray, places: np.ndarray, size: int) -> Embeddings:
    """Rows of `own` at their places among zeros."""
    sides = []
    for side in (own.vectors, own.visibility):
        sides.append(side if side is None else np.zeros((size, side.shape[1]), np.float32))
        if side is not None:
            sides[-1][places] = side[rows]
    return Embeddings(*sides, own.global_width)


def _before(
    row: np.ndarray, index: np.ndarray, distances: np.ndarray, entries: np.ndarray, place: np.ndarray
) -> list[int] | np.ndarray:
    """How many of a strip's row stand before each of some entries; `place`: where these would stand in `index`."""
    if len(entries) <= _FEW:
        pairs = zip(distances, place, strict=True)
        return [np.count_nonzero(row[:at] <= value) + np.count_nonzero(row[at:] < value) for value, at in pairs]
    return np.searchsorted(np.sort(_keys(row, index)), _keys(distances, entries))


def _keys(distances: np.ndarray, index: np.ndarray) -> np.ndarray:
    """int64 that order as (distance, index): the bits of floats that are not negative order as they do."""
    keys = (distances + np.float32(0)).view(np.int32).astype(np.int64)  # + 0: there is a -0, whose bits are another's
    keys <<= 32
    keys |= index
    return keys
