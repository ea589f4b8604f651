"""MLflow, such that a training never waits for it and never stops because of it.

What is logged goes at once to `RUN/tracking/events.jsonl`; a thread sends it on. While the server cannot be reached,
events stay in the file and are sent later, after a restart too. A metric of a step that was logged before is not
logged again, so a run that goes on from a checkpoint draws one curve.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from keyreid.config import TrackingConfig
from keyreid.files import replace_text

RETRY_SECONDS = 10.0
FLUSH_SECONDS = 60.0
LAST_TRIES, LAST_WAIT_SECONDS = 4, 1.0  # when the run ends: others may hold SQLite for a moment
TRACKING, EVENTS, SENT, RUN_ID = "tracking", "events.jsonl", "sent", "run_id"
BATCH_EVENTS = 200

# Nothing is reported to MLflow's makers, and a dead server is noticed in seconds, not after minutes of retries.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "ERROR")  # not how it makes its tables
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")


def store_uri(config: TrackingConfig, output: Path) -> str:
    """The tracking server or store of a configuration: SQLite in the output folder unless it names another."""
    return config.uri or f"sqlite:///{(output / 'mlflow.db').resolve()}"


class Tracker:
    """One MLflow run; a context manager that ends it. Its methods neither block nor raise.

    Args:
        config: server and experiment.
        output: where the embedded store lies.
        run_dir: this run's folder; the MLflow run goes on if the folder already has one.
        name: the run's name in MLflow.
        tags: MLflow tags of a new run (`mlflow.parentRunId` makes it a child).
        enabled: False on every rank but the first.
    """

    def __init__(
        self,
        config: TrackingConfig,
        output: Path,
        run_dir: Path,
        name: str,
        tags: Mapping[str, str] | None = None,
        enabled: bool = True,
    ) -> None:
        self._config = config
        self._output = output
        self._name = name
        self._tags = dict(tags or {})
        self._folder = run_dir / TRACKING
        self._enabled = enabled
        self._last_step: dict[str, int] = {}
        self._params: set[str] = set()
        self._stop = threading.Event()
        self._new = threading.Event()
        self._warned = False
        if enabled:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._remember_earlier_events()
            self._append({"status": "RUNNING"})
            self._thread = threading.Thread(target=self._send_all, name="mlflow", daemon=True)
            self._thread.start()

    @property
    def uri(self) -> str:
        """The store that runs are sent to."""
        return store_uri(self._config, self._output)

    @property
    def run_id(self) -> str | None:
        """The MLflow run, once it has been created."""
        path = self._folder / RUN_ID
        return path.read_text().strip() if path.is_file() else None

    @property
    def all_sent(self) -> bool:
        """Whether MLflow has everything."""
        return not self._unsent()

    def params(self, values: Mapping[str, object]) -> None:
        """Log parameters; those of an earlier start of the run stay as they are."""
        new = {key: str(value)[:6000] for key, value in values.items() if key not in self._params}
        self._params.update(new)
        if new:
            self._append({"params": new})

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Log numbers of a step."""
        new = {key: float(value) for key, value in values.items() if step > self._last_step.get(key, -1)}
        self._last_step.update(dict.fromkeys(new, step))
        if new:
            self._append({"metrics": new, "step": step, "time": int(time.time() * 1000)})

    def artifact(self, path: Path, folder: str = "") -> None:
        """Log a file or a whole folder."""
        self._append({"artifact": str(Path(path).resolve()), "folder": folder})

    def tag(self, key: str, value: str) -> None:
        """Set a tag."""
        self._append({"tag": [key, value]})

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.close("FINISHED" if kind is None else "FAILED")

    def close(self, status: str) -> None:
        """End the run with FINISHED, FAILED or KILLED (which may go on), and send what is left for a while."""
        if not self._enabled or self._stop.is_set():
            return
        self._append({"status": status})
        self._stop.set()
        self._new.set()
        self._thread.join(FLUSH_SECONDS)
        left = self._unsent()
        if left:
            self._warn(f"{len(left)} events are kept in {self._folder / EVENTS} and sent when the run is started again")

    def _append(self, event: Mapping[str, object]) -> None:
        if not self._enabled:
            return
        try:
            with (self._folder / EVENTS).open("a") as file:
                file.write(json.dumps(event) + "\n")
        except OSError as error:  # a full disk stops the checkpoints, which say so; not this
            self._warn(f"cannot write {self._folder / EVENTS}: {error}")
        self._new.set()

    def _remember_earlier_events(self) -> None:
        path = self._folder / EVENTS
        if not path.is_file():
            return
        text = path.read_text()
        whole = text[: text.rfind("\n") + 1]  # a killed process may leave half a line
        if whole != text:
            replace_text(path, whole)
        for line in whole.splitlines():
            event = json.loads(line)
            self._params.update(event.get("params", {}))
            for key in event.get("metrics", {}):
                self._last_step[key] = max(event["step"], self._last_step.get(key, -1))

    def _unsent(self) -> list[str]:
        sent = self._folder / SENT
        done = int(sent.read_text()) if sent.is_file() else 0
        path = self._folder / EVENTS
        return path.read_text().splitlines()[done:] if path.is_file() else []

    def _send_all(self) -> None:
        """The thread: send what is new; after a failure, wait and try again."""
        client = monitor = None
        tries_left = LAST_TRIES
        while True:
            self._new.clear()
            stopping = self._stop.is_set()
            try:
                client = client or self._connect()
                monitor = monitor or self._monitor()
                while lines := self._unsent()[:BATCH_EVENTS]:
                    self._send(client, [json.loads(line) for line in lines])
                    sent = self._folder / SENT
                    done = int(sent.read_text()) if sent.is_file() else 0
                    replace_text(sent, str(done + len(lines)))
                self._warned = False
            except Exception as error:  # whatever a server, a driver or a network does must not end a training
                self._warn(
                    f"MLflow at {self.uri}: {type(error).__name__}: {str(error).splitlines()[0][:200]}; trying again"
                )
                if not stopping:
                    self._stop.wait(RETRY_SECONDS)
                    continue
                tries_left -= 1
                if tries_left:
                    time.sleep(LAST_WAIT_SECONDS)
                    continue
            if stopping:
                if monitor:
                    monitor.finish()
                return
            self._new.wait()

    def _connect(self):
        import mlflow
        from mlflow.entities import Experiment

        if self.uri.startswith("sqlite:///"):
            Path(self.uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
        client = mlflow.MlflowClient(tracking_uri=self.uri)
        if self.run_id is None:
            experiment: Experiment | None = client.get_experiment_by_name(self._config.experiment)
            if experiment is None:
                # The server chooses where a remote store keeps artifacts; the embedded one keeps them beside itself.
                local = None if self._config.uri else (self._output / "mlartifacts").resolve().as_uri()
                experiment_id = client.create_experiment(self._config.experiment, artifact_location=local)
            else:
                experiment_id = experiment.experiment_id
            run = client.create_run(experiment_id, tags=self._tags, run_name=self._name)
            replace_text(self._folder / RUN_ID, run.info.run_id)
        return client

    def _monitor(self):
        if not self._config.system_metrics:
            return None
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        monitor = SystemMetricsMonitor(self.run_id, resume_logging=True, tracking_uri=self.uri)
        monitor.start()
        return monitor

    def _send(self, client, events: list[dict]) -> None:
        from mlflow.entities import Metric, Param

        run_id = self.run_id
        metrics = [
            Metric(key, value, event["time"], event["step"])
            for event in events
            for key, value in event.get("metrics", {}).items()
        ]
        params = [Param(key, value) for event in events for key, value in event.get("params", {}).items()]
        for start in range(0, len(metrics), 1000):
            client.log_batch(run_id, metrics=metrics[start : start + 1000])
        for start in range(0, len(params), 100):
            client.log_batch(run_id, params=params[start : start + 100])
        for event in events:
            if "artifact" in event and Path(event["artifact"]).exists():
                log = client.log_artifacts if Path(event["artifact"]).is_dir() else client.log_artifact
                log(run_id, event["artifact"], event["folder"] or None)
            elif "tag" in event:
                client.set_tag(run_id, *event["tag"])
            elif event.get("status") == "RUNNING":
                client.update_run(run_id, status="RUNNING")
            elif "status" in event:
                client.set_terminated(run_id, event["status"])

    def _warn(self, message: str) -> None:
        if not self._warned:
            print(f"warning: {message}", file=sys.stderr, flush=True)
        self._warned = True
