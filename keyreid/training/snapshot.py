"""From a running engine to a checkpoint's content, and back."""

from pathlib import Path

import torch

from keyreid.checkpoints import folder as checkpoints
from keyreid.checkpoints.folder import Snapshot, TrainingState
from keyreid.checkpoints.weights_file import WeightsHeader, read_header
from keyreid.config import Config
from keyreid.errors import CheckpointError
from keyreid.losses import Criterion
from keyreid.model import KeyReID
from keyreid.training.engine import Engine, WeightAverage

NETWORK, CRITERION = "network.", "criterion."


def take(
    engine: Engine, average: WeightAverage | None, training_state: TrainingState, header: WeightsHeader, first: bool
) -> Snapshot | None:
    """Copy all of a run to the CPU of the first rank; a collective. None on the other ranks."""
    weights, states = _collect(engine.weights(), first), _collect(engine.optimizer_states(), first)
    averages = _collect(average.full().items(), first) if average else {}
    if not first:
        return None
    network: KeyReID = engine.module.network
    parameters = dict(network.named_parameters())
    buffers = {n: b.detach().cpu().clone() for n, b in network.state_dict().items() if n not in parameters}
    tables = {CRITERION + n: b.detach().cpu().clone() for n, b in engine.module.criterion.state_dict().items()}
    weights = {name.removeprefix(NETWORK): value for name, value in weights.items()} | buffers
    return Snapshot(training_state, header, weights, averages | buffers if averages else {}, states | tables)


def read(folder: Path, config: Config, header: WeightsHeader) -> Snapshot:
    """Read a verified checkpoint for the run of `config`.

    Raises:
        CheckpointError: it belongs to another architecture or other identities.
    """
    found = read_header(folder / checkpoints.WEIGHTS)
    check_same_network(folder, found, header)
    ema = checkpoints.read_tensors(folder, checkpoints.EMA)
    if config.training.ema_decay is not None and not ema:
        raise CheckpointError(f"{folder} has no averaged weights: set training.ema_decay=null, or start a new run")
    weights, training = (checkpoints.read_tensors(folder, f) for f in (checkpoints.WEIGHTS, checkpoints.TRAINING))
    return Snapshot(checkpoints.read_state(folder), found, weights, ema, training)


def check_same_network(path: Path, found: WeightsHeader, wanted: WeightsHeader) -> None:
    """Refuse weights of another network, naming what differs."""
    different = [
        f"{section}.{key} is {theirs!r} there and {ours!r} here"
        for section in ("model", "clip")
        for key, theirs in getattr(found, section).model_dump().items()
        if (ours := getattr(getattr(wanted, section), key, None)) is not None or theirs is not None
        if key != "weights" and theirs != (ours.model_dump() if hasattr(ours, "model_dump") else ours)
    ]
    for what in ("identities", "cameras"):
        there, here = list(getattr(found, what)), list(getattr(wanted, what))
        different += [f"{len(there)} {what} there and {len(here)} here"] if there != here else []
    if different:
        raise CheckpointError(
            f"{path} is of another architecture or dataset: {'; '.join(different)}. "
            "Give the run another name, or remove its folder to start anew"
        )


def restore_before(restored: Snapshot, network: KeyReID, criterion: Criterion) -> None:
    """Weights, running statistics and centre tables, into modules that no engine has wrapped yet."""
    network.load_state_dict(dict(restored.weights))
    tables = {n.removeprefix(CRITERION): t for n, t in restored.training.items() if n.startswith(CRITERION)}
    criterion.load_state_dict(tables)


def restore_after(restored: Snapshot, engine: Engine, average: WeightAverage | None) -> None:
    """Optimizer states, float32 copies of lower-precision weights, the average, and the fp16 loss scale."""
    engine.restore_optimizer_states(restored.training)
    if next(engine.module.network.parameters()).dtype != torch.float32:
        engine.restore_weights({NETWORK + n: t for n, t in restored.weights.items()})
    if average is not None:
        average.restore(restored.ema)
    engine.restore_loss_scale(restored.state.loss_scale)


def _collect(tensors, first: bool) -> dict[str, torch.Tensor]:
    # Every rank takes part in gathering; only the first keeps a copy.
    return {name: value.detach().to("cpu", torch.float32, copy=True) for name, value in tensors if first}
