"""The network: `build_model` from a configuration."""

from keyreid.backbones import Backbone, build_backbone
from keyreid.config import ClipConfig, ModelConfig
from keyreid.model.keyreid import Features, KeyReID
from keyreid.model.sharded_classes import ClassGroup

__all__ = ["Features", "KeyReID", "build_model"]


def build_model(
    model: ModelConfig,
    clip: ClipConfig,
    num_identities: int,
    num_cameras: int,
    backbone: Backbone | None = None,
    group: ClassGroup | None = None,
) -> KeyReID:
    """The network of a configuration with random weights; `keyreid.checkpoints.start` fills it as `model.weights` says.

    Args:
        num_identities: training identities (classes).
        num_cameras: cameras of the data set.
        backbone: where it was made and filled before.
        group: who shares out the classes of sharded classifiers; None: nobody, for they are not needed.

    Raises:
        ConfigError: the backbone, picture size, heads or parts do not fit together.
    """
    backbone = backbone or build_backbone(model, clip, num_cameras)
    return KeyReID(backbone, model, clip.frames, num_identities, num_cameras, group)
