"""A thread that sends a run's events to one sink, so that training neither waits for it nor stops because of it."""

import sys
import threading
import time
from typing import Protocol

from keyreid.files import replace_text
from keyreid.tracking.events import Event, EventLog

RETRY_SECONDS = 10.0
FLUSH_SECONDS = 60.0
LAST_TRIES, LAST_WAIT_SECONDS = 4, 1.0  # when the run ends: others may hold SQLite for a moment
BATCH_EVENTS = 200
LINES_SENT = "sent"  # of a run of keyreid 0.1: the lines that MLflow has


class Sink(Protocol):
    """Where events go: a server, a file. `str()` names it in warnings; it connects when it first sends."""

    def send(self, events: list[Event]) -> None:
        """Take events in their order; after an exception of any kind the same ones come again, later."""

    def close(self) -> None:
        """Called in the end, by the thread that sends."""


class Sender:
    """Sends what the log holds and the sink has not, from where an earlier start of the run ended.

    Args:
        name: of the sink; `sent-NAME` beside the log remembers the byte up to which it has all.
    """

    def __init__(self, name: str, sink: Sink, log: EventLog) -> None:
        self._sink = sink
        self._log = log
        self._sent = log.path.with_name(f"sent-{name}")
        self._offset = self._first_offset(name)
        self._stop = threading.Event()
        self._new = threading.Event()
        self._warned = False
        self._thread = threading.Thread(target=self._send_all, name=name, daemon=True)
        self._thread.start()

    def _first_offset(self, name: str) -> int:
        lines = self._log.path.with_name(LINES_SENT)
        if self._sent.is_file():
            return int(self._sent.read_text())
        return self._log.read(0, int(lines.read_text()))[1] if name == "mlflow" and lines.is_file() else 0

    @property
    def unsent(self) -> int:
        """Events that the sink does not have yet."""
        return len(self._log.read(self._offset, sys.maxsize)[0])

    def wake(self) -> None:
        """The log has something new."""
        self._new.set()

    def close(self) -> None:
        """Send what is left, for a while."""
        self._stop.set()
        self._new.set()
        self._thread.join(FLUSH_SECONDS)
        if left := self.unsent:
            self._warn(f"{self._sink}: {left} events are kept in {self._log.path} and sent at the run's next start")

    def _send_all(self) -> None:
        """The thread: send what is new; after a failure, wait and try again."""
        tries_left = LAST_TRIES
        while True:
            self._new.clear()
            stopping = self._stop.is_set()
            sent = self._try_to_send()
            if not stopping:
                self._new.wait() if sent else self._stop.wait(RETRY_SECONDS)
                continue
            tries_left -= 1
            if sent or not tries_left:
                break
            time.sleep(LAST_WAIT_SECONDS)
        self._sink.close()

    def _try_to_send(self) -> bool:
        try:
            self._send_new()
            self._warned = False
        except Exception as error:  # whatever a server, a driver or a network does must not end a training
            first_line = next(iter(str(error).splitlines()), "")[:200]
            self._warn(f"{self._sink}: {type(error).__name__}: {first_line}; trying again")
            return False
        return True

    def _send_new(self) -> None:
        while True:
            events, offset = self._log.read(self._offset, BATCH_EVENTS)
            if not events:
                return
            self._sink.send(events)
            replace_text(self._sent, str(offset))
            self._offset = offset

    def _warn(self, message: str) -> None:
        if not self._warned:
            print(f"warning: {message}", file=sys.stderr, flush=True)
        self._warned = True
