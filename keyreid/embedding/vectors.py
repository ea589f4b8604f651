"""Vectors of tracklets, in memory and in files: Parquet, one row per tracklet, bounded by the disk alone.

Columns: `key`; `identity`, `identity_name` (null where unknown); `camera`, `camera_name`; `frames`; `first_frame`,
`last_frame` (numbers in the video, where frames are numbered); `start_seconds`, `end_seconds` (where the frame rate is
known); `visibility` (fixed list, float); `vector` (fixed list, float or half float); `picture` (JPEG of the middle
frame, or null). The file's metadata says which network made the vectors. Any Parquet tool reads them.
"""

import difflib
import hashlib
import io
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from keyreid.distributed.ranks import Ranks
from keyreid.embedding.distance import Embeddings
from keyreid.embedding.npz import read_arrays
from keyreid.errors import DataError
from keyreid.files import replacing, sha256, writing
from keyreid.shards.members import UNKNOWN_IDENTITY

FORMAT = "keyreid-vectors/1"
METADATA_KEY = b"keyreid"
ROW_GROUP_BYTES = 32 * 2**20  # of vectors; also what is read at a time
DESCRIPTION = {
    **{"key": pa.string(), "identity": pa.int64(), "identity_name": pa.string()},
    **{"camera": pa.int64(), "camera_name": pa.string(), "frames": pa.int32()},
    **{"first_frame": pa.int64(), "last_frame": pa.int64()},
    **{"start_seconds": pa.float64(), "end_seconds": pa.float64()},
}
_NPZ = ("vectors", "visibility", "global_width", "dataset")
_KEYS_COMPARED = 20_000  # for the nearest one to a mistyped key, which takes long


