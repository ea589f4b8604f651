"""The DALI reader: DALI decodes, resizes, flips and crops; on the CPU, or on the GPU that the batch goes to.

A thread carries out the plan ahead of time: it reads exactly the bytes that are needed and makes the guidance. DALI's
serial external_source takes what is ready. There is ONE pipeline for the reader's life and it is never reset: parallel
sources with an iterator made anew each epoch delivered wrong pictures without an exception. Epochs are counted by the
plan. Each frame carries a serial number through the pipeline, and what comes out is joined to its clip by that number.
"""

import itertools
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from keyreid.config import Config
from keyreid.errors import ConfigError, DataError, install_hint
from keyreid.shards import members
from keyreid.shards.batch import ClipBatch, ClipPlan
from keyreid.shards.fetch import ClipFetcher, FetchedClip, Reader
from keyreid.shards.shard_set import ShardSet

MAX_FRAMES = 1024  # one run of the pipeline; a longer list of clips takes several
_SERIAL_LIMIT = 1 << 30


@dataclass
class _PipelineRun:
    """One run of the pipeline: N frames of whole clips."""

    # What external_source takes, for each frame: the encoded picture, the crop's top and left before the flip, whether
    # it is flipped, its serial number, and its size where some must be resized.
    inputs: list[Any]
    fetched: list[FetchedClip]  # the same frames, to name the one that does not decode
    batch: ClipBatch | None  # with the last run of a list of clips: everything but the pictures


