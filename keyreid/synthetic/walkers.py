"""Rendered pedestrians in the exact layout of MARS: data for the quickstart and the tests, without a download.

`keyreid walkers OUT --identities 200 --seed 0` draws people who walk past several cameras. Who someone is lies in
clothes, build, hair and bags; cameras differ so much in colour, light, viewpoint and sharpness that raw pixels and
colour histograms do not find people again (benchmarks/README.md has the figures). Every picture depends on the seed and
on its own place alone: not on the number of processes, nor on how many identities are drawn beside it.

Layout, as MARS has it: `bbox_train/0001/0001C1T0001F001.jpg`, `bbox_test/` with the distractors `0000` and the junk
`00-1`, `info/train_name.txt`, `test_name.txt` (CRLF), `tracks_train_info.mat`, `tracks_test_info.mat`, `query_IDX.mat`.
Beside it: the true keypoints (`keypoints/KEY.npz`) and `walkers.json`, the settings, written last.
"""

import contextlib
import functools
import io
import json
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path

import cv2
import numpy as np
import scipy.io

from keyreid.datasets.frames import content_hash
from keyreid.datasets.tracklet import DISTRACTOR_IDENTITY, JUNK_IDENTITY
from keyreid.errors import DataError
from keyreid.ownership import LOCK, OWNER, owned
from keyreid.pose import keypoint_files
from keyreid.processes import end_with_parent
from keyreid.progress import track
from keyreid.synthetic import scene
from keyreid.synthetic.clothes import dress
from keyreid.synthetic.filming import random_stream, render_tracklet

VERSION = 3  # of the drawing: raised whenever the same settings give other pictures
PARTS = {"bbox_train", "bbox_test", "keypoints", "info"}
_PERSON, _CAMERA, _VISITS, _TRACKLET, _DISTRACTOR, _JUNK = range(1, 7)  # random streams


@dataclass(frozen=True)
class Walkers:
    """What is rendered."""

    identities: int  # people, training and test together
    cameras: int = 6  # 2 to 9: MARS's file names have one digit for it
    seed: int = 0  # of everything
    test_share: float = 0.5  # of the identities, kept for testing
    tracklets: int = 2  # at most so many of one person at one camera; in the test split the first of each is a query
    frames: tuple[int, int] = (8, 20)  # least and most of a tracklet
    distractors: int | None = None  # test tracklets of people whom no query looks for; None: twice the test identities
    junk: int | None = None  # test tracklets of badly placed boxes; None: a quarter of the distractors
    height: int = 256  # of the pictures, pixels
    width: int = 128

    def __post_init__(self) -> None:
        for wrong, message in (
            (self.identities < 2, f"identities={self.identities}: at least 2"),
            (not 2 <= self.cameras <= 9, f"cameras={self.cameras}: 2 to 9, MARS's names have one digit for them"),
            (not 0 < self.test_share < 1, f"test_share={self.test_share}: between 0 and 1"),
            (self.tracklets < 1, f"tracklets={self.tracklets}: at least 1"),
            (not 1 <= self.frames[0] <= self.frames[1], f"frames={self.frames}: least and most, from 1"),
            (min(self.height, self.width) < 24, f"{self.height}x{self.width} pixels: at least 24"),
            (min(self.distractors or 0, self.junk or 0) < 0, "distractors and junk cannot be negative"),
        ):
            if wrong:
                raise DataError(f"walkers: {message}")

    @property
    def train_identities(self) -> int:
        """Identities 1 to this one train; the rest are for testing."""
        return min(max(round(self.identities * (1 - self.test_share)), 1), self.identities - 1)


@dataclass(frozen=True)
class _Job:
    """One tracklet to draw: `stream` names its random numbers, `person` those of its person (None: junk)."""

    identity: int
    camera: int
    number: int
    frames: int
    person: tuple[int, ...] | None
    stream: tuple[int, ...]

    @property
    def name(self) -> str:
        """The person's folder: MARS writes junk as 00-1."""
        return "00-1" if self.identity == JUNK_IDENTITY else f"{self.identity:04d}"

    @property
    def key(self) -> str:
        return f"{self.name}C{self.camera}T{self.number:04d}"

    def picture(self, frame: int) -> str:
        return f"{self.key}F{frame + 1:03d}.jpg"


def render(
    root: Path | str, identities: int, cameras: int = 6, seed: int = 0, *, processes=1, quiet=False, **settings
) -> Walkers:
    """Draw a dataset into `root`, new or from an earlier call: what is there with the same settings is kept.

    Pictures do not depend on `processes`; `settings` are the other fields of `Walkers`. DataError where a setting is
    out of range, or `root` holds something else.
    """
    root = Path(root)
    walkers = Walkers(identities=identities, cameras=cameras, seed=seed, **settings)
    description = json.dumps({"version": VERSION, **asdict(walkers)}, indent=1)
    done = root / "walkers.json"
    with contextlib.nullcontext() if done.is_file() else owned(root, "keyreid walkers"):
        if done.is_file():
            if done.read_text() != description:
                raise DataError(f"{root} holds walkers of other settings ({done}); choose another folder or remove it")
            return walkers
        if {path.name for path in root.iterdir() if path.name not in (LOCK, OWNER)} - PARTS:
            raise DataError(f"{root} is not empty and not a folder of walkers; choose another folder")
        train, test = _plan(walkers)
        for name, jobs in (("train", train), ("test", test)):
            _render_all(walkers, root, f"bbox_{name}", jobs, processes, quiet)
        _write_info(root / "info", train, test)
        done.write_text(description)
    return walkers


