"""From a configuration to a network."""

from __future__ import annotations

from keyreid.backbones import Backbone, build_backbone
from keyreid.config import ClipConfig, ModelConfig
from keyreid.guidance import named
from keyreid.model.keyreid import KeyReID


def build_model(
    model: ModelConfig, clip: ClipConfig, num_identities: int, num_cameras: int, backbone: Backbone | None = None
) -> KeyReID:
    """The network of a configuration with random weights; `keyreid.checkpoints.start` fills it as `model.weights` says.

    Args:
        model: architecture.
        clip: frames and picture size.
        num_identities: training identities (classes).
        num_cameras: cameras of the data set.
        backbone: where it was made and filled before.

    Raises:
        ConfigError: the backbone, picture size, heads or parts do not fit together.
    """
    return KeyReID(
        build_backbone(model, clip, num_cameras) if backbone is None else backbone,
        frames=clip.frames,
        num_identities=num_identities,
        num_cameras=num_cameras,
        parts=model.parts,
        guidance=named(model.guidance),
        guidance_epsilon=model.guidance_epsilon,
        local_heads=model.local_heads,
        tcss=model.tcss,
        drop_path=model.drop_path,
    )
