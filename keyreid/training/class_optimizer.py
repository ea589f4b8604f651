"""Trains a rank's sharded classes (model/sharded_classes.py) beside the engine, which knows nothing of them."""

import torch
import torch.distributed as dist
from torch import Tensor

from keyreid.config import OptimizerConfig
from keyreid.model.sharded_classes import ShardedClasses
from keyreid.training.schedule import OPTIMIZER_STATES, build_optimizer, create_states


class ClassOptimizer:
    """An optimizer of the engine's kind over this rank's classes.

    Args:
        of_engine: whose learning rate it follows.
        steps: taken before, where the states are put back afterwards.

    Attributes:
        squared_norm: of the step's gradient of all classes, after `complete`.
    """

    def __init__(
        self, classes: ShardedClasses, config: OptimizerConfig, of_engine: torch.optim.Optimizer, steps: int
    ) -> None:
        self._classes, self._of_engine = classes, of_engine
        self.parameters = list(classes.weights.values())
        self._optimizer = build_optimizer(classes.weights.items(), config)
        create_states(self._optimizer, self.parameters, steps)
        self.squared_norm = torch.zeros(())

    def complete(self) -> None:
        """Make the gradients those of the whole batch; a collective.

        A group has those of its clips already, times the number of ranks, by which the engine divides its own.
        """
        group = self._classes.group
        for parameter in self.parameters:
            parameter.grad /= group.ranks
            if group.between is not None:
                dist.all_reduce(parameter.grad, group=group.between)
        self.squared_norm = sum(parameter.grad.square().sum() for parameter in self.parameters)
        if group.peers is not None:
            dist.all_reduce(self.squared_norm, group=group.peers)

    def step(self) -> None:
        """Apply the gradients."""
        for group in self._optimizer.param_groups:
            group["lr"] = self._of_engine.param_groups[0]["lr"]
        self._optimizer.step()
        self.discard()

    def discard(self) -> None:
        """Forget the gradients."""
        self._optimizer.zero_grad()

    def weights(self) -> dict[str, Tensor]:
        """The whole weights on the CPU of the first rank, nothing on the others; a collective."""
        return self._whole(self._classes.weights)

    def states(self) -> dict[str, Tensor]:
        """The same of the optimizer's states, as the engine would name them."""
        return self._whole({name: self._optimizer.state[p][key] for name, p, key in self._named_states()})

    def restore_states(self, states: dict[str, Tensor]) -> None:
        """Put back what `states` gave."""
        for name, parameter, key in self._named_states():
            self._optimizer.state[parameter][key].copy_(self._classes.own(states[name]))

    def _named_states(self) -> list[tuple[str, torch.nn.Parameter, str]]:
        keys = OPTIMIZER_STATES[type(self._optimizer)]
        return [(f"network.{name}/{key}", p, key) for name, p in self._classes.weights.items() for key in keys]

    def _whole(self, parts: dict[str, Tensor]) -> dict[str, Tensor]:
        found = {name: self._classes.whole(part) for name, part in parts.items()}
        return {name: whole for name, whole in found.items() if whole is not None}
