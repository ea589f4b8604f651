"""Vector files: Parquet with one row a tracklet, written and read in pieces, so that size is bounded by the disk alone.

Columns: `key`; `identity`, `identity_name` (null where unknown); `camera`, `camera_name`; `frames`; `first_frame`,
`last_frame` (numbers in the video, where frames are numbered); `start_seconds`, `end_seconds` (where the frame rate is
known); `visibility` (fixed list, float); `vector` (fixed list, float or half float); `picture` (JPEG of the middle
frame, or null). The file's metadata says which network made the vectors. Any Parquet tool reads them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from keyreid.embedding.distance import Embeddings
from keyreid.errors import DataError
from keyreid.files import replacing

FORMAT = "keyreid-vectors/1"
METADATA_KEY = b"keyreid"
ROW_GROUP_BYTES = 32 * 2**20  # of vectors; also what is read at a time
DESCRIPTION = (
    ("key", pa.string()),
    ("identity", pa.int64()),
    ("identity_name", pa.string()),
    ("camera", pa.int64()),
    ("camera_name", pa.string()),
    ("frames", pa.int32()),
    ("first_frame", pa.int64()),
    ("last_frame", pa.int64()),
    ("start_seconds", pa.float64()),
    ("end_seconds", pa.float64()),
)


@dataclass(frozen=True)
class VectorsAbout:
    """What the vectors of a file are.

    Attributes:
        width: D.
        parts: P, entries of `visibility`.
        global_width: how many of the D are the global feature; P parts of equal width follow, or none.
        dataset: name of the data set.
        weights: name and SHA-256 of the weights file: only vectors of one network can be compared.
        dtype: of the stored vectors.
        fingerprint: of all that decides the content, by which an interrupted embedding knows its parts again.
    """

    width: int
    parts: int
    global_width: int
    dataset: str
    weights: dict[str, str] = field(default_factory=dict)
    dtype: Literal["float32", "float16"] = "float32"
    fingerprint: str = ""

    @property
    def rows_at_a_time(self) -> int:
        """Rows of a row group, and of what is read at a time."""
        return max(1, ROW_GROUP_BYTES // (4 * self.width))

    @property
    def schema(self) -> pa.Schema:
        """The Parquet schema, with this object in its metadata."""
        number = pa.float32() if self.dtype == "float32" else pa.float16()
        columns = [
            *DESCRIPTION,
            ("visibility", pa.list_(pa.float32(), self.parts)),
            ("vector", pa.list_(number, self.width)),
            ("picture", pa.binary()),
        ]
        return pa.schema(columns, {METADATA_KEY: json.dumps({"format": FORMAT, **asdict(self)}).encode()})


def make_table(about: VectorsAbout, columns: dict[str, Sequence[Any]], visibility: Any, vectors: Any) -> pa.Table:
    """Rows of a vector file: DESCRIPTION's columns and `picture`, visibility [n, P] and vectors [n, D]."""
    schema = about.schema
    lists = {
        "visibility": (np.asarray(visibility, np.float32), about.parts),
        "vector": (np.asarray(vectors, about.dtype), about.width),
    }
    arrays = []
    for column in schema:
        if column.name in lists:
            values, size = lists[column.name]
            arrays.append(pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), size))
        else:
            arrays.append(pa.array(columns[column.name], column.type))
    return pa.Table.from_arrays(arrays, schema=schema)


