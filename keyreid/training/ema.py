"""An exponential average of the weights, kept where the weights are: whole, or each rank its ZeRO 3 shard."""

from collections.abc import Mapping

import torch
from torch import nn

from keyreid.training.engine import joined, own_part, own_part_of


class WeightAverage:
    """average <- decay * average + (1 - decay) * weights, after every applied step.

    Args:
        network: its trained parameters are averaged; built into the engine already.
        decay: per step.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.decay = decay
        self._parameters = dict(network.named_parameters())
        self._averages = {name: own_part(p).detach().clone() for name, p in self._parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take the weights of this step in."""
        current = [own_part(parameter) for parameter in self._parameters.values()]
        torch._foreach_lerp_(list(self._averages.values()), current, 1 - self.decay)

    def full(self) -> dict[str, torch.Tensor]:
        """The whole averages by name; a collective under ZeRO 3."""
        return {name: joined(self._parameters[name], average) for name, average in self._averages.items()}

    @torch.no_grad()
    def restore(self, averages: Mapping[str, torch.Tensor]) -> None:
        """Put back what `full` gave."""
        for name, average in self._averages.items():
            average.copy_(own_part_of(self._parameters[name], averages[name].to(average.device)))
