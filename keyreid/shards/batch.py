"""What a plan asks of a reader, and what a reader gives: the two records that both readers share."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import torch


@dataclass(frozen=True)
class ClipPlan:
    """One clip to read: which tracklet, which T frames, and what is done to each frame.

    Attributes:
        tracklet: position in `ShardSet.tracklets`.
        label: index of the identity among the training identities; -1 when not training.
        frames: int [T], positions in the tracklet.
        flip: bool [T].
        crop: int [T, 2], top and left of the crop relative to the (flipped) frame, which is zero outside; (0, 0) moves
            nothing, pad-and-crop by p pixels draws from -p to p.
        erase: int [T, 4], top, left, height, width in pixels; height 0 erases nothing.
        blank: bool [T], frames whose guidance is zero (the released evaluation's padding).
    """

    tracklet: int
    label: int
    frames: np.ndarray
    flip: np.ndarray
    crop: np.ndarray
    erase: np.ndarray
    blank: np.ndarray


@dataclass
class ClipBatch:
    """B clips of T frames as a reader gives them, on the CPU or on a GPU.

    Attributes:
        images: uint8 [B, T, 3, H, W], RGB; resized, flipped and cropped, not yet erased or normalised. In memory the
            channels come last, as decoders write them.
        guidance: float32 [B, T, P, Hp, Wp] in [0, 1]: part heatmaps averaged over each patch, after the frame's
            flip, crop and erasure.
        erase: int32 [B, T, 4], as in ClipPlan; `erased` says which frames have one.
        visibility: float32 [B, P]: the share of the clip's frames in which the part has a keypoint.
        labels: int64 [B], training labels or -1.
        identities: int64 [B], the dataset's identities; -2 where unknown.
        cameras: int64 [B], position among the dataset's cameras, from 0.
        tracklets: int64 [B], position in `ShardSet.tracklets`.
        keys: the tracklets' keys.
    """

    images: torch.Tensor
    guidance: torch.Tensor
    erase: torch.Tensor
    visibility: torch.Tensor
    labels: torch.Tensor
    identities: torch.Tensor
    cameras: torch.Tensor
    tracklets: torch.Tensor
    keys: list[str]

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def erased(self) -> torch.Tensor:
        """float32 [B, T]: 1 where a frame has an erased rectangle."""
        return (self.erase[..., 2] > 0).float()

    def to(self, device: torch.device | str) -> ClipBatch:
        """The same batch on another device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True), lambda keys: keys)

    def __getitem__(self, rows: slice) -> ClipBatch:
        return self._map(lambda tensor: tensor[rows], lambda keys: keys[rows])

    def _map(self, of_tensor, of_keys) -> ClipBatch:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return ClipBatch(**{n: of_keys(v) if n == "keys" else of_tensor(v) for n, v in values.items()})
