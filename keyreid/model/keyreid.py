"""KeyRe-ID: a global and a keypoint-guided local branch on one vision transformer (arXiv 2507.07393)."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from timm.layers import Mlp
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from keyreid.config import TcssConfig
from keyreid.model.backbone import Backbone
from keyreid.model.global_branch import GlobalBranch
from keyreid.model.heads import Classifiers, Neck
from keyreid.model.local_branch import LocalBranch


class Features(NamedTuple):
    """What the network says of B clips, each on its own (no batch statistics).

    Attributes:
        global_feature: float32 [B, D].
        part_features: float32 [P, B, T*D].
        temporal_scores: float32 [B, T], the temporal attention before its softmax; not negative.
    """

    global_feature: torch.Tensor
    part_features: torch.Tensor
    temporal_scores: torch.Tensor

    @staticmethod
    def concatenate(batches: list[Features]) -> Features:
        """The features of several micro-batches as those of one batch."""
        return Features(
            *(torch.cat(values, dim) for values, dim in zip(zip(*batches, strict=True), BATCH_DIMS, strict=True))
        )


BATCH_DIMS = (0, 1, 0)  # where Features' tensors count clips


class KeyReID(nn.Module):
    """The network.

    Args:
        vit: a timm VisionTransformer at the clip's size; it is taken apart.
        frames: T.
        num_identities: classes of the classifiers.
        num_cameras: cameras of the camera embedding.
        parts: P.
        guidance: see LocalBranch.
        guidance_epsilon: see LocalBranch.
        local_heads: heads of the local branch.
        camera_embedding: factor on the camera embedding.
        tcss: shift and shuffle of the local branch's rows.
        drop_path: stochastic depth of the local branch's block.

    Attributes:
        checkpoint_activations: recompute the backbone's blocks in the backward pass instead of keeping what they made.
    """

    def __init__(
        self,
        vit: VisionTransformer,
        frames: int,
        num_identities: int,
        num_cameras: int,
        parts: int = 6,
        guidance: Literal["aligned", "released"] = "aligned",
        guidance_epsilon: float = 1e-2,
        local_heads: int = 12,
        camera_embedding: float = 3.0,
        tcss: TcssConfig | None = None,
        drop_path: float = 0.0,
    ):
        super().__init__()
        self.frames = frames
        self.parts = parts
        self.guidance = guidance
        self.num_identities = num_identities
        self.num_cameras = num_cameras
        self.image_size = tuple(vit.patch_embed.img_size)
        self.patch_grid = tuple(vit.patch_embed.grid_size)
        self.width = vit.embed_dim
        self.part_width = frames * vit.embed_dim
        self.checkpoint_activations = False
        self.backbone = Backbone(vit, num_cameras, camera_embedding)
        self.global_branch = GlobalBranch(vit.blocks[-1], vit.norm, self.width)
        mlp = getattr(vit.blocks[-1], "mlp", None)
        self.local_branch = LocalBranch(
            frames=frames,
            width=self.width,
            heads=local_heads,
            patches=vit.patch_embed.num_patches,
            prefix_tokens=vit.num_prefix_tokens,
            mode=guidance,
            epsilon=guidance_epsilon,
            tcss=tcss or TcssConfig(),
            drop_path=drop_path,
            activation=type(mlp.act) if type(mlp) is Mlp else nn.GELU,
        )
        self.global_neck = Neck(1, self.width)
        self.part_necks = Neck(parts, self.part_width)
        self.global_classifier = Classifiers(1, self.width, num_identities)
        self.part_classifiers = Classifiers(parts, self.part_width, num_identities)

    def forward(self, images: torch.Tensor, guidance: torch.Tensor, cameras: torch.Tensor) -> torch.Tensor:
        """`heads(features(...))`: logits [1+P, B, C]; arguments as for `features`."""
        return self.heads(self.features(images, guidance, cameras))

    def features(self, images: torch.Tensor, guidance: torch.Tensor, cameras: torch.Tensor) -> Features:
        """Features of clips, each clip's from that clip alone.

        Args:
            images: [B, T, 3, H, W], normalised by .5/.5.
            guidance: [B, T, P, Hp, Wp]: `aligned` in [0, 1], `released` in [-1, 1].
            cameras: int [B]; -1 is unknown.
        """
        tokens = self.backbone(
            images.flatten(0, 1), cameras.repeat_interleave(self.frames), self.checkpoint_activations and self.training
        )
        global_feature, temporal_scores = self.global_branch(tokens, self.frames)
        return Features(global_feature, self.local_branch(tokens, guidance), temporal_scores)

    def heads(self, features: Features) -> torch.Tensor:
        """Logits [1+P, B, C] (the global branch first) from the features of the whole batch.

        In training the necks take their statistics from the B features given: over all ranks where these were
        gathered from all ranks.
        """
        whole = self.global_classifier(self.global_neck(features.global_feature.unsqueeze(0)))
        parts = self.part_classifiers(self.part_necks(features.part_features))
        return torch.cat([whole, parts])

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
