"""Collectives that gradients pass through."""

import torch
import torch.distributed as dist


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