class DaliReader(Reader):
    """See Reader."""

    def __init__(
        self, shards: ShardSet, batches: Iterator[list[ClipPlan]], config: Config, device: str, workers: int | None
    ) -> None:
        """Build the pipeline and start to read ahead; ConfigError where DALI is not installed."""
        super().__init__(config, device)
        self._fetcher = ClipFetcher(shards, config)
        self._workers = config.data.workers if workers is None else max(1, workers)
        clip = config.clip
        self._resize = shards.index.picture_size != (clip.width, clip.height)
        self._pipeline = _build(self._source, clip.height, clip.width, self._resize, self.device, self._workers)
        self._runs = self._read(batches)
        self._ahead = ThreadPoolExecutor(1, thread_name_prefix="keyreid-reader")
        self._ready = deque(self._ahead.submit(next, self._runs) for _ in range(config.data.prefetch + 1))
        self._running: deque[_PipelineRun] = deque()

    def _next(self) -> ClipBatch:
        pictures, batch = [], None
        while batch is None:
            delivered, run = self._run()
            pictures.append(delivered)
            self.faults.add({member: what for clip in run.fetched for member, what in clip.faults.items()})
            batch = run.batch
        images = pictures[0] if len(pictures) == 1 else torch.cat(pictures)
        batch.images = images.unflatten(0, (len(batch), -1)).permute(0, 1, 4, 2, 3)
        return batch

    def close(self) -> None:
        """Stop reading ahead and let the pipeline go."""
        self._ahead.shutdown(cancel_futures=True)
        self._runs.close()
        self._running.clear()
        self._pipeline = None

    def _run(self) -> tuple[torch.Tensor, _PipelineRun]:
        """One run's pictures, uint8 [N, H, W, 3], and what they are."""
        if self._pipeline is None:
            raise StopIteration
        stream = torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None
        try:
            pictures, serial = self._pipeline.run(stream)
        except RuntimeError as error:
            raise self._named(error) from None
        run = self._running.popleft()
        asked, given = run.inputs[3], np.asarray(serial.as_cpu().as_array()).reshape(-1)
        if not np.array_equal(given, asked):
            raise RuntimeError(f"DALI delivered the frames {given[:8]}.. for {asked[:8]}..: do not train on this")
        return torch.from_dlpack(pictures.as_tensor()), run

    def _source(self) -> list[Any]:
        """DALI's external_source: the next run's inputs. An error, and the end, stay for the next call."""
        run = self._ready[0].result()
        self._ready.popleft()
        self._ready.append(self._ahead.submit(next, self._runs))
        self._running.append(run)
        return run.inputs

    def _read(self, batches: Iterator[list[ClipPlan]]) -> Iterator[_PipelineRun]:
        """Carry out the plan: all of a list's clips at once, for storage that takes its time."""
        read = 0
        # A picture that does not decode would end the pipeline, so that it is found before.
        decode = members.try_picture if self.faults.policy == "skip" else None
        with ThreadPoolExecutor(self._workers, thread_name_prefix="keyreid-fetch") as pool:
            for clips in batches:
                self._fetcher.ahead(clips)
                fetched = list(pool.map(self._fetcher.fetch, clips, itertools.repeat(decode)))
                batch = self._fetcher.batch(clips, fetched)
                size = max(1, MAX_FRAMES // len(clips[0].frames))
                for start in range(0, len(clips), size):
                    rows = slice(start, start + size)
                    inputs = self._inputs(clips[rows], fetched[rows], read)
                    read += len(inputs[0])
                    yield _PipelineRun(inputs, fetched[rows], batch if start + size >= len(clips) else None)

    def _inputs(self, clips: list[ClipPlan], fetched: list[FetchedClip], read: int) -> list[Any]:
        pictures = [np.frombuffer(picture, np.uint8) for clip in fetched for picture in clip.pictures]
        flip = np.concatenate([clip.flip for clip in clips]).astype(np.int32)
        crop = np.concatenate([clip.crop for clip in clips]).astype(np.int32)
        crop[:, 1] *= 1 - 2 * flip  # the crop is cut before the flip here, so that its left edge is mirrored
        serial = (np.arange(read, read + len(pictures)) % _SERIAL_LIMIT).astype(np.int32)
        sizes = [np.concatenate([clip.sizes for clip in fetched]).astype(np.int32)] if self._resize else []
        return [pictures, crop, flip, serial, *sizes]

    def _named(self, error: RuntimeError) -> Exception:
        """DALI's errors name no sample: find the picture that does not decode."""
        for run in self._running:
            for clip in run.fetched:
                for (position, frame), picture in zip(clip.rows, clip.pictures, strict=True):
                    try:
                        members.decode_picture(picture)
                    except ValueError as reason:
                        return self._fetcher.shards.fault(position, members.picture_member(frame), str(reason))
        return DataError(f"DALI cannot decode a batch: {error}")


def _build(source: Any, height: int, width: int, resize: bool, device: torch.device, threads: int) -> Any:
    """The pipeline: encoded frames in, uint8 [H, W, 3] pictures and their serial numbers out."""
    try:
        from nvidia.dali import fn, pipeline_def, types
    except ImportError as error:
        raise ConfigError(
            f"data.reader=dali, but DALI cannot be imported ({error}); set data.reader=plain, or {install_hint('dali')}"
        ) from None
    on_gpu = device.type == "cuda"
    kinds = [types.UINT8, *[types.INT32] * (4 if resize else 3)]

    @pipeline_def(enable_conditionals=resize)
    def clips() -> Any:
        encoded, crop, flip, serial, *size = fn.external_source(
            source, num_outputs=len(kinds), batch=True, parallel=False, dtype=kinds, ndim=[1, 1, 0, 0, 1][: len(kinds)]
        )
        pictures = fn.decoders.image(
            encoded, device="mixed" if on_gpu else "cpu", output_type=types.RGB, adjust_orientation=False
        )
        if resize:  # noqa: SIM102  the second condition is DALI's and asks every frame: resizing always costs 1 ms
            if size[0][0] != width or size[0][1] != height:
                pictures = fn.resize(pictures, size=[height, width], interp_type=types.INTERP_CUBIC, antialias=True)
        pictures = fn.slice(pictures, start=crop, shape=[height, width], axes=[0, 1], out_of_bounds_policy="pad")
        return fn.flip(pictures, horizontal=flip), serial

    pipeline = clips(
        batch_size=MAX_FRAMES,
        num_threads=threads,
        device_id=(torch.cuda.current_device() if device.index is None else device.index) if on_gpu else None,
        prefetch_queue_depth=2,
    )
    pipeline.build()
    return pipeline
