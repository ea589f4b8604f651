"""An index of large galleries, by FAISS.

FAISS, because it is the library made for this: plain files, no server, memory-mapped inverted lists, and a filter by
row inside the search (the camera). The index is an inverted file of about sqrt(N) lists with half-precision vectors
(`IVF,SQfp16`): distances are right to three digits, so nothing needs to be compared again, and only the share of true
neighbours found depends on how many lists are probed. A search maps the file; it does not read it whole.
"""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa

from keyreid.embedding.distance import Metric
from keyreid.embedding.vectors import VectorFiles, matrix
from keyreid.errors import ConfigError, DataError, install_hint
from keyreid.files import replacing, writing
from keyreid.ownership import owned
from keyreid.progress import track

FORMAT = "keyreid-gallery-index/1"
TRAINING_ROWS_A_LIST, MAX_LISTS = 64, 8192
PROBED_SHARE, MIN_PROBES = 16, 16  # one list of so many is searched, and at least so many lists


class GalleryIndex:
    """An index file and what it is of (`FILE.json` beside it)."""

    @classmethod
    def fitting(cls, path: Path, gallery: VectorFiles, metric: Metric, probes: int | None = None) -> "GalleryIndex":
        """The index at a path, built first where it is not there or not of these very vectors."""
        if not cls.fits(path, gallery, metric):
            with owned(path.parent, "keyreid search", path.name, wait=True):
                if not cls.fits(path, gallery, metric):
                    cls.build(gallery, path, metric)
        return cls(path, gallery, metric, probes)

    @staticmethod
    def fits(path: Path, gallery: VectorFiles, metric: Metric) -> bool:
        """Whether the index file is there and is of these very vectors."""
        try:
            return path.is_file() and json.loads(_card_path(path).read_text()) == _card(gallery, metric)
        except (OSError, ValueError):
            return False

    @classmethod
    def build(cls, gallery: VectorFiles, path: Path, metric: Metric, seed: int = 0) -> "GalleryIndex":
        """Build the index of a gallery and write it; errors as of opening one.

        Memory: 2 N D bytes for the vectors, and 4 x 64 x sqrt(N) x D for the sample that the lists are learnt from.
        """
        faiss = _faiss(metric)
        if not len(gallery):
            raise DataError(f"{gallery.paths[0]}: the gallery is empty")
        lists = int(np.clip(round(np.sqrt(len(gallery))), 1, MAX_LISTS))
        index = faiss.index_factory(gallery.about.width, f"IVF{lists},SQfp16", faiss.METRIC_L2)
        index.cp.min_points_per_centroid = 1  # small galleries: no warning for what is harmless
        index.cp.seed = seed
        index.train(_sample(gallery, min(len(gallery), TRAINING_ROWS_A_LIST * lists), metric, seed))
        steps = -(-len(gallery) // gallery.about.rows_at_a_time)
        for _, table in track(gallery.blocks(["vector"]), steps, "indexing", "blocks"):
            index.add(_for_metric(matrix(table["vector"], gallery.about.width), metric))
        with writing(path), replacing(path, alone=True) as partial:
            faiss.write_index(index, str(partial))
            _card_path(path).unlink(missing_ok=True)  # it must not vouch for the new index
        _card_path(path).write_text(json.dumps(_card(gallery, metric), indent=1))
        return cls(path, gallery, metric)

    def __init__(self, path: Path, gallery: VectorFiles, metric: Metric, probes: int | None = None) -> None:
        """Open an index.

        Args:
            probes: lists that are searched; default a sixteenth, at least 16. More find more, in more time.

        Raises:
            ConfigError: FAISS is not installed, or the metric cannot be indexed.
            DataError: there is no such index, it is damaged, or it is of other vectors.
        """
        faiss = _faiss(metric)
        if not self.fits(path, gallery, metric):
            raise DataError(f"{path}: no index of these vectors by {metric}; leave it out, or delete it to build it")
        try:
            self._index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY)
        except RuntimeError as error:
            raise DataError(f"{path}: not a whole index: {str(error).splitlines()[0]}; delete it") from None
        self.metric = metric
        self.lists = self._index.nlist
        self.probes = min(self.lists, probes or max(MIN_PROBES, self.lists // PROBED_SHARE))

    def search(self, vectors: np.ndarray, k: int, allowed: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """The k nearest rows: distances float32 [Q, k] ascending and rows [Q, k]; infinity, -1 where fewer are found.

        Args:
            allowed: bool [N], rows that may be found.
        """
        faiss = _faiss(self.metric)
        settings = {"nprobe": self.probes}
        if allowed is not None:
            bits = np.packbits(allowed, bitorder="little")  # must outlive the search
            settings["sel"] = faiss.IDSelectorBitmap(len(allowed), faiss.swig_ptr(bits))
        asking = _for_metric(vectors, self.metric)
        squared, rows = self._index.search(asking, k, params=faiss.SearchParametersIVF(**settings))
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


def _card(gallery: VectorFiles, metric: Metric) -> dict:
    made = gallery.about.fingerprint
    files = [{"file": path.name, "bytes": path.stat().st_size, "fingerprint": made} for path in gallery.paths]
    return {"format": FORMAT, "metric": metric, "rows": len(gallery), "files": files, "weights": gallery.about.weights}


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
