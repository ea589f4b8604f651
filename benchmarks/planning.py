"""Planning a step: processor milliseconds of one rank that holds 16 clips, on average and at most.

    python benchmarks/planning.py [--tracklets 800000 10000000] [--ranks 1 64 512] [--lanes 1 64 512]

An identity has 1 to 20 tracklets, 8 on average, and K of them in a batch. P grows with the ranks, so that a rank's
clips stay the same, and its time should, however many ranks and tracklets there are. A mean is over an epoch, its
beginning included; after `--seconds` of it the rest is taken to be like what was measured after its first 64 steps.
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import fields

import numpy as np

from keyreid.config import ClipConfig, DataConfig
from keyreid.shards.plan import TrainingPlan
from keyreid.shards.set_index import SetIndex
from keyreid.shards.shard_set import ShardSet

CLIPS = 16
BLOCK = 64  # steps whose frames a plan draws together


def shards(tracklets: int) -> ShardSet:
    """A set of which only those columns are there that a plan asks for."""
    rng = np.random.default_rng(0)
    people = tracklets // 8
    count = 1 + rng.binomial(19, 7 / 19, people)
    total, person = int(count.sum()), np.repeat(np.arange(people, dtype=np.int32), count)
    columns = {"identity": person.astype(np.int64), "person": person, "identities": np.arange(people)}
    columns |= {"by_identity": np.arange(total), "identity_start": np.r_[0, np.cumsum(count)]}
    columns |= {"camera": rng.integers(1, 50, total), "frames": rng.integers(8, 200, total)}
    columns |= {"split": np.zeros(total, np.uint8), "common": np.zeros(4, np.int64)}
    index = SetIndex(**dict.fromkeys((field.name for field in fields(SetIndex)), None) | columns)
    return ShardSet("nowhere", {"cameras": list(range(50)), "splits": []}, index, None)


def waits(plan: TrainingPlan, ranks: int, seconds: float) -> tuple[float, float]:
    """Mean and longest time of a step of one rank in the second epoch, in processor milliseconds."""
    steps, times = plan.steps_per_epoch, []
    batches, until = plan.batches(0, steps - 1, ranks // 2, ranks), time.monotonic() + seconds
    next(batches)
    while len(times) < steps and (len(times) < 2 * BLOCK or len(times) % BLOCK or time.monotonic() < until):
        start = time.process_time()
        clips = next(batches)
        times.append((time.process_time() - start) * 1e3)
        assert len(clips) == CLIPS
    return (sum(times[:BLOCK]) + np.mean(times[BLOCK:]) * (steps - BLOCK)) / steps, max(times)


def exponent(means: dict[int, float]) -> str:
    """Of means that grow as a power of their keys: from the first key to the last."""
    (first, one), *_, (last, other) = sorted(means.items())
    return f"{math.log(other / one) / math.log(last / first):.2f}"


def main() -> None:
    """Print a row for each number of ranks and lanes, and how times grow."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tracklets", type=int, nargs="+", default=[800_000, 10_000_000])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 64, 512])
    parser.add_argument("--lanes", type=int, nargs="+", default=[1, 64, 512])
    parser.add_argument("--k", type=int, default=16, help="K, which divides the 16")
    parser.add_argument("--seconds", type=float, default=5)
    options = parser.parse_args()
    print("| tracklets | ranks | lanes | steps an epoch | ms a step, mean | longest |\n|---|---|---|---|---|---|")
    means = {}
    for tracklets in options.tracklets:
        known = shards(tracklets)
        for ranks in options.ranks:
            for lanes in (lanes for lanes in options.lanes if lanes <= ranks):
                data = DataConfig(
                    shards="nowhere", identities=ranks * CLIPS // options.k, tracklets=options.k, lanes=lanes
                )
                plan = TrainingPlan(known, data, ClipConfig(), seed=1)
                mean, longest = waits(plan, ranks, options.seconds)
                means[tracklets, ranks, lanes] = mean
                row = f"| {tracklets:,} | {ranks} | {lanes} | {plan.steps_per_epoch:,} | {mean:.3f} | {longest:.0f} |"
                print(row, flush=True)
    print("\nexponents, from the least to the most:")
    for tracklets in options.tracklets:
        for lanes in options.lanes:
            own = {r: mean for (t, r, width), mean in means.items() if t == tracklets and width == lanes}
            if len(own) > 1:
                print(f"in ranks, {tracklets:,} tracklets, {lanes} lanes: {exponent(own)}")
        own = {r: mean for (t, r, width), mean in means.items() if t == tracklets and width == r}
        if len(own) > 1:
            print(f"in ranks, {tracklets:,} tracklets, a lane a rank: {exponent(own)}")
    for ranks, lanes in dict.fromkeys(key[1:] for key in means):
        own = {t: mean for (t, *key), mean in means.items() if key == [ranks, lanes]}
        if len(own) > 1:
            print(f"in tracklets, {ranks} ranks, {lanes} lanes: {exponent(own)}")


if __name__ == "__main__":
    main()
