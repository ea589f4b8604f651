"""Ranks on one machine: one that fails ends all, and stop signals reach every one."""

import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

LAUNCH = """
import sys
from pathlib import Path
from keyreid.distributed import launch
launch.MODULE = [sys.executable, "-c", Path(sys.argv[1]).read_text()]
sys.exit(launch.run_ranks(2, Path(sys.argv[2]), []))
"""


@pytest.fixture
def run(tmp_path):
    """Start two ranks of a script; gives the launcher's process and its folder."""
    started = []

    def start(script):
        (tmp_path / "rank.py").write_text(
            "import os, sys, time, signal\nrank = int(os.environ['RANK'])\n" + textwrap.dedent(script)
        )
        command = [sys.executable, "-c", LAUNCH, str(tmp_path / "rank.py"), str(tmp_path)]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


def test_ranks_know_their_place(run):
    process = run("print([os.environ[k] for k in ('RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'MASTER_ADDR')])")
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 0
    assert "['0', '0', '2', '127.0.0.1']" in output


def test_a_failing_rank_ends_the_others_and_shows_its_traceback(run):
    start = time.monotonic()
    output, _ = run("if rank == 1: raise RuntimeError('tracklet 7 is broken')\ntime.sleep(600)").communicate(timeout=60)
    assert time.monotonic() - start < 20
    assert "error: rank 1 ended with status 1" in output
    assert "RuntimeError: tracklet 7 is broken" in output


def test_the_status_is_the_failing_ranks(run):
    process = run("sys.exit(3 if rank == 1 else 0)")
    process.communicate(timeout=30)
    assert process.returncode == 3


def test_a_killed_rank_is_named(run):
    process = run("if rank == 1: os.kill(os.getpid(), signal.SIGKILL)\ntime.sleep(600)")
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGKILL
    assert "rank 1 was killed by SIGKILL" in output


def test_a_stop_signal_reaches_all_ranks_which_end_in_order(run, tmp_path):
    process = run(f"""
        def stop(*_):
            open('{tmp_path}/stopped-%d' % rank, 'w').close()
            sys.exit(0)
        signal.signal(signal.SIGUSR2, stop)
        open('{tmp_path}/ready-%d' % rank, 'w').close()
        time.sleep(600)
    """)
    while len(list(tmp_path.glob("ready-*"))) < 2:
        time.sleep(0.05)
    process.send_signal(signal.SIGUSR2)
    process.communicate(timeout=30)
    assert process.returncode == 0
    assert len(list(tmp_path.glob("stopped-*"))) == 2


def test_no_rank_outlives_a_killed_launcher(run, tmp_path):
    process = run(f"open('{tmp_path}/pid-%d' % os.getpid(), 'w').close()\ntime.sleep(600)")
    while len(list(tmp_path.glob("pid-*"))) < 2:
        time.sleep(0.05)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 10
    pids = [int(path.name[4:]) for path in tmp_path.glob("pid-*")]
    while any(_alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(_alive(pid) for pid in pids)


def _alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
