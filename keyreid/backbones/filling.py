"""Weights into a module by name and shape, and a word on each that found no place."""

import logging
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from keyreid.errors import CheckpointError

log = logging.getLogger(__name__)
NAMES_LISTED = 12


def fill(module: nn.Module, state: Mapping[str, torch.Tensor], source: str, strict: bool = False) -> None:
    """Copy what fits by name and shape, and list what does not.

    Args:
        source: names the weights in messages.
        strict: whatever is missing or of another shape is an error.

    Raises:
        CheckpointError: nothing fits, or (strict) not everything does.
    """
    own = module.state_dict()
    fitting = {name: tensor for name, tensor in state.items() if name in own and own[name].shape == tensor.shape}
    if not fitting:
        raise CheckpointError(
            f"{source}: nothing of it fits. It has {_listed(list(state))}; the network has {_listed(list(own))}"
        )
    other_shape = [
        f"{name} {tuple(tensor.shape)} for {tuple(own[name].shape)}"
        for name, tensor in state.items()
        if name in own and name not in fitting
    ]
    lists = {
        "of another shape": other_shape,
        "not in the file": [name for name in own if name not in state],
        "without a place in the network": [name for name in state if name not in own],
    }
    if strict and (lists["of another shape"] or lists["not in the file"]):
        raise CheckpointError(
            f"{source}: " + "; ".join(f"{what}: {_listed(names)}" for what, names in lists.items() if names)
        )
    module.load_state_dict(fitting, strict=False)
    log.info("%s: loaded %d of %d entries", source, len(fitting), len(own))
    for what, names in lists.items():
        if names:
            log.info("%s: did not load, %s: %s", source, what, _listed(names))


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:NAMES_LISTED])
    return shown + (f" and {len(names) - NAMES_LISTED} more" if len(names) > NAMES_LISTED else "")
