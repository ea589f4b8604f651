"""What a run tells others: an event log in its folder, and sinks that send the log on.

What is logged goes at once to `RUN/tracking/events.jsonl`; a thread for each sink sends it from there. While a server
cannot be reached, events stay in the file and are sent later, after a restart too. A metric of a step that was logged
before is not logged again, so a resumed run draws one curve.

Another tracker is a class in a new file with `send(events)` and `close()` (see sender.Sink), a line in `SINKS`, and its
name in `TrackingConfig.sinks`.
"""

import sys
import time
from collections.abc import Mapping
from pathlib import Path

from keyreid.config import TrackingConfig
from keyreid.tracking.mlflow_sink import RUN_ID, MlflowSink, created_run, store_uri
from keyreid.tracking.sender import EVENTS, Event, EventLog, Sender, Sink

__all__ = ["EVENTS", "RUN_ID", "SINKS", "TRACKING", "Event", "EventLog", "Sink", "Tracker", "store_uri"]

TRACKING = "tracking"
# Called with (config, output folder, folder of the event log, name of the run, tags).
SINKS = {"mlflow": MlflowSink}


class Tracker:
    """Tells of one run; a context manager that ends it. Its methods neither block nor raise.

    Args:
        output: where the embedded store lies.
        run_dir: this run's folder; the sinks' runs continue if the folder already has some.
        tags: of a new run.
        enabled: False on every rank but the first.
        status: that is logged now; None for a run that has ended, to send what is left: `Tracker(...).close(None)`.
    """

    def __init__(
        self,
        config: TrackingConfig,
        output: Path,
        run_dir: Path,
        name: str,
        tags: Mapping[str, str] | None = None,
        enabled: bool = True,
        status: str | None = "RUNNING",
    ) -> None:
        self._folder = run_dir / TRACKING
        self._open, self._warned = enabled, False
        self._senders: list[Sender] = []
        if enabled:
            self._log = EventLog(self._folder)
            self._append({"status": status})
            sinks = {sink: SINKS[sink](config, output, self._folder, name, tags or {}) for sink in config.sinks}
            self._senders = [Sender(sink, target, self._log) for sink, target in sinks.items()]

    @property
    def run_id(self) -> str | None:
        """The MLflow run, once it has been created."""
        return created_run(self._folder)

    @property
    def all_sent(self) -> bool:
        """Whether every sink has everything."""
        return not any(sender.unsent for sender in self._senders)

    def params(self, values: Mapping[str, object]) -> None:
        """Log parameters; those of an earlier start of the run stay as they are."""
        known = self._log.params if self._open else values
        self._append({"params": {key: str(value)[:6000] for key, value in values.items() if key not in known}})

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Log numbers of a step."""
        last = self._log.last_step if self._open else {}
        new = {key: float(value) for key, value in values.items() if step > last.get(key, -1)}
        self._append({"metrics": new, "step": step, "time": int(time.time() * 1000)})

    def again_from(self, step: int) -> None:
        """Log the steps after this one anew: another recipe takes them again."""
        if self._open:
            self._log.last_step = {key: min(last, step) for key, last in self._log.last_step.items()}

    def artifact(self, path: Path, folder: str = "") -> None:
        """Log a file or a whole folder."""
        self._append({"artifact": str(Path(path).resolve()), "folder": folder})

    def tag(self, key: str, value: str) -> None:
        """Set a tag."""
        self._append({"tag": [key, value]})

    def provenance(self, values: Mapping[str, str]) -> None:
        """Say who started the run, from what: `command`, `user`, `commit`, `version`."""
        self._append({"provenance": dict(values)})

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close("FINISHED" if kind is None else "FAILED")

    def close(self, status: str | None) -> None:
        """End the run with FINISHED, FAILED or KILLED (which may continue), and send what is left for a while."""
        self._append({"status": status})
        if self._open:
            self._open = False
            for sender in self._senders:
                sender.close()

    def _append(self, event: Event) -> None:
        """Log an event, unless there is nothing in it."""
        if not self._open or not next(iter(event.values())):
            return
        try:
            self._log.append(event)
        except OSError as error:  # a full disk stops the checkpoints, which say so; not this
            if not self._warned:
                print(f"warning: cannot write {self._log.path}: {error}", file=sys.stderr, flush=True)
            self._warned = True
        for sender in self._senders:
            sender.wake()
