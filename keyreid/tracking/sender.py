"""A run's event log, and the threads that send it to sinks, so that training neither waits nor stops because of one.

The log has one JSON object a line, appended and never changed:
{"params": {KEY: TEXT}}                          {"metrics": {KEY: NUMBER}, "step": N, "time": MILLISECONDS}
{"artifact": PATH, "folder": FOLDER}             {"tag": [KEY, TEXT]}
{"provenance": {KEY: TEXT}} of each start        {"status": RUNNING, FINISHED, FAILED or KILLED}
"""

import json
import os
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from keyreid.files import replace_text

EVENTS = "events.jsonl"
RETRY_SECONDS = 10.0
FLUSH_SECONDS = 60.0
LAST_TRIES, LAST_WAIT_SECONDS = 4, 1.0  # when the run ends: others may hold SQLite for a moment
BATCH_EVENTS = 200
LINES_SENT = "sent"  # of a run of keyreid 0.1: the lines that MLflow has
Event = dict[str, Any]


class EventLog:
    """Appends events and reads them from any byte on, so that sending them costs what is new.

    Args:
        folder: created if absent. An earlier start's log is continued, without the half line of a killed process.

    Attributes:
        params: names of the parameters logged so far.
        last_step: of each metric logged so far.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / EVENTS
        self.params: set[str] = set()
        self.last_step: dict[str, int] = {}
        if not self.path.is_file():
            return
        whole = 0
        with self.path.open("rb") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    os.truncate(self.path, whole)
                    break
                whole += len(line)
                self._recall(json.loads(line))

    def append(self, event: Mapping[str, object]) -> None:
        """Write one event; OSError where the disk is full or the folder is gone."""
        self._recall(event)
        with self.path.open("a") as file:
            file.write(json.dumps(event) + "\n")

    def read(self, offset: int, limit: int) -> tuple[list[Event], int]:
        """At most `limit` events from byte `offset` on, and the offset of the next."""
        events: list[Event] = []
        if self.path.is_file():
            with self.path.open("rb") as file:
                file.seek(offset)
                while len(events) < limit and (line := file.readline()).endswith(b"\n"):
                    events.append(json.loads(line))
                    offset += len(line)
        return events, offset

    def _recall(self, event: Event) -> None:
        self.params.update(event.get("params", {}))
        for key in event.get("metrics", {}):
            self.last_step[key] = max(event["step"], self.last_step.get(key, -1))


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
        self._sink, self._log = sink, log
        self._sent = log.path.with_name(f"sent-{name}")
        lines = log.path.with_name(LINES_SENT)
        if self._sent.is_file():
            self._offset = int(self._sent.read_text())
        else:
            self._offset = log.read(0, int(lines.read_text()))[1] if name == "mlflow" and lines.is_file() else 0
        self._stop, self._new, self._warned = threading.Event(), threading.Event(), False
        self._thread = threading.Thread(target=self._send_all, name=name, daemon=True)
        self._thread.start()

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
            while (found := self._log.read(self._offset, BATCH_EVENTS))[0]:
                self._sink.send(found[0])
                replace_text(self._sent, str(found[1]))
                self._offset = found[1]
            self._warned = False
        except Exception as error:  # whatever a server, a driver or a network does must not end a training
            first_line = next(iter(str(error).splitlines()), "")[:200]
            self._warn(f"{self._sink}: {type(error).__name__}: {first_line}; trying again")
            return False
        return True

    def _warn(self, message: str) -> None:
        if not self._warned:
            print(f"warning: {message}", file=sys.stderr, flush=True)
        self._warned = True
