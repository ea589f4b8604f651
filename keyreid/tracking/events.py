"""The event log of a run: what it tells, one JSON object a line, appended and never changed.

{"params": {KEY: TEXT}}                          {"metrics": {KEY: NUMBER}, "step": N, "time": MILLISECONDS}
{"artifact": PATH, "folder": FOLDER}             {"tag": [KEY, TEXT]}
{"provenance": {KEY: TEXT}} of each start        {"status": RUNNING, FINISHED, FAILED or KILLED}
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

EVENTS = "events.jsonl"
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
