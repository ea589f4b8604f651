"""Trains a rank's sharded classes (model/sharded_classes.py) beside the engine, which knows nothing of them."""

import torch
import torch.distributed as dist

from keyreid.config import OptimizerConfig
from keyreid.distributed.parts import Held
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

    def held_weights(self) -> dict[str, Held]:
        """This rank's part of each weight, by the network's names."""
        return {name: self._classes.held(weight) for name, weight in self._classes.weights.items()}

    def held_states(self) -> dict[str, Held]:
        """The same of the optimizer's states, as the engine would name them."""
        keys = OPTIMIZER_STATES[type(self._optimizer)]
        return {
            f"network.{name}/{key}": self._classes.held(self._optimizer.state[weight][key])
            for name, weight in self._classes.weights.items()
            for key in keys
        }
