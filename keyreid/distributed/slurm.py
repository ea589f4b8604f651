"""Slurm from the login node: what a submission is, handing it to `sbatch`, and following the job.

The batch files in slurm/ are the one description of how a job runs; nothing here writes a script. A submission is a
list of words that goes to `sbatch` as it is, without a shell in between.
"""

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
FINAL_STATES = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "PREEMPTED"}
FINAL_STATES |= {"NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE", "BOOT_FAIL"}
CLIENT_VARIABLES = {"SLURM_CONF", "SLURM_CLUSTERS", "SLURM_TIME_FORMAT"}
POLL_SECONDS = 1.0
MOST_NODES = 65_536  # more than Slurm itself can have
FORMS = {  # of sbatch's options: what would be refused there, or take for ever here
    "nodes": (r"[1-9]\d{0,5}(-[1-9]\d{0,5})?(,[1-9]\d{0,5}(-[1-9]\d{0,5})?)*", "2, 2-4 or 2,4"),
    "gpus-per-node": (r"([\w.-]+:)?[1-9]\d{0,3}", "a number, or TYPE:NUMBER"),
    "mem": (r"\d{1,12}[KMGTkmgt]?B?", "a number and K, M, G or T"),
    "time": (
        r"\d{1,8}(:\d{1,2}){0,2}|\d{1,5}-\d{1,2}(:\d{1,2}){0,2}|(?i:infinite|unlimited)",
        "30, 2:00:00 or 1-00:00:00",
    ),
    "array": (r"\d{1,8}(-\d{1,8}(:\d{1,8})?)?(,\d{1,8}(-\d{1,8}(:\d{1,8})?)?)*(%\d{1,8})?", "0-9, 1,3 or 0-9%2"),
}


@dataclass(frozen=True)
class Submission:
    """One call of `sbatch`."""

    script: Path  # the batch file, in the folder slurm/ of the keyreid that the job uses
    arguments: Sequence[str]  # for the batch file
    options: Mapping[str, object]  # of sbatch, by their long names; those that are None are left out
    extra: Sequence[str]  # more words for sbatch
    container: str | None  # image that the job runs in

    @property
    def command(self) -> list[str]:
        """The words of the call."""
        options = [f"--{name}={value}" for name, value in self.options.items() if value is not None]
        if self.options.get("dependency"):
            options.append("--kill-on-invalid-dep=yes")  # else a job whose predecessor failed waits for ever
        return ["sbatch", "--export=ALL", *options, *self.extra, str(self.script), *self.arguments]

    @property
    def environment(self) -> dict[str, str]:
        """Variables that make the job use the same keyreid as the submission does, or a container's."""
        own = {"KEYREID_HOME": str(self.script.parents[1]), "KEYREID_BIN": str(Path(sys.executable).parent)}
        return own | ({"KEYREID_CONTAINER": self.container} if self.container else {})

    def shell_line(self) -> str:
        """The call as one would type it."""
        return " ".join([*(f"{k}={shlex.quote(v)}" for k, v in self.environment.items()), shlex.join(self.command)])

    def test(self) -> str:
        """What Slurm says it would do, with nothing queued; KeyreidError where the cluster can never run it."""
        return self._call("--test-only").stderr.strip()

    def submit(self) -> str:
        """Queue the job; gives its id. KeyreidError, with sbatch's words, where it refuses."""
        return self._call("--parsable").stdout.strip().split(";")[0]

    def _call(self, option: str) -> subprocess.CompletedProcess[str]:
        words = ["sbatch", option, *self.command[1:]]
        result = _run(words, self.environment)
        if result.returncode:
            raise KeyreidError(f"sbatch refused: {result.stderr.strip()}\nThe command was: {shlex.join(words)}")
        return result


def check_options(options: Mapping[str, object]) -> None:
    """Raise KeyreidError for an option of sbatch that cannot be one."""
    for name, value in options.items():
        pattern, forms = FORMS.get(name, (r"[^\0-\x1f\x7f]{1,1000}", "one line of text"))
        if value is not None and not re.fullmatch(pattern, str(value), re.ASCII):
            raise KeyreidError(f"--{name} {str(value)[:80]}: {forms}")
    node_counts(str(options.get("nodes") or ""))


def node_counts(nodes: str) -> list[tuple[int, int]]:
    """Least and most of each range in `--nodes` that was checked: 2, 2-4, or 2,4 of newer Slurms."""
    counts = []
    for least, _, most in (word.partition("-") for word in nodes.split(",") if word):
        counts.append((int(least), int(most or least)))
        if not counts[-1][0] <= counts[-1][1] <= MOST_NODES:
            raise KeyreidError(f"--nodes {nodes}: LEAST-MOST, with at most {MOST_NODES} nodes")
    return counts


def words(options: str) -> list[str]:
    """Options in one string as a shell would split them; KeyreidError where a quote is open."""
    try:
        return shlex.split(options)
    except ValueError as error:
        raise KeyreidError(f"{options[:80]!r}: {error}") from None


def log_pattern(folder: Path, verb: str, array: bool) -> str:
    """sbatch's file name pattern for the log of a job of this verb in `folder`."""
    if "\\" in str(folder):  # sbatch takes a backslash as the end of all replacements
        raise KeyreidError(f"{folder}: Slurm cannot write logs to a folder with a backslash in its name")
    return f"{str(folder.absolute()).replace('%', '%%')}/{verb}-{'%A_%a' if array else '%j'}.log"


def follow(job_id: str, logs: Sequence[Path]) -> str:
    """Print what is added to the logs until the job ends, through requeues; gives its final state.

    Raises:
        KeyreidError: Slurm does not know the job (any more).
    """
    offsets = dict.fromkeys(logs, 0)
    while True:
        result = _run(["scontrol", "show", "job", "-o", job_id])
        states = re.findall(r"\bJobState=([A-Z_]+)", result.stdout)
        if result.returncode or not states:
            reason = result.stderr.strip() or "unknown to Slurm"
            raise KeyreidError(f"job {job_id}: {reason}; `sacct -j {job_id}` may tell")
        for log in logs:
            offsets[log] = _print_from(log, offsets[log])
        if states[-1] in FINAL_STATES:
            return states[-1]
        time.sleep(POLL_SECONDS)


def _print_from(log: Path, offset: int) -> int:
    """Print the whole lines from `offset` on; gives where they end."""
    try:
        with log.open("rb") as file:
            file.seek(offset)
            text = file.read()
    except OSError:
        return offset
    whole = text[: text.rfind(b"\n") + 1]
    print(whole.decode(errors="replace"), end="", flush=True)
    return offset + len(whole)


def _run(words: list[str], environment: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    if shutil.which(words[0]) is None:
        raise KeyreidError(f"{words[0]} not found: submit from a login node of the cluster (--dry-run works anywhere)")
    # Inside a job, its own variables would be taken for options of the new one. SBATCH_* are the user's own defaults.
    foreign = {name for name in os.environ if name.startswith("SLURM_")} - CLIENT_VARIABLES
    environment = {k: v for k, v in os.environ.items() if k not in foreign} | dict(environment or {})
    return subprocess.run(
        words, env=environment, capture_output=True, text=True, errors="replace", check=False, stdin=subprocess.DEVNULL
    )
