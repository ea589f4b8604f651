"""A run's event log, and the threads that send it to sinks, so that training neither waits nor stops because of one.

The log has one JSON object a line, appended and never changed:
{"params": {KEY: TEXT}}                          {"metrics": {KEY: NUMBER}, "step": N, "time": MILLISECONDS}
{"artifact": PATH, "folder": FOLDER}             {"tag": [KEY, TEXT]}
{"provenance": {KEY: TEXT}} of each start        {"status": RUNNING, FINISHED, FAILED or KILLED}
"""

import json
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from keyreid.files import replace_text

EVENTS = "events.jsonl"
RETRY_SECONDS, LONGEST_RETRY_SECONDS = 10.0, 320.0  # doubled after each failure in a row
FLUSH_SECONDS = 60.0
LAST_TRIES, LAST_WAIT_SECONDS = 4, 1.0  # when the run ends: others may hold SQLite for a moment
BATCH_EVENTS = 200
LINES_SENT = "sent"  # of a run of keyreid 0.1: the lines that MLflow has
Event = dict[str, Any]


class EventLog:
    """Appends events and reads them from any byte on, so that sending them costs what is new.

    Args:
        folder: created if absent. An earlier start's log is continued. Lines that are no events, as a full disk or a
            killed process leaves them, are skipped and counted.

    Attributes:
        params: names of the parameters logged so far.
        last_step: of each metric logged so far.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / EVENTS
        self.params: set[str] = set()
        self.last_step: dict[str, int] = {}
        self._torn, damaged = False, 0
        if not self.path.is_file():
            return
        with self.path.open("rb") as file:
            for line in file:
                self._torn = not line.endswith(b"\n")
                if event := _event(line):
                    self._recall(event)
                else:
                    damaged += 1
        if damaged:
            print(f"warning: {self.path}: {damaged} damaged lines are skipped", file=sys.stderr, flush=True)

    def append(self, event: Mapping[str, object]) -> None:
        """Write one event; OSError where the disk is full or the folder is gone."""
        self._recall(event)
        torn, self._torn = self._torn, True
        with self.path.open("a") as file:
            file.write("\n" * torn + json.dumps(event) + "\n")
        self._torn = False

    def read(self, offset: int, limit: int) -> tuple[list[Event], int]:
        """At most `limit` events from byte `offset` on, and the offset of the next."""
        events: list[Event] = []
        if self.path.is_file():
            with self.path.open("rb") as file:
                file.seek(offset)
                while len(events) < limit and (line := file.readline()).endswith(b"\n"):
                    events += [event] if (event := _event(line)) else []
                    offset += len(line)
        return events, offset

    def _recall(self, event: Event) -> None:
        self.params.update(event.get("params", {}))
        for key in event.get("metrics", {}):
            self.last_step[key] = max(event["step"], self.last_step.get(key, -1))


def _event(line: bytes) -> Event | None:
    """The event of a line, None where there is none."""
    try:
        event = json.loads(line.strip(b"\0\r\n "))
    except (ValueError, RecursionError):
        return None
    match event:
        case {"metrics": dict(values), "step": int(step), "time": int(moment)}:
            fine = all(isinstance(value, float) for value in values.values()) and max(abs(step), abs(moment)) < 2**63
        case {"params": dict(texts)} | {"provenance": dict(texts)}:
            fine = all(isinstance(text, str) for text in texts.values())
        case {"artifact": str(), "folder": str()} | {"tag": [str(), str()]} | {"status": str()}:
            fine = True
        case _:
            fine = False
    return event if fine else None


class Sink(Protocol):
    """Where events go: a server, a file. `str()` names it in warnings; it connects when it first sends."""

    def send(self, events: list[Event]) -> bool | None:
        """Take events in their order; after an exception of any kind the same ones come again, later.

        True: it has nothing of this run (any more), and took nothing now: all come, from the log's first.
        """

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
        self._offset = self._known_offset(log.path.with_name(LINES_SENT) if name == "mlflow" else None)
        self._stop, self._new, self._warned = threading.Event(), threading.Event(), False
        self._thread = threading.Thread(target=self._send_all, name=name, daemon=True)
        self._thread.start()

    def _known_offset(self, lines: Path | None) -> int:
        """Where an earlier start ended; the log's begin where that cannot be known, for MLflow takes nothing twice."""
        try:
            if lines and lines.is_file() and not self._sent.is_file():
                return self._log.read(0, int(lines.read_text()))[1]
            offset = int(self._sent.read_text())
            with self._log.path.open("rb") as log:
                log.seek(offset - 1)
                return offset if log.read(1) == b"\n" else 0
        except (OSError, ValueError):
            return 0

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
            self._warned = False
            self._warn(f"{self._sink}: {left} events are unsent; the run's next start sends them ({self._log.path})")

    def _send_all(self) -> None:
        """The thread: send what is new; after a failure, wait and try again."""
        tries_left, wait = LAST_TRIES, RETRY_SECONDS
        while True:
            self._new.clear()
            stopping = self._stop.is_set()
            sent = self._try_to_send()
            if not stopping:
                self._new.wait() if sent else self._stop.wait(wait)
                wait = RETRY_SECONDS if sent else min(2 * wait, LONGEST_RETRY_SECONDS)
                continue
            tries_left -= 1
            if sent or not tries_left:
                break
            time.sleep(LAST_WAIT_SECONDS)
        self._sink.close()

    def _try_to_send(self) -> bool:
        try:
            while (found := self._log.read(self._offset, BATCH_EVENTS))[0]:
                after = 0 if self._sink.send(found[0]) else found[1]
                replace_text(self._sent, str(after))
                self._offset = after
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