def _plan(walkers: Walkers) -> tuple[list[_Job], list[_Job]]:
    """Training and test tracklets, in MARS's order: by file name, junk first."""
    first_test = walkers.train_identities + 1
    train = [job for identity in range(1, first_test) for job in _visits(walkers, identity)]
    test = [job for identity in range(first_test, walkers.identities + 1) for job in _visits(walkers, identity)]
    many = 2 * (walkers.identities - walkers.train_identities)
    distractors = many if walkers.distractors is None else walkers.distractors
    test += _extras(walkers, JUNK_IDENTITY, _JUNK, distractors // 4 if walkers.junk is None else walkers.junk)
    test += _extras(walkers, DISTRACTOR_IDENTITY, _DISTRACTOR, distractors)
    return train, sorted(test, key=lambda job: (job.identity, job.camera, job.number))


def _visits(walkers: Walkers, identity: int) -> Iterator[_Job]:
    """The tracklets of one person, at two cameras at least."""
    rng = random_stream(walkers.seed, _VISITS, identity)
    seen = rng.integers(max(2, (walkers.cameras + 1) // 2), walkers.cameras + 1)
    for camera in sorted(rng.permutation(walkers.cameras)[:seen] + 1):
        for number in range(1, rng.integers((walkers.tracklets + 1) // 2, walkers.tracklets + 1) + 1):
            frames = rng.integers(walkers.frames[0], walkers.frames[1] + 1)
            stream = (walkers.seed, _TRACKLET, identity, int(camera), number)
            yield _Job(identity, int(camera), number, int(frames), (walkers.seed, _PERSON, identity), stream)


def _extras(walkers: Walkers, identity: int, kind: int, count: int) -> list[_Job]:
    jobs, numbers = [], [0] * (walkers.cameras + 1)
    for i in range(count):
        rng = random_stream(walkers.seed, kind, i)
        camera = int(rng.integers(1, walkers.cameras + 1))
        frames = int(rng.integers(walkers.frames[0], walkers.frames[1] + 1))
        numbers[camera] += 1
        person = None if identity == JUNK_IDENTITY else (walkers.seed, kind, i, 1)
        jobs.append(_Job(identity, camera, numbers[camera], frames, person, (walkers.seed, kind, i, 2)))
    return jobs


def _render_all(walkers: Walkers, root: Path, folder: str, jobs: list[_Job], processes: int, quiet: bool) -> None:
    work = functools.partial(_render_person, walkers, root, folder)
    people = [list(group) for _, group in groupby(jobs, key=lambda job: job.person or job.stream)]
    with contextlib.ExitStack() as stack:
        done = map(work, people)
        if processes > 1:  # fresh ones: a fork of a process that has run threads (OpenCV, PyTorch) may hang
            spawn = multiprocessing.get_context("spawn")
            pool = stack.enter_context(ProcessPoolExecutor(processes, spawn, end_with_parent))
            done = pool.map(work, people, chunksize=4)
        for _ in track(done, len(people), f"walkers {folder}", "people", quiet):
            pass


def _render_person(walkers: Walkers, root: Path, folder: str, jobs: list[_Job]) -> None:
    """Draw and write the tracklets of one person."""
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)
    person = dress(random_stream(*jobs[0].person)) if jobs[0].person else None
    for job in jobs:
        camera = _camera(walkers.seed, job.camera, walkers.height, walkers.width)
        stream = random_stream(*job.stream)
        rendered = render_tracklet(person, camera, job.frames, stream, walkers.height, walkers.width)
        directory = root / folder / job.name
        directory.mkdir(parents=True, exist_ok=True)
        names = tuple(job.picture(frame) for frame in range(job.frames))
        for name, picture in zip(names, rendered.pictures, strict=True):
            (directory / name).write_bytes(picture)
        scores = rendered.keypoints[..., 2].mean(axis=1)
        provenance = {"tool": "keyreid walkers", "version": VERSION, "seed": walkers.seed}
        hashes = tuple(map(content_hash, rendered.pictures))
        truth = keypoint_files.KeypointFile(rendered.keypoints, scores, names, provenance, hashes)
        keypoint_files.save(keypoint_files.path_of(root / "keypoints", job.key), truth, durable=False)
    cv2.setNumThreads(threads)


@functools.lru_cache(maxsize=16)
def _camera(seed: int, number: int, height: int, width: int) -> scene.Camera:
    return scene.camera(number, random_stream(seed, _CAMERA, number), height, width)


def _write_info(info: Path, train: list[_Job], test: list[_Job]) -> None:
    """MARS's index: names, rows of (start, end, identity, camera) counted from 1, and the rows that are queries."""
    info.mkdir(parents=True, exist_ok=True)
    for name, jobs in (("train", train), ("test", test)):
        names = [job.picture(frame) for job in jobs for frame in range(job.frames)]
        (info / f"{name}_name.txt").write_bytes("".join(f"{line}\r\n" for line in names).encode())
        ends = np.cumsum([job.frames for job in jobs])
        rows = [(e - job.frames + 1, e, job.identity, job.camera) for e, job in zip(ends, jobs, strict=True)]
        table = np.array(rows, np.int32).reshape(-1, 4)
        _save_mat(info / f"tracks_{name}_info.mat", {f"track_{name}_info": table})
    queries = [row for row, job in enumerate(test, start=1) if job.identity > 0 and job.number == 1]
    kind = np.uint16 if len(test) < 1 << 16 else np.uint32
    _save_mat(info / "query_IDX.mat", {"query_IDX": np.array([queries], kind)})


def _save_mat(path: Path, variables: dict[str, np.ndarray]) -> None:
    """Write a MATLAB 5 file; its header, where SciPy puts the time of day, is the same in every run."""
    stream = io.BytesIO()
    scipy.io.savemat(stream, variables, do_compression=True)
    header = b"MATLAB 5.0 MAT-file, keyreid walkers".ljust(116)
    path.write_bytes(header + stream.getvalue()[116:])