@dataclass(frozen=True)
class VectorsAbout:
    """What vectors are.

    Attributes:
        width: D.
        parts: P, entries of `visibility`.
        global_width: how many of the D are the global feature; P parts of equal width follow, or none.
        weights: `name` and `sha256` of the weights file: only vectors of one network can be compared. A network that
            is still in training has a name alone.
        fingerprint: of the vectors, or of all that decides them: an interrupted embedding knows its parts by it.
        cameras_known: the network took the cameras for those it was trained on; None where that is not recorded.
    """

    width: int
    parts: int
    global_width: int
    dataset: str
    weights: Mapping[str, str] = field(default_factory=dict)
    dtype: Literal["float32", "float16"] = "float32"
    fingerprint: str = ""
    cameras_known: bool | None = None

    @property
    def rows_at_a_time(self) -> int:
        """Rows of a row group, and of what is read at a time."""
        return max(1, ROW_GROUP_BYTES // (4 * self.width))

    @property
    def schema(self) -> pa.Schema:
        """The Parquet schema, with this object in its metadata."""
        number = pa.float32() if self.dtype == "float32" else pa.float16()
        arrays = {"visibility": pa.list_(pa.float32(), self.parts), "vector": pa.list_(number, self.width)}
        about = {METADATA_KEY: json.dumps({"format": FORMAT, **asdict(self)}).encode()}
        return pa.schema([*DESCRIPTION.items(), *arrays.items(), ("picture", pa.binary())], about)


@dataclass(frozen=True)
class Vectors:
    """N embedded tracklets in memory.

    Attributes:
        described: N rows of DESCRIPTION's columns, and of `picture` or not; see `description`.
        vectors: [N, D].
        visibility: float32 [N, P], the share of frames in which each part is seen.
    """

    about: VectorsAbout
    described: pa.Table
    vectors: np.ndarray
    visibility: np.ndarray

    def __len__(self) -> int:
        return len(self.vectors)

    def __getitem__(self, rows: np.ndarray | slice) -> "Vectors":
        described = self.described.take(np.arange(len(self))[rows])
        return Vectors(self.about, described, self.vectors[rows], self.visibility[rows])

    @cached_property
    def keys(self) -> np.ndarray:
        """str [N]."""
        return np.array(self.described["key"].to_pylist(), np.str_)

    @cached_property
    def identities(self) -> np.ndarray:
        """int64 [N]; UNKNOWN_IDENTITY where not known."""
        return self.described["identity"].fill_null(UNKNOWN_IDENTITY).to_numpy()

    @cached_property
    def cameras(self) -> np.ndarray:
        """int64 [N], numbers of the data set."""
        return self.described["camera"].to_numpy()

    @cached_property
    def frames(self) -> np.ndarray:
        """int64 [N], frames of each tracklet."""
        return self.described["frames"].to_numpy().astype(np.int64)

    @property
    def embeddings(self) -> Embeddings:
        """Vectors and visibility, as distances take them."""
        return Embeddings(self.vectors, self.visibility, self.about.global_width)

    @property
    def table(self) -> pa.Table:
        """Rows of a vector file."""
        columns = {"picture": pa.nulls(len(self), pa.binary())}
        columns |= dict(zip(self.described.column_names, self.described.columns, strict=True))
        for name, values in (("visibility", self.visibility), ("vector", self.vectors.astype(self.about.dtype))):
            columns[name] = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])
        return pa.table(columns, self.about.schema)

    def rows_of(self, keys: Sequence[str] | np.ndarray, source: str = "these vectors") -> np.ndarray:
        """int64 [n]: the rows of these tracklets; see `rows_of`."""
        return rows_of(self.described["key"], keys, source)

    def save(self, path: Path, ranks: Ranks | None = None) -> None:
        """Write a vector file of all ranks' rows, one rank's after the other's; errors as of `write_vectors`.

        A collective. Rows go to the first rank in blocks, so that it holds its own rows and one block.
        """
        ranks = ranks or Ranks.alone()
        first = np.cumsum([0, *ranks.from_all(len(self))])
        digests = ranks.from_all(_digest(self.vectors, int(first[ranks.rank])))
        # By which an index knows its vectors again; a sum, so that it does not depend on who has which rows.
        about = replace(self.about, fingerprint=f"{sum(int(digest, 16) for digest in digests) % 2**256:064x}")
        # At the same rows whatever the ranks, so that the file is the same to the byte.
        cuts = sorted({*range(0, int(first[-1]), about.rows_at_a_time), *first.tolist()})

        def blocks() -> Iterator[pa.Table | None]:
            for start, stop in itertools.pairwise(cuts):
                owner = int(np.searchsorted(first, start, side="right")) - 1
                own = slice(start - first[ranks.rank], stop - first[ranks.rank])
                table = replace(self[own], about=about).table if owner == ranks.rank else None
                yield table if owner == 0 else ranks.to_first(table, owner)

        ranks.in_step(writing_vectors(path, about, blocks()) if ranks.first else blocks())

    @staticmethod
    def load(path: Path) -> "Vectors":
        """Read a vector file, or the `.npz` of the last version, without pictures; DataError where it is neither."""
        return _read_npz(path) if path.suffix == ".npz" else VectorFiles([path]).load()


def description(columns: Mapping[str, Sequence[Any] | np.ndarray]) -> pa.Table:
    """The columns DESCRIPTION of some tracklets, and `picture` where it is given; null where there is nothing.

    Args:
        columns: by name, of equal length; at least `key` and `identity`, where UNKNOWN_IDENTITY becomes null.
    """
    types = {**DESCRIPTION, **({"picture": pa.binary()} if "picture" in columns else {})}
    nothing = [None] * len(columns["key"])
    arrays = {name: pa.array(columns.get(name, nothing), kind) for name, kind in types.items()}
    identity = np.asarray(columns["identity"], np.int64)
    return pa.table({**arrays, "identity": pa.array(identity, mask=identity == UNKNOWN_IDENTITY)})


def write_vectors(path: Path, about: VectorsAbout, tables: Iterable[pa.Table]) -> int:
    """Write tables as one file with row groups of about ROW_GROUP_BYTES, whole or not at all; gives how many rows.

    Raises:
        KeyreidError: it cannot be written.
    """
    return sum(writing_vectors(path, about, tables))


def writing_vectors(path: Path, about: VectorsAbout, tables: Iterable[pa.Table]) -> Iterator[int]:
    """The same table by table; gives the rows of each."""
    waiting: list[pa.Table] = []
    # Vectors do not get smaller by compression or dictionaries; the other columns do.
    plain = list(DESCRIPTION)
    packed = {"compression": dict.fromkeys(plain, "zstd"), "use_dictionary": plain, "write_statistics": plain}
    with writing(path), replacing(path, alone=True) as file, pq.ParquetWriter(file, about.schema, **packed) as writer:

        def flush() -> None:
            if waiting:
                writer.write_table(pa.concat_tables(waiting).combine_chunks(), row_group_size=about.rows_at_a_time)
                waiting.clear()

        for table in tables:
            waiting.append(table.replace_schema_metadata(about.schema.metadata))
            if sum(map(len, waiting)) >= about.rows_at_a_time:
                flush()
            yield len(table)
        flush()


