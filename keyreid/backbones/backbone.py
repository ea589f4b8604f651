"""What a backbone is: it turns frames into tokens on a grid, and hands over its last stage for the branches to run."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from keyreid.config import ClipConfig, ModelConfig
from keyreid.errors import CheckpointError, ConfigError

log = logging.getLogger(__name__)
NAMES_LISTED = 12


@dataclass(frozen=True)
class PatchGrid:
    """Where the patches of a picture lie: `patch` pixels square, one every `stride` pixels both ways."""

    height: int
    width: int
    patch: int
    stride: int

    @property
    def shape(self) -> tuple[int, int]:
        """Hp, Wp."""
        return tuple((side - self.patch) // self.stride + 1 for side in (self.height, self.width))

    @classmethod
    def tiling(cls, model: ModelConfig, clip: ClipConfig, patch: int, stride: int) -> "PatchGrid":
        """The grid of a configuration's frames; a ConfigError names the next sizes where patches do not tile them."""
        for name, pixels in {"clip.height": clip.height, "clip.width": clip.width}.items():
            excess = (pixels - patch) % stride
            if pixels < patch or excess:
                below = max(pixels - excess, patch)
                raise ConfigError(
                    f"{name}={pixels}: patches of {patch} pixels every {stride} pixels do not tile it; "
                    f"use {below} or {below + stride} with {model.backbone}"
                )
        return cls(clip.height, clip.width, patch, stride)


class LastStage(NamedTuple):
    """What comes after a backbone's tokens.

    Of the block's output, the first token is read. The global branch computes that token alone where this is timm's
    plain transformer block, and else runs the block whole.
    """

    block: nn.Module  # [S, R+N, D] -> [S, 1 or more, D]
    norm: nn.Module  # for the first token
    activation: type[nn.Module] = nn.GELU  # of the local branch's own block


class Backbone(nn.Module):
    """Frames to tokens, all but the last stage.

    A backbone gives `grid_of`, `build`, `forward` and `last_stage`; `load`, `resized` and `download` where its files
    need more than names that agree. Its constructor calls `add_camera_table` last.

    Args:
        width: D, of a token.
        prefix_tokens: R, tokens before the patches; the first one stands for the frame.
    """

    def __init__(self, width: int, grid: PatchGrid, prefix_tokens: int = 1) -> None:
        super().__init__()
        self.width, self.grid, self.prefix_tokens = width, grid, prefix_tokens
        self.checkpoint_activations = False  # True: `run` keeps only a block's input for the backward pass
        self.camera: nn.Parameter | None = None
        self.camera_factor = 0.0

    @classmethod
    def grid_of(cls, model: ModelConfig, clip: ClipConfig) -> PatchGrid:
        """The grid of a configuration, without building anything: every reader asks."""
        raise NotImplementedError

    @classmethod
    def build(cls, model: ModelConfig, clip: ClipConfig, num_cameras: int) -> "Backbone":
        """The backbone of a configuration with random weights; its last stage is still in it."""
        raise NotImplementedError

    def forward(self, images: torch.Tensor, cameras: torch.Tensor, prompts: torch.Tensor | None = None) -> torch.Tensor:
        """The tokens of frames [S, R+N, D]: R prefix tokens, then N patches in raster order.

        Args:
            images: [S, 3, H, W], normalised.
            cameras: int [S]; -1 is unknown.
            prompts: [S, N, D], added to the patches' tokens before the first block.
        """
        raise NotImplementedError

    def last_stage(self) -> LastStage:
        """Hand over what comes after the tokens. Asked once; from then on its weights belong to the asker."""
        raise NotImplementedError

    def load(self, state: Mapping[str, torch.Tensor], source: str) -> None:
        """Fill from a state dict of the backbone alone, before `last_stage` is asked; see `fill`."""
        fill(self, state, source)

    def resized(self, state: Mapping[str, torch.Tensor], source: str) -> Mapping[str, torch.Tensor]:
        """Our own state dict from pictures of another size, made to fit this one's grid."""
        return state

    @classmethod
    def download(cls, name: str) -> Mapping[str, torch.Tensor]:
        """What `model.weights=timm` gets; a CheckpointError where there are none, or the network does not give them."""
        raise CheckpointError(f"model.weights=timm: timm has no weights for {name}; give the path of a file")

    def add_camera_table(self, num_cameras: int, factor: float) -> None:
        """A learnt embedding of each camera, which `with_cameras` adds `factor` times; none where either is 0."""
        if num_cameras and factor:
            self.camera_factor = factor
            self.camera = nn.Parameter(torch.empty(num_cameras, self.width))
            nn.init.trunc_normal_(self.camera, std=0.02)

    def with_cameras(self, tokens: torch.Tensor, cameras: torch.Tensor) -> torch.Tensor:
        """Tokens [S, any, D] with their cameras' embedding; -1 gets the mean of the learnt ones."""
        if self.camera is None:
            return tokens
        table = torch.cat([self.camera, self.camera.mean(0, keepdim=True)])
        return tokens + self.camera_factor * table[torch.where(cameras < 0, len(self.camera), cameras)].unsqueeze(1)

    def run(self, block: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """One block; its activations are computed again in the backward pass where that was asked for."""
        if self.checkpoint_activations and self.training:
            return checkpoint(block, x, use_reentrant=False)
        return block(x)


def fill(module: nn.Module, state: Mapping[str, torch.Tensor], source: str, strict: bool = False) -> None:
    """Copy what fits by name and shape, and list what does not.

    Args:
        source: names the weights in messages.
        strict: whatever is missing or of another shape is an error.

    Raises:
        CheckpointError: nothing fits, or (strict) not everything does.
    """
    own = module.state_dict()
    fitting = {name: tensor for name, tensor in state.items() if name in own and own[name].shape == tensor.shape}
    if not fitting:
        raise CheckpointError(
            f"{source}: nothing of it fits. It has {_listed(list(state))}; the network has {_listed(list(own))}"
        )
    misfits = [name for name in state if name in own and name not in fitting]
    lists = {
        "of another shape": [f"{name} {tuple(state[name].shape)} for {tuple(own[name].shape)}" for name in misfits],
        "not in the file": [name for name in own if name not in state],
        "without a place in the network": [name for name in state if name not in own],
    }
    faults = [f"{what}: {_listed(names)}" for what, names in lists.items() if names]
    if strict and own.keys() - fitting:
        raise CheckpointError(f"{source}: {'; '.join(faults)}")
    module.load_state_dict(fitting, strict=False)
    log.info("%s: loaded %d of %d entries", source, len(fitting), len(own))
    for fault in faults:
        log.info("%s: did not load, %s", source, fault)


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:NAMES_LISTED])
    return shown + (f" and {len(names) - NAMES_LISTED} more" if len(names) > NAMES_LISTED else "")
