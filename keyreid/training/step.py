"""One optimizer step: clips in, losses out, the same whatever the number of ranks and micro-batches.

The triplet and centre losses and the BatchNorm necks compare clips of the whole global batch, so gradients cannot
simply be summed over micro-batches. With accumulation, a step first computes the features of every micro-batch
without gradients, then necks, classifiers and losses once on all of them, and last runs each micro-batch again with
the gradient that its features got (gradient caching). A single micro-batch needs no second pass.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from keyreid.config import Config
from keyreid.distributed.ranks import Ranks
from keyreid.losses import Criterion, check_labels, gather, gather_features
from keyreid.model import Features, KeyReID
from keyreid.model.inputs import prepare
from keyreid.shards.batch import ClipBatch
from keyreid.training import stochastic_depth


class TrainedModule(nn.Module):
    """The network and its losses as the one module that DeepSpeed wraps.

    Both stages go through `forward`, because the engine's hooks (casting, gathering sharded weights) live there.
    """

    def __init__(self, network: KeyReID, criterion: Criterion) -> None:
        super().__init__()
        self.network = network
        self.criterion = criterion

    def forward(self, clips: Clips, features: Features | None = None, losses: bool = True):
        """Features of `clips` unless given; with `losses`, (total, terms, features) of the global batch."""
        if features is None:
            dtype = next(self.network.parameters()).dtype  # lower than float32 where the engine casts the weights
            features = self.network.features(clips.images.to(dtype), clips.guidance.to(dtype), clips.cameras)
            if not losses:
                return features
        everywhere = gather_features(features)
        labels, erased = gather(clips.labels), gather(clips.erased)
        visibility = None if clips.visibility is None else gather(clips.visibility)
        total, terms = self.criterion(everywhere, self.network.heads(everywhere), labels, erased, visibility)
        return total, terms, everywhere


@dataclass
class Clips:
    """The network's inputs and the losses' labels for some clips of this rank, on its device."""

    images: torch.Tensor
    guidance: torch.Tensor
    cameras: torch.Tensor
    labels: torch.Tensor
    erased: torch.Tensor
    visibility: torch.Tensor | None


@dataclass(frozen=True)
class StepResult:
    """What a step did.

    Attributes:
        loss: the total of the global batch, the same on all ranks.
        terms: its terms, on the device (a copy to the CPU waits for it).
        applied: False where the loss was not finite or the fp16 gradients overflowed.
        gradient_norm: 2-norm of the global gradient before clipping; None where nothing was applied.
    """

    loss: float
    terms: dict[str, torch.Tensor]
    applied: bool
    gradient_norm: float | None


class Stepper:
    """Runs optimizer steps on a DeepSpeed engine whose module is a TrainedModule."""

    def __init__(self, engine, config: Config, ranks: Ranks, paths: list[stochastic_depth.ClipDropPath]) -> None:
        self.engine = engine
        self.module: TrainedModule = engine.module
        self.config = config
        self.ranks = ranks
        self.paths = paths
        self._gradient_norm: float | None = None
        if config.training.zero_stage == 0:  # ZeRO clips and reports the norm itself
            engine.basic_optimizer.register_step_pre_hook(self._clip_gradients)

    def step(self, batch: ClipBatch, step: int) -> StepResult:
        """Train on this rank's clips of step `step`; a collective.

        Raises:
            DataError: a label that the classifiers do not have.
        """
        check_labels(batch.labels, self.module.network.num_identities, batch.keys)
        micro = len(batch) // self.config.training.accumulation
        first = self.ranks.rank * len(batch)
        copies = max(self.config.clip.frames, self.config.model.parts)
        draws = stochastic_depth.draw(self.paths, self.config.seed, step, len(batch) * self.ranks.world_size, copies)

        def use_draws(start: int, stop: int) -> None:
            stochastic_depth.use(self.paths, draws, slice(first + start, first + stop), self.ranks.device)

        saved = [buffer.clone() for buffer in self.module.network.buffers()]
        batch = batch.to(self.ranks.device)
        if micro == len(batch):
            use_draws(0, micro)
            clips = self._clips(batch)
            total, terms, features = self.engine(clips)
            loss = total.item()
            if finite := torch.isfinite(total).item():
                self.engine.backward(total)
        else:
            if self.config.training.zero_stage == 3:
                # DeepSpeed 0.19.8 copies a step's first gradients over those of the step before and adds the rest; the
                # backbone gets none in our first backward pass, and would add to what is left from the step before.
                self.engine.optimizer.grad_partitions_flat_buffer.zero_()
            pieces = [(start, start + micro) for start in range(0, len(batch), micro)]
            cached = []
            for start, stop in pieces:
                use_draws(start, stop)
                with torch.no_grad():
                    cached.append(self.engine(self._clips(batch[start:stop]), losses=False))
            leaves = Features(*(value.requires_grad_() for value in Features.concatenate(cached)))
            clips = self._clips(batch)
            total, terms, features = self.engine(clips, features=leaves)
            loss = total.item()
            if finite := torch.isfinite(total).item():
                self.engine.backward(total)
                scale = loss_scale(self.engine)  # the leaves' gradients carry it, and the next passes add it again
                gradients = Features(*(leaf.grad / scale for leaf in leaves))
                for start, stop in pieces:
                    use_draws(start, stop)
                    again = self.engine(self._clips(batch[start:stop]), losses=False)
                    self.engine.backward(_inner_product(again, gradients, start, stop))
        if not finite:
            with torch.no_grad():  # the necks' running statistics met the bad features
                for buffer, before in zip(self.module.network.buffers(), saved, strict=True):
                    buffer.copy_(before)
            return StepResult(loss, terms, applied=False, gradient_norm=None)
        self.engine.step()
        applied = self.engine.was_step_applied()
        if applied:
            labels = gather(clips.labels)
            visibility = None if clips.visibility is None else gather(clips.visibility)
            self.module.criterion.update_centres(features, labels, visibility)
        norm = self.engine.get_global_grad_norm() if self.config.training.zero_stage else self._gradient_norm
        return StepResult(loss, terms, applied, float(norm) if applied and norm is not None else None)

    def bad_ranks(self, batch: ClipBatch) -> list[int]:
        """Ranks whose own features of a batch are not finite; a collective, to explain a bad step."""
        self.engine.eval()
        with torch.no_grad():
            features = self.engine(self._clips(batch.to(self.ranks.device)), losses=False)
        self.engine.train()
        finite = all(torch.isfinite(value).all().item() for value in features)
        return [rank for rank, fine in enumerate(self.ranks.from_all(finite)) if not fine]

    def _clips(self, batch: ClipBatch) -> Clips:
        mode = self.module.network.guidance
        images, guidance = prepare(batch, mode)
        visibility = batch.visibility if mode.uses_visibility else None
        return Clips(images, guidance, batch.cameras, batch.labels, batch.erased, visibility)

    def _clip_gradients(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        limit = self.config.training.clip_gradient_norm or float("inf")
        self._gradient_norm = torch.nn.utils.clip_grad_norm_(parameters, limit).item()


def loss_scale(engine) -> float:
    """What the engine multiplies a loss with before its backward pass (fp16; else 1)."""
    if engine.torch_autocast_z0_gradscaler is not None:
        return engine.torch_autocast_z0_gradscaler.get_scale()
    return float(getattr(engine.optimizer, "loss_scale", 1.0))


def _inner_product(features: Features, gradients: Features, start: int, stop: int) -> torch.Tensor:
    """The scalar whose gradient with respect to `features` are rows start..stop of `gradients`."""
    rows = Features(
        gradients.global_feature[start:stop],
        gradients.part_features[:, start:stop],
        gradients.temporal_scores[start:stop],
    )
    return sum((value * gradient).sum() for value, gradient in zip(features, rows, strict=True))
