"""Keypoints of every frame of a dataset: pictures in, one keypoint file for each tracklet out.

Reader processes decode and resize; this process runs the network and OpenPifPaf's decoder. A batch holds frames of one
tracklet only, so that a tracklet's file depends on nothing but its frames and the settings, whatever was done before or
beside it: a run that was killed, or cut into shares, gives the same files as one run.
"""

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import groupby
from multiprocessing import get_context
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
import torch

from keyreid.datasets.frames import content_hash, frame_hashes, read_frame
from keyreid.datasets.tracklet import Dataset, Frame, Tracklet
from keyreid.errors import ConfigError, DataError
from keyreid.files import replace_text
from keyreid.pose import keypoint_files, pifpaf
from keyreid.pose.parts import NUM_KEYPOINTS
from keyreid.pose.pictures import Fitted, Pose, Selection, choose, decode, fit
from keyreid.processes import end_with_parent
from keyreid.progress import track


@dataclass(frozen=True)
class PoseSettings:
    """What keypoints depend on, beside the frames."""

    checkpoint: str = pifpaf.WALKERS
    # Pixels of the longer side before the network; None: 128 for walkers, whom the network knows so, else as it is.
    long_edge: int | None = None
    threshold: float | None = None  # confidence below which a joint is missing; None: OpenPifPaf's 0.15
    select: Selection = "score"
    dtype: Literal["float32", "float16"] = "float32"

    def __post_init__(self) -> None:
        if self.checkpoint == pifpaf.WALKERS and self.long_edge is None:
            object.__setattr__(self, "long_edge", pifpaf.WALKERS_LONG_EDGE)


@dataclass(frozen=True)
class PoseWork:
    """How the work is done; keypoints depend on `batch_size` alone of these, and only by rounding."""

    batch_size: int = 32
    workers: int = 2
    devices: tuple[str, ...] = ("cpu",)  # one process each
    trust: bool = False
    max_unreadable: int = 100


@dataclass
class Summary:
    """What a run did."""

    tracklets: int = 0  # written by this run
    there: int = 0  # tracklets that an earlier run had written
    changed: int = 0  # of `tracklets`: an earlier run had written them, from frames that are no longer the same
    frames: int = 0  # of `tracklets`
    empty: int = 0  # readable frames without a person
    unreadable: list[str] = field(default_factory=list)  # frames and why; their keypoints are zeros

    def __add__(self, other: "Summary") -> "Summary":
        return Summary(*(mine + theirs for mine, theirs in zip(vars(self).values(), vars(other).values(), strict=True)))

    def __str__(self) -> str:
        found = f"{self.frames} frames, {self.empty} without a person, {len(self.unreadable)} not readable"
        again = f" ({self.changed} anew, of other frames than before)" if self.changed else ""
        return f"{self.tracklets} tracklets written{again}, {self.there} were there; {found}"


def estimate(
    dataset: Dataset, out: Path, settings: PoseSettings, work: PoseWork, share: tuple[int, int] = (0, 1)
) -> Summary:
    """Write into `out` the keypoint file of each tracklet without one; share (i, n): as task i, from 0, of n.

    A file that is damaged, or was made from other frames or pictures than the tracklet now has, is written anew.

    Raises:
        ConfigError: `out` holds keypoints of other settings, or there is no such share or device.
        DataError: more frames than `work.max_unreadable` could not be read.
    """
    number, shares = share
    if not 0 <= number < shares:
        raise ConfigError(f"share {number}/{shares}: of n tasks, the first is 0/n and the last (n - 1)/n")
    for device in work.devices:
        try:
            torch.empty(1, device=device)
        except (RuntimeError, AssertionError) as error:
            raise ConfigError(f"--device {device}: {str(error).splitlines()[0]}") from None
    processes, mine = len(work.devices), dataset.tracklets[number::shares]
    if processes == 1:
        return _estimate_on(work.devices[0], mine, out, settings, work)
    # A process for each device, started afresh: CUDA does not survive a fork, and OpenPifPaf would otherwise spread one
    # network over all GPUs that it sees.
    with ProcessPoolExecutor(processes, get_context("spawn"), end_with_parent) as pool:
        jobs = [
            pool.submit(_estimate_on, device, mine[position::processes], out, settings, work, quiet=position > 0)
            for position, device in enumerate(work.devices)
        ]
        return sum((job.result() for job in jobs), Summary())


def parse_devices(text: str) -> tuple[str, ...]:
    """`auto` is every visible GPU, or the CPU where there is none; otherwise a list such as `cuda:0,cuda:1`."""
    if text == "auto":
        return tuple(f"cuda:{i}" for i in range(torch.cuda.device_count())) or ("cpu",)
    return tuple(text.split(","))


