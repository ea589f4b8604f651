"""One training run, from joining the other ranks to the files that say how it ended."""

import contextlib
import getpass
import itertools
import json
import logging
import platform
import shlex
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path

import yaml

from keyreid.checkpoints.folder import checkpoints, named, read_state
from keyreid.config import Config, load_config, save_config
from keyreid.distributed.preemption import StopRequest
from keyreid.distributed.ranks import Ranks, join, leave, position
from keyreid.errors import ConfigError, DataError, KeyreidError
from keyreid.files import replace_text
from keyreid.ownership import owned
from keyreid.shards.plan import TrainingPlan
from keyreid.shards.shard_set import ShardSet
from keyreid.tracking import TRACKING, Tracker
from keyreid.training import OnEvaluation
from keyreid.training.costs import described
from keyreid.training.loop import Interrupted, Trainer
from keyreid.training.recipe import DATA, fingerprint, flatten, settings
from keyreid.version import commit, version

log = logging.getLogger("keyreid")

RESULT, INTERRUPTED, COMPLETED, RESOLVED = "result.json", "interrupted", "completed", "config.yaml"
PROVENANCE = "provenance.json"
# What a run leaves; the first goes first, so that a run is never called complete that has lost its checkpoints.
OF_A_RUN = COMPLETED, INTERRUPTED, RESULT, "checkpoints", TRACKING, "evaluation", "profile", RESOLVED, PROVENANCE
PACKAGES = ("keyreid", "torch", "deepspeed", "timm", "webdataset", "nvidia-dali-cuda130", "ray", "mlflow", "numpy")


def train(
    config: Config,
    resume: bool = True,
    tags: Mapping[str, str] | None = None,
    stop: StopRequest | None = None,
    on_evaluation: OnEvaluation | None = None,
    command: Sequence[str] | None = None,
    change: Sequence[str] = (),
) -> dict | None:
    """Train on this process's rank; every rank of the run calls it.

    The run's folder then holds the resolved configuration, provenance, checkpoints, evaluations, logs, and either
    `completed` and `result.json`, or `interrupted` after a stop signal. A start that is refused leaves it as it was,
    but for lines in the logs.

    Args:
        resume: from the newest whole checkpoint; False: what is there of an earlier run moves to `RUN/earlier-N`.
        tags: of the MLflow run, when it is new.
        stop: asked after every step; default one that listens to stop signals, which only a main thread can.
        command: that started the run; default this process's.
        change: settings and sections of the configuration that a resumed run may have otherwise than its checkpoint.

    Returns:
        the last evaluation, or None after a stop signal.

    Raises:
        KeyreidError: the folder is another training's, the checkpoint another run's; see also Trainer.run.
    """
    ranks = join()
    about = config.tracking, Path(config.output), config.run_dir, config.name, tags
    try:
        with _one_training(config.run_dir, ranks), contextlib.nullcontext(stop) if stop else StopRequest() as stop:
            _start_logging(config.run_dir, ranks)
            trainer = Trainer(config, ranks, Tracker(*about, enabled=False), stop, resume, on_evaluation, change)
            ranks.agree(True)  # all have come so far: nothing is written before
            if ranks.first:
                _begin(config, resume, trainer.resumed)
            trainer.tracker = Tracker(*about, ranks.first)
            if ranks.first:
                start = _record_start(config.run_dir, command or sys.argv, ranks.world_size, trainer.changes)
                trainer.tracker.provenance(start)
            return _tracked(config, ranks, trainer)
    except Exception:
        log.debug("training failed", exc_info=True)
        raise
    finally:
        leave()


@contextlib.contextmanager
def _one_training(run_dir: Path, ranks: Ranks) -> Iterator[None]:
    """The folder is this run's alone; a collective."""
    with contextlib.ExitStack() as held:
        refusal = None
        if ranks.first:
            try:
                held.enter_context(owned(run_dir, "keyreid train"))
            except KeyreidError as error:
                refusal = str(error)
        if refusal := ranks.from_first(refusal):
            raise KeyreidError(refusal)
        yield


