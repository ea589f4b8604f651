"""Slurm from the login node: what a submission is, handing it to `sbatch`, and following the job.

The batch files in slurm/ are the one description of how a job runs; nothing here writes a script. A submission is a
list of words that goes to `sbatch` as it is, without a shell in between.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from keyreid.errors import KeyreidError

ARRAY_PLACEHOLDER = "%a"  # in overrides: the number of the array task
FINAL_STATES = frozenset(
    ["COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE", "BOOT_FAIL", "PREEMPTED"]
)
CLIENT_VARIABLES = ("SLURM_CONF", "SLURM_CLUSTERS", "SLURM_TIME_FORMAT")
POLL_SECONDS = 1.0


@dataclass(frozen=True)
class Submission:
    """One call of `sbatch`.

    Attributes:
        script: the batch file.
        arguments: words for the batch file.
        options: words for sbatch, each `--name=value`.
        environment: variables added to the job's environment.
    """

    script: Path
    arguments: tuple[str, ...]
    options: tuple[str, ...]
    environment: Mapping[str, str]

    @property
    def command(self) -> list[str]:
        """The words of the call."""
        return ["sbatch", "--export=ALL", *self.options, str(self.script), *self.arguments]

    def shell_line(self) -> str:
        """The call as one would type it."""
        variables = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        return " ".join([*variables, shlex.join(self.command)])


def batch_file(verb: str) -> Path:
    """`slurm/VERB.sbatch`, in the clone that this package belongs to, or in the folder that KEYREID_HOME names.

    Raises:
        KeyreidError: there is none.
    """
    home = os.environ.get("KEYREID_HOME")
    folder = Path(home) if home else Path(__file__).resolve().parents[1]
    path = folder.absolute() / "slurm" / f"{verb}.sbatch"
    if not path.is_file():
        raise KeyreidError(
            f"{path} is missing: the batch files come with a clone of the repository, not with an installed package; "
            "install keyreid from a clone (pip install -e CLONE), or set KEYREID_HOME to one"
        )
    return path


def job_environment(script: Path, container: str | None = None) -> dict[str, str]:
    """Variables that make the job use the same keyreid as the submission does, or a container's."""
    environment = {"KEYREID_HOME": str(script.parents[1]), "KEYREID_BIN": str(Path(sys.executable).parent)}
    return environment | ({"KEYREID_CONTAINER": container} if container else {})


def log_pattern(folder: Path, verb: str, array: bool) -> str:
    """sbatch's file name pattern for the log of a job of this verb in `folder`."""
    if "\\" in str(folder):  # sbatch takes a backslash as the end of all replacements
        raise KeyreidError(f"{folder}: Slurm cannot write logs to a folder with a backslash in its name")
    escaped = str(folder.absolute()).replace("%", "%%")
    return f"{escaped}/{verb}-{'%A_%a' if array else '%j'}.log"


def test(submission: Submission) -> str:
    """What Slurm says it would do; nothing is queued.

    Raises:
        KeyreidError: the cluster can never run this.
    """
    words = submission.command
    return _sbatch([words[0], "--test-only", *words[1:]], submission.environment).stderr.strip()


def submit(submission: Submission) -> str:
    """Queue a job.

    Returns:
        Its id.

    Raises:
        KeyreidError: sbatch refused, with its words.
    """
    words = submission.command
    return _sbatch([words[0], "--parsable", *words[1:]], submission.environment).stdout.strip().split(";")[0]


def follow(job_id: str, logs: Sequence[Path]) -> str:
    """Print what is added to the logs until the job ends, through requeues.

    Returns:
        Its final state.
    """
    offsets = dict.fromkeys(logs, 0)
    while True:
        state = job_state(job_id)
        for log in logs:
            offsets[log] = _print_from(log, offsets[log])
        if state in FINAL_STATES:
            return state
        time.sleep(POLL_SECONDS)


def job_state(job_id: str) -> str:
    """RUNNING, PENDING, COMPLETED ...

    Raises:
        KeyreidError: Slurm does not know the job (any more).
    """
    result = _run(["scontrol", "show", "job", "-o", job_id])
    states = re.findall(r"\bJobState=([A-Z_]+)", result.stdout)
    if result.returncode or not states:
        raise KeyreidError(f"job {job_id}: {result.stderr.strip() or 'unknown to Slurm'}; `sacct -j {job_id}` may tell")
    return states[-1]


def _print_from(log: Path, offset: int) -> int:
    """Print the whole lines from `offset` on; gives where they end."""
    try:
        with log.open("rb") as file:
            file.seek(offset)
            text = file.read()
    except OSError:
        return offset
    whole = text[: text.rfind(b"\n") + 1]
    sys.stdout.write(whole.decode(errors="replace"))
    sys.stdout.flush()
    return offset + len(whole)


def _sbatch(words: list[str], environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    result = _run(words, environment)
    if result.returncode:
        raise KeyreidError(f"sbatch refused: {result.stderr.strip()}\nThe command was: {shlex.join(words)}")
    return result


def _run(words: list[str], environment: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    if shutil.which(words[0]) is None:
        raise KeyreidError(f"{words[0]} not found: submit from a login node of the cluster (--dry-run works anywhere)")
    # Inside a job, its own variables would be taken for options of the new one. SBATCH_* are the user's own defaults.
    inherited = {
        name: value for name, value in os.environ.items() if not name.startswith("SLURM_") or name in CLIENT_VARIABLES
    }
    return subprocess.run(
        words,
        env=inherited | dict(environment or {}),
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
    )
