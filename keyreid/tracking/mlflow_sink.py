"""MLflow as a sink: one MLflow run for each run folder, the same one after a restart."""

import json
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path

from keyreid.config import TrackingConfig
from keyreid.files import replace_text
from keyreid.tracking.sender import Event

RUN_ID = "run_id"
REPLACES = "keyreid.replaces"  # tag of a run: the one that was lost, of which it has everything
NONSENSE = "an answer that is not MLflow's"
# What MLflow's pages show of a run's provenance, and under which name MLflow looks for it
PROVENANCE_TAGS = {
    "command": "mlflow.source.name",
    "source_type": "mlflow.source.type",
    "commit": "mlflow.source.git.commit",
    "user": "mlflow.user",
    "version": "keyreid.version",
}

# Nothing is reported to MLflow's makers, and a dead server is noticed in seconds, not after minutes of retries.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "ERROR")  # not how it makes its tables
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")


def created_run(folder: Path) -> str | None:
    """The MLflow run of an event log's folder, once it has been created."""
    path = folder / RUN_ID
    text = path.read_text(errors="replace").strip() if path.is_file() else ""
    return text if re.fullmatch(r"[\w-]+", text) else None


def store_uri(config: TrackingConfig, output: Path) -> str:
    """The tracking server or store of a configuration: SQLite in the output folder unless it names another."""
    return config.uri or f"sqlite:///{(output / 'mlflow.db').resolve()}"


class MlflowSink:
    """Sends events to an MLflow server or store.

    Args:
        output: where the embedded store lies.
        folder: of the event log; remembers the MLflow run.
        tags: of a new run (`mlflow.parentRunId` makes it a child).
    """

    def __init__(self, config: TrackingConfig, output: Path, folder: Path, name: str, tags: Mapping[str, str]) -> None:
        self._config, self._output, self._name, self._tags = config, output, name, dict(tags)
        self._folder, self._run_id = folder, created_run(folder)
        self._uri = store_uri(config, output)
        self._file = Path(self._uri[10:].split("?")[0]) if self._uri.startswith("sqlite:///") else None
        self._client = self._monitor = None
        self._created, self._refused = False, []

    def __str__(self) -> str:
        return f"MLflow at {self._uri}"

    def send(self, events: list[Event]) -> bool:
        """See Sink."""
        self._client = self._client or self._connect()
        if not (self._run_id and self._finds_run()):
            self._monitor = self._monitor and self._monitor.finish()
            self._create_run()
            return True
        self._monitor = self._monitor or self._start_monitor()
        self._send([event if "artifact" in event else _unicode(event) for event in events])
        return False

    def _send(self, events: list[Event]) -> None:
        from mlflow.entities import Metric, Param
        from mlflow.exceptions import MlflowException

        numbers = [(event, *metric) for event in events for metric in event.get("metrics", {}).items()]
        metrics = [Metric(key, value, event["time"], event["step"]) for event, key, value in numbers]
        params = [Param(key, value) for event in events for key, value in event.get("params", {}).items()]
        try:
            for start in range(0, len(metrics), 1000):
                self._client.log_batch(self._run_id, metrics=metrics[start : start + 1000])
            for start in range(0, len(params), 100):
                self._client.log_batch(self._run_id, params=params[start : start + 100])
            for event in events:
                self._send_single(event)
        except MlflowException as error:
            if error.error_code != "INVALID_PARAMETER_VALUE":
                raise
            pieces = _pieces(events)  # what is refused would hold back all that comes after it
            for piece in pieces:
                self._send(piece)
            if not pieces:
                self._refused.append(f"{json.dumps(events[0])[:200]}: {str(error)[:200]}")

    def close(self) -> None:
        """Stop measuring the machine."""
        if self._monitor:
            self._monitor.finish()
        if self._refused:
            said = f"warning: {self} refused {len(self._refused)} events, which are left out; the first: "
            print(said + self._refused[0], file=sys.stderr, flush=True)

    def _send_single(self, event: Event) -> None:
        """What MLflow takes one by one."""
        client, run_id = self._client, self._run_id
        if "artifact" in event and Path(event["artifact"]).exists():
            log = client.log_artifacts if Path(event["artifact"]).is_dir() else client.log_artifact
            log(run_id, event["artifact"], event["folder"] or None)
        elif "tag" in event:
            client.set_tag(run_id, *event["tag"])
        elif "provenance" in event:
            known = {"source_type": "LOCAL", **event["provenance"]}
            for key, tag in PROVENANCE_TAGS.items():
                if known.get(key):
                    client.set_tag(run_id, tag, known[key])
        elif event.get("status") == "RUNNING":
            client.update_run(run_id, status="RUNNING")
        elif "status" in event:
            client.set_terminated(run_id, event["status"])

    def _connect(self):
        import mlflow

        if self._file:
            self._file.parent.mkdir(parents=True, exist_ok=True)
        return mlflow.MlflowClient(tracking_uri=self._uri)

    def _finds_run(self) -> bool:
        """Whether the store has the run: asked each time, for stores get lost, and to numbers any server says yes."""
        from mlflow.exceptions import MlflowException

        if self._file and not self._file.exists():  # the open store would take all, and nobody would ever see it
            raise FileNotFoundError(f"{self._file} was deleted")
        try:
            run = self._client.get_run(self._run_id).info
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return False
        if run.run_id != self._run_id:
            raise ValueError(NONSENSE)
        self._created = self._created and run.lifecycle_stage != "active"
        return run.lifecycle_stage == "active"

    def _create_run(self) -> None:
        """A run of the configured experiment; in the place of one that was lost."""
        if self._created:
            raise ValueError(f"run {self._run_id}, which was just made, is not there")
        client, name = self._client, self._config.experiment
        known = client.get_experiment_by_name(name)
        if known and known.lifecycle_stage == "deleted":
            client.restore_experiment(known.experiment_id)
        # The server chooses where a remote store keeps artifacts; the embedded one keeps them beside itself.
        local = None if self._config.uri else (self._output / "mlartifacts").resolve().as_uri()
        experiment_id = known.experiment_id if known else client.create_experiment(name, local)
        tags = self._tags | ({REPLACES: self._run_id} if self._run_id else {})
        run_id = client.create_run(experiment_id, tags=tags, run_name=self._name).info.run_id
        if not run_id:
            raise ValueError(NONSENSE)
        replace_text(self._folder / RUN_ID, run_id)
        self._run_id, self._created = run_id, True

    def _start_monitor(self):
        if not self._config.system_metrics:
            return None
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        monitor = SystemMetricsMonitor(self._run_id, resume_logging=True, tracking_uri=self._uri)
        monitor.start()
        return monitor


def _unicode(event: Event) -> Event:
    """The event without halves of characters, which words of a command line may have and no store takes."""
    return json.loads(json.dumps(event, ensure_ascii=False).encode(errors="replace"))


def _pieces(events: list[Event]) -> list[list[Event]]:
    """Two halves, or the values of one event; nothing where there is a single thing."""
    if len(events) > 1:
        return [events[: len(events) // 2], events[len(events) // 2 :]]
    kind, content = next(iter(events[0].items()))
    many = kind in ("params", "metrics") and len(content) > 1
    return [[{**events[0], kind: {key: value}}] for key, value in content.items()] if many else []