def _begin(config: Config, resume: bool, resumed: Path | None) -> None:
    """Make the folder this run's: what is there of another moves aside, what says how an earlier start ended goes."""
    run_dir = config.run_dir
    if resumed:  # what is newer is damaged
        _set_aside(run_dir, [folder for folder in checkpoints(resumed.parent) if folder.name > resumed.name])
    elif not resume or not _is_of(run_dir, config):
        _set_aside(run_dir, [run_dir / name for name in OF_A_RUN])
    for name in (COMPLETED, INTERRUPTED):
        (run_dir / name).unlink(missing_ok=True)
    save_config(config, run_dir / RESOLVED)


def _set_aside(run_dir: Path, paths: Sequence[Path]) -> None:
    """Move what is there to a new folder `RUN/earlier-N`."""
    if not (there := [path for path in paths if path.exists()]):
        return
    aside = next(aside for n in itertools.count(1) if not (aside := run_dir / f"earlier-{n}").exists())
    for path in there:
        target = aside / path.relative_to(run_dir)
        target.parent.mkdir(parents=True, exist_ok=True)
        path.rename(target)
    log.warning("moved to %s: %s", aside, ", ".join(str(path.relative_to(run_dir)) for path in there))


def _is_of(run_dir: Path, config: Config) -> bool:
    """Whether what an earlier start left there, before its first checkpoint, is of the same recipe."""
    try:
        return settings(load_config(run_dir / RESOLVED)) == settings(config)
    except ConfigError:
        return not (run_dir / RESOLVED).exists()


def _tracked(config: Config, ranks: Ranks, trainer: Trainer) -> dict | None:
    tracker = trainer.tracker
    environment = {"python": platform.python_version(), "host": platform.node()}
    tracker.params(flatten(config.model_dump(mode="json")) | environment | _versions())
    tracker.artifact(config.run_dir / RESOLVED)
    status = "FAILED"
    try:
        result = trainer.run()
        status = "FINISHED"
    except Interrupted as interruption:
        status = "KILLED"
        log.info("stopped (%s); the same command resumes here", interruption)
        if ranks.first:
            replace_text(config.run_dir / INTERRUPTED, str(interruption))
        return None
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


def describe_plan(config: Config, ranks: int = 1) -> str:
    """The resolved configuration, and how long and how large the training would be, on so many ranks."""
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
        f"{(sum(p.numel() for p in network.parameters()) + network.sharded_parameters) / 1e6:.1f} M parameters\n"
        f"{described(config, network.width, plan.num_identities, ranks)}"
    )


def completed_result(config: Config) -> dict | None:
    """What an earlier run of this configuration, on these shards if they are there, ended with, or None.

    Trackers get what they could not get then.
    """
    folder, data = config.run_dir, None
    with contextlib.suppress(DataError):
        data = fingerprint(ShardSet.from_config(config.data))
    with contextlib.suppress(KeyreidError, OSError, ValueError):  # none, of another version, or cut off: train
        newest = named(folder / "checkpoints", "latest")
        same = data is None or (newest and read_state(newest).recipe.get(DATA, data) == data)
        if (folder / COMPLETED).is_file() and load_config(folder / RESOLVED) == config and same:
            result = json.loads((folder / RESULT).read_text())
            Tracker(config.tracking, Path(config.output), folder, config.name, {}, position()[0] == 0, None).close(None)
            return result
    return None


def _record_start(run_dir: Path, command: Sequence[str], ranks: int, changes: Mapping[str, object]) -> dict[str, str]:
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
        **{f"changed {key}": "{!r} -> {!r}".format(*values) for key, values in changes.items()},
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


def _versions() -> dict[str, object]:
    versions = dict.fromkeys((f"version.{package}" for package in PACKAGES), "absent")
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[f"version.{package}"] = metadata.version(package)
    return versions
