"""MLflow as a sink: one MLflow run for each run folder, the same one after a restart."""

import os
from collections.abc import Mapping
from pathlib import Path

from keyreid.config import TrackingConfig
from keyreid.files import replace_text
from keyreid.tracking.sender import Event

RUN_ID = "run_id"
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
    return path.read_text().strip() if path.is_file() else None


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
        self._client = self._monitor = None

    def __str__(self) -> str:
        return f"MLflow at {self._uri}"

    def send(self, events: list[Event]) -> None:
        """See Sink."""
        from mlflow.entities import Metric, Param

        self._client = self._client or self._connect()
        self._monitor = self._monitor or self._start_monitor()

        numbers = [(event, *metric) for event in events for metric in event.get("metrics", {}).items()]
        metrics = [Metric(key, value, event["time"], event["step"]) for event, key, value in numbers]
        params = [Param(key, value) for event in events for key, value in event.get("params", {}).items()]
        for start in range(0, len(metrics), 1000):
            self._client.log_batch(self._run_id, metrics=metrics[start : start + 1000])
        for start in range(0, len(params), 100):
            self._client.log_batch(self._run_id, params=params[start : start + 100])
        for event in events:
            self._send_single(event)

    def close(self) -> None:
        """Stop measuring the machine."""
        if self._monitor:
            self._monitor.finish()

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

        if self._uri.startswith("sqlite:///"):
            Path(self._uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
        client = mlflow.MlflowClient(tracking_uri=self._uri)
        if self._run_id is None:
            name = self._config.experiment
            known = client.get_experiment_by_name(name)
            # The server chooses where a remote store keeps artifacts; the embedded one keeps them beside itself.
            local = None if self._config.uri else (self._output / "mlartifacts").resolve().as_uri()
            experiment_id = known.experiment_id if known else client.create_experiment(name, local)
            run = client.create_run(experiment_id, tags=self._tags, run_name=self._name)
            replace_text(self._folder / RUN_ID, run.info.run_id)
            self._run_id = run.info.run_id
        return client

    def _start_monitor(self):
        if not self._config.system_metrics:
            return None
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        monitor = SystemMetricsMonitor(self._run_id, resume_logging=True, tracking_uri=self._uri)
        monitor.start()
        return monitor
