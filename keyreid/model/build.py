"""From a configuration to a network."""

from __future__ import annotations

from keyreid.config import ClipConfig, ModelConfig
from keyreid.model.backbone import create_vit
from keyreid.model.keyreid import KeyReID


def build_model(model: ModelConfig, clip: ClipConfig, num_identities: int, num_cameras: int) -> KeyReID:
    """The network of a configuration, with the initial weights that it names.

    Args:
        model: architecture and initial weights.
        clip: frames and picture size.
        num_identities: training identities (classes).
        num_cameras: cameras of the data set.

    Raises:
        ConfigError: the backbone, picture size, heads or parts do not fit together.
        CheckpointError: the weights cannot be read or fit nothing.
    """
    vit = create_vit(model, clip)
    network = KeyReID(
        vit,
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
    return network