class VectorFiles:
    """Vector files as one list of N rows, `about` which all of them agree; nothing but what is asked for is read."""

    def __init__(self, paths: Sequence[Path]) -> None:
        """Open files, and all `*.parquet` of folders.

        Raises:
            DataError: a file is missing, is none of ours, or was made by another network.
        """
        self.paths: list[Path] = []
        for path in paths:
            if path.is_dir() and not any(path.glob("*.parquet")):
                raise DataError(f"{path}: no .parquet files in this folder")
            self.paths += sorted(path.glob("*.parquet")) if path.is_dir() else [path]
        self._files = [_open(path) for path in self.paths]
        self.about = read_about(self.paths[0], self._files[0])
        self.fingerprints: list[str] = []  # of each file
        for path, file in zip(self.paths, self._files, strict=True):
            about = read_about(path, file)
            check_comparable(self.about, about, f"{self.paths[0]}", f"{path}")
            self.fingerprints.append(about.fingerprint)
        self._first = np.cumsum([0, *(file.metadata.num_rows for file in self._files)])

    def __len__(self) -> int:
        return int(self._first[-1])

    def rows_of_file(self, number: int | Sequence[int]) -> np.ndarray:
        """int64 [..., 2]: the first row of each of these files, and the one after its last."""
        return np.stack([self._first[:-1], self._first[1:]], axis=-1)[number]

    def blocks(self, columns: Iterable[str], rows: int | None = None) -> Iterator[tuple[int, pa.Table]]:
        """All rows in order, `rows` at a time (default: as ROW_GROUP_BYTES allow): the first's number, the rows."""
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

    def load(self) -> Vectors:
        """All rows but their pictures, in memory."""
        vectors = np.empty((len(self), self.about.width), self.about.dtype)
        visibility = np.empty((len(self), self.about.parts), np.float32)
        described = [description({name: [] for name in DESCRIPTION})]
        for first, table in self.blocks([*DESCRIPTION, "visibility", "vector"]):
            rows = slice(first, first + len(table))
            vectors[rows] = matrix(table["vector"], self.about.width)
            visibility[rows] = matrix(table["visibility"], self.about.parts)
            described.append(table.select(list(DESCRIPTION)))
        return Vectors(self.about, pa.concat_tables(described).combine_chunks(), vectors, visibility)

    def take(self, rows: np.ndarray, columns: Sequence[str]) -> pa.Table:
        """Some rows in the order given; reads the row groups that hold them, one at a time."""
        order = np.argsort(rows, kind="stable")
        wanted = np.asarray(rows, np.int64)[order]
        pieces = [self.about.schema.empty_table().select(list(columns))]
        for number, file in enumerate(self._files):
            start = self._first[number]
            for group in range(file.metadata.num_row_groups):
                end = start + file.metadata.row_group(group).num_rows
                inside = wanted[np.searchsorted(wanted, start) : np.searchsorted(wanted, end)]
                if len(inside):
                    pieces.append(file.read_row_group(group, columns=list(columns)).take(inside - start))
                start = end
        return pa.concat_tables(pieces).take(np.argsort(order, kind="stable"))

    def rows_of(self, keys: Sequence[str]) -> np.ndarray:
        """int64 [n]: the row of each key; see `rows_of`."""
        return rows_of(pa.array(self.column("key"), pa.string()), keys, str(self.paths[0]))


def embeddings_of(table: pa.Table, about: VectorsAbout) -> Embeddings:
    """The vectors and visibilities of rows, as distances take them."""
    vectors, seen = matrix(table["vector"], about.width), matrix(table["visibility"], about.parts)
    return Embeddings(vectors, seen, about.global_width)


def read_about(path: Path, file: pq.ParquetFile | None = None) -> VectorsAbout:
    """What a vector file says of itself; DataError where it is missing or none."""
    metadata = (file or _open(path)).schema_arrow.metadata or {}
    try:
        values = json.loads(metadata[METADATA_KEY])
        if values.pop("format") != FORMAT:
            raise ValueError(f"its format is not {FORMAT}")
        return VectorsAbout(**values)
    except (KeyError, ValueError, TypeError) as error:
        raise DataError(f"{path}: Parquet, but not a file of vectors as keyreid writes them: {error}") from None


