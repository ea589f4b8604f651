"""Who this process is among the processes of a run, whatever launched it."""

import datetime
import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from keyreid.errors import KeyreidError

COLLECTIVE_TIMEOUT = datetime.timedelta(minutes=30)
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

    def agree(self, *flags: bool) -> list[bool]:
        """Whether each flag is set on any rank; a collective."""
        if self.control is None:
            return [bool(flag) for flag in flags]
        values = torch.tensor(flags, dtype=torch.uint8)
        dist.all_reduce(values, op=dist.ReduceOp.MAX, group=self.control)
        return values.bool().tolist()

    def from_first(self, value: object) -> Any:
        """The first rank's value, on every rank; a collective."""
        if self.control is None:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self.control)
        return values[0]

    def from_all(self, value: object) -> list[Any]:
        """Every rank's value, on every rank; a collective."""
        if self.control is None:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.control)
        return values


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
        alone = {"store": dist.HashStore(), "rank": 0, "world_size": 1} if world_size == 1 else {}
        dist.init_process_group("nccl" if cuda else "gloo", timeout=COLLECTIVE_TIMEOUT, **alone)
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    control = dist.new_group(backend="gloo") if cuda else dist.group.WORLD
    return Ranks(rank, world_size, local_rank, device, control)


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
