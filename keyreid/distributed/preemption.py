"""Stop signals: the first asks training to save and end after the current step, the second ends it at once.

USR2 may come any number of times: Slurm can lose one that it is to pass on to ranks that just start, so the batch file
repeats it.
"""

import os
import signal
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)


class StopRequest:
    """Remembers that a stop signal came; a context that puts the old handlers back (but after USR2, for USR2)."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "StopRequest":
        for number in STOP_SIGNALS:
            self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        if self.signal == signal.SIGUSR2:
            signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # repeated while the process ends

    def ask(self, number: int) -> None:
        """As if the signal had come; for threads, which hear none."""
        self.signal = signal.Signals(number)

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        if self.signal is not None and number != signal.SIGUSR2:
            os._exit(128 + number)
        self.ask(number)
