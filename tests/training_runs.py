"""Small training runs of real ranks: processes forked from a server that has imported everything once."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import shutil
import signal
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from packed import make_dataset, pack_dataset

from keyreid.checkpoints import folder as checkpoints
from keyreid.checkpoints import manifest
from keyreid.checkpoints.saved import read_tensors
from keyreid.config import Config, check_config
from keyreid.distributed.parts import Part
from keyreid.distributed.preemption import StopRequest
from keyreid.distributed.ranks import join, leave

SERVER = multiprocessing.get_context("forkserver")
HEAVY = ["keyreid.training.loop", "keyreid.evaluation.judging", "keyreid.training.run"]
SERVER.set_forkserver_preload([*HEAVY, "mlflow", "deepspeed", "keyreid.shards.dali"])
TIMEOUT = 300


def toy_shards(folder: Path, identities: int = 12) -> Path:
    """Shards of a dataset of 64 x 32 pictures; half of the identities train."""
    pack_dataset(make_dataset(folder / "pictures", identities=identities), folder / "pictures", folder / "shards")
    return folder / "shards"


def damaged(shards: Path, folder: Path) -> Path:
    """A copy in which many bytes of pictures are flipped."""
    shutil.copytree(shards, folder)
    for tar in folder.glob("*.tar"):
        content = bytearray(tar.read_bytes())
        for place in range(3000, len(content), 4000):
            content[place] ^= 0xFF
        tar.write_bytes(content)
    return folder


def toy_config(shards: Path, output: Path, **sections) -> Config:
    """A run of seconds: two blocks of a narrow ViT, clips of two frames, 8 clips a step, 5 steps an epoch."""
    values = {
        "name": "toy",
        "output": str(output),
        "data": {"shards": str(shards), "workers": 1, "identities": 4, "tracklets": 2, "augment": {"pad_pixels": 3}},
        "clip": {"frames": 2, "height": 64, "width": 32},
        "model": {"backbone": "vit_tiny_patch16_224", "depth": 2, "local_heads": 6, "drop_path": 0.3},
        "optimizer": {"lr": 0.01},
        "schedule": {"epochs": 2, "warmup_epochs": 1, "steps_per_epoch": 5},
        "training": {"precision": "fp32", "log_every_steps": 1},
        "evaluation": {"every_epochs": 0, "pictures": 0},
        "tracking": {"system_metrics": False},
    }
    for section, changes in sections.items():
        values[section] = {**values.get(section, {}), **changes} if isinstance(changes, dict) else changes
    return check_config(values, "toy")


@dataclass
class Ranks:
    """Processes of one run."""

    processes: list

    def kill(self) -> None:
        """SIGKILL to every rank at once."""
        for process in self.processes:
            if process.is_alive():
                process.kill()
        self.wait()

    def signal(self, number: int, rank: int = 0) -> None:
        """Send a signal to one rank."""
        os.kill(self.processes[rank].pid, number)

    def wait(self) -> list[int]:
        """Exit codes, once all have ended."""
        for process in self.processes:
            process.join(TIMEOUT)
            assert process.exitcode is not None, "a rank hangs"
        return [process.exitcode for process in self.processes]


def start(target, config: Config, ranks: int, *arguments) -> Ranks:
    """Start `target(config, *arguments)` on each rank."""
    port, processes = free_port(), []
    for rank in range(ranks):
        place = {"RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        words = {name: str(value) for name, value in place.items()}
        processes.append(SERVER.Process(target=_as_rank, args=(words, config.run_dir, target, config, *arguments)))
        processes[-1].start()
    return Ranks(processes)


def free_port() -> int:
    """Of the loopback interface, at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def together(target, ranks: int, *arguments, ending: Sequence[int] = ()) -> None:
    """`target(*arguments)` on each rank of a gloo group, without a configuration; `ending`: exit codes, default 0."""
    arguments = ranks, free_port(), target, *arguments
    processes = [SERVER.Process(target=_in_group, args=(rank, *arguments)) for rank in range(ranks)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == list(ending or [0] * ranks)


def _in_group(rank: int, ranks: int, port: int, target, *arguments) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=ranks)
    target(*arguments)
    torch.distributed.destroy_process_group()


