"""Any input gives a result or an error, within seconds; the profile of hypothesis (tests/conftest.py) says how many."""

import signal
from collections.abc import Callable

from hypothesis import given
from hypothesis import strategies as st

SECONDS = 10  # of the processor for one input: a busy machine takes none away


def fuzz(check: Callable[..., None], *inputs: st.SearchStrategy) -> None:
    """Give the check what the strategies draw."""

    def limited(*drawn: object) -> None:
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        try:
            check(*drawn)
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)

    def stop(*_: object) -> None:
        raise AssertionError(f"one input took more than {SECONDS} s")

    before = signal.signal(signal.SIGPROF, stop)
    try:
        given(st.tuples(*inputs))(lambda drawn: limited(*drawn))()
    finally:
        signal.signal(signal.SIGPROF, before)
