"""An index of large galleries, by FAISS.

FAISS, because it is the library made for this: plain files, no server, memory-mapped, and a filter by row inside the
search (the camera). Vectors are kept in half precision: distances are right to three digits, so nothing needs to be
compared again, and only the share of true neighbours found depends on how far is looked. Two kinds:

- `graph` (`HNSW32,SQfp16`): a graph of neighbours, for up to GRAPH_MOST rows. It answers 20 times faster than lists
  and takes 13 times longer to build (benchmarks/README.md); its 256 bytes a row are small beside the vectors.
- `lists` (`IVF,SQfp16`): about sqrt(N) inverted lists, for more rows.

A search maps the file and reads what it needs. An index grows when its gallery does: what is new is added at its end.
"""

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from keyreid.embedding.distance import Metric
from keyreid.embedding.vectors import VectorFiles, matrix
from keyreid.errors import ConfigError, DataError, install_hint
from keyreid.files import replace_text, replacing, writing
from keyreid.ownership import owned
from keyreid.progress import track

FORMAT = "keyreid-gallery-index/1"
Kind = Literal["graph", "lists"]
GRAPH_MOST = 100_000  # rows; of 768 numbers their graph takes 77 CPU-seconds
NEIGHBOURS, LOOKED_AT = 32, 64  # of a row in the graph; candidates that a search keeps, at least twice what it gives
TRAINING_ROWS_A_LIST, MAX_LISTS = 64, 8192
PROBED_SHARE, MIN_PROBES = 16, 16  # one list of so many is searched, and at least so many lists