def check_comparable(one: VectorsAbout, other: VectorsAbout, one_name: str, other_name: str) -> None:
    """Raise DataError where the vectors are not of one network and one kind."""
    by = "sha256" if "sha256" in one.weights and "sha256" in other.weights else "name"
    if one.weights.get(by) != other.weights.get(by):
        names = [about.weights.get("name", "unknown weights") for about in (one, other)]
        made = f"{other_name} was embedded by {names[1]}, {one_name} by {names[0]}"
        raise DataError(f"{made}: vectors of different networks cannot be compared; embed both with the same weights")
    if (one.width, one.global_width) != (other.width, other.global_width):
        widths = f"{other_name} has vectors of {other.width} numbers, {one_name} of {one.width}"
        raise DataError(f"{widths}: embed both with the same --features")


def matrix(column: pa.ChunkedArray, width: int) -> np.ndarray:
    """A fixed list column as [n, width], without a copy where it is in one piece."""
    pieces = [chunk.flatten().to_numpy(zero_copy_only=False).reshape(-1, width) for chunk in column.chunks]
    return pieces[0] if len(pieces) == 1 else np.concatenate(pieces or [np.empty((0, width), np.float32)])


def places_of(there: pa.Array | pa.ChunkedArray, keys: Sequence[str] | np.ndarray) -> np.ndarray:
    """int64 [n]: where each key stands; -1 where it is not there."""
    return pc.index_in(pa.array(keys, pa.string()), value_set=there).fill_null(-1).to_numpy().astype(np.int64)


def rows_of(there: pa.Array | pa.ChunkedArray, keys: Sequence[str] | np.ndarray, source: str) -> np.ndarray:
    """int64 [n]: where each key stands.

    Raises:
        DataError: a key is not there; a near one is named.
    """
    places = places_of(there, keys)
    if len(missing := np.flatnonzero(places < 0)):
        key = str(keys[missing[0]])
        near = difflib.get_close_matches(key, there[:_KEYS_COMPARED].to_pylist(), n=1, cutoff=0.0)
        hint = f"; the nearest key is {near[0]}" if near else ""
        raise DataError(f"{source}: no tracklet has the key {key!r} ({len(missing)} are missing){hint}")
    return places


def _digest(vectors: np.ndarray, first: int) -> str:
    """A sum over the rows, each hashed with its number."""
    total = 0
    for number, row in enumerate(vectors, first):
        total += int.from_bytes(hashlib.sha256(number.to_bytes(8) + row.tobytes()).digest())
    return f"{total % 2**256:x}"


def _open(path: Path) -> pq.ParquetFile:
    try:
        if path.suffix == ".npz":  # has to be held whole, as always
            content = io.BytesIO()
            pq.write_table(_read_npz(path).table, content, compression="none")
            return pq.ParquetFile(content)
        return pq.ParquetFile(path, memory_map=False, pre_buffer=False)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; make it with `keyreid embed` or `keyreid evaluate`") from None
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: not a whole Parquet file: {error}") from None


def _read_npz(path: Path) -> Vectors:
    """What evaluations of the last version wrote; by an unknown network, so that it compares with no other file."""
    file = read_arrays(path, ("keys", "identities", "cameras", "frames", *_NPZ))
    vectors, visibility, global_width, dataset = (file.pop(name) for name in _NPZ)
    lengths = {len(array) for array in (vectors, visibility, *file.values())}
    if vectors.ndim != 2 or visibility.ndim != 2 or len(lengths) > 1:
        raise DataError(f"{path}: not a file of vectors: {len(vectors)} vectors, {len(file['keys'])} keys")
    weights = {"name": f"unknown weights of {path.name}", "sha256": sha256(path)}
    about = VectorsAbout(vectors.shape[1], visibility.shape[1], int(global_width), str(dataset), weights)
    columns = dict(zip(("key", "identity", "camera", "frames"), file.values(), strict=True))
    described = description({**columns, "camera_name": file["cameras"].astype(np.str_)})
    return Vectors(about, described, vectors, visibility)
