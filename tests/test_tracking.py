"""What is logged arrives once, through restarts and a dead server; MLflow and trackers of one's own."""

import socket
import sqlite3
import subprocess
import sys
import threading
import time

import mlflow
import pytest

from keyreid.config import TrackingConfig
from keyreid.tracking import EVENTS, SINKS, EventLog, Tracker, sender, store_uri

QUIET = TrackingConfig(system_metrics=False)


def client_of(output, config=QUIET):
    return mlflow.MlflowClient(tracking_uri=store_uri(config, output))


def curve(tracker, key, client):
    return [(point.step, point.value) for point in client.get_metric_history(tracker.run_id, key)]


def test_a_run_that_goes_on_draws_one_curve(tmp_path):
    picture = tmp_path / "picture.png"
    picture.write_bytes(b"png")
    with Tracker(QUIET, tmp_path, tmp_path / "run", "first") as tracker:
        tracker.params({"alpha": 0.75})
        for step in (1, 2, 3):
            tracker.metrics({"loss": step / 10}, step)
        tracker.artifact(picture, "pictures")
    first = tracker.run_id
    with Tracker(QUIET, tmp_path, tmp_path / "run", "first") as tracker:  # from a checkpoint at step 1
        tracker.params({"alpha": 0.5, "beta": 1})
        for step in (2, 3, 4):
            tracker.metrics({"loss": step / 10}, step)
    assert tracker.run_id == first
    assert curve(tracker, "loss", client_of(tmp_path)) == [(1, 0.1), (2, 0.2), (3, 0.3), (4, 0.4)]
    run = client_of(tmp_path).get_run(first)
    assert run.data.params == {"alpha": "0.75", "beta": "1"}
    assert run.info.status == "FINISHED"
    assert [file.path for file in client_of(tmp_path).list_artifacts(first, "pictures")] == ["pictures/picture.png"]


def test_an_error_marks_the_run(tmp_path):
    with pytest.raises(ZeroDivisionError), Tracker(QUIET, tmp_path, tmp_path / "run", "bad") as tracker:
        raise ZeroDivisionError
    assert client_of(tmp_path).get_run(tracker.run_id).info.status == "FAILED"


def test_half_a_line_of_a_killed_process_is_forgotten(tmp_path):
    with Tracker(QUIET, tmp_path, tmp_path / "run", "killed") as tracker:
        tracker.metrics({"loss": 1.0}, 1)
    with (tmp_path / "run" / "tracking" / EVENTS).open("a") as file:
        file.write('{"metrics": {"loss": 2.0}, "st')
    with Tracker(QUIET, tmp_path, tmp_path / "run", "killed") as tracker:
        tracker.metrics({"loss": 3.0}, 2)
    assert curve(tracker, "loss", client_of(tmp_path)) == [(1, 1.0), (2, 3.0)]


def test_a_store_that_fails_for_a_moment_at_the_end_gets_all(tmp_path):
    with Tracker(QUIET, tmp_path, tmp_path / "run", "first"):
        pass
    tracker = Tracker(QUIET, tmp_path, tmp_path / "run", "first")
    while not tracker.all_sent:
        time.sleep(0.05)
    store = sqlite3.connect(tmp_path / "mlflow.db", check_same_thread=False, isolation_level=None)
    store.execute("CREATE TRIGGER held BEFORE INSERT ON metrics BEGIN SELECT RAISE(ABORT, 'held'); END")
    released = threading.Timer(1.5, store.execute, ["DROP TRIGGER held"])
    released.start()
    tracker.metrics({"loss": 1.0}, 1)
    tracker.close("FINISHED")
    released.join()
    store.close()
    assert tracker.all_sent
    assert curve(tracker, "loss", client_of(tmp_path)) == [(1, 1.0)]
    assert client_of(tmp_path).get_run(tracker.run_id).info.status == "FINISHED"


class TableSink:
    """A tracker of one's own: numbers as lines of a CSV file."""

    def __init__(self, config, output, folder, name, tags):
        self.path = folder / "numbers.csv"

    def __str__(self):
        return f"table {self.path}"

    def send(self, events):
        """Append each number."""
        with self.path.open("a") as file:
            for event in events:
                file.writelines(f"{event['step']},{key},{value}\n" for key, value in event.get("metrics", {}).items())

    def close(self):
        """Nothing is open."""


