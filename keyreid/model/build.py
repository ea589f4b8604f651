"""From a configuration to a network."""

from __future__ import annotations

from timm.models.vision_transformer import VisionTransformer

from keyreid.config import ClipConfig, ModelConfig
from keyreid.model.backbone import create_vit
from keyreid.model.keyreid import KeyReID


def build_model(
    model: ModelConfig, clip: ClipConfig, num_identities: int, num_cameras: int, vit: VisionTransformer | None = None
) -> KeyReID:
    """The network of a configuration with random weights; `keyreid.checkpoints.start` fills it as `model.weights` says.

    Args:
        model: architecture.
        clip: frames and picture size.
        num_identities: training identities (classes).
        num_cameras: cameras of the data set.
        vit: the backbone, where it was made and filled before; it is taken apart.

    Raises:
        ConfigError: the backbone, picture size, heads or parts do not fit together.
    """
    return KeyReID(
        create_vit(model, clip) if vit is None else vit,
        frames=clip.frames,
        num_identities=num_identities,
        num_cameras=num_cameras,
        parts=model.parts,
        guidance=model.guidance,
        guidance_epsilon=model.guidance_epsilon,
        local_heads=model.local_heads,
        camera_embedding=model.camera_embedding,
        tcss=model.tcss,
        drop_path=model.drop_path,
    )
