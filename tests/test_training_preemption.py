"""Stop signals as a training hears them."""

import os
import signal
import subprocess
import sys

import pytest

from keyreid.distributed.preemption import StopRequest


def test_usr2_may_be_repeated_until_the_process_ends():
    before = signal.getsignal(signal.SIGUSR2)
    with StopRequest() as stop:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGUSR2)
    os.kill(os.getpid(), signal.SIGUSR2)
    signal.signal(signal.SIGUSR2, before)
    assert stop.signal == signal.SIGUSR2


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_of_another_kind_ends_at_once(second):
    program = (
        "import os, signal\n"
        "from keyreid.distributed.preemption import StopRequest\n"
        "with StopRequest():\n"
        "    os.kill(os.getpid(), signal.SIGUSR2)\n"
        f"    os.kill(os.getpid(), {int(second)})\n"
        "    print('went on')\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (128 + second, ""), result.stderr
