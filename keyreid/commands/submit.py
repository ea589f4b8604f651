"""`keyreid submit`: queue a job on a Slurm cluster, with the batch files in slurm/."""

import re
import shlex
from functools import partial
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import typer

from keyreid.distributed import slurm
from keyreid.errors import ConfigError, KeyreidError

LOGS = Path("runs/slurm")
OfPipeline = partial(typer.Option, rich_help_panel="Pipeline")


Verb = Literal["train", "evaluate", "pose", "shard", "tune", "pipeline"]  # a batch file each, and the chain of them


class Job(NamedTuple):
    """A batch file's verb, its arguments, and the options of sbatch that are not None."""

    verb: Verb
    arguments: list[str]
    options: dict[str, object]


def submit(
    verb: Annotated[Verb, typer.Argument(help="The job; pipeline is pose, shard, train and evaluate in a row.")],
    arguments: Annotated[
        list[str], typer.Argument(help="Arguments of `keyreid VERB`: CONFIG section.key=value ...; -- before options.")
    ],
    nodes: Annotated[str | None, typer.Option(help="Number of nodes, or LEAST-MOST.")] = None,
    gpus_per_node: Annotated[str | None, typer.Option(help="GPUs per node, 8 or TYPE:8; one rank per GPU.")] = None,
    tasks_per_node: Annotated[int | None, typer.Option(min=1, help="Ranks per node without GPUs.")] = None,
    cpus_per_task: Annotated[int | None, typer.Option(min=1, help="CPUs per rank.")] = None,
    mem: Annotated[str | None, typer.Option(help="Memory per node; 0: all of it.")] = None,
    time: Annotated[str | None, typer.Option(help="Time limit, like 1-00:00:00; training resumes after it.")] = None,
    partition: Annotated[str | None, typer.Option(help="As for sbatch, like the next four.")] = None,
    account: Annotated[str | None, typer.Option()] = None,
    qos: Annotated[str | None, typer.Option()] = None,
    constraint: Annotated[str | None, typer.Option()] = None,
    exclude: Annotated[str | None, typer.Option()] = None,
    array: Annotated[str | None, typer.Option(help="Like 0-9%2: shares of pose, shard; %a in train arguments.")] = None,
    dependency: Annotated[str | None, typer.Option(help="Like afterok:JOB.")] = None,
    job_name: Annotated[str | None, typer.Option(help="Name in the queue. Default: keyreid-VERB.")] = None,
    container: Annotated[str | None, typer.Option(help="Image to run in; see slurm/site.env.example.")] = None,
    extra: Annotated[str, typer.Option(help="More options of sbatch: '--reservation=r --nice=10'.")] = "",
    change: Annotated[list[str] | None, typer.Option(help="As for `keyreid train`; repeat it for several.")] = None,
    dataset: Annotated[str | None, OfPipeline(help="Dataset, as for `keyreid shard`.")] = None,
    root: Annotated[Path | None, OfPipeline(help="The dataset's folder.")] = None,
    keypoints: Annotated[Path | None, OfPipeline(help="Folder for pose to fill. Without it, no pose job.")] = None,
    shares: Annotated[int, OfPipeline(min=1, help="Array tasks of pose and shard.")] = 8,
    pose_options: Annotated[str, OfPipeline(help="More options of pose.")] = "",
    shard_options: Annotated[str, OfPipeline(help="More options of shard.")] = "",
    dry_run: Annotated[bool, typer.Option(help="Print the exact command and batch file; queue nothing.")] = False,
    test_only: Annotated[bool, typer.Option(help="Ask Slurm when and where the job would run; queue nothing.")] = False,
    follow: Annotated[bool, typer.Option(help="Print the logs until the job ends; Ctrl-C leaves it running.")] = False,
) -> None:
    """Queue a job on a Slurm cluster, after checking here whatever can be checked.

    The same by hand: sbatch OPTIONS slurm/VERB.sbatch ARGUMENTS. docs/slurm.md explains it step by step.
    """
    place = {"mem": mem, "time": time, "partition": partition, "account": account, "qos": qos}
    place |= {"constraint": constraint, "exclude": exclude, "dependency": dependency}
    size = {"nodes": nodes, "gpus-per-node": gpus_per_node, "cpus-per-task": cpus_per_task}
    slurm.check_options({**place, **size, "array": array, "job-name": job_name})
    ranks = int(gpus_per_node.rpartition(":")[2]) if gpus_per_node else tasks_per_node
    tasks = ranks if verb in ("train", "evaluate", "pipeline") else tasks_per_node
    if tasks != 1:  # one is the default; said, it makes of LEAST-MOST nodes always LEAST
        size["ntasks-per-node"] = tasks
    if follow and (array or verb == "pipeline"):
        raise KeyreidError("--follow shows one job, this is several: tail -F the log that you want to see")
    config = _check(verb, arguments, nodes, ranks, array, waits=dependency is not None)
    arguments = [*arguments, *_of_training(verb, change or [])]
    if verb == "pipeline":
        if dataset is None or root is None or array:
            raise KeyreidError("a pipeline needs --dataset NAME and --root FOLDER, and --shares in place of --array")
        pose = [dataset, str(root), f"--out={keypoints}", *slurm.words(pose_options)] if keypoints else None
        shard = [dataset, str(root), f"--out={config.data.shards}", *slurm.words(shard_options)]
        shard += [f"--keypoints={keypoints}"] if keypoints else []
        jobs = _pipeline(pose, shard, arguments, str(config.run_dir), f"0-{shares - 1}", size)
    else:
        jobs = [Job(verb, arguments, {**size, "array": array, "job-name": job_name})]
    last = _hand_over(jobs, place, slurm.words(extra), container, dry_run, test_only)
    if follow and last:
        _follow(jobs[-1], last)


