"""`keyreid submit`: what is refused before it is queued, what is queued exactly, and that nothing reaches a shell."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from slurm_cluster import REPOSITORY

from keyreid.cli import app
from keyreid.errors import KeyreidError

HOSTILE = [
    "a b",
    "it's",
    '"',
    "$(touch pwned)",
    "`touch pwned`",
    "; touch pwned",
    "two\nlines",
    "%j%%",
    "-x",
    "\\",
    "*",
    "",
]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "tiny.yaml", "model.dept=3"], "unknown key 'model.dept'; the nearest known one is 'model.depth'"),
        (["train", "tiny.yaml", "loss.alpha=2"], "loss.alpha: Input should be less than or equal to 1"),
        (["train", "nowhere.yaml"], "nowhere.yaml: No such file or directory"),
        (["train", "tiny.yaml", "data.shards=nowhere"], "nowhere/dataset.json: no dataset card"),
        (["train", "tiny.yaml", "--nodes=3"], "3 nodes x 1 ranks x 1 micro-batches do not divide the batch of 4 clips"),
        (
            ["train", "tiny.yaml", "--nodes=2-4"],
            "3 nodes x 1 ranks x 1 micro-batches do not divide the batch of 4 clips",
        ),
        (["train", "tiny.yaml", "--array=0-3"], "put %a into its name"),
        (["tune", "tiny.yaml"], "unknown key 'data'"),
        (["pipeline", "tiny.yaml"], "a pipeline needs --dataset NAME and --root FOLDER"),
        (["evaluate", "runs/tiny", "--gpus-per-node=many"], "--gpus-per-node many: a number, or TYPE:NUMBER"),
        (["evaluate", "runs/tiny", "--array=0-3", "--follow"], "--follow shows one job"),
    ],
)
def test_bad_input_is_refused_before_queueing(cluster, workspace, monkeypatch, words, message):
    monkeypatch.chdir(workspace)
    monkeypatch.setenv("SLURM_CONF", cluster.environment["SLURM_CONF"])
    with pytest.raises(KeyreidError, match=re.escape(message)):
        app(["submit", *words, "--tasks-per-node=1"], standalone_mode=False)
    assert cluster.run("squeue", "--noheader") == ""


def test_a_cluster_that_is_not_there_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(KeyreidError, match="sbatch not found: submit from a login node of the cluster"):
        app(["submit", "evaluate", "runs/tiny"], standalone_mode=False)


def test_a_folder_without_batch_files_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("KEYREID_HOME", str(tmp_path))
    message = f"{tmp_path}/slurm/evaluate.sbatch is missing: set KEYREID_HOME to a clone of keyreid"
    with pytest.raises(KeyreidError, match=re.escape(message)):
        app(["submit", "evaluate", "runs/tiny"], standalone_mode=False)


def test_slurm_says_when_it_would_run_or_that_it_never_can(cluster, keyreid):
    common = ["submit", "evaluate", "runs/tiny", "--test-only", "--gpus-per-node"]
    assert re.search(r"Job \d+ to start at .* on nodes", keyreid(*common, "2", "--nodes=2").stdout)
    result = keyreid(*common, "3", check=False)
    assert "sbatch refused" in result.stderr and "Requested node configuration is not available" in result.stderr
    assert cluster.run("squeue", "--noheader") == ""


def test_dry_run_prints_the_command_that_would_run(cluster, keyreid, tmp_path):
    options = ["--nodes=1-4", "--gpus-per-node=a100:8", "--cpus-per-task=9", "--mem=0", "--time=1-0", "--partition=p"]
    options += ["--account=a", "--qos=q", "--constraint=x&y", "--exclude=n[1-3]"]
    other = ["--array=0-3%2", "--dependency=afterok:7", "--extra=--nice=10 --comment='two words'", "--dry-run"]
    out = keyreid("submit", "evaluate", "runs/tiny", *options, *other, cwd=tmp_path).stdout
    script = REPOSITORY / "slurm" / "evaluate.sbatch"
    words = shlex.split(out.splitlines()[0])
    command = words[words.index("sbatch") :]
    expected = [*options, "--ntasks-per-node=8", "--array=0-3%2", "--dependency=afterok:7", "--kill-on-invalid-dep=yes"]
    expected += [f"--output={tmp_path}/runs/slurm/evaluate-%A_%a.log", "--nice=10", "--comment=two words"]
    assert command[:2] == ["sbatch", "--export=ALL"]
    assert sorted(command[2:-2]) == sorted(expected)
    assert command[-2:] == [str(script), "runs/tiny"]
    assert out.endswith(script.read_text() + "\n")
    assert not (tmp_path / "runs").exists()


@pytest.fixture
def recording_home(tmp_path) -> Path:
    """A clone with a hostile name, whose site.env writes down what a job sees and ends it."""
    home = tmp_path / "it's; $(touch pwned)\n%j"
    shutil.copytree(REPOSITORY / "slurm", home / "slurm")
    (home / "slurm" / "site.env").write_text(
        'printf "%s\\0" "$@" >arguments\n'
        'printf "%s\\0" "$KEYREID_HOME" "$KEYREID_CONTAINER" "$CUDA_VISIBLE_DEVICES" "$SLURM_JOB_NAME" >seen\n'
        "exit 0\n"
    )
    return home


def test_hostile_names_arrive_unchanged(cluster, keyreid, queued, tmp_path, recording_home):
    cwd = tmp_path / "work 'dir' $(touch pwned) %x"
    cwd.mkdir()
    for verb in ("pose", "shard", "evaluate"):
        name = f"{verb} $(touch pwned); 'x'"
        options = ["--gpus-per-node=2", f"--job-name={name}", "--container=$(touch pwned) i.sif"]
        result = keyreid(
            "submit",
            verb,
            *options,
            "--",
            *HOSTILE,
            cwd=cwd,
            KEYREID_HOME=str(recording_home),
            CUDA_VISIBLE_DEVICES="7",
        )
        assert cluster.wait(queued(result))["JobState"] == "COMPLETED"
        assert (cwd / "arguments").read_bytes().decode().split("\0")[:-1] == HOSTILE
        # The GPUs that were asked for, as Slurm hands them out.
        seen = (cwd / "seen").read_bytes().decode().split("\0")[:-1]
        assert seen == [str(recording_home), "$(touch pwned) i.sif", "0,1", name]
        assert list((cwd / "runs" / "slurm").glob(f"{verb}-*.log"))
    assert not list(tmp_path.rglob("pwned"))


def test_the_printed_command_does_the_same_in_a_shell(cluster, keyreid, tmp_path, recording_home):
    (tmp_path / "runs" / "slurm").mkdir(parents=True)
    out = keyreid("submit", "pose", "--dry-run", "--", *HOSTILE, cwd=tmp_path, KEYREID_HOME=str(recording_home)).stdout
    command = out[: out.index(f"\n\n# {recording_home}")]
    answer = cluster.run("bash", "-c", command, cwd=tmp_path)
    assert cluster.wait(answer.split()[-1])["JobState"] == "COMPLETED"
    assert (tmp_path / "arguments").read_bytes().decode().split("\0")[:-1] == HOSTILE


def test_a_job_in_a_container_starts_keyreid_inside(cluster, keyreid, queued, tmp_path):
    """Checks the command line that apptainer gets: a program of that name stands in PATH, Debian has no apptainer."""
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "apptainer").write_text('#!/bin/sh\nprintf "%s\\n" "$@" >apptainer_was_given\n')
    (programs / "apptainer").chmod(0o755)
    path = f"{programs}:{cluster.environment['PATH']}"
    result = keyreid(
        "submit",
        "pose",
        "--container",
        "/images/k.sif",
        "mars",
        "a b",
        cwd=tmp_path,
        PATH=path,
        KEYREID_CONTAINER_MOUNTS="/data",
    )
    assert cluster.wait(queued(result))["JobState"] == "COMPLETED"
    given = (tmp_path / "apptainer_was_given").read_text().splitlines()
    binds = f"{tmp_path},{REPOSITORY},/data"
    inside = ["keyreid", "pose", "mars", "a b", "--share", "0/1"]
    assert given == ["exec", "--bind", binds, "--pwd", str(tmp_path), "/images/k.sif", *inside]


def test_a_pipeline_waits_and_falls_with_its_first_failure(cluster, keyreid, queued, workspace):
    result = keyreid(
        "submit", "pipeline", "tiny.yaml", "--dataset=mars", "--root=nowhere", "--shares=2", "--tasks-per-node=1"
    )
    last = queued(result)
    names = re.findall(r"^(\w+): job (\d+)", result.stdout, re.MULTILINE)
    assert [name for name, _ in names] == ["shard", "shard", "train", "evaluate"]
    assert cluster.wait(last)["JobState"] == "CANCELLED"
    states = [cluster.job(job)["JobState"] for _, job in names]
    assert states == ["FAILED", "CANCELLED", "CANCELLED", "CANCELLED"]
    logs = list((workspace / "runs" / "slurm").glob(f"shard-{names[0][1]}_*.log"))
    assert len(logs) == 2
    assert all("error: nowhere" in log.read_text() for log in logs)


def test_a_pipeline_with_keypoints_begins_with_pose(cluster, keyreid, workspace):
    where = ["--dataset=mars", "--root=a b", "--keypoints=the poses", "--pose-options=--workers=0", "--shares=2"]
    out = keyreid(
        "submit", "pipeline", "tiny.yaml", *where, "--gpus-per-node=2", "--cpus-per-task=1", "--dry-run"
    ).stdout
    lines = [shlex.split(line) for line in out.splitlines() if " sbatch --export" in line]
    scripts = [next(word for word in words if word.endswith(".sbatch")) for words in lines]
    assert [Path(script).stem for script in scripts] == ["pose", "shard", "shard", "train", "evaluate"]
    assert lines[0][lines[0].index(scripts[0]) + 1 :] == ["mars", "a b", "--out=the poses", "--workers=0"]
    assert lines[1][-1] == "--keypoints=the poses"
    before = [next((word for word in words if word.startswith("--dependency=")), "") for words in lines]
    assert all("--cpus-per-task=1" in words for words in lines)  # or the batch files' own four would fill a node
    assert before[0] == "" and all(word.startswith("--dependency=afterok:JOB_OF_") for word in before[1:])


def test_following_ends_with_the_job_and_its_status(cluster, keyreid):
    # Submitted from inside another job, whose options must not leak into this one.
    outer = {"SLURM_NNODES": "2", "SLURM_JOB_ID": "1", "SLURM_NTASKS": "9"}
    result = keyreid("submit", "shard", "mars", "nowhere", "--follow", check=False, **outer)
    assert result.returncode == 1
    assert "share 0/1 of: keyreid shard mars nowhere" in result.stdout  # the job's own log
    job = re.search(r"^job (\d+): FAILED$", result.stdout, re.MULTILINE)[1]
    assert cluster.job(job)["NumNodes"] == "1"


@pytest.mark.parametrize("file", sorted((REPOSITORY / "slurm").glob("*.sbatch")), ids=lambda path: path.name)
def test_by_hand_outside_the_clone_says_what_to_do(cluster, file, tmp_path):
    log = tmp_path / "log"
    job = cluster.run("sbatch", "--parsable", f"--output={log}", "--array=0", file, "x", cwd=tmp_path).strip()
    assert cluster.wait(job)["JobState"] == "FAILED"
    assert "submit from the folder that holds slurm/, or set KEYREID_HOME" in log.read_text()


def test_scripts_are_valid_bash():
    for file in [*(REPOSITORY / "slurm").glob("*"), *(REPOSITORY / "launch").glob("*")]:
        subprocess.run(["bash", "-n", file], check=True)
