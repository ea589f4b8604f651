"""Start the ranks of a run on this machine, and end all of them when one fails.

torchrun, deepspeed and srun start ranks themselves; this is for `keyreid train` alone. It passes stop signals on, so
that a run saves and ends in order, which torch's own elastic agent does not wait for.
"""

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from keyreid.distributed.preemption import STOP_SIGNALS
from keyreid.distributed.ranks import position

MODULE = [sys.executable, "-m", "keyreid.cli"]  # what a rank runs
POLL_SECONDS = 0.1
GRACE_SECONDS = 10.0  # for the ranks that are left after one failed
PR_SET_PDEATHSIG = 1


def default_ranks() -> int:
    """A rank for each visible GPU, one where there is none."""
    import torch

    return max(1, torch.cuda.device_count())


def is_launched() -> bool:
    """Whether a launcher started this process as one of several ranks."""
    return position()[1] > 1


def run_ranks(ranks: int, log_dir: Path, arguments: Sequence[str] | None = None) -> int:
    """Run `keyreid ARGUMENTS` (by default this process's own) as `ranks` processes until all have ended.

    The first rank writes to this terminal, the others to `LOG_DIR/rank-N.log`.

    Returns:
        0 when all ranks returned 0, else the status of the one that failed first.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    log_dir.mkdir(parents=True, exist_ok=True)
    port = free_port()
    processes = [_start(arguments, rank, ranks, port, log_dir) for rank in range(ranks)]
    previous = {number: signal.signal(number, lambda n, _: _pass_on(processes, n)) for number in STOP_SIGNALS}
    try:
        while None in (states := [process.poll() for process in processes]) and not any(states):
            time.sleep(POLL_SECONDS)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        _end(processes)
    failed, status = next(((rank, state) for rank, state in enumerate(states) if state), (None, 0))
    if failed is None:
        return 0
    reason = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
    lines = [f"error: rank {failed} {reason}; the others were ended"]
    log = log_dir / f"rank-{failed}.log"
    if failed and log.is_file():
        tail = log.read_text(errors="replace").splitlines()
        start = max((i for i, line in enumerate(tail) if line.startswith("Traceback")), default=max(0, len(tail) - 30))
        lines += [f"--- {log}", *tail[start:]]
    print(*lines, sep="\n", file=sys.stderr, flush=True)
    return status if status > 0 else 128 - status


def free_port(address: str = "127.0.0.1") -> int:
    """A port of this machine that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind((address, 0))
        return probe.getsockname()[1]


def _start(arguments: Sequence[str], rank: int, ranks: int, port: int, log_dir: Path) -> subprocess.Popen:
    environment = os.environ | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    # Ranks share the cores; by default each would start a thread for every core.
    environment.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // ranks)))
    with contextlib.nullcontext() if rank == 0 else (log_dir / f"rank-{rank}.log").open("ab") as output:
        return subprocess.Popen(
            [*MODULE, *arguments],
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT if output else None,
            stdin=subprocess.DEVNULL,
            preexec_fn=_die_with_parent,
            start_new_session=True,  # Ctrl-C reaches the ranks once, through us
        )


def _die_with_parent() -> None:
    """In the child, on Linux: be killed when the launcher is, so that no rank outlives it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _pass_on(processes: Sequence[subprocess.Popen], number: int) -> None:
    for process in processes:
        if process.poll() is None:
            process.send_signal(number)


def _end(processes: Sequence[subprocess.Popen]) -> None:
    """End what still runs: a word first, so that tracking can close, then by force."""
    _pass_on(processes, signal.SIGTERM)
    deadline = time.monotonic() + GRACE_SECONDS
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
