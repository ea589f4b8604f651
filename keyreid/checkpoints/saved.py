"""The tensors of a checkpoint, by name, whoever wrote them and whoever reads them.

Each rank reads its files (manifest.reader_of), and no others. What another needs of them travels between the ranks, in
blocks; so all ranks together read a checkpoint once, and none ever holds more of it than it needs.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor

from keyreid.checkpoints.manifest import KINDS, kind_of, read_manifest, reader_of
from keyreid.checkpoints.weights_file import read_weights, written_by
from keyreid.distributed.parts import Part
from keyreid.distributed.ranks import Ranks
from keyreid.errors import CheckpointError

_ALONE = Ranks.alone()


class Piece(NamedTuple):
    """What one file has of a tensor."""

    part: Part
    dtype: torch.dtype
    file: str
    reader: int  # the rank


class Saved:
    """A verified checkpoint, opened by these ranks together."""

    def __init__(self, folder: Path, ranks: Ranks = _ALONE) -> None:
        self.folder, self._ranks, self._open = folder, ranks, {}
        self._pieces: dict[str, dict[str, list[Piece]]] = {kind: {} for kind in KINDS}
        try:
            for file, entry in read_manifest(folder).items():
                if kind := kind_of(file):
                    reader = reader_of(file, entry, ranks.world_size)
                    for name, (part, dtype) in self._tensors(file, entry.get("tensors")).items():
                        self._pieces[kind].setdefault(name, []).append(Piece(part, dtype, file, reader))
        except (OSError, ValueError, TypeError, KeyError, AttributeError, SafetensorError) as error:
            raise CheckpointError(f"{folder}: cannot be read: {error}") from None
        for kind, named in self._pieces.items():
            for name, pieces in named.items():
                if sum(len(piece.part) for piece in pieces) != len(Part.whole(pieces[0].part.shape)):
                    raise CheckpointError(
                        f"{folder}: {name} of {kind} is not whole: {', '.join(p.file for p in pieces)}"
                    )

    def shapes(self, kind: str) -> dict[str, tuple[int, ...]]:
        """The shapes of the whole tensors of a kind (see manifest.py), by name."""
        return {name: pieces[0].part.shape for name, pieces in self._pieces[kind].items()}

    def read(self, kind: str, wanted: Mapping[str, Part]) -> Iterator[tuple[str, Tensor]]:
        """Each part's numbers, [len(part)] on the CPU; a collective, so all ranks must iterate to the end.

        Args:
            wanted: by name; the same names in the same order on all ranks.
        """
        if not wanted:
            return
        pieces = {name: self._pieces[kind][name] for name in wanted}
        rank = self._ranks.rank
        asked = [p.reader != rank and p.part.meets(wanted[name]) for name, of in pieces.items() for p in of]
        asked = iter(self._ranks.agree(*asked))
        for name, part in wanted.items():
            own = torch.empty(len(part), dtype=pieces[name][0].dtype)
            for piece in pieces[name]:
                travels = next(asked)
                if travels or piece.reader == rank:
                    for block in piece.part.blocks():
                        part.fill(own, block, self._block(name, piece, block, travels))
            yield name, own

    def _tensors(self, file: str, listed: Mapping[str, Sequence] | None) -> dict[str, tuple[Part, torch.dtype]]:
        if listed is None:  # one rank wrote whole tensors
            found = {name: self._opened(file).get_tensor(name) for name in self._opened(file).keys()}  # noqa: SIM118
            return {name: (Part.whole(value.shape), value.dtype) for name, value in found.items()}
        found = {
            name: (Part(tuple(shape), *rest), getattr(torch, dtype)) for name, (dtype, shape, *rest) in listed.items()
        }
        if wrong := [
            name for name, (part, dtype) in found.items() if not (part.is_sound and isinstance(dtype, torch.dtype))
        ]:
            raise ValueError(f"{file}: {wrong[0]}: no part of a tensor")
        return found

    def _opened(self, file: str) -> safe_open:
        """A file, mapped: its numbers are read when they are copied."""
        if file not in self._open:
            self._open[file] = safe_open(self.folder / file, framework="pt")
        return self._open[file]

    def _block(self, name: str, piece: Piece, block: Part, travels: bool) -> Tensor:
        if piece.reader == self._ranks.rank:
            values = self._opened(piece.file).get_tensor(name).flatten()
            if len(values) != len(piece.part) or values.dtype != piece.dtype:
                raise CheckpointError(f"{self.folder / piece.file}: {name} is not what the manifest says")
            values = values[block.start - piece.part.start : block.stop - piece.part.start]
        else:
            values = torch.empty(len(block), dtype=piece.dtype)
        if travels:
            dist.broadcast(values, piece.reader, self._ranks.control)
        return values


def read_tensors(folder: Path, kind: str, without: Sequence[str] = ()) -> dict[str, Tensor]:
    """All tensors of a kind, whole, but for those named; empty where the checkpoint has none."""
    saved = Saved(folder)
    shapes = {name: shape for name, shape in saved.shapes(kind).items() if name not in without}
    wanted = {name: Part.whole(shape) for name, shape in shapes.items()}
    return {name: values.view(shapes[name]) for name, values in saved.read(kind, wanted)}


def read_network(file: Path, without: Sequence[str] = ()) -> dict[str, Tensor]:
    """The tensors of a weights file but for those named; of a checkpoint of several ranks, from all files of its kind.

    Raises:
        CheckpointError: as `read_weights`, or the others' files are not beside it.
    """
    ranks = written_by(file)
    if ranks == 1:
        return {name: value for name, value in read_weights(file).items() if name not in without}
    with suppress(OSError, ValueError, KeyError, TypeError):
        if file.name in read_manifest(file.parent):
            return read_tensors(file.parent, file.name, without)
    raise CheckpointError(
        f"{file}: one of {ranks} parts, and the others are not beside it: take the checkpoint's whole folder, or what "
        "`keyreid export weights` makes of it"
    )
