"""The whole float32 state of an engine, gathered to one process or put back, whatever shards it.

DeepSpeed's own checkpoint files hold the shards of one world size and one ZeRO stage. Here every weight and every
optimizer state is gathered by name through DeepSpeed's public accessors (deepspeed.utils.safe_get_full_*), so that
what is saved fits any number of ranks and any stage. Putting weights back happens before the engine is built, which
then shards them as it likes; optimizer states go back through the accessors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
import torch.distributed as dist
from deepspeed.runtime.zero import GatheredParameters
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import nn

LOSS_SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")  # DeepSpeed's dynamic scaler
OPTIMIZER_STATES = {
    torch.optim.SGD: ("momentum_buffer",),
    torch.optim.AdamW: ("exp_avg", "exp_avg_sq"),
}


def full_weights(engine) -> Iterator[tuple[str, torch.Tensor]]:
    """Each parameter, float32 and whole; a collective for each, so all ranks must iterate to the end."""
    for name, parameter in engine.module.named_parameters():
        whole = safe_get_full_fp32_param(parameter) if parameter.requires_grad else None
        if whole is None:  # no float32 state beside it: not trained, or the engine shards nothing
            with GatheredParameters([parameter]):
                whole = parameter.detach().clone()
        yield name, whole.detach()


def full_optimizer_states(engine) -> Iterator[tuple[str, torch.Tensor]]:
    """`NAME/STATE` and its tensor, for each parameter; a collective for each, so all ranks must iterate to the end."""
    for name, parameter in _trained(engine):
        for key in OPTIMIZER_STATES[type(engine.basic_optimizer)]:
            if _is_sharded(parameter):
                whole = safe_get_full_optimizer_state(parameter, key)
            else:
                whole = engine.basic_optimizer.state[parameter][key]
            yield f"{name}/{key}", whole.detach()


def create_optimizer_states(engine, steps: int) -> None:
    """Give the optimizer the zero states that it would make at its first step, as if `steps` had been taken.

    Needed before states can be put back, and always with several parameter groups: ZeRO 1 and 2 map states to
    parameters after the first group's first step, when the other groups have none (DeepSpeed 0.19.8).
    """
    optimizer = engine.basic_optimizer
    # ZeRO 3 hands the optimizer one flat sub-group at a time, and only while it steps.
    shards = getattr(engine.optimizer, "fp32_partitioned_groups_flat", None)
    for parameter in shards or [parameter for group in optimizer.param_groups for parameter in group["params"]]:
        state = optimizer.state[parameter]
        for key in OPTIMIZER_STATES[type(optimizer)]:
            state[key] = torch.zeros_like(parameter)
        if isinstance(optimizer, torch.optim.AdamW):
            state["step"] = torch.tensor(float(steps))
    link = getattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state", None)
    if link is not None:
        link()


def restore_optimizer_states(engine, states: Mapping[str, torch.Tensor]) -> None:
    """Put `full_optimizer_states` back, after `create_optimizer_states`."""
    for name, parameter in _trained(engine):
        for key in OPTIMIZER_STATES[type(engine.basic_optimizer)]:
            value = states[f"{name}/{key}"].to(engine.device)
            if hasattr(parameter, "ds_id"):
                safe_set_local_optimizer_state(parameter, own_shard(parameter, value), key)
            elif _is_sharded(parameter):
                safe_set_full_optimizer_state(parameter, value, key)
            else:
                engine.basic_optimizer.state[parameter][key].copy_(value)


def restore_master_weights(engine, weights: Mapping[str, torch.Tensor]) -> None:
    """Put float32 weights into an engine that computes in lower precision and keeps float32 copies of its own."""
    for name, parameter in _trained(engine):
        value = weights[name].to(engine.device)
        if hasattr(parameter, "ds_id"):
            safe_set_local_fp32_param(parameter, own_shard(parameter, value))
        else:
            safe_set_full_fp32_param(parameter, value)


def _trained(engine) -> list[tuple[str, nn.Parameter]]:
    return [(name, parameter) for name, parameter in engine.module.named_parameters() if parameter.requires_grad]


def _is_sharded(parameter: nn.Parameter) -> bool:
    """Whether ZeRO 3 (ds_id) or ZeRO 1 and 2 (_hp_mapping) hold the parameter's float32 state."""
    return hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping")


def own_shard(parameter: nn.Parameter, value: torch.Tensor) -> torch.Tensor:
    """This rank's slice of a ZeRO 3 parameter's whole value, padded at the end (DeepSpeed's own setter forgets to)."""
    size = parameter.ds_tensor.numel()
    flat = torch.nn.functional.pad(value.flatten(), (0, size * dist.get_world_size() - value.numel()))
    return flat.narrow(0, size * dist.get_rank(), size)


def loss_scale_state(engine) -> dict[str, float]:
    """State of the fp16 loss scaler, wherever the engine keeps it; empty without one."""
    scaler = _grad_scaler(engine)
    if scaler is not None:
        return {key: float(value) for key, value in scaler.state_dict().items()}
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    return {key: float(getattr(scaler, key)) for key in LOSS_SCALER_FIELDS if hasattr(scaler, key)}


def restore_loss_scale(engine, values: Mapping[str, float]) -> None:
    """Put `loss_scale_state` back."""
    if not values:
        return
    scaler = _grad_scaler(engine)
    if scaler is not None:
        whole = {"growth_interval": int(values["growth_interval"]), "_growth_tracker": int(values["_growth_tracker"])}
        scaler.load_state_dict({**values, **whole})
        return
    for key, value in values.items():
        setattr(engine.optimizer.loss_scaler, key, value if key == "cur_scale" else int(value))


def _grad_scaler(engine) -> torch.amp.GradScaler | None:
    """torch's scaler: under autocast the engine has one without ZeRO, and ZeRO's optimizer has one with it."""
    return engine.torch_autocast_z0_gradscaler or getattr(engine.optimizer, "torch_autocast_gradscaler", None)
