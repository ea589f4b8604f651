"""`keyreid submit`: queue a job on a Slurm cluster, with the batch files in slurm/."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from keyreid.errors import ConfigError, KeyreidError

if TYPE_CHECKING:
    from keyreid.config import Config

LOGS = Path("runs/slurm")


class Verb(str, Enum):
    """What can be queued: a batch file each, and the chain of them."""

    TRAIN = "train"
    EVALUATE = "evaluate"
    POSE = "pose"
    SHARD = "shard"
    TUNE = "tune"
    PIPELINE = "pipeline"


class Job(NamedTuple):
    """A batch file's verb, its arguments, and the options of sbatch that are not None."""

    verb: Verb
    arguments: list[str]
    options: dict[str, object]


def submit(
    verb: Annotated[Verb, typer.Argument(help="The job; pipeline is pose, shard, train and evaluate in a row.")],
    arguments: Annotated[
        list[str],
        typer.Argument(
            help="What `keyreid VERB` takes (train, pipeline: CONFIG section.key=value ...). "
            "Put -- before them if they contain options of their own."
        ),
    ],
    nodes: Annotated[str | None, typer.Option(help="Number of nodes, or LEAST-MOST.")] = None,
    gpus_per_node: Annotated[str | None, typer.Option(help="GPUs of each node, 8 or TYPE:8; a rank on each.")] = None,
    tasks_per_node: Annotated[int | None, typer.Option(min=1, help="Ranks on each node without GPUs.")] = None,
    cpus_per_task: Annotated[int | None, typer.Option(min=1, help="CPUs of each rank.")] = None,
    mem: Annotated[str | None, typer.Option(help="Memory of each node; 0: all of it.")] = None,
    time: Annotated[str | None, typer.Option(help="Time limit, as 1-00:00:00; training goes on after it.")] = None,
    partition: Annotated[str | None, typer.Option(help="As for sbatch, and so are the next four.")] = None,
    account: Annotated[str | None, typer.Option()] = None,
    qos: Annotated[str | None, typer.Option()] = None,
    constraint: Annotated[str | None, typer.Option()] = None,
    exclude: Annotated[str | None, typer.Option()] = None,
    array: Annotated[
        str | None, typer.Option(help="As 0-9%2. pose, shard: the shares. train: %a in arguments is the task's number.")
    ] = None,
    dependency: Annotated[str | None, typer.Option(help="As afterok:JOB.")] = None,
    job_name: Annotated[str | None, typer.Option(help="Name in the queue. Default keyreid-VERB.")] = None,
    container: Annotated[str | None, typer.Option(help="Image to run in; see slurm/site.env.example.")] = None,
    extra: Annotated[str, typer.Option(help="More options of sbatch: '--reservation=r --nice=10'.")] = "",
    dataset: Annotated[
        str | None, typer.Option(help="Dataset, as for `keyreid shard`.", rich_help_panel="Pipeline")
    ] = None,
    root: Annotated[Path | None, typer.Option(help="The dataset's folder.", rich_help_panel="Pipeline")] = None,
    keypoints: Annotated[
        Path | None,
        typer.Option(help="Folder that pose fills. Without it no pose job is queued.", rich_help_panel="Pipeline"),
    ] = None,
    shares: Annotated[int, typer.Option(min=1, help="Array tasks of pose and shard.", rich_help_panel="Pipeline")] = 8,
    pose_options: Annotated[str, typer.Option(help="More options of pose.", rich_help_panel="Pipeline")] = "",
    shard_options: Annotated[str, typer.Option(help="More options of shard.", rich_help_panel="Pipeline")] = "",
    dry_run: Annotated[bool, typer.Option(help="Print the exact command and batch file; queue nothing.")] = False,
    test_only: Annotated[bool, typer.Option(help="Ask Slurm when and where it would run; queue nothing.")] = False,
    follow: Annotated[bool, typer.Option(help="Print the logs until the job ends; Ctrl-C leaves it running.")] = False,
) -> None:
    """Queue a job on a Slurm cluster, after checking here what can be checked.

    The same by hand: sbatch OPTIONS slurm/VERB.sbatch ARGUMENTS. docs/slurm.md goes through it step by step.
    """
    from keyreid.distributed import slurm

    ranks = _count(gpus_per_node) if gpus_per_node else tasks_per_node
    size = {"nodes": nodes, "gpus-per-node": gpus_per_node, "cpus-per-task": cpus_per_task}
    tasks = ranks if verb in (Verb.TRAIN, Verb.EVALUATE, Verb.PIPELINE) else tasks_per_node
    if tasks != 1:  # one is the default; said, it makes of LEAST-MOST nodes always LEAST
        size["ntasks-per-node"] = tasks
    place = {"mem": mem, "time": time, "partition": partition, "account": account, "qos": qos}
    place |= {"constraint": constraint, "exclude": exclude}
    if follow and (array or verb is Verb.PIPELINE):
        raise KeyreidError("--follow shows one job, this is several: tail -F the log that you want to see")
    if verb is Verb.PIPELINE:
        if dataset is None or root is None or array:
            raise KeyreidError("a pipeline needs --dataset NAME and --root FOLDER, and --shares in place of --array")
        config = _checked_config(arguments, nodes, ranks)
        where = [dataset, str(root)]
        pose = [*where, f"--out={keypoints}", *shlex.split(pose_options)]
        shard = [*where, f"--out={config.data.shards}", *shlex.split(shard_options)]
        jobs = list(_pipeline(arguments, config, pose, shard, keypoints, shares, size))
    else:
        if verb is Verb.TRAIN:
            _check_training(arguments, nodes, ranks, array, waits=dependency is not None)
        if verb is Verb.TUNE:
            _check_search(arguments, waits=dependency is not None)
        jobs = [Job(verb, arguments, {**size, "array": array, "job-name": job_name})]

    after = dependency
    for job in jobs:
        script = slurm.batch_file(job.verb.value)
        options = {**job.options, **place, "dependency": after}
        if after:
            options["kill-on-invalid-dep"] = "yes"  # else a job whose predecessor failed waits for ever
        options["output"] = slurm.log_pattern(LOGS, job.verb.value, bool(job.options.get("array")))
        words = [f"--{name}={value}" for name, value in options.items() if value is not None] + shlex.split(extra)
        environment = slurm.job_environment(script, container)
        submission = slurm.Submission(script, tuple(job.arguments), tuple(words), environment)
        if dry_run:
            print(f"{submission.shell_line()}\n\n# {script}\n{script.read_text()}")
            after = f"afterok:JOB_OF_{job.verb.value.upper()}"
        elif test_only:
            print(f"{job.verb.value}: {slurm.test(submission)}")
        else:
            LOGS.mkdir(parents=True, exist_ok=True)
            job_id = slurm.submit(submission)
            after = f"afterok:{job_id}"
            _tell(job, job_id)
    if follow and not dry_run and not test_only:
        _follow(job, job_id)


