"""Sets of up to ten million tracklets: making the columns, opening, planning, labels and holdout, and how they grow.

    python benchmarks/sets.py [--tracklets 10000 100000 1000000 10000000] [--processes 16] [--folder DIR]

Made sets: indices and a card as packing writes them, and shards that are holes, since nothing here reads a picture.
An identity has 100 tracklets of 8 frames. Every figure is a fresh process's; memory is what it alone holds (USS), with
its imports, and the share of the mapped file that falls to each of several processes (PSS).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from keyreid.pose.parts import part_names
from keyreid.shards.card import CARD_NAME, card_digest, encode_card
from keyreid.shards.index_file import TAR_BLOCK, ShardIndex, encode_index, index_path

FRAMES, OF_IDENTITY, OF_SHARD = 8, 100, 2000  # frames of a tracklet, tracklets of an identity and of a shard
CAMERAS = 50
WORK = """
import json, sys, time, psutil
import numpy as np
from keyreid.config import ClipConfig, DataConfig
from keyreid.shards.plan import TrainingPlan
from keyreid.shards.shard_set import ShardSet

folder, what, total = sys.argv[1], sys.argv[2], int(sys.argv[3])
start = psutil.Process().memory_full_info().uss
begin = time.perf_counter()
shards = ShardSet.open(folder)
assert len(shards) == total
lanes = min(64, total // 2500)  # of four identities
data = DataConfig(shards=folder, lanes=lanes, identities=4 * lanes, tracklets=4)
if what not in ("open", "many"):
    shards.index.person.sum(), shards.index.split.sum(), shards.index.frames.sum()  # the file is in memory
    begin = time.perf_counter()
if what == "plan":
    next(TrainingPlan(shards, data, ClipConfig()).batches(0, 0, 1, lanes))
elif what == "labels":
    shards.training_identities()
elif what == "holdout":
    shards.select("train", holdout=0.1), shards.select("holdout_query", holdout=0.1)
seconds = time.perf_counter() - begin
if what == "many":
    print(flush=True)
    shards.index.person.sum(), shards.index.size.sum(), shards.index.crc.sum()
    print(flush=True)
    sys.stdin.readline()
memory = psutil.Process().memory_full_info()
print(json.dumps(dict(seconds=seconds, uss=memory.uss, more=memory.uss - start, pss=memory.pss)), flush=True)
"""


def make_set(folder: Path, tracklets: int) -> None:
    """Indices, shards of holes, and the card of a set; identities one after the other."""
    shards = []
    for number in range(-(-tracklets // OF_SHARD)):
        rows = np.arange(number * OF_SHARD, min(tracklets, (number + 1) * OF_SHARD))
        rng = np.random.default_rng(number)
        frames, members = len(rows) * FRAMES, len(rows) * (2 + 2 * FRAMES)
        size = rng.integers(900, 4000, members).astype("<u4")
        steps = TAR_BLOCK + -(-size.astype(np.int64) // TAR_BLOCK) * TAR_BLOCK
        tar = folder / f"made-{number:05d}.tar"
        header = {"format": "keyreid-index/1", "shard": tar.name, "bytes": int(steps.sum()) + 10_240, "parts": 6}
        header |= {"sha256": "0" * 64, "settings": "none"}
        crc, eight = rng.integers(0, 1 << 32, members).astype("<u4"), np.full(frames, 128, "<u2")
        index = ShardIndex(
            *(header, np.char.zfill(rows.astype("U10"), 10), rows // OF_IDENTITY, rng.integers(0, CAMERAS, len(rows))),
            *(np.zeros(len(rows), "u1"), np.full(len(rows), FRAMES), np.cumsum(steps) - steps + TAR_BLOCK, size, crc),
            *(np.zeros(frames, "u1"), eight, eight * 2, np.full(frames, 63, "u1")),
        )
        content = encode_index(index)
        index_path(tar).write_bytes(content)
        with tar.open("wb") as file:
            file.truncate(header["bytes"])
        shard = {"file": tar.name, "index": index_path(tar).name, "index_bytes": len(content)}
        shard |= {"index_sha256": hashlib.sha256(content).hexdigest(), "tracklets": len(rows), "frames": frames}
        shards.append(shard | {"bytes": header["bytes"], "sha256": header["sha256"]})
    counts = {"tracklets": tracklets, "frames": tracklets * FRAMES, "identities": -(-tracklets // OF_IDENTITY)}
    card = {
        "format": "keyreid-dataset/1",
        "name": "made",
        "tool": "benchmarks/sets.py",
        "source": {"dataset": "folder", "folder": "made", "options": {}},
        "settings": {"image": "keep", "keypoints": "", "heatmaps": {"from": "", "parts": list(part_names(6))}},
        "counts": counts | {"frames_with_keypoints": tracklets * FRAMES, "heatmap_bytes": 0},
        "by_split": {"train": counts},
        "cameras": list(range(CAMERAS)),
        "splits": [],
        "query_camera": None,
        "shards": shards,
    }
    (folder / CARD_NAME).write_bytes(encode_card(card | {"card_sha256": card_digest(card)}))


def measured(folder: Path, what: str, total: int) -> dict[str, float]:
    """What a fresh process says."""
    command = [sys.executable, "-c", WORK, str(folder), what, str(total)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def shared(folder: Path, total: int, processes: int) -> list[dict[str, float]]:
    """What so many processes hold of the columns that all have read."""
    command = [sys.executable, "-c", WORK, str(folder), "many", str(total)]
    pipe = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    running = [subprocess.Popen(command, **pipe) for _ in range(processes)]
    for process in running:
        process.stdout.readline(), process.stdout.readline()
    found = []
    for process in running:
        process.stdin.write("\n")
        process.stdin.flush()
        found.append(process.stdout.readline())
    for process in running:
        process.wait()
    return [json.loads(line) for line in found]


def main() -> None:
    """Print a row for each size, and how times grow from the least to the most."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tracklets", type=int, nargs="+", default=[10_000, 100_000, 1_000_000, 10_000_000])
    parser.add_argument("--processes", type=int, default=16)
    parser.add_argument("--folder", type=Path, help="where sets are made; default a temporary one")
    options = parser.parse_args()
    names = ("open", "plan", "labels", "holdout")
    print("| tracklets | first making, s | opening, s | its memory, MB | plan, s | labels, s | holdout, s | memory |")
    print("|---|---|---|---|---|---|---|---|")
    seconds: dict[int, list[float]] = {}
    for total in options.tracklets:
        folder = Path(tempfile.mkdtemp(dir=options.folder))
        try:
            make_set(folder, total)
            first = measured(folder, "open", total)["seconds"]
            tries = {name: [measured(folder, name, total) for _ in range(3)] for name in names}
            found = {name: min(each, key=lambda one: one["seconds"]) for name, each in tries.items()}
            seconds[total] = [found[name]["seconds"] for name in names]
            opened, *others = seconds[total]
            held = f"{found['open']['uss'] / 1e6:.0f} ({found['open']['more'] / 1e6:.0f} of the set)"
            times = " | ".join(f"{each:.3f}" for each in others)
            planned = f"{found['plan']['uss'] / 1e6:.0f} MB"
            print(f"| {total:,} | {first:.1f} | {opened:.3f} | {held} | {times} | {planned} |", flush=True)
            if total == max(options.tracklets):
                each = shared(folder, total, options.processes)
                size = (folder / "dataset.columns").stat().st_size
                text = "{} processes that have read {:.2f} GB of columns: {:.0f} MB each by PSS, {:.0f} MB of its own"
                means = (np.mean([one[name] for one in each]) / 1e6 for name in ("pss", "uss"))
                last = text.format(len(each), size / 1e9, *means)
        finally:
            shutil.rmtree(folder)
    print(f"\n{last}")
    least, most = min(seconds), max(seconds)
    if most > least:
        grown = (math.log(b / a) / math.log(most / least) for a, b in zip(seconds[least], seconds[most], strict=True))
        print("exponents:", ", ".join(f"{name} {each:.2f}" for name, each in zip(names, grown, strict=True)))


if __name__ == "__main__":
    main()
