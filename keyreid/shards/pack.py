"""Pack a dataset that is cut into shards: write them on several processes, then write the dataset card.

Which tracklet goes to which shard follows from the dataset alone, so processes and the tasks of a SLURM array share
the work without talking: each writes whole shards, finished shards are kept, and the card appears when all are there.
"""

import shutil
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import chain, repeat, starmap
from pathlib import Path
from typing import Any

import numpy as np

import keyreid
from keyreid.datasets.tracklet import Tracklet
from keyreid.errors import DataError, KeyreidError
from keyreid.files import replace_bytes, sha256, writing
from keyreid.processes import end_with_parent, worker_context
from keyreid.progress import track
from keyreid.shards.card import CARD_NAME, card_digest, encode_card, read_card
from keyreid.shards.index_file import index_path, read_index
from keyreid.shards.layout import ShardLayout, splits_of
from keyreid.shards.members import SPLITS, VERSION, decode_json, encode_json
from keyreid.shards.shard_set import ShardSet
from keyreid.shards.writer import PackSettings, kept, write_shard

_DISK_RESERVE = 1.05
_NOTE = ".packed-"  # and the share: what it has finished, until the card is there


def check_destination(layout: ShardLayout, out: Path) -> None:
    """Refuse (DataError) to replace another dataset's shards: readers name most of them alike (`folder`, `mars`)."""
    try:
        there = read_card(out)["source"]
    except DataError:
        return
    if any(there[name] != _source(layout)[name] for name in ("dataset", "folder")):
        raise DataError(
            f"{out}: holds the shards of another dataset ({there['dataset']}, from a folder {there['folder']!r}); "
            "choose another --out, or delete them first"
        )


def pack(
    layout: ShardLayout, out: Path, processes: int = 1, share: tuple[int, int] = (0, 1), quiet: bool = False
) -> tuple[int, int]:
    """Write the shards of share i of n (shards i, i + n, ...) that are not there yet, or are there and damaged.

    Returns:
        How many shards were written, how many were kept.

    Raises:
        DataError: the input is bad, or the disk is too small.
        KeyreidError: `out` cannot be written to.
    """
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    numbers = range(share[0], len(layout.shards), share[1])
    tars, hashes = {number: out / layout.shards[number][0] for number in numbers}, layout.fingerprints(numbers)
    note = out / f"{_NOTE}{share[0]}-of-{share[1]}.json"
    note.unlink(missing_ok=True)

    def whole(number: int) -> bool:
        tar = tars[number]
        return kept(tar, hashes[tar.name], every_byte=True) and _newest(tar, layout, number)

    with ThreadPoolExecutor(processes) as pool:
        checks = pool.map(whole, numbers)
        checked = track(zip(numbers, checks, strict=True), len(numbers), "checking", "shards", quiet=quiet)
        todo = [number for number, is_whole in checked if not is_whole]
    if todo and not layout.before:
        (out / CARD_NAME).unlink(missing_ok=True)  # it must not vouch for shards that are being replaced
    for name in (CARD_NAME, *(tar.stem for tar in tars.values())):
        for stale in out.glob(f".{name}.*.partial"):
            stale.unlink(missing_ok=True)
    needed, free = sum(layout.bytes[number] for number in todo), shutil.disk_usage(out).free
    if needed * _DISK_RESERVE > free:
        raise DataError(
            f"{out}: about {needed / 1e9:.2f} GB are to be written, but the disk has {free / 1e9:.2f} GB free; "
            "make room, or choose another --out"
        )
    jobs = [(tars[n], layout.shards[n][1], layout.settings, hashes[tars[n].name]) for n in todo]
    frames = sum(len(tracklet.frames) for _, tracklets, *_ in jobs for tracklet in tracklets)
    start = time.monotonic()
    for _ in track(_write(jobs, processes), frames, "packing", "frames", quiet=quiet):
        pass
    with writing(note):
        replace_bytes(note, encode_json({"layout": layout.digest, "fingerprints": hashes}))
    if todo and not quiet:
        print(f"packed {frames} frames: {frames / (time.monotonic() - start):.0f} frames/s")
    return len(todo), len(numbers) - len(todo)


def finish(layout: ShardLayout, out: Path) -> dict[str, Any]:
    """Write the dataset card and give it; DataError where shards are missing or of other tracklets or settings."""
    if absent := missing(layout, out):
        some = ", ".join(absent[:5]) + (f" and {len(absent) - 5} more" if len(absent) > 5 else "")
        raise DataError(
            f"{out}: {len(absent)} of {len(layout.shards)} shards are missing or were packed from other data or with "
            f"other settings: {some}; run their shares again, then finish"
        )
    card = make_card(layout, out)
    card["card_sha256"] = card_digest(card)
    with writing(out / CARD_NAME):
        replace_bytes(out / CARD_NAME, encode_card(card))
    ShardSet.open(out)  # makes its columns
    for note in out.glob(f"{_NOTE}*"):
        note.unlink(missing_ok=True)
    return card


