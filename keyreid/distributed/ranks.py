"""Who this process is among the processes of a run, whatever launched it."""

import datetime
import errno
import json
import os
import re
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torch.distributed as dist

from keyreid.errors import CheckpointError, ConfigError, DataError, KeyreidError

COLLECTIVE_TIMEOUT = datetime.timedelta(minutes=30)
LOCAL = re.compile(r"localhost|127\.[\d.]+|::1")  # addresses that no other machine reaches
LOOPBACK = "lo" if sys.platform == "linux" else "lo0"
ERRORS = {kind.__name__: kind for kind in (KeyreidError, DataError, ConfigError, CheckpointError)}  # that others raise
# (rank, world size, local rank) in the words of torchrun and deepspeed, then of srun
LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK"), ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")


@dataclass(frozen=True)
class Ranks:
    """Position of this process: `rank` of `world_size`, `local_rank` on its machine, and the device it computes on."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    control: dist.ProcessGroup | None  # gloo, for words between CPUs that need not wait for a GPU; None when alone

    @classmethod
    def alone(cls, device: torch.device | str = "cpu") -> "Ranks":
        """One process by itself, without a process group."""
        return cls(0, 1, 0, torch.device(device), None)

    @property
    def first(self) -> bool:
        """Whether this is the process that prints, logs and writes."""
        return self.rank == 0

    def apart(self) -> "Ranks":
        """The same for the collectives of another thread; a collective."""
        return self if self.control is None else replace(self, control=dist.new_group(backend="gloo"))

    def agree(self, *flags: bool) -> list[bool]:
        """Whether each flag is set on any rank; a collective."""
        if self.control is None:
            return [bool(flag) for flag in flags]
        values = torch.tensor(flags, dtype=torch.uint8)
        dist.all_reduce(values, op=dist.ReduceOp.MAX, group=self.control)
        return values.bool().tolist()

    def from_first(self, value: object) -> Any:
        """The first rank's value, on every rank; a collective. Values are JSON's, a path, or an error."""
        return self._from(0, value)

    def from_all(self, value: object) -> list[Any]:
        """Every rank's value, on every rank; a collective. Values are as in from_first."""
        return [self._from(rank, value) for rank in range(self.world_size)]

    def added(self, values: np.ndarray) -> np.ndarray:
        """The sum of all ranks' arrays of one shape and type, in the array given; a collective. 0 + x is x, exactly."""
        if self.control is not None:
            dist.all_reduce(torch.from_numpy(values), group=self.control)
        return values

    def to_first(self, table: pa.Table | None, source: int) -> pa.Table | None:
        """Give a rank's table to the first; those two call it together. None on the others."""
        if self.rank == source:
            content = pa.BufferOutputStream()
            with pa.ipc.new_stream(content, table.schema) as stream:
                stream.write_table(table)
            words = torch.frombuffer(bytearray(content.getvalue()), dtype=torch.uint8)
            dist.send(torch.tensor(len(words)), 0, group=self.control)
            dist.send(words, 0, group=self.control)
        if not self.first:
            return None
        length = torch.tensor(0)
        dist.recv(length, source, group=self.control)
        words = torch.empty(int(length), dtype=torch.uint8)
        dist.recv(words, source, group=self.control)
        return pa.ipc.open_stream(pa.py_buffer(words.numpy())).read_all()

    def in_step(self, work: Iterator[object]) -> None:
        """Do each rank's work piece by piece, and meet after each: nobody waits for longer than a piece takes.

        Raises:
            KeyreidError: on all ranks, where the work of one raised it or an OSError.
        """
        error, going = None, True
        while going:
            try:
                busy = next(work, self) is not self
            except (KeyreidError, OSError) as caught:
                busy, error = False, caught
            going, failed = self.agree(busy, error is not None)
            if failed:
                raise next(found for found in [error, *self.from_all(error)] if found is not None)

    def _from(self, source: int, value: object) -> Any:
        if self.control is None:
            return value
        words = _packed(value) if (own := self.rank == source) else None
        length = torch.tensor(len(words) if own else 0)
        dist.broadcast(length, source, self.control)
        words = words if own else torch.empty(int(length), dtype=torch.uint8)
        dist.broadcast(words, source, self.control)
        return value if own else _unpacked(words)