def _pipeline(
    arguments: list[str],
    config: Config,
    pose: list[str],
    shard: list[str],
    keypoints: Path | None,
    shares: int,
    size: dict[str, object],
) -> Iterator[Job]:
    """The jobs from pictures to scores, in the order in which each waits for the one before."""
    array = f"0-{shares - 1}"
    if keypoints is not None:
        gpu = "1" if size["gpus-per-node"] else None
        yield Job(Verb.POSE, pose, {"array": array, "gpus-per-node": gpu, "cpus-per-task": size["cpus-per-task"]})
        shard = [*shard, f"--keypoints={keypoints}"]
    yield Job(Verb.SHARD, shard, {"array": array, "cpus-per-task": size["cpus-per-task"]})
    yield Job(Verb.SHARD, shard, {})  # checks that nothing is missing
    yield Job(Verb.TRAIN, arguments, size)
    yield Job(Verb.EVALUATE, [str(config.run_dir)], size)


def _checked_config(arguments: list[str], nodes: str | None, ranks: int | None) -> Config:
    """The configuration that the arguments name, which must fit the number of ranks."""
    from keyreid.config import load_config

    config = load_config(arguments[0], arguments[1:])
    for count in _counts(nodes) if ranks else []:
        config.check_ranks(ranks, count)
    return config


def _check_training(arguments: list[str], nodes: str | None, ranks: int | None, array: str | None, waits: bool) -> None:
    """Refuse what would fail on the cluster: the configuration, and the shards unless an earlier job makes them."""
    from keyreid.distributed.slurm import ARRAY_PLACEHOLDER

    if array:
        if not any(word.startswith("name=") and ARRAY_PLACEHOLDER in word for word in arguments):
            raise ConfigError("each task of an array is a run of its own: put %a into its name, as name=mars-%a")
        first = re.match(r"\d*", array)[0]
        arguments = [word.replace(ARRAY_PLACEHOLDER, first) for word in arguments]
    _check_shards(_checked_config(arguments, nodes, ranks), waits)


def _check_search(arguments: list[str], waits: bool) -> None:
    """The same for a search, whose trials are trainings."""
    from keyreid.tuning.search import load_search

    overrides = [word for word in arguments[1:] if not word.startswith("-")]
    _check_shards(load_search(Path(arguments[0]), overrides)[1], waits)


def _check_shards(config: Config, waits: bool) -> None:
    from keyreid.shards.shard_set import ShardSet

    if not waits and "://" not in config.data.shards:
        ShardSet.from_config(config.data)


def _counts(nodes: str | None) -> list[int]:
    """The numbers of nodes that "2", "2-4" or "2,4" (of newer Slurms) allow."""
    numbers = []
    for word in (nodes or "").split(","):
        if found := re.fullmatch(r"(\d+)(?:-(\d+))?", word):
            numbers += range(int(found[1]), int(found[2] or found[1]) + 1)
    return numbers


def _count(gpus: str) -> int:
    number = gpus.rsplit(":", 1)[-1]
    if not number.isdigit():
        raise KeyreidError(f"--gpus-per-node {gpus}: a number, or TYPE:NUMBER")
    return int(number)


def _tell(job: Job, job_id: str) -> None:
    """Say where a queued job is and how to see it."""
    array = job.options.get("array")
    name = f"{job.verb.value}-{job_id}{'_TASK' if array else ''}.log"
    print(f"{job.verb.value}: job {job_id}, log {LOGS / name}")
    if job.verb is Verb.TRAIN and not array:
        print(f"  rank 0: tail -F {shlex.quote(str(_rank_log(job, job_id)))}")
    print(f"  state: squeue --job {job_id}; end it: scancel {job_id}")


def _rank_log(job: Job, job_id: str) -> Path:
    from keyreid.config import load_config

    return load_config(job.arguments[0], job.arguments[1:]).run_dir / "slurm" / f"{job_id}-0.log"


def _follow(job: Job, job_id: str) -> None:
    from keyreid.distributed import slurm

    logs = [LOGS / f"{job.verb.value}-{job_id}.log"]
    if job.verb is Verb.TRAIN:
        logs.append(_rank_log(job, job_id))
    try:
        state = slurm.follow(job_id, logs)
    except KeyboardInterrupt:
        print(f"\njob {job_id} goes on; end it with scancel {job_id}")
        return
    print(f"job {job_id}: {state}")
    if state != "COMPLETED":
        raise typer.Exit(1)
