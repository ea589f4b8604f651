"""Heads, losses and the step around them, without backbone and engine, for costs to be counted and timed."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.distributed as dist
from allocations import AllocationLog
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from keyreid.config import Config, check_config
from keyreid.distributed.ranks import Ranks
from keyreid.guidance import named
from keyreid.losses import Criterion, Scope
from keyreid.model import Features, KeyReID
from keyreid.model.heads import Classifiers, Neck
from keyreid.shards.batch import ClipBatch
from keyreid.training.step import Stepper, Targets, TrainedModule


def recipe(clips: int, lanes: int = 1, compare: str = "batch", precision: str = "fp32", **sections) -> Config:
    """Batches of so many clips, four of an identity."""
    data = {"shards": "nowhere", "identities": clips // 4, "tracklets": 4, "lanes": lanes}
    training = {"precision": precision, **sections.pop("training", {})}
    return check_config({"data": data, "loss": {"compare": compare}, "training": training, **sections}, "here", Config)


class Heads(KeyReID):
    """Necks and classifiers; features are numbers that only the clips' count decides."""

    def __init__(self, config: Config, width: int, identities: int):
        nn.Module.__init__(self)
        self.frames, self.parts, self.guidance = config.clip.frames, config.model.parts, named(config.model.guidance)
        self.classes = None
        self.num_identities, self.width, self.part_width = identities, width, config.clip.frames * width
        self.global_neck, self.part_necks = Neck(1, width), Neck(self.parts, self.part_width)
        self.global_classifier = Classifiers(1, width, identities)
        self.part_classifiers = Classifiers(self.parts, self.part_width, identities)

    def features(self, images, guidance, cameras) -> Features:
        clips, random = len(images), torch.Generator().manual_seed(len(images))
        shapes = (clips, self.width), (self.parts, clips, self.part_width), (clips, self.frames)
        return Features(*(torch.randn(s, generator=random).requires_grad_() for s in shapes))


class NoEngine:
    """Runs the stages of a step and learns nothing."""

    gradient_norm, loss_scale = 1.0, 1.0

    def __init__(self, module: TrainedModule):
        self.module = module

    def run(self, stage, **inputs):
        return stage(**inputs)

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def begin_passes(self) -> None: ...

    def step(self) -> bool:
        return True


def stepper(config: Config, width: int, identities: int, ranks: Ranks) -> Stepper:
    """As the loop builds it."""
    owners = ranks if config.scopes > 1 and ranks.world_size > 1 else None
    network = Heads(config, width, identities)
    criterion = Criterion(config.loss, identities, width, network.part_width, config.model.parts, owners)
    return Stepper(NoEngine(TrainedModule(network, criterion)), config, ranks, [])


def batch(config: Config, ranks: Ranks) -> ClipBatch:
    """A rank's clips of a step: blank, every four of an identity."""
    clips, frames = config.data.batch_size // ranks.world_size, config.clip.frames
    numbers = torch.arange(clips) + ranks.rank * clips
    pictures = torch.zeros(clips, frames, 3, 2, 2, dtype=torch.uint8)
    guidance = torch.zeros(clips, frames, config.model.parts, 1, 1)
    erase, visibility = torch.zeros(clips, frames, 4, dtype=torch.int32), torch.ones(clips, config.model.parts)
    labels = numbers // 4
    return ClipBatch(pictures, guidance, erase, visibility, labels, labels, numbers, numbers, ["a clip"] * clips)


class OneOf:
    """This process as one of many ranks, whose others are not there: what they would say is what this one says.

    Owners of rows are the exception: each rank has all centres.
    """

    def __init__(self, config: Config, width: int, identities: int, ranks: int):
        if ranks > 1:
            dist.init_process_group("fake", store=FakeStore(), rank=ranks // 2, world_size=ranks)
        rank = ranks // 2 if ranks > 1 else 0
        self.ranks = Ranks(rank, ranks, 0, torch.device("cpu"), dist.group.WORLD if ranks > 1 else None)
        self.stepper = stepper(config, width, identities, self.ranks)
        self.module, self.config = self.stepper.module, config
        if self.module.criterion.owners:
            self.module.criterion = Criterion(config.loss, identities, width, config.clip.frames * width, 6)
        clips = batch(config, self.ranks)
        centres = self.module.criterion.centres_of(clips.labels % identities)
        share = replace(self.stepper.share, seen=config.data.batch_size * torch.ones(config.model.parts))
        labels = clips.labels % identities
        self.features = self.module.network.features(clips.images, None, None)
        self.targets = Targets(labels, clips.erased, clips.visibility, share, centres)

    def losses(self, logits: torch.Tensor | None = None) -> Scope:
        """Heads (but where logits are given) and losses, forward and backward."""
        heads = self.module.network.heads
        if logits is not None:
            self.module.network.heads = lambda *_: logits
        found = self.module.losses(self.features, self.targets)
        self.module.network.heads = heads
        found.total.backward()
        self.module.network.learn_statistics(self.targets.share, self.config.scopes)
        return found.scope

    def held(self, logits: torch.Tensor | None = None) -> tuple[AllocationLog, set[int]]:
        """What that holds at once beside the features, weights and their gradients: log, numbers of those."""
        parameters = [*self.module.parameters(), *([] if logits is None else [logits])]
        known = [*self.features, *parameters, *self.module.buffers(), *vars(self.targets).values()]
        known = [tensor for tensor in known if isinstance(tensor, torch.Tensor)]
        with AllocationLog() as log:
            without = {log.number(tensor) for tensor in known}
            scope = self.losses(logits)
            without |= {log.number(of.grad) for of in (*self.features, *parameters) if of.grad is not None}
            with torch.no_grad():
                self.module.criterion.update_centres(*scope)
        return log, without

    def leave(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()
