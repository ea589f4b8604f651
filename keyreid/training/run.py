"""One training run, from joining the other ranks to the files that say how it ended."""

import contextlib
import getpass
import json
import logging
import platform
import shlex
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path

import yaml

from keyreid.config import Config, load_config, save_config
from keyreid.distributed.preemption import StopRequest
from keyreid.distributed.ranks import Ranks, join, leave
from keyreid.files import replace_text
from keyreid.shards.plan import TrainingPlan
from keyreid.shards.shard_set import ShardSet
from keyreid.tracking import Tracker
from keyreid.training import OnEvaluation
from keyreid.training.loop import Interrupted, Trainer
from keyreid.version import commit, version

log = logging.getLogger("keyreid")

RESULT, INTERRUPTED, COMPLETED, RESOLVED = "result.json", "interrupted", "completed", "config.yaml"
PROVENANCE = "provenance.json"
PACKAGES = ("keyreid", "torch", "deepspeed", "timm", "webdataset", "nvidia-dali-cuda130", "ray", "mlflow", "numpy")


def train(
    config: Config,
    resume: bool = True,
    tags: Mapping[str, str] | None = None,
    stop: StopRequest | None = None,
    on_evaluation: OnEvaluation | None = None,
    command: Sequence[str] | None = None,
) -> dict | None:
    """Train on this process's rank; every rank of the run calls it.

    The run's folder then holds the resolved configuration, provenance, checkpoints, evaluations, logs, and either
    `completed` and `result.json`, or `interrupted` after a stop signal.

    Args:
        tags: of the MLflow run, when it is new.
        stop: asked after every step; default one that listens to stop signals, which only a main thread can.
        command: that started the run; default this process's.

    Returns:
        the last evaluation, or None after a stop signal.

    Raises:
        KeyreidError: see Trainer.run.
    """
    ranks = join()
    try:
        _start_logging(config.run_dir, ranks)
        if ranks.first:
            config.run_dir.mkdir(parents=True, exist_ok=True)
            for name in (COMPLETED, INTERRUPTED):
                (config.run_dir / name).unlink(missing_ok=True)
            save_config(config, config.run_dir / RESOLVED)
        tracker = Tracker(config.tracking, Path(config.output), config.run_dir, config.name, tags, ranks.first)
        if ranks.first:
            tracker.provenance(_record_start(config.run_dir, command or sys.argv, ranks.world_size))
        with contextlib.nullcontext(stop) if stop else StopRequest() as stop:
            return _tracked(config, ranks, tracker, stop=stop, resume=resume, on_evaluation=on_evaluation)
    finally:
        leave()


def _tracked(config: Config, ranks: Ranks, tracker: Tracker, **trainer: object) -> dict | None:
    environment = {"python": platform.python_version(), "host": platform.node()}
    tracker.params(_flatten(config.model_dump(mode="json")) | environment | _versions())
    tracker.artifact(config.run_dir / RESOLVED)
    status = "FAILED"
    try:
        result = Trainer(config, ranks, tracker, **trainer).run()
        status = "FINISHED"
    except Interrupted as interruption:
        status = "KILLED"
        log.info("stopped (%s); the same command resumes here", interruption)
        if ranks.first:
            replace_text(config.run_dir / INTERRUPTED, str(interruption))
        return None
    except Exception:
        log.debug("training failed", exc_info=True)
        raise
    finally:
        tracker.close(status)
    if ranks.first:
        replace_text(config.run_dir / RESULT, json.dumps(result, indent=1, default=str))
        (config.run_dir / INTERRUPTED).unlink(missing_ok=True)
        replace_text(config.run_dir / COMPLETED, "")
    return result


def check_data(config: Config) -> tuple[ShardSet, TrainingPlan]:
    """The shards and the plan of a run; raises what is wrong with them."""
    shards = ShardSet.from_config(config.data)
    return shards, TrainingPlan(shards, config.data, config.clip, config.seed)


def describe_plan(config: Config) -> str:
    """The resolved configuration, and how long and how large the training would be."""
    from keyreid.checkpoints.start import start_network

    shards, plan = check_data(config)
    model = config.model
    if model.weights == "timm":  # nothing is downloaded for a plan
        model = model.model_copy(update={"weights": None})
    network = start_network(model, config.clip, plan.num_identities, len(shards.camera_index))
    steps = config.schedule.steps_per_epoch or plan.steps_per_epoch
    return (
        f"{yaml.safe_dump(config.model_dump(mode='json'), sort_keys=False)}\n"
        f"{plan.num_identities} training identities, {steps} steps an epoch, {steps * config.schedule.epochs} in all\n"
        f"{sum(p.numel() for p in network.parameters()) / 1e6:.1f} M parameters"
    )


def completed_result(config: Config) -> dict | None:
    """What an earlier run of this configuration ended with, or None."""
    folder = config.run_dir
    done = (folder / COMPLETED).is_file() and (folder / RESULT).is_file()
    return json.loads((folder / RESULT).read_text()) if done and load_config(folder / RESOLVED) == config else None


def _record_start(run_dir: Path, command: Sequence[str], ranks: int) -> dict[str, str]:
    """Add this start to `RUN/provenance.json`, a list with the newest last; gives what was added."""
    user = ""
    with contextlib.suppress(KeyError, OSError):  # a container's user that has no name
        user = getpass.getuser()
    program = "keyreid" if Path(command[0]).name == "cli.py" else command[0]
    start = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": shlex.join([program, *command[1:]]),
        "directory": str(Path.cwd()),
        "user": user,
        "host": platform.node(),
        "ranks": str(ranks),
        "version": version(),
        "commit": commit() or "",
    }
    path = run_dir / PROVENANCE
    earlier: list[dict[str, str]] = []
    with contextlib.suppress(OSError, ValueError):  # none yet, or cut off by hand: no reason not to train
        earlier = json.loads(path.read_text())
    replace_text(path, json.dumps([*earlier, start], indent=1))
    return start


def _start_logging(run_dir: Path, ranks: Ranks) -> None:
    """The first rank speaks to the terminal; each rank keeps a log file."""
    folder = run_dir / "logs"
    folder.mkdir(parents=True, exist_ok=True)
    log.handlers.clear()
    log.setLevel(logging.DEBUG)
    log.propagate = False
    to_file, to_terminal = logging.FileHandler(folder / f"rank-{ranks.rank}.log"), logging.StreamHandler(sys.stdout)
    to_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    to_terminal.setLevel(logging.INFO)
    log.addHandler(to_file)
    if ranks.first:
        log.addHandler(to_terminal)
    # DeepSpeed 0.19.8 calls collectives that torch 2.14 renames; it tells so at every call.
    warnings.filterwarnings("ignore", message=".*torch.distributed.* is deprecated", category=FutureWarning)
    for chatty in ("torch.utils.cpp_extension", "mlflow"):
        logging.getLogger(chatty).setLevel(logging.ERROR)


def _flatten(values: dict, prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in values.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _versions() -> dict[str, object]:
    versions = dict.fromkeys((f"version.{package}" for package in PACKAGES), "absent")
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[f"version.{package}"] = metadata.version(package)
    return versions