def write_vectors(path: Path, about: VectorsAbout, tables: Iterator[pa.Table]) -> int:
    """Write tables as one file with row groups of about ROW_GROUP_BYTES; it is there whole or not at all.

    Returns:
        How many rows were written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = 0
    waiting: list[pa.Table] = []
    # Vectors do not get smaller by compression or dictionaries; the other columns do.
    plain = [column.name for column in about.schema if column.name not in ("visibility", "vector", "picture")]
    packed = {"compression": dict.fromkeys(plain, "zstd"), "use_dictionary": plain, "write_statistics": plain}
    try:
        with replacing(path, alone=True) as partial, pq.ParquetWriter(partial, about.schema, **packed) as writer:

            def flush() -> None:
                if waiting:
                    writer.write_table(pa.concat_tables(waiting).combine_chunks(), row_group_size=about.rows_at_a_time)
                    waiting.clear()

            for table in tables:
                rows += len(table)
                waiting.append(table.replace_schema_metadata(about.schema.metadata))
                if sum(map(len, waiting)) >= about.rows_at_a_time:
                    flush()
            flush()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from None
    return rows


_KEYS_COMPARED = 20_000  # for the nearest one to a mistyped key, which takes long


class VectorFiles:
    """Vector files as one list of N rows; nothing but what is asked for is read.

    Attributes:
        paths: the files.
        about: what their vectors are; the same network made all of them.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        """Open files, and all `*.parquet` of folders.

        Raises:
            DataError: a file is missing, is none of ours, or was made by another network.
        """
        self.paths = [file for path in paths for file in _files(path)]
        self._files = [_open(path) for path in self.paths]
        abouts = [read_about(path, file) for path, file in zip(self.paths, self._files, strict=True)]
        self.about = abouts[0]
        for path, about in zip(self.paths, abouts, strict=True):
            check_comparable(self.about, about, f"{self.paths[0]}", f"{path}")
        self._counts = [file.metadata.num_rows for file in self._files]
        self._first = np.cumsum([0, *self._counts])

    def __len__(self) -> int:
        return int(self._first[-1])

    def blocks(self, columns: Sequence[str] = (), rows: int | None = None) -> Iterator[tuple[int, pa.Table]]:
        """All rows in order, some at a time: the number of the first, and the rows.

        Args:
            rows: how many at a time; default what fits ROW_GROUP_BYTES.
        """
        first = 0
        for path, file in zip(self.paths, self._files, strict=True):
            try:
                for batch in file.iter_batches(rows or self.about.rows_at_a_time, columns=list(columns)):
                    yield first, pa.table(batch)
                    first += len(batch)
            except (OSError, pa.ArrowException) as error:
                raise DataError(f"{path}: damaged: {error}") from None

    def column(self, name: str) -> np.ndarray:
        """One column of all rows."""
        pieces = [table[name].to_numpy() for _, table in self.blocks([name], rows=1 << 16)]
        return np.concatenate(pieces) if pieces else np.empty(0, object)

    def take(self, rows: np.ndarray, columns: Sequence[str]) -> pa.Table:
        """Some rows in the order given; reads the row groups that hold them, one at a time."""
        order = np.argsort(rows, kind="stable")
        wanted = np.asarray(rows, np.int64)[order]
        pieces = []
        for number, file in enumerate(self._files):
            start = self._first[number]
            for group in range(file.metadata.num_row_groups):
                end = start + file.metadata.row_group(group).num_rows
                inside = wanted[np.searchsorted(wanted, start) : np.searchsorted(wanted, end)]
                if len(inside):
                    pieces.append(file.read_row_group(group, columns=list(columns)).take(inside - start))
                start = end
        if not pieces:
            return self.about.schema.empty_table().select(list(columns))
        return pa.concat_tables(pieces).take(np.argsort(order, kind="stable"))

    def rows_of(self, keys: Sequence[str]) -> np.ndarray:
        """int64: the row of each key.

        Raises:
            DataError: a key is not there; a near one is named.
        """
        place = {key: row for row, key in enumerate(self.column("key").tolist())}
        missing = [key for key in keys if key not in place]
        if missing:
            import difflib

            some = list(place)[:_KEYS_COMPARED]
            near = difflib.get_close_matches(missing[0], some, n=1, cutoff=0.0)
            hint = f"; the nearest key is {near[0]}" if near else ""
            raise DataError(f"{self.paths[0]}: no tracklet has the key {missing[0]!r}{hint}")
        return np.array([place[key] for key in keys], np.int64)


def embeddings_of(table: pa.Table, about: VectorsAbout) -> Embeddings:
    """The vectors and visibilities of rows, as distances take them."""
    return Embeddings(
        matrix(table["vector"], about.width),
        matrix(table["visibility"], about.parts),
        about.global_width,
    )


def read_about(path: Path, file: pq.ParquetFile | None = None) -> VectorsAbout:
    """What a vector file says of itself.

    Raises:
        DataError: it is missing or no vector file.
    """
    metadata = (file or _open(path)).schema_arrow.metadata or {}
    try:
        values = json.loads(metadata[METADATA_KEY])
        if values.pop("format") != FORMAT:
            raise ValueError(f"its format is not {FORMAT}")
        return VectorsAbout(**values)
    except (KeyError, ValueError, TypeError) as error:
        raise DataError(f"{path}: Parquet, but not a file of vectors as `keyreid embed` writes: {error}") from None


def check_comparable(one: VectorsAbout, other: VectorsAbout, one_name: str, other_name: str) -> None:
    """Raise DataError where the vectors are not of one network and one kind."""
    if one.weights.get("sha256") != other.weights.get("sha256"):
        names = [about.weights.get("name", "unknown weights") for about in (one, other)]
        raise DataError(
            f"{other_name} was embedded by {names[1]}, {one_name} by {names[0]}: vectors of different networks cannot "
            "be compared; embed both with the same weights"
        )
    if (one.width, one.global_width) != (other.width, other.global_width):
        raise DataError(
            f"{other_name} has vectors of {other.width} numbers, {one_name} of {one.width}: embed both with the same "
            "--features"
        )


def matrix(column: pa.ChunkedArray, width: int) -> np.ndarray:
    """A fixed list column as [n, width], without a copy where it is in one piece."""
    pieces = [chunk.flatten().to_numpy(zero_copy_only=False).reshape(-1, width) for chunk in column.chunks]
    return pieces[0] if len(pieces) == 1 else np.concatenate(pieces or [np.empty((0, width), np.float32)])


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    files = sorted(path.glob("*.parquet"))
    if not files:
        raise DataError(f"{path}: no .parquet files in this folder")
    return files


def _open(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path, memory_map=False, pre_buffer=False)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; make it with `keyreid embed`") from None
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: not a whole Parquet file: {error}") from None
