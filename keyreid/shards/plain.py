"""The readers without DALI: PyTorch DataLoader workers that read and decode one batch at a time.

The plan is made in the main process and sent to the workers, so that their number changes nothing.
"""

import copy
from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from keyreid.config import Config
from keyreid.errors import KeyreidError
from keyreid.processes import end_with_parent, worker_context
from keyreid.shards import members
from keyreid.shards.batch import ClipBatch, ClipPlan
from keyreid.shards.fetch import ClipFetcher, Reader
from keyreid.shards.shard_set import ShardSet


class PlainReader(Reader):
    """See Reader."""

    def __init__(
        self, shards: ShardSet, batches: Iterator[list[ClipPlan]], config: Config, device: str, workers: int | None
    ) -> None:
        super().__init__(config, device)
        workers = config.data.workers if workers is None else workers
        loader = DataLoader(
            _Batches(ClipFetcher(shards, config)),
            sampler=batches,  # what is sampled are the clips to read
            batch_size=None,
            num_workers=workers,
            prefetch_factor=config.data.prefetch if workers else None,
            multiprocessing_context=worker_context(__name__, "keyreid.shards.writer") if workers else None,
            worker_init_fn=end_with_parent,
        )
        self._batches = iter(loader)

    def _next(self) -> ClipBatch:
        batch, faults, error = next(self._batches)
        if error is not None:
            raise error
        self.faults.add(faults)
        return batch

    def close(self) -> None:
        """End the workers."""
        self._batches = iter(())


class StreamReader(PlainReader):
    """One worker that streams whole shards from front to back, nothing kept on disk.

    For evaluating and embedding remote shards once, in the order of the set. For training, which jumps, use the others.
    """

    def __init__(
        self, shards: ShardSet, batches: Iterator[list[ClipPlan]], config: Config, device: str, workers: int | None
    ) -> None:
        from keyreid.shards.remote import StreamedShardFiles  # fsspec only where it is needed

        streamed = copy.copy(shards)
        streamed.files = StreamedShardFiles([shards.shard_name(n) for n in range(len(shards.card["shards"]))])
        super().__init__(streamed, batches, config, device, 0 if workers == 0 else 1)


class _Batches(Dataset):
    """A "dataset" whose index is the plan of a batch."""

    def __init__(self, fetcher: ClipFetcher) -> None:
        self.fetcher = fetcher

    def __getitem__(self, clips: list[ClipPlan]) -> tuple[ClipBatch | None, dict[str, str], Exception | None]:
        """The batch and what could not be read, or the error that ends the run.

        An error is a result: DataLoader would wrap it into one with a traceback.
        """
        fetched, images = [], []
        try:
            self.fetcher.ahead(clips)
            for clip in clips:
                fetched.append(self.fetcher.fetch(clip, members.decode_picture))
                images.append(_images(fetched[-1].pictures, clip, self.fetcher))
        except KeyreidError as error:
            return None, {}, error
        faults = {member: message for clip in fetched for member, message in clip.faults.items()}
        return self.fetcher.batch(clips, fetched, torch.stack(images).permute(0, 1, 4, 2, 3)), faults, None


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
