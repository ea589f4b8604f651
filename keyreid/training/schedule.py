"""The optimizer's parameter groups and states, and the learning rate of each step."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

from keyreid.config import OptimizerConfig, ScheduleConfig

if TYPE_CHECKING:
    from timm.scheduler import CosineLRScheduler


OPTIMIZER_STATES = {torch.optim.SGD: ("momentum_buffer",), torch.optim.AdamW: ("exp_avg", "exp_avg_sq")}


def build_optimizer(
    parameters: Iterable[tuple[str, torch.nn.Parameter]], config: OptimizerConfig
) -> torch.optim.Optimizer:
    """SGD or AdamW over two groups: weights, and biases at their own rate (published: twice)."""
    weights, biases = [], []
    for name, parameter in parameters:
        if parameter.requires_grad:
            (biases if name.endswith("bias") else weights).append(parameter)
    groups = [{"params": weights, "lr_scale": 1.0}, {"params": biases, "lr_scale": config.bias_lr_factor}]
    if config.name == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay)
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay)


def create_states(optimizer: torch.optim.Optimizer, parameters: Iterable[torch.Tensor], steps: int) -> None:
    """Give parameters the zero states that the optimizer would make at its first step, as if `steps` had been taken."""
    for parameter in parameters:
        state = optimizer.state[parameter]
        for key in OPTIMIZER_STATES[type(optimizer)]:
            state[key] = torch.zeros_like(parameter)
        if isinstance(optimizer, torch.optim.AdamW):
            state["step"] = torch.tensor(float(steps))


def build_schedule(
    optimizer: torch.optim.Optimizer, schedule: ScheduleConfig, lr: float, steps_per_epoch: int
) -> "CosineLRScheduler":
    """Linear warm-up, then a cosine to the floor; `step_update(step)` sets the rate of that step, counted from 0.

    A pure function of the step, so a resumed run needs nothing but the step. The published recipe changes the rate
    once an epoch; here it changes every step along the same curve.
    """
    from timm.scheduler import CosineLRScheduler

    return CosineLRScheduler(
        optimizer,
        t_initial=schedule.epochs * steps_per_epoch,
        lr_min=min(schedule.floor_lr, lr),
        warmup_t=schedule.warmup_epochs * steps_per_epoch,
        warmup_lr_init=min(schedule.warmup_lr, lr),
        t_in_epochs=False,
    )