def missing(layout: ShardLayout, out: Path) -> list[str]:
    """Names of the shards that are not there as they would be written now."""
    known = _noted(layout, out)
    if not known:  # nobody packs: all is asked of the dataset
        known = layout.fingerprints(range(len(layout.shards)))
    return [name for name, _ in layout.shards if name not in known or not kept(out / name, known[name])]


def _noted(layout: ShardLayout, out: Path) -> dict[str, str]:
    """Fingerprints of the shards that shares of this packing have finished, as they noted them."""
    known: dict[str, str] = {}
    for note in out.glob(f"{_NOTE}*.json"):
        try:
            said = decode_json(note.read_bytes())
            if said["layout"] == layout.digest:
                known |= said["fingerprints"]
        except (OSError, ValueError, LookupError, TypeError):  # being replaced, or a stranger's
            continue
    return known


def make_card(layout: ShardLayout, out: Path) -> dict[str, Any]:
    """The dataset card of the finished shards in `out`; FORMAT.md says what each entry means."""
    dataset, settings = layout.dataset, layout.settings
    counts = {"frames_with_keypoints": 0, "heatmap_bytes": 0}
    shards, columns = [], []
    for name in [*(shard["file"] for shard in layout.before), *(name for name, _ in layout.shards)]:
        path = index_path(out / name)
        index = read_index(path)
        columns.append(np.stack([index.identity, index.camera, index.split, index.frames]))
        counts["frames_with_keypoints"] += int((index.visible > 0).sum())
        counts["heatmap_bytes"] += index.heatmap_bytes
        shard = {"file": name, "tracklets": len(index.key), "frames": int(index.frames.sum())}
        shard |= {"index": path.name, "index_bytes": path.stat().st_size, "index_sha256": sha256(path)}
        shards.append(shard | {entry: index.header[entry] for entry in ("bytes", "sha256")})
    facts = np.concatenate(columns, 1)
    by_split = {split: _counts(facts[:, facts[2] == number]) for number, split in enumerate(SPLITS)}
    return {
        "format": f"keyreid-dataset/{VERSION}",
        "name": dataset.name,
        "tool": f"keyreid {keyreid.__version__}",
        "source": _source(layout),
        "settings": settings.described(),
        "counts": _counts(facts) | counts,
        "by_split": {split: numbers for split, numbers in by_split.items() if numbers["tracklets"]},
        "cameras": np.unique(facts[1]).tolist(),
        "splits": splits_of(dataset),
        "query_camera": dataset.query_camera,
        "names": dataset.names,
        "frames_per_second": dataset.frames_per_second,
        "shards": shards,
    }


def _source(layout: ShardLayout) -> dict[str, Any]:
    dataset = layout.settings.dataset or layout.dataset.name
    return {"dataset": dataset, "folder": layout.settings.root.name, "options": layout.settings.options}


def _counts(facts: np.ndarray) -> dict[str, int]:
    """Of tracklets' identities, cameras, splits and frames."""
    return {"tracklets": facts.shape[1], "frames": int(facts[3].sum()), "identities": len(np.unique(facts[0]))}


def _newest(tar: Path, layout: ShardLayout, number: int) -> bool:
    """Whether none of a finished shard's pictures has changed since it was written."""
    paths = {frame.path for tracklet in layout.shards[number][1] for frame in tracklet.frames}
    try:
        changes = (max(stat.st_mtime_ns, stat.st_ctime_ns) for stat in map(Path.stat, paths))
        return max(changes) <= index_path(tar).stat().st_mtime_ns
    except OSError:
        return False


_Job = tuple[Path, list[Tracklet], PackSettings, str]


def _write(jobs: list[_Job], processes: int) -> Iterator[None]:
    """Write shards, in other processes where there are several; yields once a frame."""
    if processes == 1 or len(jobs) < 2:
        for frames in chain.from_iterable(starmap(write_shard, jobs)):
            yield from repeat(None, frames)
        return
    context = worker_context("keyreid.shards.writer", "keyreid.shards.plain")
    counter = context.Value("Q", 0)
    shown = 0
    with ProcessPoolExecutor(min(processes, len(jobs)), context, _start_worker, (counter,)) as pool:
        waiting = {pool.submit(_write_in_worker, job) for job in jobs}
        try:
            while waiting:
                finished, waiting = wait(waiting, timeout=0.5, return_when=FIRST_COMPLETED)
                for future in finished:
                    future.result()
                before, shown = shown, counter.value
                yield from repeat(None, shown - before)
        except BrokenProcessPool:
            raise KeyreidError(
                "a packing process was ended from outside (out of memory?); "
                "run the same command again, with fewer --processes: finished shards are kept"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


_frames_done: Any = None  # in a worker: the counter that all share


def _start_worker(counter: Any) -> None:
    global _frames_done
    _frames_done = counter
    end_with_parent()


def _write_in_worker(job: _Job) -> None:
    for frames in write_shard(*job):
        with _frames_done.get_lock():
            _frames_done.value += frames
