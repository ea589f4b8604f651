"""What a plan asks of a reader, and what a reader gives: the two records that both readers share."""

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch

_SMALL_BYTES = 65_536


@dataclass(frozen=True)
class ClipPlan:
    """One clip to read: which tracklet, which T frames, and what is done to each frame.

    A crop is relative to the (flipped) frame, which is zero outside: (0, 0) moves nothing, pad-and-crop by p pixels
    draws from -p to p.
    """

    tracklet: int  # position in `ShardSet.tracklets`
    label: int  # index of the identity among the training identities; -1 when not training
    frames: np.ndarray  # int [T], positions in the tracklet
    flip: np.ndarray  # bool [T]
    crop: np.ndarray  # int [T, 2], top and left in pixels
    erase: np.ndarray  # int [T, 4], top, left, height, width in pixels; height 0 erases nothing
    blank: np.ndarray  # bool [T], frames whose guidance is zero (the released evaluation's padding)


@dataclass
class ClipBatch:
    """B clips of T frames as a reader gives them, on the CPU or on a GPU.

    Images are resized, flipped and cropped, not yet erased or normalised; in memory the channels come last, as decoders
    write them. Guidance is part heatmaps averaged over each patch, after the frame's flip, crop and erasure.
    """

    images: torch.Tensor  # uint8 [B, T, 3, H, W], RGB
    guidance: torch.Tensor  # float32 [B, T, P, Hp, Wp] in [0, 1]
    erase: torch.Tensor  # int32 [B, T, 4], as in ClipPlan; `erased` says which frames have one
    visibility: torch.Tensor  # float32 [B, P]: the share of the clip's frames in which the part has a keypoint
    labels: torch.Tensor  # int64 [B], training labels or -1
    identities: torch.Tensor  # int64 [B], the dataset's identities; -2 where unknown
    cameras: torch.Tensor  # int64 [B], position among the dataset's cameras, from 0
    tracklets: torch.Tensor  # int64 [B], position in `ShardSet.tracklets`
    keys: list[str]  # of the tracklets

    def __len__(self) -> int:
        return len(self.keys)

    def __getstate__(self) -> dict[str, Any]:
        """Small tensors as arrays: PyTorch holds a file open for each tensor on its way from another process."""
        small = {name for name, value in vars(self).items() if name != "keys" and value.nbytes < _SMALL_BYTES}
        return {name: value.numpy() if name in small else value for name, value in vars(self).items()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        arrays = {name: torch.from_numpy(value) for name, value in state.items() if isinstance(value, np.ndarray)}
        vars(self).update(state | arrays)

    @property
    def erased(self) -> torch.Tensor:
        """float32 [B, T]: 1 where a frame has an erased rectangle."""
        return (self.erase[..., 2] > 0).float()

    def to(self, device: torch.device | str) -> "ClipBatch":
        """The same batch on another device."""
        tensors = (getattr(self, field.name) for field in fields(self)[:-1])
        return ClipBatch(*(tensor.to(device, non_blocking=True) for tensor in tensors), self.keys)

    def __getitem__(self, rows: slice) -> "ClipBatch":
        return ClipBatch(*(getattr(self, field.name)[rows] for field in fields(self)))