def run(target, config: Config, ranks: int = 1, *arguments) -> None:
    """Start and wait; a rank that fails is an error with what it printed."""
    codes = start(target, config, ranks, *arguments).wait()
    assert codes == [0] * ranks, f"{codes}\n{printed(config)}"


@contextlib.contextmanager
def stepping(config: Config):
    """A Trainer of this rank, of which the test itself takes the steps."""
    from keyreid.tracking import Tracker
    from keyreid.training.loop import Trainer

    ranks = join()
    tracker = Tracker(config.tracking, config.run_dir.parent, config.run_dir, "", enabled=False)
    trainer = Trainer(config, ranks, tracker, StopRequest())
    trainer.engine.train()
    yield trainer
    trainer.reader.close()
    leave()


def state_of(trainer) -> dict[str, torch.Tensor]:
    """All that a checkpoint would hold, on the first rank; a collective."""
    from keyreid.training import snapshot

    taken = snapshot.take(trainer.engine, None, trainer.state, trainer.header)
    of_ranks = [None] * trainer.ranks.world_size if trainer.ranks.first else None
    torch.distributed.gather_object(taken, of_ranks)
    return {name: value for each in ("weights", "training") for name, value in joined(of_ranks or [], each).items()}


def joined(of_ranks: list, kind: str) -> dict[str, torch.Tensor]:
    """The whole tensors of what each rank has taken."""
    whole = {}
    for taken in of_ranks:
        for name, value in getattr(taken, kind).items():
            part = taken.parts[f"{kind}.safetensors"].get(name) or Part.whole(value.shape)
            to = whole.setdefault(name, torch.full(part.shape, torch.nan).to(value.dtype))
            Part.whole(part.shape).fill(to.view(-1), part, value.flatten())
    return whole


def train(config: Config) -> None:
    """What `keyreid train` does on a rank."""
    from keyreid.training.run import train

    train(config)


class StopAfter(StopRequest):
    """A stop signal that comes after so many steps: training asks once a step."""

    def __init__(self, steps: int) -> None:
        self.left = steps
        super().__init__()

    @property
    def signal(self) -> signal.Signals | None:
        self.left -= 1
        return signal.SIGTERM if self.left <= 0 else None

    @signal.setter
    def signal(self, _: object) -> None:
        """Nothing else asks."""


def printed(config: Config) -> str:
    """What the ranks of a run wrote to their terminals."""
    return "\n".join(path.read_text() for path in sorted(config.run_dir.parent.glob("output-*.txt")))


def newest_tensors(config: Config) -> dict[str, torch.Tensor]:
    """Everything that the newest checkpoint holds."""
    folder = checkpoints.newest_whole(config.run_dir / "checkpoints")
    return {
        f"{file}:{name}": tensor
        for file in (manifest.WEIGHTS, manifest.EMA, manifest.TRAINING)
        for name, tensor in read_tensors(folder, file).items()
    }


def logged(config: Config, key: str) -> list[tuple[int, float]]:
    """(step, value) of a metric in the order in which it was logged."""
    lines = (config.run_dir / "tracking" / "events.jsonl").read_text().splitlines()
    events = (json.loads(line) for line in lines if line.endswith("}"))
    return [(event["step"], event["metrics"][key]) for event in events if key in event.get("metrics", {})]


def _as_rank(environment: dict[str, str], run_dir: Path, target, config: Config, *arguments) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    output = (run_dir.parent / f"output-{run_dir.name}-{environment['RANK']}.txt").open("a", buffering=1)
    os.dup2(output.fileno(), 1)
    os.dup2(output.fileno(), 2)
    sys.stdout, sys.stderr = open(1, "w", buffering=1), open(2, "w", buffering=1)  # noqa: SIM115
    target(config, *arguments)
