"""Clips of a remote set by whole shards and by ranges: requests, bytes and time, from a web server with a delay.

    python benchmarks/remote.py                       # 120 MB of disk, about 2 minutes
    python benchmarks/remote.py --open-files 10000    # an epoch of so many shards under `ulimit -n 256`; 4 minutes

The server is another process on the loopback; it waits before it answers. Tracklets of 60 frames of 256 x 128, clips of
4 frames in batches of 16 as training draws them, bytes read and checked and not decoded.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import multiprocessing
import resource
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from aiohttp import web

from keyreid.config import Config, check_config
from keyreid.datasets.tracklet import Dataset, Frame, Tracklet
from keyreid.shards import open_reader, remote
from keyreid.shards.fetch import ClipFetcher
from keyreid.shards.layout import plan_shards
from keyreid.shards.pack import finish, pack
from keyreid.shards.plan import TrainingPlan
from keyreid.shards.shard_set import ShardSet
from keyreid.shards.writer import PackSettings
from keyreid.synthetic.walkers import render

SHARD_BYTES = 2_000_000  # so that a set of 50 MB has as many as a large one of 7 GB


def make_set(root: Path, tracklets: int, frames: int, size: int, target: int) -> Path:
    """A set whose tracklets share the same 300 pictures."""
    render(root / "walkers", 8, 4, 0, processes=1, frames=(8, 10), test_share=0.25, distractors=0, junk=0, height=size)
    pictures = itertools.cycle(sorted((root / "walkers").rglob("*.jpg")))
    keypoints = np.random.default_rng(0).uniform(0, 1, (frames, 17, 3)).astype(np.float32) * (size // 2, size, 1)
    records = []
    for number in range(tracklets):
        taken = tuple(Frame(path) for path in itertools.islice(pictures, frames))
        fields = {"identity": number // 4, "camera": number % 4 + 1, "split": "train", "frames": taken}
        records.append(Tracklet(f"t{number:06d}", **fields, keypoints=keypoints.astype(np.float32)))
    plan = plan_shards(Dataset("far", tuple(records)), PackSettings(root), target)
    pack(plan, root / "shards", quiet=True)
    finish(plan, root / "shards")
    return root / "shards"


def serve(folder: Path, delay: float, port: multiprocessing.Queue) -> None:
    """A web server that waits before each answer, and says at /counts what was asked for since the last time."""
    counts = {"requests": 0, "bytes": 0}

    async def file(request: web.Request) -> web.StreamResponse:
        await asyncio.sleep(delay)
        return web.FileResponse(folder / request.match_info["name"])

    async def note(request: web.Request, response: web.StreamResponse) -> None:
        if request.path.endswith(".tar"):
            counts["requests"] += 1
            counts["bytes"] += int(response.headers["Content-Length"])

    async def told(_request: web.Request) -> web.Response:
        answer = web.json_response(counts)
        counts.update(requests=0, bytes=0)
        return answer

    async def run() -> None:
        app = web.Application()
        app.add_routes([web.get("/set/{name}", file), web.get("/counts", told)])
        app.on_response_prepare.append(note)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port.put(site._server.sockets[0].getsockname()[1])
        await asyncio.Event().wait()

    asyncio.run(run())


@contextlib.contextmanager
def serving(folder: Path, delay: float) -> Iterator[str]:
    """The URL of a server in a process of its own."""
    clean = multiprocessing.get_context("spawn")
    port = clean.Queue()
    server = clean.Process(target=serve, args=(folder, delay, port), daemon=True)
    server.start()
    yield f"http://127.0.0.1:{port.get()}"
    server.terminate()


def make_config(location: str, **data: object) -> Config:
    """The published recipe for this set."""
    return check_config({"data": {"shards": location, **data}}, "benchmark")


def measure(shards: ShardSet, url: str, batches: int, ahead: bool = True) -> tuple[float, float, float]:
    """Requests, kB and milliseconds a clip."""
    config = make_config(f"{url}/set")
    plan, fetcher = TrainingPlan(shards, config.data, config.clip, 0), ClipFetcher(shards, config)
    urllib.request.urlopen(f"{url}/counts").close()
    start = time.perf_counter()
    for step in range(batches):
        clips = plan.step(*divmod(step, plan.steps_per_epoch))
        if ahead:
            fetcher.ahead(clips)
        for clip in clips:
            fetcher.fetch(clip)
    seconds, clips = time.perf_counter() - start, batches * len(clips)
    counts = json.load(urllib.request.urlopen(f"{url}/counts"))
    return counts["requests"] / clips, counts["bytes"] / clips / 1e3, 1e3 * seconds / clips


def compare(root: Path, delay: float, batches: int) -> None:
    """The table of one delay."""
    total = sum(shard["bytes"] for shard in ShardSet.open(root / "shards").card["shards"]) / 1e9
    cases = [
        ("whole shards, all fit", 2 * total, "shards", 0, True),
        ("whole, cache 10 %", total / 10, "shards", 0, True),
    ]
    cases += [("ranges, frame after frame", None, "ranges", 0, False)]
    cases += [(f"ranges, gap {gap / 1024:.3g} kB", None, "ranges", gap, True) for gap in (0, 32 << 10, 256 << 10)]
    cases += [("ranges, a clip's whole span", None, "ranges", 1 << 22, True)]
    with serving(root / "shards", delay) as url:
        for number, (name, gigabytes, how, gap, ahead) in enumerate(cases):
            shards = ShardSet.open(f"{url}/set", root / f"cache{delay}{number}", gigabytes, how)
            remote.GAP = gap
            figures = "{:.2f} | {:.0f} | {:.1f}".format(*measure(shards, url, batches, ahead))
            print(f"| {1e3 * delay:.0f} ms | {name} | {figures} |", flush=True)


def read_epoch(folder: Path, reader: str) -> None:
    """An epoch by one of the readers; a rank may have 256 files open."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
    shards = ShardSet.open(folder)
    config = make_config(str(folder), reader=reader, identities=16)
    plan, start, seen = TrainingPlan(shards, config.data, config.clip, 0), time.perf_counter(), set()
    for batch in open_reader(shards, (plan.step(0, step) for step in range(plan.steps_per_epoch)), config):
        seen |= set(batch.tracklets.tolist())
    print(
        f"{reader}: {len(seen)} tracklets of {len(shards.card['shards'])} shards: {time.perf_counter() - start:.0f} s"
    )


def main() -> None:
    """Make the set, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, default=30)
    parser.add_argument("--open-files", type=int, metavar="SHARDS", help="instead: an epoch of so many")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        if arguments.open_files:
            folder = make_set(root, arguments.open_files, 1, 64, 1)
            for reader in ("dali", "plain"):
                child = multiprocessing.get_context("spawn").Process(target=read_epoch, args=(folder, reader))
                child.start()
                child.join()
            with serving(folder, 0.02) as url:
                for who in ("the first process", "each later one"):
                    start = time.perf_counter()
                    remote.open_remote(f"{url}/set", root / "cache")
                    print(f"card and indices, 20 ms a request, {who}: {time.perf_counter() - start:.2f} s")
            return
        make_set(root, 128, 60, 256, SHARD_BYTES)
        print("| delay | how | requests a clip | kB a clip | ms a clip |\n|---|---|---|---|---|")
        for delay in (0.0, 0.02):
            compare(root, delay, arguments.batches)


if __name__ == "__main__":
    main()
