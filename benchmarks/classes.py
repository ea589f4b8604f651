"""What a rank holds of many classes, replicated and sharded: real training steps of toy clips with so many identities.

    python benchmarks/classes.py                        # 100,000 identities on 2 ranks
    python benchmarks/classes.py --identities 20000 --ranks 1 2 4
    python benchmarks/classes.py --checkpoint --negatives 1   # saving and resuming instead of steps

The clips are those of the tests, a few people's; the classifiers and centres are of as many as are asked for. Held:
weights, optimizer states and centres of all that is trained. Before the network: what Python, torch, DeepSpeed and
others take.

Checkpoints: how long training waits for a save, and what the rank that reads most hashes or maps of the checkpoint's
files on resuming (what it does both with counts once). Private memory is the process's own, without mapped files.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import socket
import statistics
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.multiprocessing as mp

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))


def main() -> None:
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--identities", type=int, default=100_000)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2])
    parser.add_argument("--stages", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--negatives", type=float, nargs="+", default=[1.0, 0.1])
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--checkpoint", action="store_true")
    arguments = parser.parse_args()
    from training_runs import toy_shards

    columns = ["a rank holds", "its peak memory", "before the network", "s/step", "loss"]
    if arguments.checkpoint:
        columns = ["checkpoint", "training waits", "written after", "a rank reads", "resumed after"]
        columns += ["private memory of a step", "saving", "resuming"]
    print(f"| ranks | ZeRO | classifiers | {' | '.join(columns)} |\n|{'---|' * (3 + len(columns))}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        shards = toy_shards(Path(folder) / "data", 24)
        forms = [("replicated", 1.0), *(("sharded", share) for share in arguments.negatives)]
        for ranks, stage in ((ranks, stage) for ranks in arguments.ranks for stage in arguments.stages):
            for form, negatives in forms:
                print(row(shards, Path(folder), ranks, stage, form, negatives, arguments), flush=True)


def row(shards: Path, folder: Path, ranks: int, stage: int, form: str, negatives: float, arguments) -> str:
    """One line of the table: the rank that needs most."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    most = {}
    for resume in (False, True)[: 1 + arguments.checkpoint]:
        mp.spawn(_rank, (ranks, port, shards, folder, stage, form, negatives, resume, arguments), nprocs=ranks)
        found = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(ranks)]
        most |= {name: max(of_rank[name] for of_rank in found) for name in found[0]}
    what = form if negatives == 1 else f"{form}, {negatives:.0%} of the negative classes"
    if arguments.checkpoint:
        whole = sum(path.stat().st_size for path in (folder / "toy" / "checkpoints" / "step-00000002").iterdir())
        shutil.rmtree(folder / "toy")
        seconds = (
            f"{most['stall']:.2f} s | {most['written']:.1f} s | {most['read'] / whole:.2f} | {most['resumed']:.1f} s"
        )
        private = " | ".join(f"{most[name] / 1e9:.2f} GB" for name in ("stepping", "saving", "resuming"))
        return f"| {ranks} | {stage} | {what} | {whole / 1e9:.2f} GB | {seconds} | {private} |"
    held, peak, before = (f"{most[name] / 1e9:.2f} GB" for name in ("held", "peak", "before"))
    return f"| {ranks} | {stage} | {what} | {held} | {peak} | {before} | {most['seconds']:.2f} | {most['loss']:.3f} |"


def _rank(rank: int, ranks: int, port: int, shards, folder, stage, form, negatives, resume: bool, arguments) -> None:
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    torch.set_num_threads(1)
    from training_runs import StopAfter, toy_config

    from keyreid.distributed.ranks import join, leave
    from keyreid.tracking import Tracker
    from keyreid.training.engine import import_deepspeed
    from keyreid.training.loop import Trainer, TrainingPlan

    made = TrainingPlan.__init__

    def with_more_identities(plan, *given):
        made(plan, *given)
        plan.num_identities = arguments.identities

    TrainingPlan.__init__ = with_more_identities
    sections = {"model": {"parts": 3, "classifiers": form}, "loss": {"negative_classes": negatives}}
    config = toy_config(shards, folder, training={"zero_stage": stage}, **sections)
    place = join()
    import_deepspeed()
    before = _peak()
    tracker = Tracker(config.tracking, folder, folder, "benchmark", enabled=False)
    if resume:
        (folder / f"{rank}.json").write_text(
            json.dumps(_resumed(lambda: Trainer(config, place, tracker, StopAfter(99))))
        )
        leave()
        return
    trainer = Trainer(config, place, tracker, StopAfter(99), resume=False)
    trainer.engine.train()
    seconds = []
    for step in range(1 if arguments.checkpoint else arguments.steps):
        batch, start = next(trainer.reader), time.perf_counter()
        outcome = trainer.stepper.step(batch, step)
        seconds.append(time.perf_counter() - start)
    found = {
        "held": _held(trainer),
        "peak": _peak(),
        "before": before,
        "seconds": statistics.median(seconds[-arguments.steps + 1 :]),
        "loss": outcome.loss,
    }
    if arguments.checkpoint:
        found = _saved(trainer)
    (folder / f"{rank}.json").write_text(json.dumps(found))
    trainer.reader.close()
    leave()


def _saved(trainer) -> dict[str, float]:
    """Seconds and private memory of a save; the second one, when memory is as warm as later in a training."""
    with Private() as stepping:
        time.sleep(0.1)
    with Private() as saving:
        for step in (1, 2):
            trainer.state = replace(trainer.state, step=step)
            trainer.ranks.agree(True)
            start = time.perf_counter()
            trainer._save(None)
            stall = time.perf_counter() - start
            trainer.writer.wait()
    written = time.perf_counter() - start
    return {"stall": stall, "written": written, "stepping": stepping.most, "saving": saving.most}


def _resumed(start) -> dict[str, float]:
    """Bytes that are read, and private memory, until a Trainer is there."""
    from keyreid.training import snapshot

    mapped, restore_after = [], snapshot.restore_after

    def noted(*given):
        restore_after(*given)
        maps = re.findall(
            r"\.safetensors\n(?:Size|KernelPageSize|MMUPageSize).*?\nRss: +(\d+)", SMAPS.read_text(), re.S
        )
        mapped.append(sum(map(int, maps)) * 1024)

    snapshot.restore_after = noted
    digest, hashed = hashlib.file_digest, []
    hashlib.file_digest = lambda file, how: hashed.append(os.fstat(file.fileno()).st_size) or digest(file, how)
    begun = time.perf_counter()
    with Private() as resuming:
        trainer = start()
    found = {"read": max(sum(hashed), *mapped), "resumed": time.perf_counter() - begun}
    trainer.reader.close()
    return {**found, "resuming": resuming.most}


SMAPS = Path("/proc/self/smaps")


class Private:
    """The most private memory that the process has within the block, asked for every 10 ms."""

    def __enter__(self) -> Private:
        self.most, self._over = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(0.01):
            now = int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024
            self.most = max(self.most, now)


def _held(trainer) -> int:
    """Bytes of weights, optimizer states and centres that are a rank's own."""
    module, classes = trainer.engine.module, trainer.engine.classes
    optimizers = [trainer.engine._optimizer, *([classes._optimizer] if classes else [])]
    tensors = [*module.parameters(), *module.buffers(), *(classes.parameters if classes else [])]
    tensors += [value for optimizer in optimizers for state in optimizer.state.values() for value in state.values()]
    return sum(value.numel() * value.element_size() for value in tensors if isinstance(value, torch.Tensor))


def _peak() -> int:
    """Most memory that the process had so far."""
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


if __name__ == "__main__":
    main()