def _packed(value: object) -> torch.Tensor:
    """A value as the UTF-8 of JSON, for nothing is unpickled that came from a socket."""
    if isinstance(value, Exception):
        kind = type(value).__name__
        value = [kind, str(value)] if kind in ERRORS else [KeyreidError.__name__, f"{kind}: {value}"]
    else:
        value = ["path", str(value)] if isinstance(value, Path) else ["value", value]
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def _unpacked(words: torch.Tensor) -> Any:
    kind, value = json.loads(words.numpy().tobytes())
    return value if kind == "value" else {**ERRORS, "path": Path}[kind](value)


def position() -> tuple[int, int, int]:
    """(rank, world size, local rank) from the launcher's variables; (0, 1, 0) when there is none.

    srun counts only inside a job step: the batch script itself also sees SLURM_NTASKS.
    """
    for rank, world_size, local_rank in LAUNCHER_VARIABLES:
        if rank in os.environ and world_size in os.environ:
            if rank == "SLURM_PROCID" and os.environ.get("SLURM_STEP_ID", "").startswith("42949672"):
                continue  # the pseudo step of a batch script
            return int(os.environ[rank]), int(os.environ[world_size]), int(os.environ.get(local_rank, 0))
    return 0, 1, 0


def join() -> Ranks:
    """Join the run's process group (NCCL on GPUs, gloo on CPUs) and choose the device.

    Raises:
        KeyreidError: several ranks, but no MASTER_ADDR and MASTER_PORT to meet at.
    """
    rank, world_size, local_rank = position()
    # DeepSpeed and torch both read these, and srun sets none of them.
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(local_rank))
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if world_size > 1 and missing:
        raise KeyreidError(
            f"{world_size} ranks but no {' and '.join(missing)}: start with `keyreid train --ranks N`, torchrun, "
            "deepspeed, or slurm/train.sbatch"
        )
    if cuda := torch.cuda.is_available():
        torch.cuda.set_device(local_rank % torch.cuda.device_count())
    else:  # otherwise DeepSpeed looks for accelerators of other makers and warns
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if not dist.is_initialized():
        place = {"store": _store(rank, world_size), "rank": rank, "world_size": world_size}
        dist.init_process_group("nccl" if cuda else "gloo", timeout=COLLECTIVE_TIMEOUT, **place)
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    control = dist.new_group(backend="gloo") if cuda else dist.group.WORLD
    return Ranks(rank, world_size, local_rank, device, control)


def _store(rank: int, world_size: int) -> dist.Store | None:
    """Where the ranks meet; None where torchrun's agents have such a place.

    Whoever reaches it may write to it. So it listens at the first rank's MASTER_ADDR alone, not on all interfaces like
    torch's own, and ranks that meet on the loopback interface use no other.
    """
    if world_size == 1:
        return dist.HashStore()
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if LOCAL.fullmatch(address):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", LOOPBACK)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={LOOPBACK}")
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return None
    first = {"is_master": True, "master_listen_fd": _listener(address, port)} if rank == 0 else {}
    return dist.TCPStore(address, port, world_size, timeout=COLLECTIVE_TIMEOUT, **first)


def _listener(address: str, port: int) -> int | None:
    """A socket that listens at the address; None, with a warning, where only other machines know this one by it."""
    for family, *_, place in socket.getaddrinfo(address, port, type=socket.SOCK_STREAM):
        if LOCAL.fullmatch(place[0]) and not LOCAL.fullmatch(address):
            continue  # as /etc/hosts may call this machine, while the others have its true address
        try:
            return socket.create_server(place, family=family).detach()
        except OSError as error:
            if error.errno != errno.EADDRNOTAVAIL:
                raise KeyreidError(f"the ranks cannot meet at {address}, port {port}: {error}") from None
    said = f"warning: MASTER_ADDR {address} is none of this machine's own: the ranks meet on all its interfaces"
    print(f"{said} (docs/security.md)", file=sys.stderr, flush=True)
    return None


def leave() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def gather(tensor: torch.Tensor, dim: int = 0) -> torch.Tensor:
    """The tensors of all ranks, joined along `dim` in rank order, differentiable; the same object on one rank.

    Every rank must hold the same shape and compute the same loss from the result. Then the gradient for a rank's own
    part needs no communication: it is its slice of the gradient, times the number of ranks because data-parallel
    training averages the weights' gradients over the ranks.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return tensor
    return _Gather.apply(tensor, dim)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        ctx.dim, ctx.length = dim, tensor.shape[dim]
        pieces = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size())]
        dist.all_gather(pieces, tensor.contiguous())
        return torch.cat(pieces, dim)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        own = gradient.narrow(ctx.dim, dist.get_rank() * ctx.length, ctx.length)
        return own * dist.get_world_size(), None
