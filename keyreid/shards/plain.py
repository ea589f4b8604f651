"""The reader without DALI: PyTorch DataLoader workers that read and decode one clip at a time.

The plan is made in the main process and sent to the workers, clip by clip, so that their number changes nothing.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from keyreid.config import Config
from keyreid.errors import KeyreidError
from keyreid.processes import end_with_parent
from keyreid.shards import format
from keyreid.shards.batch import ClipBatch, ClipPlan
from keyreid.shards.fetch import ClipFetcher, Faults, FetchedClip
from keyreid.shards.index import ShardSet
from keyreid.shards.processes import worker_context


class PlainReader:
    """Iterates the batches of a plan; see `keyreid.shards.open_reader`.

    Attributes:
        wait_seconds: how long the consumer has waited.
        faults: what could not be read.
    """

    def __init__(
        self, shards: ShardSet, batches: Iterator[list[ClipPlan]], config: Config, device: str, workers: int | None
    ) -> None:
        self.device = torch.device(device)
        self.faults = Faults(config.data.on_fault, config.data.max_faults)
        self.wait_seconds = 0.0
        workers = config.data.workers if workers is None else workers
        fetcher = ClipFetcher(shards, config)
        self._loader = DataLoader(
            _Clips(fetcher),
            batch_sampler=batches,  # type: ignore[arg-type]  # what is sampled are the clips to read
            num_workers=workers,
            prefetch_factor=config.data.prefetch if workers else None,
            multiprocessing_context=worker_context() if workers else None,
            worker_init_fn=_start_worker,
            collate_fn=_Collate(fetcher),
            pin_memory=self.device.type == "cuda",
        )
        self._batches = iter(self._loader)

    def __iter__(self) -> Iterator[ClipBatch]:
        return self

    def __next__(self) -> ClipBatch:
        start = time.perf_counter()
        batch, faults, error = next(self._batches)
        self.wait_seconds += time.perf_counter() - start
        if error is not None:
            raise error
        self.faults.add(faults)
        return batch.to(self.device)

    def close(self) -> None:
        """End the workers."""
        self._batches = iter(())
        self._loader = None  # type: ignore[assignment]


def _start_worker(_number: int) -> None:
    end_with_parent()


Sample = tuple[ClipPlan, FetchedClip | None, torch.Tensor | None, Exception | None]


class _Clips(Dataset):
    """A "dataset" whose index is the plan of a clip."""

    def __init__(self, fetcher: ClipFetcher) -> None:
        self.fetcher = fetcher

    def __getitem__(self, clip: ClipPlan) -> Sample:
        """A clip, read and decoded. An error is a result: DataLoader would wrap it into one with a traceback."""
        try:
            fetched = self.fetcher.fetch(clip, format.decode_picture)
            return clip, fetched, _images(fetched.pictures, clip, self.fetcher), None
        except KeyreidError as error:
            return clip, None, None, error


class _Collate:
    """Makes one batch of clips, in the worker."""

    def __init__(self, fetcher: ClipFetcher) -> None:
        self.fetcher = fetcher

    def __call__(self, samples: list[Sample]) -> tuple[ClipBatch | None, dict[str, str], Exception | None]:
        """The batch and what could not be read, or the error that ends the run."""
        clips, fetched, images, errors = zip(*samples, strict=True)
        error = next((error for error in errors if error), None)
        if error is not None:
            return None, {}, error
        faults = {member: message for clip in fetched for member, message in clip.faults.items()}
        return self.fetcher.batch(list(clips), list(fetched), torch.stack(images).permute(0, 1, 4, 2, 3)), faults, None


def _images(pictures: list[np.ndarray], clip: ClipPlan, fetcher: ClipFetcher) -> torch.Tensor:
    """Resize, flip and crop a clip's pictures: uint8 [T, H, W, 3]."""
    height, width = fetcher.height, fetcher.width
    images = np.zeros((len(pictures), height, width, 3), np.uint8)
    for image, picture, flip, (top, left) in zip(images, pictures, clip.flip.tolist(), clip.crop.tolist(), strict=True):
        if picture.shape[:2] != (height, width):
            picture = np.asarray(Image.fromarray(picture).resize((width, height), Image.Resampling.BICUBIC))
        if flip:
            picture = picture[:, ::-1]
        kept = picture[max(top, 0) : height + min(top, 0), max(left, 0) : width + min(left, 0)]
        image[max(-top, 0) : height - max(top, 0), max(-left, 0) : width - max(left, 0)] = kept
    return torch.from_numpy(images)
