"""KeyRe-ID: a global and a keypoint-guided local branch on one vision transformer (arXiv 2507.07393)."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from keyreid.backbones import Backbone
from keyreid.config import ModelConfig
from keyreid.distributed.share import WHOLE, Share
from keyreid.guidance import named
from keyreid.model.global_branch import GlobalBranch
from keyreid.model.heads import Classifiers, Neck
from keyreid.model.local_branch import LocalBranch
from keyreid.model.sharded_classes import ClassGroup, ShardedClasses, ShardedLogits


class Features(NamedTuple):
    """What the network says of B clips, each on its own (no batch statistics), in float32."""

    global_feature: torch.Tensor  # [B, D]
    part_features: torch.Tensor  # [P, B, T*D]
    temporal_scores: torch.Tensor  # [B, T], the temporal attention before its softmax; not negative

    @staticmethod
    def concatenate(batches: "list[Features]") -> "Features":
        """The features of several micro-batches as those of one batch."""
        return Features(*map(torch.cat, zip(*batches, strict=True), (0, 1, 0)))  # where the tensors count clips


class KeyReID(nn.Module):
    """The network.

    Args:
        backbone: at the clip's size; its last stage becomes the global branch's.
        frames: T.
        num_identities: classes of the classifiers.
        group: who shares out the classes of sharded classifiers; None: nobody, for they are not needed.

    Attributes:
        classes: this rank's, where they are sharded; their weights are no parameters of the network.
    """

    def __init__(
        self,
        backbone: Backbone,
        model: ModelConfig,
        frames: int,
        num_identities: int,
        num_cameras: int,
        group: ClassGroup | None = None,
    ):
        super().__init__()
        self.frames, self.parts = frames, model.parts
        self.guidance = named(model.guidance)
        self.num_identities, self.num_cameras = num_identities, num_cameras
        self.image_size = (backbone.grid.height, backbone.grid.width)
        self.patch_grid = backbone.grid.shape
        self.width, self.part_width = backbone.width, frames * backbone.width
        stage = backbone.last_stage()
        self.backbone = backbone
        self.global_branch = GlobalBranch(stage, self.width)
        self.local_branch = LocalBranch(model, frames, backbone, stage.activation)
        self.prompts = self.guidance.prompts(model.parts, self.width)
        self.global_neck = Neck(1, self.width)
        self.part_necks = Neck(model.parts, self.part_width)
        self.classes: ShardedClasses | None = None
        if model.classifiers == "replicated":
            self.global_classifier = Classifiers(1, self.width, num_identities)
            self.part_classifiers = Classifiers(model.parts, self.part_width, num_identities)
        elif group is not None:
            self.classes = ShardedClasses((self.width, self.part_width), model.parts, num_identities, group)
        self._compiled: tuple[Callable[..., torch.Tensor], ...] = ()

    @property
    def checkpoint_activations(self) -> bool:
        """Recompute the backbone's blocks in the backward pass instead of keeping what they made."""
        return self.backbone.checkpoint_activations

    @checkpoint_activations.setter
    def checkpoint_activations(self, value: bool) -> None:
        self.backbone.checkpoint_activations = value

    @property
    def sharded_parameters(self) -> int:
        """Numbers in the classifiers that are none of this module's parameters, of all classes."""
        apart = not hasattr(self, "global_classifier")
        return apart * self.num_identities * (self.width + self.parts * self.part_width)

    def compile(self, **options) -> None:
        """torch.compile (with its options) backbone and branches, for training; the state dict's names stay.

        Evaluation runs as before: it meets many batch sizes, and pictures of attention hook into the branches.
        """
        modules = self.backbone, self.global_branch, self.local_branch
        self._compiled = tuple(torch.compile(module, **options) for module in modules)

    def features(self, images: torch.Tensor, guidance: torch.Tensor, cameras: torch.Tensor) -> Features:
        """Features of clips, each clip's from that clip alone.

        Args:
            images: [B, T, 3, H, W], normalised by .5/.5.
            guidance: [B, T, P, Hp, Wp], in the range of `Guidance.scaled`.
            cameras: int [B]; -1 is unknown.
        """
        modules = self._compiled if self.training else ()
        backbone, global_branch, local_branch = modules or (self.backbone, self.global_branch, self.local_branch)
        prompts = self.prompts(guidance.flatten(0, 1)) if self.prompts is not None else None
        tokens = backbone(images.flatten(0, 1), cameras.repeat_interleave(self.frames), prompts)
        global_feature, temporal_scores = global_branch(tokens, self.frames)
        return Features(global_feature, local_branch(tokens, guidance), temporal_scores)

    def heads(self, features: Features, share: Share = WHOLE) -> torch.Tensor | ShardedLogits:
        """Logits [1+P, B, C] (the global branch first) from the features of B clips.

        In training the necks take their statistics from the scopes of the share, over all ranks that hold one together.
        """
        if self.classes is not None:
            whole = self.global_neck(features.global_feature.unsqueeze(0), share)
            return ShardedLogits(whole, self.part_necks(features.part_features, share), self.classes)
        whole = self.global_classifier(self.global_neck(features.global_feature.unsqueeze(0), share))
        parts = self.part_classifiers(self.part_necks(features.part_features, share))
        return torch.cat([whole, parts])

    def running_statistics(self) -> list[torch.Tensor]:
        """A copy of the necks' running statistics."""
        return [buffer.clone() for neck in (self.global_neck, self.part_necks) for buffer in neck.buffers()]

    @torch.no_grad()
    def restore_statistics(self, before: list[torch.Tensor]) -> None:
        """Put back what `running_statistics` gave."""
        buffers = [buffer for neck in (self.global_neck, self.part_necks) for buffer in neck.buffers()]
        torch._foreach_copy_(buffers, before)

    def learn_statistics(self, share: Share, scopes: int) -> None:
        """After the passes of a step on a share: see Neck; a collective."""
        for neck in (self.global_neck, self.part_necks):
            neck.learn_statistics(share, scopes)

    def embed(self, images: torch.Tensor, guidance: torch.Tensor, cameras: torch.Tensor) -> torch.Tensor:
        """The vector of each clip that is compared in evaluation: [B, D + P*T*D], Euclidean, not normalised.

        The global feature after its neck, then each part's after its neck, divided by P. Call `eval()` first.
        """
        if self.training:
            raise RuntimeError("embed() is for evaluation: call eval() on the model first")
        features = self.features(images, guidance, cameras)
        whole = self.global_neck(features.global_feature.unsqueeze(0))[0]
        parts = self.part_necks(features.part_features) / self.parts
        return torch.cat([whole, parts.transpose(0, 1).flatten(1)], 1)