class GalleryIndex:
    """An index file and what it is of (`FILE.json` beside it).

    Attributes:
        kind: `graph` or `lists`.
        probes: lists that are searched, or candidates that are kept in a graph.
        lists: how many there are; 0 in a graph.
        made: rows that were added to the file when it was opened.
    """

    @classmethod
    def fitting(
        cls, path: Path, gallery: VectorFiles, metric: Metric, probes: int | None = None, kind: Kind | None = None
    ) -> "GalleryIndex":
        """The index at a path, grown first by what the gallery has more, or built where it is of other vectors.

        Args:
            kind: default that of the file, or by size (GRAPH_MOST).
        """
        made = 0
        if not cls.fits(path, gallery, metric, kind):
            with owned(path.parent, "keyreid search", path.name, wait=True):
                made = cls._extend(path, gallery, metric, kind)
        index = cls(path, gallery, metric, probes)
        index.made = made
        return index

    @classmethod
    def fits(cls, path: Path, gallery: VectorFiles, metric: Metric, kind: Kind | None = None) -> bool:
        """Whether the index file is there and is of these very vectors."""
        held, _ = _held(path, gallery, metric, kind)
        return sorted(held) == list(range(len(gallery.paths)))

    @classmethod
    def build(
        cls, gallery: VectorFiles, path: Path, metric: Metric, kind: Kind | None = None, seed: int = 0
    ) -> "GalleryIndex":
        """Build the index of a gallery and write it; errors as of opening one.

        Memory: 2 N D bytes for the vectors; a graph's 8 x 32 N beside them, or for lists 4 x 64 x sqrt(N) x D bytes for
        the sample that they are learnt from.
        """
        faiss = _faiss(metric)
        if not len(gallery):
            raise DataError(f"{gallery.paths[0]}: the gallery is empty")
        kind = kind or ("graph" if len(gallery) <= GRAPH_MOST else "lists")
        lists = int(np.clip(round(np.sqrt(len(gallery))), 1, MAX_LISTS))
        what = f"HNSW{NEIGHBOURS},SQfp16" if kind == "graph" else f"IVF{lists},SQfp16"
        index = faiss.index_factory(gallery.about.width, what, faiss.METRIC_L2)
        if kind == "lists":
            index.cp.min_points_per_centroid = 1  # small galleries: no warning for what is harmless
            index.cp.seed = seed
        index.train(_sample(gallery, min(len(gallery), TRAINING_ROWS_A_LIST * lists), metric, seed))
        _write(index, gallery, path, [], metric, kind)
        return cls(path, gallery, metric)

    @classmethod
    def _extend(cls, path: Path, gallery: VectorFiles, metric: Metric, kind: Kind | None) -> int:
        """Add the gallery's new files, or build anew where there is nothing to add to; gives how many rows."""
        held, kind_there = _held(path, gallery, metric, kind)
        if not held:
            cls.build(gallery, path, metric, kind)
            return len(gallery)
        index = _faiss(metric).read_index(str(path))  # in memory, once
        before = index.ntotal
        _write(index, gallery, path, held, metric, kind_there)
        return index.ntotal - before

    def __init__(self, path: Path, gallery: VectorFiles, metric: Metric, probes: int | None = None) -> None:
        """Open an index.

        Args:
            probes: lists that are searched; default a sixteenth, at least 16. Of a graph, candidates; default 64. More
                find more, in more time.

        Raises:
            ConfigError: FAISS is not installed, or the metric cannot be indexed.
            DataError: there is no such index, it is damaged, or it is of other vectors.
        """
        self._index = _read(path, metric)
        held, self.kind = _held(path, gallery, metric)
        if sorted(held) != list(range(len(gallery.paths))):
            raise DataError(f"{path}: no index of these vectors by {metric}; leave it out, or delete it to build it")
        self.metric, self.made = metric, 0
        self.lists = 0 if self.kind == "graph" else self._index.nlist
        lists = min(self.lists, probes or max(MIN_PROBES, self.lists // PROBED_SHARE))
        self.probes = lists or probes or LOOKED_AT
        # Which row of the gallery each row here is: files may come in another order, where one was added later.
        pieces = [np.arange(*gallery.rows_of_file(number)) for number in held]
        self._row = None if held == sorted(held) else np.concatenate(pieces)

    def search(self, vectors: np.ndarray, k: int, allowed: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """The k nearest rows: distances float32 [Q, k] ascending and rows [Q, k]; infinity, -1 where fewer are found.

        Args:
            allowed: bool [N], rows that may be found.
        """
        faiss = _faiss(self.metric)
        graph = self.kind == "graph"
        settings: dict[str, Any] = {"efSearch": max(self.probes, 2 * k)} if graph else {"nprobe": self.probes}
        if allowed is not None:
            allowed = allowed if self._row is None else allowed[self._row]
            bits = np.packbits(allowed, bitorder="little")  # must outlive the search
            settings["sel"] = faiss.IDSelectorBitmap(len(allowed), faiss.swig_ptr(bits))
        asking = _for_metric(vectors, self.metric)
        params = (faiss.SearchParametersHNSW if graph else faiss.SearchParametersIVF)(**settings)
        squared, rows = self._index.search(asking, k, params=params)
        if self._row is not None:
            rows = np.where(rows < 0, -1, self._row[rows])
        squared = np.where(rows < 0, np.inf, np.maximum(squared, 0))
        return (np.sqrt(squared) if self.metric == "euclidean" else squared / 2), rows


def _faiss(metric: Metric):
    """FAISS, where it is there and can index the metric."""
    if metric not in ("euclidean", "cosine"):
        raise ConfigError(f"--metric {metric} cannot be indexed: it weighs parts for each pair; leave --index out")
    try:
        import faiss
    except ImportError:
        hint = install_hint("search")
        raise ConfigError(f"an index needs FAISS; {hint}. Without --index the search is exact") from None
    return faiss


def _read(path: Path, metric: Metric) -> Any:
    """The index in a file, mapped; DataError where it cannot be."""
    faiss = _faiss(metric)
    try:
        return faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)
    except RuntimeError as error:
        raise DataError(f"{path}: not a whole index: {str(error).splitlines()[0]}; delete it") from None


def _write(index: Any, gallery: VectorFiles, path: Path, held: list[int], metric: Metric, kind: Kind) -> None:
    """Add the files that an index does not hold, and write it.

    The card goes first: whoever is killed before the index follows leaves one that holds the card's first files, and
    that is known by its rows.
    """
    rest = [number for number in range(len(gallery.paths)) if number not in held]
    steps = sum(-(-rows // gallery.about.rows_at_a_time) for rows in np.diff(gallery.rows_of_file(rest)).ravel())
    blocks = (table for number in rest for _, table in VectorFiles([gallery.paths[number]]).blocks(["vector"]))
    for table in track(blocks, int(steps), "indexing", "blocks"):
        index.add(_for_metric(matrix(table["vector"], gallery.about.width), metric))
    files = [_described(gallery, number) for number in [*held, *rest]]
    card = {"format": FORMAT, "kind": kind, "metric": metric, "weights": gallery.about.weights, "files": files}
    with writing(path), replacing(path, alone=True) as partial:
        _faiss(metric).write_index(index, str(partial))
        if not held:  # the card must not vouch for another index
            path.unlink(missing_ok=True)
        replace_text(_card_path(path), json.dumps(card, indent=1))


def _held(path: Path, gallery: VectorFiles, metric: Metric, kind: Kind | None = None) -> tuple[list[int], Kind]:
    """Which of the gallery's files an index holds, in its order, and its kind; none where it is of anything else."""
    try:
        card = json.loads(_card_path(path).read_text())
        there, files = card.get("kind", "lists"), card["files"]
        wanted = {"format": FORMAT, "metric": metric, "weights": gallery.about.weights}
        if not path.is_file() or (kind or there) != there or any(card[name] != wanted[name] for name in wanted):
            return [], there
        if "rows" in card:  # of the last version, which knew a gallery as a whole
            made = gallery.about.fingerprint
            whole = [{"file": path.name, "bytes": path.stat().st_size, "fingerprint": made} for path in gallery.paths]
            return (list(range(len(whole))) if (card["rows"], files) == (len(gallery), whole) else []), there
        numbers = {json.dumps(_described(gallery, number)): number for number in range(len(gallery.paths))}
        ends = np.cumsum([file["rows"] for file in files])
        held = [numbers.get(json.dumps(file), -1) for file in files]
        held = held[: int(np.searchsorted(ends, _read(path, metric).ntotal, side="right"))]
    except (OSError, ValueError, KeyError, TypeError):
        return [], kind or "lists"
    return ([] if -1 in held else held), there


def _described(gallery: VectorFiles, number: int) -> dict[str, Any]:
    """How a card knows one of the gallery's files again."""
    path, (first, end) = gallery.paths[number], gallery.rows_of_file(number)
    made = gallery.fingerprints[number]
    return {"file": path.name, "bytes": path.stat().st_size, "rows": int(end - first), "fingerprint": made}


def _card_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def _sample(gallery: VectorFiles, count: int, metric: Metric, seed: int) -> np.ndarray:
    """So many rows of the gallery, drawn at random, in one pass."""
    chosen = np.sort(np.random.default_rng(seed).permutation(len(gallery))[:count])
    sample = np.empty((count, gallery.about.width), np.float32)
    for first, table in gallery.blocks(["vector"]):
        start, end = np.searchsorted(chosen, [first, first + len(table)])
        if end > start:
            drawn = table["vector"].take(pa.array(chosen[start:end] - first))
            sample[start:end] = _for_metric(matrix(drawn, gallery.about.width), metric)
    return sample


def _for_metric(vectors: np.ndarray, metric: Metric) -> np.ndarray:
    """float32, and of length 1 for cosine: |a - b|^2 / 2 is then 1 - cos."""
    vectors = np.array(vectors, np.float32, order="C")
    if metric == "cosine":
        _faiss(metric).normalize_L2(vectors)
    return vectors