def test_a_tracker_of_ones_own_is_a_class_and_its_name(tmp_path, monkeypatch):
    monkeypatch.setitem(SINKS, "table", TableSink)
    config = QUIET.model_copy(update={"sinks": ("mlflow", "table")})
    for loss in (0.5, 0.25):
        with Tracker(config, tmp_path, tmp_path / "run", "both") as tracker:
            tracker.metrics({"loss": loss}, int(1 / loss))
    assert (tmp_path / "run" / "tracking" / "numbers.csv").read_text() == "2,loss,0.5\n4,loss,0.25\n"
    assert curve(tracker, "loss", client_of(tmp_path)) == [(2, 0.5), (4, 0.25)]


def test_without_sinks_the_log_is_kept(tmp_path):
    with Tracker(QUIET.model_copy(update={"sinks": ()}), tmp_path, tmp_path / "run", "alone") as tracker:
        tracker.metrics({"loss": 1.0}, 1)
    assert '"loss": 1.0' in (tmp_path / "run" / "tracking" / EVENTS).read_text()
    assert not (tmp_path / "mlflow.db").exists()


def test_a_folder_of_the_last_version_is_sent_from_where_it_ended(tmp_path):
    """There `sent` counted lines, for MLflow alone."""
    with Tracker(QUIET, tmp_path, tmp_path / "run", "old") as tracker:
        tracker.metrics({"loss": 1.0}, 1)
    folder = tmp_path / "run" / "tracking"
    (folder / "sent-mlflow").unlink()
    (folder / "sent").write_text(str(len((folder / EVENTS).read_text().splitlines())))
    with (folder / EVENTS).open("a") as file:
        file.write('{"metrics": {"loss": 2.0}, "step": 2, "time": 5}\n')
    with Tracker(QUIET, tmp_path, tmp_path / "run", "old") as tracker:
        tracker.metrics({"loss": 2.5}, 2)
    points = client_of(tmp_path).get_metric_history(tracker.run_id, "loss")
    assert sorted((point.step, point.value) for point in points) == [(1, 1.0), (2, 2.0)]  # and none twice
    assert tracker.all_sent


def test_sending_reads_only_what_is_new(tmp_path, monkeypatch):
    """10 times the events cost 10 times the bytes, whatever was sent before."""
    read = []
    plain = EventLog.read
    monkeypatch.setitem(SINKS, "table", TableSink)

    def counting(self, offset, limit):
        events, after = plain(self, offset, limit)
        read.append(after - offset)
        return events, after

    monkeypatch.setattr(EventLog, "read", counting)
    config = QUIET.model_copy(update={"sinks": ("table",)})
    with Tracker(config, tmp_path, tmp_path / "run", "long") as tracker:
        for step in range(2000):
            tracker.metrics({"loss": 1.0}, step)
    assert tracker.all_sent
    assert sum(read) == (tmp_path / "run" / "tracking" / EVENTS).stat().st_size


def test_provenance_becomes_mlflows_own_tags(tmp_path):
    start = {"command": "keyreid train x.yaml", "user": "ada", "commit": "0123456789ab", "version": "9", "host": "here"}
    with Tracker(QUIET, tmp_path, tmp_path / "run", "known", {"mlflow.parentRunId": "p"}) as tracker:
        tracker.provenance(start)
    tags = client_of(tmp_path).get_run(tracker.run_id).data.tags
    assert tags["mlflow.source.name"] == "keyreid train x.yaml"
    assert tags["mlflow.source.type"] == "LOCAL"
    assert tags["mlflow.source.git.commit"] == "0123456789ab"
    assert (tags["mlflow.user"], tags["keyreid.version"], tags["mlflow.parentRunId"]) == ("ada", "9", "p")


@pytest.mark.slow
def test_a_dead_server_delays_but_loses_nothing(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(sender, "RETRY_SECONDS", 0.5)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = TrackingConfig(uri=f"http://127.0.0.1:{port}", system_metrics=False)
    tracker = Tracker(config, tmp_path, tmp_path / "run", "patient")
    tracker.metrics({"loss": 1.0}, 1)
    assert tracker.run_id is None  # logging waits for no server
    said, deadline = "", time.monotonic() + 90
    while "warning: MLflow at" not in said and time.monotonic() < deadline:
        time.sleep(0.2)
        said += capfd.readouterr().err
    assert "warning: MLflow at" in said

    store = [
        "--backend-store-uri",
        f"sqlite:///{tmp_path}/server.db",
        "--default-artifact-root",
        str(tmp_path / "files"),
    ]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    server = subprocess.Popen([*command, *store], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 90
        while tracker.run_id is None and time.monotonic() < deadline:
            time.sleep(0.2)
        tracker.metrics({"loss": 2.0}, 2)
        tracker.close("FINISHED")
        assert curve(tracker, "loss", client_of(tmp_path, config)) == [(1, 1.0), (2, 2.0)]
    finally:
        server.terminate()
        server.wait(120)  # uvicorn lets its connections time out first
