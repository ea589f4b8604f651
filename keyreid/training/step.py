"""One optimizer step: clips in, losses out, the same whatever the number of ranks and micro-batches.

The triplet and centre losses and the BatchNorm necks compare clips of the whole global batch, so gradients cannot
simply be summed over micro-batches. A step of one micro-batch needs one pass (`_step_at_once`). With accumulation, a
step first computes the features of every micro-batch without gradients, then necks, classifiers and losses once on all
of them, and last runs each micro-batch again with the gradient that its features got (`_step_in_pieces`, known as
gradient caching).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from keyreid.config import Config
from keyreid.distributed.ranks import Ranks, gather
from keyreid.losses import Criterion, check_labels, gather_features
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
    """What the losses know of the global batch beside its features: labels [B], erased [B, T], visibility [B, P]."""

    labels: Tensor
    erased: Tensor
    visibility: Tensor | None


class Losses(NamedTuple):
    """The total of the global batch, its terms, and the features of all ranks' clips that they were computed from."""

    total: Tensor
    terms: dict[str, Tensor]
    features: Features


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
        """The losses of the global batch, from this rank's features of it."""
        everywhere = gather_features(features)
        logits = self.network.heads(everywhere)
        total, terms = self.criterion(everywhere, logits, targets.labels, targets.erased, targets.visibility)
        return Losses(total, terms, everywhere)

    def features_and_losses(self, clips: Clips, targets: Targets) -> Losses:
        """Both in one pass."""
        return self.losses(self.features(clips), targets)


@dataclass(frozen=True)
class StepResult:
    """What a step did; the same on all ranks."""

    loss: float  # the total of the global batch
    terms: dict[str, Tensor]  # its terms, on the device (a copy to the CPU waits for it)
    applied: bool  # False where the loss was not finite or the fp16 gradients overflowed
    gradient_norm: float | None  # 2-norm of the global gradient before clipping; None where nothing was applied


class Stepper:
    """Runs optimizer steps on an engine whose module is a TrainedModule."""

    def __init__(self, engine: Engine, config: Config, ranks: Ranks, paths: list[stochastic_depth.ClipDropPath]):
        self.engine, self.config, self.ranks, self.paths = engine, config, ranks, paths
        self.module: TrainedModule = engine.module
        self._draws: list[Tensor] = []

    def step(self, batch: ClipBatch, step: int) -> StepResult:
        """Train on this rank's clips of step `step`; a collective.

        Raises:
            DataError: a label that the classifiers do not have.
        """
        check_labels(batch.labels, self.module.network.num_identities, batch.keys)
        copies = max(self.config.clip.frames, self.config.model.parts)
        clips_everywhere = len(batch) * self.ranks.world_size
        self._draws = stochastic_depth.draw(self.paths, self.config.seed, step, clips_everywhere, copies)
        before = [buffer.clone() for buffer in self.module.network.buffers()]
        batch = batch.to(self.ranks.device)
        used = self.module.network.guidance.uses_visibility and batch.visibility is not None
        visibility = gather(batch.visibility) if used else None
        targets = Targets(gather(batch.labels), gather(batch.erased), visibility)
        passes = self._step_at_once if self.config.training.accumulation == 1 else self._step_in_pieces
        loss, losses = passes(batch, targets)
        if not math.isfinite(loss):
            with torch.no_grad():  # the necks' running statistics met the bad features
                for buffer, value in zip(self.module.network.buffers(), before, strict=True):
                    buffer.copy_(value)
            return StepResult(loss, losses.terms, applied=False, gradient_norm=None)
        applied = self.engine.step()
        if applied:
            self.module.criterion.update_centres(losses.features, targets.labels, targets.visibility)
        return StepResult(loss, losses.terms, applied, self.engine.gradient_norm if applied else None)

    def _step_at_once(self, batch: ClipBatch, targets: Targets) -> tuple[float, Losses]:
        """Features, losses and gradients of all of this rank's clips; no gradients where the loss is not finite."""
        self._use_draws(0, len(batch))
        losses = self.engine.run(self.module.features_and_losses, clips=self._clips(batch), targets=targets)
        loss = losses.total.item()
        if math.isfinite(loss):
            self.engine.backward(losses.total)
        return loss, losses

    def _step_in_pieces(self, batch: ClipBatch, targets: Targets) -> tuple[float, Losses]:
        """Features of each micro-batch, losses of all, then the gradients of each micro-batch."""
        self.engine.begin_passes()
        micro = len(batch) // self.config.training.accumulation
        pieces = [(start, start + micro) for start in range(0, len(batch), micro)]
        with torch.no_grad():
            cached = [self._features(batch, *piece) for piece in pieces]
        leaves = Features(*(value.requires_grad_() for value in Features.concatenate(cached)))
        losses = self.engine.run(self.module.losses, features=leaves, targets=targets)
        loss = losses.total.item()
        if math.isfinite(loss):
            self.engine.backward(losses.total)
            scale = self.engine.loss_scale  # the leaves' gradients carry it, and the next passes add it again
            gradients = Features(*(leaf.grad / scale for leaf in leaves))
            for piece in pieces:
                self.engine.backward(_inner_product(self._features(batch, *piece), gradients, *piece))
        return loss, losses

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

    def _use_draws(self, start: int, stop: int) -> None:
        first = self._draws[0].shape[0] // self.ranks.world_size * self.ranks.rank if self._draws else 0
        stochastic_depth.use(self.paths, self._draws, slice(first + start, first + stop), self.ranks.device)

    def _clips(self, batch: ClipBatch) -> Clips:
        return Clips(*prepare(batch, self.module.network.guidance), batch.cameras)


def _inner_product(features: Features, gradients: Features, start: int, stop: int) -> Tensor:
    """The scalar whose gradient with respect to `features` are rows start..stop of `gradients`."""
    whole, parts, scores = gradients
    rows = Features(whole[start:stop], parts[:, start:stop], scores[start:stop])
    return sum((value * gradient).sum() for value, gradient in zip(features, rows, strict=True))
