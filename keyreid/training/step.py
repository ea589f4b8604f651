"""One optimizer step: clips in, losses out, the same whatever the number of ranks and micro-batches.

The triplet loss and the BatchNorm necks compare the clips of a scope (see distributed/share.py). A step of one
micro-batch needs one pass (`_step_at_once`), and so does each micro-batch that has whole scopes (`_step_in_turn`).
Where micro-batches cut a scope, gradients cannot simply be summed: a step then first computes the features of every
micro-batch without gradients, then necks, classifiers and losses once on all of them, and last runs each micro-batch
again with the gradient that its features got (`_step_in_pieces`, known as gradient caching).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from keyreid.config import Config
from keyreid.distributed.ranks import Ranks
from keyreid.distributed.share import WHOLE, Share, peers_of
from keyreid.losses import Centres, Criterion, Scope, check_labels
from keyreid.model import Features, KeyReID
from keyreid.model.inputs import prepare
from keyreid.shards.batch import ClipBatch
from keyreid.training import stochastic_depth
from keyreid.training.engine import Engine

T = TypeVar("T")


@dataclass(frozen=True)
class Clips:
    """The network's inputs for some clips of this rank, on its device."""

    images: Tensor
    guidance: Tensor
    cameras: Tensor


@dataclass(frozen=True)
class Targets:
    """What the losses know of those clips beside their features: labels [n], erased [n, T], visibility [n, P]."""

    labels: Tensor
    erased: Tensor
    visibility: Tensor | None
    share: Share
    centres: Centres

    def __getitem__(self, rows: slice) -> "Targets":
        """Those of some whole scopes."""
        labels, visibility = self.labels[rows], None if self.visibility is None else self.visibility[rows]
        share = replace(self.share, scopes=self.share.scopes * len(labels) // len(self.labels))
        centres = self.centres._replace(places=self.centres.places[rows])
        return Targets(labels, self.erased[rows], visibility, share, centres)


class Losses(NamedTuple):
    """This rank's addends of the total of the global batch and of its terms, and what its clips were compared with."""

    total: Tensor
    terms: dict[str, Tensor]
    scope: Scope


class TrainedModule(nn.Module):
    """The network and its losses as the one module that the engine wraps; its methods are the stages of a step."""

    def __init__(self, network: KeyReID, criterion: Criterion) -> None:
        super().__init__()
        self.network = network
        self.criterion = criterion

    def forward(self, stage: Callable[..., T], **inputs: object) -> T:
        """Run a stage where the engine's hooks (casting, gathering sharded weights) see it."""
        return stage(**inputs)

    def features(self, clips: Clips) -> Features:
        """The features of this rank's clips."""
        dtype = next(self.network.parameters()).dtype  # lower than float32 where the engine casts the weights
        return self.network.features(clips.images.to(dtype), clips.guidance.to(dtype), clips.cameras)

    def losses(self, features: Features, targets: Targets) -> Losses:
        """The losses from the features of this rank's clips."""
        labels, erased, visibility, share, centres = vars(targets).values()
        logits = self.network.heads(features, share)
        scope = Scope.gathered(features, labels, visibility, share)
        total, terms = self.criterion(features, logits, labels, erased, visibility, share, scope, centres)
        return Losses(total, terms, scope)

    def features_and_losses(self, clips: Clips, targets: Targets) -> Losses:
        """Both in one pass."""
        return self.losses(self.features(clips), targets)


@dataclass(frozen=True)
class StepResult:
    """What a step did; the same on all ranks. Its numbers are on the device: who reads one waits for it."""

    terms: dict[str, Tensor]  # of the global batch, and their total as `loss`
    applied: bool  # False where the loss was not finite or the fp16 gradients overflowed
    norm: Tensor | float | None  # 2-norm of the global gradient before clipping; None where nothing was applied

    @property
    def loss(self) -> float:
        """The total of the global batch."""
        return float(self.terms["loss"])

    @property
    def gradient_norm(self) -> float | None:
        """2-norm of the global gradient before clipping; None where nothing was applied."""
        return None if self.norm is None else float(self.norm)


class _Answer:
    """A device's yes or no, asked for now and waited for when it is used: what was begun in between goes on."""

    def __init__(self, value: Tensor) -> None:
        self._value = value.to("cpu", non_blocking=True)
        self._asked = torch.cuda.Event() if value.is_cuda else None
        if self._asked:
            self._asked.record()

    def __bool__(self) -> bool:
        if self._asked:
            self._asked.synchronize()
        return bool(self._value)


class Stepper:
    """Runs optimizer steps on an engine whose module is a TrainedModule.

    Raises:
        ConfigError: the ranks and the lanes do not go together.
    """

    def __init__(self, engine: Engine, config: Config, ranks: Ranks, paths: list[stochastic_depth.ClipDropPath]):
        self.engine, self.config, self.ranks, self.paths = engine, config, ranks, paths
        self.module: TrainedModule = engine.module
        self.scopes = config.scopes
        self.share = WHOLE
        if self.scopes > 1 or ranks.world_size > 1:
            peers = peers_of(self.scopes, ranks.world_size, f"data.lanes={config.data.lanes}")
            wire = torch.bfloat16 if config.training.precision == "bf16" else None
            here = max(1, self.scopes // ranks.world_size)
            self.share = Share(config.data.batch_size, here, ranks.world_size, peers, wire=wire)
        self._draws: list[Tensor] = []

    def step(self, batch: ClipBatch, step: int) -> StepResult:
        """Train on this rank's clips of step `step`; a collective.

        Raises:
            DataError: a label that the classifiers do not have.
        """
        network = self.module.network
        check_labels(batch.labels, network.num_identities, batch.keys)
        self._draws = self._draw(len(batch), step)
        criterion = self.module.criterion
        centres = criterion.centres_of(batch.labels)
        batch = batch.to(self.ranks.device)
        if network.classes is not None:
            network.classes.choose(batch.labels, self.config.loss.negative_classes, self.config.seed * 1_000_003 + step)
        used = network.guidance.uses_visibility and batch.visibility is not None
        visibility = batch.visibility if used else None
        seen = self.share.add_all((visibility > 0).float().sum(0)) if used else None
        targets = Targets(batch.labels, batch.erased, visibility, replace(self.share, seen=seen), centres)
        before = network.running_statistics()
        terms, scope = self._passes()(batch, targets)
        network.learn_statistics(self.share, self.scopes)
        if not self._finite:
            self.engine.discard()
            network.restore_statistics(before)
            return StepResult(terms, applied=False, norm=None)
        applied = self.engine.step()
        if applied:
            if criterion.owners is None:
                criterion.update_centres(*scope)
            else:
                own = _rows(scope.features, self.share.first(len(batch)), len(batch))
                criterion.update_centres(own, batch.labels, visibility, centres)
        return StepResult(terms, applied, self.engine.gradient_norm if applied else None)

    def _passes(self) -> Callable[[ClipBatch, Targets], tuple[dict[str, Tensor], Scope]]:
        """How this rank's clips go through the network."""
        micro_batches = self.config.training.accumulation
        if micro_batches == 1:
            return self._step_at_once
        whole_scopes = self.share.peers is None and self.share.scopes % micro_batches == 0
        return self._step_in_turn if whole_scopes else self._step_in_pieces

    def _step_at_once(self, batch: ClipBatch, targets: Targets) -> tuple[dict[str, Tensor], Scope]:
        """Features, losses and gradients of all of this rank's clips."""
        self._use_draws(0, len(batch))
        losses = self.engine.run(self.module.features_and_losses, clips=self._clips(batch), targets=targets)
        terms = self._totals([losses])
        self._backward(losses.total)
        return terms, losses.scope

    def _step_in_turn(self, batch: ClipBatch, targets: Targets) -> tuple[dict[str, Tensor], Scope]:
        """The same of each micro-batch, where each has whole scopes."""
        self.engine.begin_passes()
        done = []
        for start, stop in self._pieces(len(batch)):
            self._use_draws(start, stop)
            clips = self._clips(batch[start:stop])
            losses = self.engine.run(self.module.features_and_losses, clips=clips, targets=targets[start:stop])
            self._backward(losses.total)
            done.append(losses._replace(total=losses.total.detach()))
        features = Features.concatenate([losses.scope.features for losses in done])
        return self._totals(done), Scope(features, targets.labels, targets.visibility)

    def _step_in_pieces(self, batch: ClipBatch, targets: Targets) -> tuple[dict[str, Tensor], Scope]:
        """Features of each micro-batch, losses of all, then the gradients of each micro-batch."""
        self.engine.begin_passes()
        pieces = self._pieces(len(batch))
        with torch.no_grad():
            cached = [self._features(batch, *piece) for piece in pieces]
        leaves = Features(*(value.requires_grad_() for value in Features.concatenate(cached)))
        losses = self.engine.run(self.module.losses, features=leaves, targets=targets)
        terms = self._totals([losses])
        self._backward(losses.total)
        scale = self.engine.loss_scale  # the leaves' gradients carry it, and the next passes add it again
        gradients = Features(*(leaf.grad / scale for leaf in leaves))
        for piece in pieces:
            self.engine.backward(_inner_product(self._features(batch, *piece), gradients, *piece))
        return terms, losses.scope

    def _backward(self, total: Tensor) -> None:
        # Data-parallel training averages gradients over the ranks, whose losses add up.
        self.engine.backward(total * self.ranks.world_size if self.ranks.world_size > 1 else total)

    def _totals(self, done: list[Losses]) -> dict[str, Tensor]:
        """The terms of the global batch and `loss`, their weighted total, on every rank."""
        names = [*done[0].terms, "loss"]
        addends = sum(torch.stack([*losses.terms.values(), losses.total.detach()]) for losses in done)
        totals = dict(zip(names, self.share.add_all(addends), strict=True))
        self._finite = _Answer(totals["loss"].isfinite())
        return totals

    def _pieces(self, clips: int) -> list[tuple[int, int]]:
        micro = clips // self.config.training.accumulation
        return [(start, start + micro) for start in range(0, clips, micro)]

    def bad_ranks(self, batch: ClipBatch) -> list[int]:
        """Ranks whose own features of a batch are not finite; a collective, to explain a bad step."""
        self.engine.train(False)
        with torch.no_grad():
            features = self.engine.run(self.module.features, clips=self._clips(batch.to(self.ranks.device)))
        self.engine.train()
        finite = all(torch.isfinite(value).all().item() for value in features)
        return [rank for rank, fine in enumerate(self.ranks.from_all(finite)) if not fine]

    def _features(self, batch: ClipBatch, start: int, stop: int) -> Features:
        self._use_draws(start, stop)
        return self.engine.run(self.module.features, clips=self._clips(batch[start:stop]))

    def _draw(self, clips: int, step: int) -> list[Tensor]:
        """The stochastic depth of this rank's clips: drawn by lanes, for the lanes that it has clips of."""
        copies = max(self.config.clip.frames, self.config.model.parts)
        lane = self.config.data.batch_size // self.config.data.lanes
        first, last = self.ranks.rank * clips, (self.ranks.rank + 1) * clips
        lanes = range(first // lane, -(-last // lane))
        drawn = [stochastic_depth.draw(self.paths, self.config.seed, step, lane, copies, number) for number in lanes]
        own = slice(first - lanes.start * lane, last - lanes.start * lane)
        return [torch.cat(of_path)[own] for of_path in zip(*drawn, strict=True)]

    def _use_draws(self, start: int, stop: int) -> None:
        stochastic_depth.use(self.paths, self._draws, slice(start, stop), self.ranks.device)

    def _clips(self, batch: ClipBatch) -> Clips:
        return Clips(*prepare(batch, self.module.network.guidance), batch.cameras)


def _inner_product(features: Features, gradients: Features, start: int, stop: int) -> Tensor:
    """The scalar whose gradient with respect to `features` are rows start..stop of `gradients`."""
    rows = _rows(gradients, start, stop - start)
    return sum((value * gradient).sum() for value, gradient in zip(features, rows, strict=True))


def _rows(features: Features, start: int, count: int) -> Features:
    """Those of `count` clips."""
    whole, parts, scores = features
    return Features(whole.narrow(0, start, count), parts.narrow(1, start, count), scores.narrow(0, start, count))