def _of_training(verb: Verb, change: list[str]) -> list[str]:
    if change and verb != "train":
        raise ConfigError("--change is for a training that resumes: keyreid submit train")
    return [f"--change={name}" for name in change]


def _check(verb: Verb, arguments: list[str], nodes: str | None, ranks: int | None, array: str | None, waits: bool):
    """The configuration; what would fail on the cluster is refused: it, or shards that no earlier job will make."""
    from keyreid.config import load_config
    from keyreid.shards.shard_set import ShardSet

    if verb in ("train", "pipeline"):
        if array:
            if not any(word.startswith("name=") and slurm.ARRAY_PLACEHOLDER in word for word in arguments):
                raise ConfigError("each task of an array is a run of its own: put %a into its name, as name=mars-%a")
            first = re.match(r"\d*", array)[0]
            arguments = [word.replace(slurm.ARRAY_PLACEHOLDER, first) for word in arguments]
        config = load_config(arguments[0], arguments[1:])
        for least, most in slurm.node_counts(nodes or "") if ranks else []:
            for count in range(least, most + 1):
                config.check_ranks(ranks, count)
    elif verb == "tune":  # its trials are trainings
        from keyreid.tuning.search import load_search

        config = load_search(Path(arguments[0]), [word for word in arguments[1:] if not word.startswith("-")])[1]
    else:
        return None
    if not waits and verb != "pipeline" and "://" not in config.data.shards:
        ShardSet.from_config(config.data)
    return config


def _pipeline(
    pose: list[str] | None, shard: list[str], train: list[str], run: str, array: str, size: dict[str, object]
) -> list[Job]:
    """The jobs from pictures to scores, in the order in which each waits for the one before."""
    cpus = {"cpus-per-task": size["cpus-per-task"]}
    one_gpu = {"gpus-per-node": "1" if size["gpus-per-node"] else None}
    return [
        *([Job("pose", pose, {"array": array, **one_gpu, **cpus})] if pose else []),
        Job("shard", shard, {"array": array, **cpus}),
        Job("shard", shard, cpus),  # checks that nothing is missing
        Job("train", train, size),
        Job("evaluate", [run], size),
    ]


def _hand_over(
    jobs: list[Job], options: dict[str, object], extra: list[str], container: str | None, dry_run: bool, test: bool
) -> str | None:
    """Queue the jobs, each after the one before, or print what would be; gives the id of the last one queued."""
    from keyreid.resources import shipped

    job_id = None
    for job in jobs:
        script = shipped(f"slurm/{job.verb}.sbatch")
        options = options | {"output": slurm.log_pattern(LOGS, job.verb, bool(job.options.get("array")))}
        submission = slurm.Submission(script, job.arguments, job.options | options, extra, container)
        if dry_run:
            print(f"{submission.shell_line()}\n\n# {script}\n{script.read_text()}")
            options["dependency"] = f"afterok:JOB_OF_{job.verb.upper()}"
        elif test:
            print(f"{job.verb}: {submission.test()}")
        else:
            LOGS.mkdir(parents=True, exist_ok=True)
            job_id = submission.submit()
            options["dependency"] = f"afterok:{job_id}"
            own, *of_rank = _logs(job, job_id)
            print(f"{job.verb}: job {job_id}, log {own}")
            for log in of_rank:
                print(f"  rank 0: tail -F {shlex.quote(str(log))}")
            print(f"  state: squeue --job {job_id}; end it: scancel {job_id}")
    return job_id


def _logs(job: Job, job_id: str) -> list[Path]:
    """The batch file's own log, and that of a training's rank 0."""
    from keyreid.config import load_config

    array = job.options.get("array")
    logs = [LOGS / f"{job.verb}-{job_id}{'_TASK' if array else ''}.log"]
    if job.verb == "train" and not array:
        words = [word for word in job.arguments if not word.startswith("--change=")]
        logs.append(load_config(words[0], words[1:]).run_dir / "slurm" / f"{job_id}-0.log")
    return logs


def _follow(job: Job, job_id: str) -> None:

    try:
        state = slurm.follow(job_id, _logs(job, job_id))
    except KeyboardInterrupt:
        print(f"\njob {job_id} keeps running; end it with scancel {job_id}")
        return
    print(f"job {job_id}: {state}")
    if state != "COMPLETED":
        raise typer.Exit(1)
