"""An exponential average of the weights, kept where the weights are: whole, or each rank its ZeRO 3 shard."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import nn

from keyreid.training.state import own_shard


class WeightAverage:
    """average <- decay * average + (1 - decay) * weights, after every applied step.

    Args:
        network: its trained parameters are averaged; built into the engine already.
        decay: per step.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.decay = decay
        self.names = [name for name, _ in network.named_parameters()]
        self._parameters = [parameter for _, parameter in network.named_parameters()]
        self._averages = [_own_part(parameter).detach().clone() for parameter in self._parameters]

    @torch.no_grad()
    def update(self) -> None:
        """Take the weights of this step in."""
        current = [_own_part(parameter) for parameter in self._parameters]
        torch._foreach_lerp_(self._averages, current, 1 - self.decay)

    def full(self) -> dict[str, torch.Tensor]:
        """The whole averages by name; a collective under ZeRO 3."""
        return {
            name: _whole(parameter, average)
            for name, parameter, average in zip(self.names, self._parameters, self._averages, strict=True)
        }

    @torch.no_grad()
    def restore(self, averages: Mapping[str, torch.Tensor]) -> None:
        """Put back what `full` gave."""
        for name, parameter, average in zip(self.names, self._parameters, self._averages, strict=True):
            whole = averages[name].to(average.device)
            average.copy_(own_shard(parameter, whole) if hasattr(parameter, "ds_tensor") else whole)


def _own_part(parameter: nn.Parameter) -> torch.Tensor:
    return parameter.ds_tensor if hasattr(parameter, "ds_tensor") else parameter


def _whole(parameter: nn.Parameter, part: torch.Tensor) -> torch.Tensor:
    if not hasattr(parameter, "ds_tensor"):
        return part
    parts = [torch.empty_like(part) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, part)
    return torch.cat(parts)[: parameter.ds_numel].view(parameter.ds_shape)
