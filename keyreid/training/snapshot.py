"""From a running engine to a checkpoint's content, and back."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from keyreid.checkpoints import folder as checkpoints
from keyreid.checkpoints.folder import Snapshot, TrainingState
from keyreid.checkpoints.weights_file import WeightsHeader, read_header
from keyreid.config import Config
from keyreid.errors import CheckpointError
from keyreid.losses import Criterion
from keyreid.model import KeyReID
from keyreid.model.sharded_classes import CLASSIFIERS
from keyreid.training.engine import Engine, WeightAverage
from keyreid.training.recipe import below, flatten

NETWORK, CRITERION = "network.", "criterion."

log = logging.getLogger(__name__)


def take(
    engine: Engine, average: WeightAverage | None, training_state: TrainingState, header: WeightsHeader, first: bool
) -> Snapshot | None:
    """Copy all of a run to the CPU of the first rank; a collective. None on the other ranks."""
    weights, states = _collect(engine.weights(), first), _collect(engine.optimizer_states(), first)
    averages = _collect(average.full().items(), first) if average else {}
    tables = engine.module.criterion.tables()
    if engine.classes is not None:
        weights, states = weights | engine.classes.weights(), states | engine.classes.states()
    if not first:
        return None
    network: KeyReID = engine.module.network
    parameters = dict(network.named_parameters())
    buffers = {n: b.detach().cpu().clone() for n, b in network.state_dict().items() if n not in parameters}
    weights = {name.removeprefix(NETWORK): value for name, value in weights.items()} | buffers
    return Snapshot(
        training_state,
        header,
        weights,
        averages | buffers if averages else {},
        states | {CRITERION + n: table for n, table in tables.items()},
    )


def read(folder: Path, config: Config, header: WeightsHeader, allowed: Sequence[str] = ()) -> Snapshot:
    """Read a verified checkpoint for the run of `config`.

    Args:
        allowed: settings and sections that may differ.

    Raises:
        CheckpointError: it belongs to another architecture or other identities.
    """
    found = read_header(folder / checkpoints.WEIGHTS)
    check_same_network(folder, found, header, allowed)
    ema = checkpoints.read_tensors(folder, checkpoints.EMA)
    if config.training.ema_decay is not None and not ema and not below("training.ema_decay", allowed):
        raise CheckpointError(f"{folder} has no averaged weights: --change training.ema_decay begins an average")
    weights, training = (checkpoints.read_tensors(folder, f) for f in (checkpoints.WEIGHTS, checkpoints.TRAINING))
    state = checkpoints.read_state(folder)
    if not state.recipe:
        log.warning("%s is of keyreid 0.1: only its network, optimizer and steps an epoch can be compared", folder)
        name = "adamw" if any(name.endswith("/exp_avg") for name in training) else "sgd"
        steps = {"schedule.steps_per_epoch": state.steps_per_epoch} if state.steps_per_epoch else {}
        state = replace(state, recipe={"optimizer.name": name, **steps})
    return Snapshot(state, found, weights, ema, training)


def check_same_network(path: Path, found: WeightsHeader, wanted: WeightsHeader, allowed: Sequence[str] = ()) -> None:
    """Refuse weights of another network, naming what differs."""
    sections = ({"model": of.model.model_dump(), "clip": of.clip.model_dump()} for of in (found, wanted))
    theirs, ours = map(flatten, sections)
    different = [
        f"{key} is {value!r} there and {ours[key]!r} here"
        for key, value in theirs.items()
        if value != ours[key] and not below(key, ("model.weights", *allowed))
    ]
    for what in ("identities", "cameras"):
        there, here = list(getattr(found, what)), list(getattr(wanted, what))
        different += [f"{len(there)} {what} there and {len(here)} here"] if there != here else []
    if different:
        raise CheckpointError(
            f"{path} is of another architecture or dataset: {'; '.join(different)}. "
            "Give the run another name, or, where the weights fit all the same, allow it: --change model.KEY"
        )


def restore_before(restored: Snapshot, network: KeyReID, criterion: Criterion) -> None:
    """Weights, running statistics and centre tables, into modules that no engine has wrapped yet."""
    weights = dict(restored.weights)
    if network.classes is not None:
        network.classes.load({name: weights.pop(name) for name in CLASSIFIERS})
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:  # a change that was allowed
        raise CheckpointError(f"the weights of step {restored.state.step} do not fit this network: {error}") from None
    tables = {n.removeprefix(CRITERION): t for n, t in restored.training.items() if n.startswith(CRITERION)}
    for name in criterion.load_tables(tables):
        log.warning("loss.centres changed: %s start anew", name)


def restore_after(restored: Snapshot, engine: Engine, average: WeightAverage | None, same_optimizer: bool) -> None:
    """Optimizer states, float32 copies of lower-precision weights, the average, and the fp16 loss scale."""
    if same_optimizer:
        engine.restore_optimizer_states(restored.training)
    else:
        log.warning("optimizer.name changed: the optimizer's state starts anew")
    if next(engine.module.network.parameters()).dtype != torch.float32:
        engine.restore_weights({NETWORK + n: t for n, t in restored.weights.items()})
    if average is not None and restored.ema:
        average.restore(restored.weights | restored.ema)  # sharded classes have no average
    if engine.loss_scale_state().keys() == restored.state.loss_scale.keys():
        engine.restore_loss_scale(restored.state.loss_scale)


def _collect(tensors, first: bool) -> dict[str, torch.Tensor]:
    # Every rank takes part in gathering; only the first keeps a copy.
    return {name: value.detach().to("cpu", torch.float32, copy=True) for name, value in tensors if first}