def _estimate_on(
    device: str, mine: Sequence[Tracklet], out: Path, settings: PoseSettings, work: PoseWork, quiet: bool = False
) -> Summary:
    network, sha256 = pifpaf.load_network(settings.checkpoint, work.trust)
    decoder = pifpaf.PoseDecoder(network, device, settings.threshold)
    tool, checkpoint = f"OpenPifPaf {pifpaf.import_openpifpaf().__version__}", Path(settings.checkpoint).name
    provenance = {"tool": tool, "checkpoint_sha256": sha256, **asdict(settings), "checkpoint": checkpoint}
    _claim(out, provenance)

    there = [tracklet for tracklet in mine if keypoint_files.path_of(out, tracklet.key).exists()]
    options = {"batch_size": None, "num_workers": work.workers, "worker_init_fn": _one_thread}
    checks = torch.utils.data.DataLoader(there, collate_fn=partial(_stands, out), **options) if there else ()
    checked = list(track(checks, len(there), "comparing", "tracklets", quiet))
    kept = {tracklet.key for tracklet, stands in zip(there, checked, strict=True) if stands}
    todo = [tracklet for tracklet in mine if tracklet.key not in kept]
    summary = Summary(there=len(kept), changed=len(there) - len(kept))
    total = sum(len(tracklet.frames) for tracklet in todo)
    found = track(_find(todo, settings, work, decoder), total, "keypoints", "frames", not total or quiet)
    for number, frames in groupby(found, key=itemgetter(0)):
        _, poses, faults, hashes = zip(*frames, strict=True)
        summary.unreadable += filter(None, faults)
        if len(summary.unreadable) > work.max_unreadable:
            count, last = len(summary.unreadable), "; ".join(summary.unreadable[-3:])
            raise DataError(f"{count} frames cannot be read, more than --max-unreadable allows; the last: {last}")
        file = keypoint_files.KeypointFile(
            keypoints=np.stack([pose.keypoints for pose in poses]),
            scores=np.array([pose.score for pose in poses], np.float32),
            frame_names=keypoint_files.frame_names(todo[number]),
            provenance=provenance | {"unreadable": [i for i, fault in enumerate(faults) if fault]},
            pictures=hashes,
        )
        keypoint_files.save(keypoint_files.path_of(out, todo[number].key), file, settings.dtype)
        summary.tracklets += 1
        summary.frames += len(poses)
        summary.empty += sum(not fault and pose.score == 0 for pose, fault in zip(poses, faults, strict=True))
    return summary


def _claim(out: Path, provenance: dict[str, Any]) -> None:
    """Say in the folder what makes its files; refuse to mix them with those of other settings."""
    path = out / "pose.json"  # beside the keypoint files: what made them
    out.mkdir(parents=True, exist_ok=True)
    if path.exists():
        earlier = json.loads(path.read_text())
        pairs = {key: (earlier.get(key), provenance.get(key)) for key in sorted(earlier | provenance)}
        if changes := ", ".join(f"{key} was {a!r}, now {b!r}" for key, (a, b) in pairs.items() if a != b):
            raise ConfigError(f"{out} holds keypoints of other settings ({changes}); give another --out")
        return
    if any(out.glob("*.npz")):
        raise ConfigError(f"{out} holds keypoint files that were not made by `keyreid pose`; give another --out")
    replace_text(path, json.dumps(provenance, indent=1, sort_keys=True) + "\n")


def _stands(out: Path, tracklet: Tracklet) -> bool:
    """Whether a keypoint file is whole, and of the frames that its tracklet now has."""
    try:
        keypoint_files.load(keypoint_files.path_of(out, tracklet.key), tracklet, frame_hashes(tracklet.frames))
    except DataError:
        return False
    return True


def _read(long_edge: int | None, chunk: tuple[int, Sequence[Frame]]) -> tuple[int, list[Fitted | str], list[str]]:
    """What the reader processes do: the chunk's number, for each frame a picture, or why there is none, and hashes."""
    pictures: list[Fitted | str] = []
    hashes = [""] * len(chunk[1])
    for number, frame in enumerate(chunk[1]):
        try:
            content = read_frame(frame)[0]
            hashes[number] = content_hash(content)
            pictures.append(fit(decode(content), long_edge))
        except (DataError, OSError, cv2.error) as error:
            place = f"{frame.path}" + ("" if frame.video_frame is None else f" frame {frame.video_frame}")
            pictures.append(str(error) if str(frame.path) in str(error) else f"{place}: {error}")
    return chunk[0], pictures, hashes


def _find(
    tracklets: Sequence[Tracklet], settings: PoseSettings, work: PoseWork, decoder: pifpaf.PoseDecoder
) -> Iterator[tuple[int, Pose, str | None, str]]:
    """Frame after frame, in order: the tracklet's number, what was found, why it could not be read, and its hash.

    A chunk is up to `batch_size` frames of one tracklet; those of one size go through the network together.
    """
    nobody = Pose(np.zeros((NUM_KEYPOINTS, 3), np.float32), 0.0)
    size = work.batch_size
    chunks = [(i, t.frames[at : at + size]) for i, t in enumerate(tracklets) for at in range(0, len(t.frames), size)]
    options = {"batch_size": None, "num_workers": work.workers, "worker_init_fn": _one_thread}
    read = partial(_read, settings.long_edge)
    for number, pictures, hashes in torch.utils.data.DataLoader(chunks, collate_fn=read, **options) if chunks else ():
        results = [nobody] * len(pictures)
        by_size = defaultdict(list)
        for position, picture in enumerate(pictures):
            if isinstance(picture, Fitted):
                by_size[picture.pixels.shape].append(position)
        for positions in by_size.values():
            found = decoder.pictures(np.stack([pictures[position].pixels for position in positions]))
            for position, poses in zip(positions, found, strict=True):
                picture = pictures[position]
                people = [picture.to_picture(pose) for pose in poses]
                results[position] = choose(people, picture.size, settings.select) or nobody
        for picture, pose, known_by in zip(pictures, results, hashes, strict=True):
            yield number, pose, picture if isinstance(picture, str) else None, known_by


def _one_thread(_worker: int) -> None:
    cv2.setNumThreads(0)
