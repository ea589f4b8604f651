"""What a training step costs beside computing: ranks, data wait, communication by ZeRO stage, and saving.

    python benchmarks/training.py shards/walkers            # of the quickstart
    python benchmarks/training.py shards/mars --config configs/mars.yaml --ranks 8

Every figure is a median over steps of real runs on this machine: DeepSpeed ranks, the DALI reader, whole checkpoints.
Communication is counted at torch.distributed, in bytes that a rank puts into collectives in a step.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.multiprocessing as mp

COUNTED = ("all_reduce", "all_gather", "all_gather_into_tensor", "reduce_scatter_tensor", "broadcast", "reduce")


def main() -> None:
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", type=Path)
    parser.add_argument("--config", type=Path, default=Path("configs/walkers.yaml"))
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()
    overrides = [f"data.shards={arguments.shards}", "schedule.epochs=1000"]
    print("| ranks | ZeRO | steps/s | clips/s | data wait | communicated per step | save stall | save in all |")
    print("|---|---|---|---|---|---|---|---|")
    for ranks, stage in [(1, 0), *((arguments.ranks, stage) for stage in (0, 1, 2, 3))]:
        row = measure(arguments.config, [*overrides, f"training.zero_stage={stage}"], ranks, arguments.steps)
        print(
            f"| {ranks} | {stage} | {row['steps']:.2f} | {row['clips']:.1f} | {row['wait']:.1%} | "
            f"{row['bytes'] / 1e6:.1f} MB | {row['stall']:.2f} s | {row['write']:.2f} s |",
            flush=True,
        )


def measure(config: Path, overrides: list[str], ranks: int, steps: int) -> dict[str, float]:
    """Run real ranks for some steps and one checkpoint; what the first rank measured."""
    with tempfile.TemporaryDirectory() as folder:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        mp.spawn(_rank, (ranks, port, str(config), [*overrides, f"output={folder}"], steps, folder), nprocs=ranks)
        return json.loads((Path(folder) / "measured.json").read_text())


def _rank(rank: int, ranks: int, port: int, path: str, overrides: list[str], steps: int, folder: str) -> None:
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks))
    from keyreid.config import load_config
    from keyreid.distributed.preemption import StopRequest
    from keyreid.distributed.ranks import join, leave
    from keyreid.tracking import Tracker
    from keyreid.training.loop import Trainer

    counter = _count_bytes()
    config = load_config(path, overrides)
    place = join()
    tracker = Tracker(config.tracking, Path(folder), Path(folder), "benchmark", enabled=False)
    trainer = Trainer(config, place, tracker, StopRequest())
    trainer.engine.train()
    seconds, moved, waited = [], [], 0.0
    for step in range(steps + 3):
        if step == 3:  # warmed up
            waited = trainer.reader.wait_seconds
        before, start = counter["bytes"], time.perf_counter()
        trainer.stepper.step(next(trainer.reader), step)
        seconds.append(time.perf_counter() - start)
        moved.append(counter["bytes"] - before)
    start = time.perf_counter()
    trainer._save(None)
    stall = time.perf_counter() - start
    trainer.writer.wait()
    if place.first:
        step_seconds = statistics.median(seconds[3:])
        measured = {
            "steps": 1 / step_seconds,
            "clips": trainer.plan.batch_size / step_seconds,
            "wait": (trainer.reader.wait_seconds - waited) / sum(seconds[3:]),
            "bytes": statistics.median(moved[3:]),
            "stall": stall,
            "write": time.perf_counter() - start,
        }
        (Path(folder) / "measured.json").write_text(json.dumps(measured))
    trainer.reader.close()
    leave()


def _count_bytes() -> dict[str, int]:
    """Count the bytes of every tensor that this rank gives to a collective from now on."""
    counter = {"bytes": 0}

    def counting(collective):
        def call(*args, **kwargs):
            # What is sent: the input of a gather or reduction is its last tensor, else its only one.
            tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
            counter["bytes"] += tensors[-1].numel() * tensors[-1].element_size() if tensors else 0
            return collective(*args, **kwargs)

        return call

    for name in COUNTED:
        setattr(torch.distributed, name, counting(getattr(torch.distributed, name)))
    return counter


if __name__ == "__main__":
    main()
