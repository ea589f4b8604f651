"""From a running engine to a checkpoint's content, and back."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from keyreid.checkpoints import folder as checkpoints
from keyreid.checkpoints.folder import Snapshot, TrainingState
from keyreid.checkpoints.manifest import EMA, KINDS, TRAINING, WEIGHTS
from keyreid.checkpoints.saved import Saved
from keyreid.checkpoints.weights_file import WeightsHeader, read_header
from keyreid.config import Config
from keyreid.distributed.parts import Held, Part, shared_out
from keyreid.distributed.ranks import Ranks
from keyreid.errors import CheckpointError
from keyreid.losses import Criterion
from keyreid.model import KeyReID
from keyreid.training.engine import Engine, WeightAverage
from keyreid.training.recipe import below, flatten

NETWORK, CRITERION = "network.", "criterion."
_ALONE = Ranks.alone()

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Restored:
    """A checkpoint for a run that resumes from it."""

    state: TrainingState
    header: WeightsHeader
    saved: Saved


def take(
    engine: Engine, average: WeightAverage | None, training_state: TrainingState, header: WeightsHeader
) -> Snapshot:
    """Copy this rank's part of a run to the CPU; training waits for no more than that."""
    weights = {name.removeprefix(NETWORK): each for name, each in engine.held_weights().items()}
    others = {name: each for name, each in _held_network(engine.module.network).items() if name not in weights}
    buffers = {name: replace(each, of=1) for name, each in others.items() if each.number == 0}  # the first rank's
    states = engine.held_states()
    if engine.classes is not None:
        weights, states = weights | engine.classes.held_weights(), states | engine.classes.held_states()
    kinds = {WEIGHTS: weights | buffers, TRAINING: states | _held_tables(engine.module.criterion)}
    if average is not None:
        kinds[EMA] = average.held() | buffers
    all_held = [(kind, name, held) for kind, named in kinds.items() for name, held in named.items()]
    taken, parts = {kind: {} for kind in KINDS}, {kind: {} for kind in kinds}
    for (kind, name, held), part in zip(all_held, shared_out(held for *_, held in all_held), strict=True):
        if len(part) or part.is_whole:
            whole = part.is_whole
            values = held.get().flatten()[part.start - held.part.start : part.stop - held.part.start]
            dtype = torch.float32 if values.is_floating_point() else values.dtype
            values = values.detach().to("cpu", dtype, copy=True)
            taken[kind][name] = values.view(part.shape) if whole else values
            parts[kind] |= {} if whole else {name: part}
    return Snapshot(training_state, header, *(taken[kind] for kind in KINDS), parts)


def read(
    folder: Path, config: Config, header: WeightsHeader, ranks: Ranks = _ALONE, allowed: Sequence[str] = ()
) -> Restored:
    """Open a verified checkpoint for the run of `config`, on all of its ranks.

    Args:
        allowed: settings and sections that may differ.

    Raises:
        CheckpointError: it belongs to another architecture or other identities.
    """
    found = read_header(folder / WEIGHTS)
    check_same_network(folder, found, header, allowed)
    saved = Saved(folder, ranks)
    averaged = config.training.ema_decay is not None
    if averaged and not saved.shapes(EMA) and not below("training.ema_decay", allowed):
        raise CheckpointError(f"{folder} has no averaged weights: --change training.ema_decay begins an average")
    state = checkpoints.read_state(folder)
    if not state.recipe:
        log.warning("%s is of keyreid 0.1: only its network, optimizer and steps an epoch can be compared", folder)
        name = "adamw" if any(name.endswith("/exp_avg") for name in saved.shapes(TRAINING)) else "sgd"
        steps = {"schedule.steps_per_epoch": state.steps_per_epoch} if state.steps_per_epoch else {}
        state = replace(state, recipe={"optimizer.name": name, **steps})
    return Restored(state, found, saved)


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


def restore_before(restored: Restored, network: KeyReID, criterion: Criterion) -> None:
    """Weights, running statistics and centre tables, into modules that no engine has wrapped yet; a collective."""
    held = _held_network(network)
    if network.classes is not None:
        held |= {name: network.classes.held(weight) for name, weight in network.classes.weights.items()}
    there, here = restored.saved.shapes(WEIGHTS), {name: each.part.shape for name, each in held.items()}
    if other := [name for name in sorted(there.keys() | here) if there.get(name) != here.get(name)]:  # change allowed
        said = (f"{name} is {there.get(name, 'not there')}, here {here.get(name, 'not there')}" for name in other[:8])
        step = restored.state.step
        raise CheckpointError(f"the weights of step {step} do not fit this network: {'; '.join(said)}")
    _restore(restored.saved, WEIGHTS, held)
    tables, there = _held_tables(criterion), restored.saved.shapes(TRAINING)
    same = {name: each for name, each in tables.items() if there[name] == each.part.shape}
    _restore(restored.saved, TRAINING, same)
    for name in tables.keys() - same:
        log.warning("loss.centres changed: %s start anew", name.removeprefix(CRITERION))


def restore_after(restored: Restored, engine: Engine, average: WeightAverage | None, same_optimizer: bool) -> None:
    """Optimizer states, float32 copies of lower-precision weights, the average, the fp16 loss scale; a collective."""
    saved = restored.saved
    if same_optimizer:
        engine.restore_optimizer_states(partial(saved.read, TRAINING))
    else:
        log.warning("optimizer.name changed: the optimizer's state starts anew")
    if next(engine.module.network.parameters()).dtype != torch.float32:
        engine.restore_weights(lambda wanted: _read_network(saved, wanted))
    if average is not None and (averages := saved.shapes(EMA)):
        for known in (True, False):  # sharded classes have no average
            held = {name: each for name, each in average.held().items() if (name in averages) == known}
            _restore(saved, EMA if known else WEIGHTS, held)
    if engine.loss_scale_state().keys() == restored.state.loss_scale.keys():
        engine.restore_loss_scale(restored.state.loss_scale)


def _held_network(network: KeyReID) -> dict[str, Held]:
    """All that is in its state dict."""
    return {name: Held.by_all(value) for name, value in network.state_dict().items()}


def _held_tables(criterion: Criterion) -> dict[str, Held]:
    return {CRITERION + name: each for name, each in criterion.held_tables().items()}


def _restore(saved: Saved, kind: str, held: Mapping[str, Held]) -> None:
    for name, values in saved.read(kind, {name: each.part for name, each in held.items()}):
        held[name].put(values)


def _read_network(saved: Saved, wanted: Mapping[str, Part]) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights by the engine's names."""
    found = saved.read(WEIGHTS, {name.removeprefix(NETWORK): part for name, part in wanted.items()})
    return ((NETWORK + name, values) for name, values in found)
