"""One training run, from joining the other ranks to the files that say how it ended."""

import contextlib
import json
import logging
import platform
import sys
import warnings
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from keyreid.config import Config, load_config, save_config
from keyreid.distributed.preemption import StopRequest
from keyreid.distributed.ranks import Ranks, join, leave
from keyreid.files import replace_text
from keyreid.tracking import Tracker
from keyreid.training.provenance import record_start

if TYPE_CHECKING:
    from keyreid.training.loop import OnEvaluation

log = logging.getLogger("keyreid")

RESULT, INTERRUPTED, COMPLETED, RESOLVED = "result.json", "interrupted", "completed", "config.yaml"
PACKAGES = ("keyreid", "torch", "deepspeed", "timm", "webdataset", "nvidia-dali-cuda130", "ray", "mlflow", "numpy")


def train(
    config: Config,
    resume: bool = True,
    tags: Mapping[str, str] | None = None,
    stop: StopRequest | None = None,
    on_evaluation: "OnEvaluation | None" = None,
    command: Sequence[str] | None = None,
) -> dict | None:
    """Train on this process's rank; every rank of the run calls it.

    The run's folder then holds the resolved configuration, provenance, checkpoints, evaluations, logs, and either
    `completed` and `result.json`, or `interrupted` after a stop signal.

    Args:
        tags: of the MLflow run, when it is new.
        stop: asked after every step; default one that listens to stop signals, which only a main thread can.
        on_evaluation: see training/loop.py.
        command: that started the run; default this process's.

    Returns:
        the last evaluation, or None after a stop signal.

    Raises:
        KeyreidError: see Trainer.
    """
    ranks = join()
    try:
        _start_logging(config.run_dir, ranks)
        if ranks.first:
            _prepare_folder(config)
            start = record_start(config.run_dir, command or sys.argv, ranks.world_size)
        tracker = Tracker(config.tracking, Path(config.output), config.run_dir, config.name, tags, ranks.first)
        if ranks.first:
            tracker.provenance(start)
        with contextlib.nullcontext(stop) if stop else StopRequest() as stop:
            return _tracked(config, ranks, tracker, stop, resume, on_evaluation)
    finally:
        leave()


def _tracked(
    config: Config,
    ranks: Ranks,
    tracker: Tracker,
    stop: StopRequest,
    resume: bool,
    on_evaluation: "OnEvaluation | None",
) -> dict | None:
    from keyreid.training.loop import Interrupted, Trainer  # imports timm, which takes seconds

    tracker.params(_flatten(config.model_dump(mode="json")) | _environment())
    tracker.artifact(config.run_dir / RESOLVED)
    status = "FAILED"
    try:
        result = Trainer(config, ranks, tracker, stop, resume, on_evaluation).run()
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


def completed_result(config: Config) -> dict | None:
    """What an earlier run of this configuration ended with, or None."""
    folder = config.run_dir
    if not (folder / COMPLETED).is_file() or not (folder / RESULT).is_file():
        return None
    if load_config(folder / RESOLVED) != config:
        return None
    return json.loads((folder / RESULT).read_text())


def _prepare_folder(config: Config) -> None:
    config.run_dir.mkdir(parents=True, exist_ok=True)
    for name in (COMPLETED, INTERRUPTED):
        (config.run_dir / name).unlink(missing_ok=True)
    save_config(config, config.run_dir / RESOLVED)


def _start_logging(run_dir: Path, ranks: Ranks) -> None:
    """The first rank speaks to the terminal; each rank keeps a log file."""
    folder = run_dir / "logs"
    folder.mkdir(parents=True, exist_ok=True)
    log.handlers.clear()
    log.setLevel(logging.DEBUG)
    log.propagate = False
    to_file = logging.FileHandler(folder / f"rank-{ranks.rank}.log")
    to_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log.addHandler(to_file)
    if ranks.first:
        to_terminal = logging.StreamHandler(sys.stdout)
        to_terminal.setLevel(logging.INFO)
        to_terminal.setFormatter(logging.Formatter("%(message)s"))
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


def _environment() -> dict[str, object]:
    values: dict[str, object] = {"python": platform.python_version(), "host": platform.node()}
    for package in PACKAGES:
        try:
            values[f"version.{package}"] = version(package)
        except PackageNotFoundError:
            values[f"version.{package}"] = "absent"
    return values
