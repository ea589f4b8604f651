"""What a backbone is: it turns frames into tokens on a grid, and hands over its last stage for the branches to run."""

import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
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

    not_in_files: Sequence[str] = ("camera",)  # patterns of what files of the backbone alone do not have

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

    def load(self, state: Mapping[str, torch.Tensor], source: "Source") -> None:
        """Fill from a state dict of the backbone alone, before `last_stage` is asked; see `fill`."""
        fill(self, state, source)

    def resized(self, state: Mapping[str, torch.Tensor], source: "Source") -> Mapping[str, torch.Tensor]:
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


@dataclass(frozen=True)
class Source:
    """Where weights come from; in messages it is its name."""

    name: str
    grid: tuple[int, int] | None = None  # Hp, Wp that its position embeddings were learnt on, where that is known
    square: bool = False  # it was trained on square pictures, if nothing else is known
    may_lack: Sequence[str] = ()  # patterns of what of the network need not be in it

    def __str__(self) -> str:
        return self.name

    def lets_miss(self, *names: str) -> bool:
        """Whether an entry of the network, by one of these names, may stay as it is."""
        return any(fnmatchcase(name, pattern) for name in names for pattern in self.may_lack)

    def grid_of(self, patches: int, own: tuple[int, int]) -> tuple[int, int]:
        """The grid that so many positions were learnt on, for a network with its own; CheckpointError if unsure."""
        side = math.isqrt(max(patches, 0))
        square = (side, side) if patches == side * side else None
        told = self.grid
        if told is None and patches == math.prod(own) and square in (None, own):
            told = own
        elif told is None and patches != math.prod(own) and self.square:
            told = square
        if told is None or math.prod(told) != patches:
            raise CheckpointError(
                f"{self}: it has positions of {patches} patches, and what their grid is cannot be told. Name its rows "
                f"and columns, for example model.weights_grid=[16,8]; this network's are {list(own)}"
            )
        return told


def fill(module: nn.Module, state: Mapping[str, torch.Tensor], source: Source) -> None:
    """Copy what fits by name and shape, and list what does not.

    Raises:
        CheckpointError: an entry of the module that the source may not lack is missing or of another shape; or the
            source has more in one of the module's layers, which would compute something else without it.
    """
    own = module.state_dict()
    fitting = {name: tensor for name, tensor in state.items() if name in own and own[name].shape == tensor.shape}
    if not own.keys() & state:
        raise CheckpointError(
            f"{source}: nothing of it fits. It has {_listed(list(state))}; the network has {_listed(list(own))}"
        )
    misfits = {name: f"{tuple(state[name].shape)} for {tuple(own[name].shape)}" for name in own.keys() & state}
    lists = {
        "of another shape": [name for name in state if name in own and name not in fitting],
        "not in the file": [name for name in own if name not in state],
        "without a place in the network": [name for name in state if name not in own],
    }
    faults = [
        f"{what}: {_listed([f'{name} {misfits[name]}' if name in misfits else name for name in names])}"
        for what, names in lists.items()
        if names
    ]
    layers = {_layer(name) for name in own} - {None}
    missed = [name for names in lists.values() for name in names if name in own or _layer(name) in layers]
    wrong = [name for name in missed if not source.lets_miss(name)]
    if wrong:
        patterns = ",".join(sorted({f"{_layer(name) or name.partition('.')[0]}*" for name in wrong}))
        raise CheckpointError(
            f"{source}: {len(wrong)} entries do not fit the network, which has {len(own)}. {'; '.join(faults)}. Set "
            "model (backbone, depth, parts) and clip.frames as these weights were trained; or, to start these parts at "
            f"random, model.allow_partial=[{patterns}]"
        )
    module.load_state_dict(fitting, strict=False)
    log.info("%s: loaded %d of %d entries", source, len(fitting), len(own))
    for fault in faults:
        log.info("%s: did not load, %s", source, fault)


def _layer(name: str) -> str | None:
    """The numbered layer that an entry is of: `blocks.3.` of `blocks.3.norm1.weight`."""
    found = re.match(r".*?\.\d+\.", name)
    return found and found[0]


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:NAMES_LISTED])
    return shown + (f" and {len(names) - NAMES_LISTED} more" if len(names) > NAMES_LISTED else "")
