"""MLflow: what is logged arrives once, through restarts and a dead server."""

import socket
import sqlite3
import subprocess
import sys
import threading
import time

import mlflow
import pytest

from keyreid import tracking
from keyreid.config import TrackingConfig
from keyreid.tracking import Tracker

QUIET = TrackingConfig(system_metrics=False)


def client_of(tracker):
    return mlflow.MlflowClient(tracking_uri=tracker.uri)


def curve(tracker, key):
    return [(point.step, point.value) for point in client_of(tracker).get_metric_history(tracker.run_id, key)]


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
    assert curve(tracker, "loss") == [(1, 0.1), (2, 0.2), (3, 0.3), (4, 0.4)]
    run = client_of(tracker).get_run(first)
    assert run.data.params == {"alpha": "0.75", "beta": "1"}
    assert run.info.status == "FINISHED"
    assert [file.path for file in client_of(tracker).list_artifacts(first, "pictures")] == ["pictures/picture.png"]


def test_an_error_marks_the_run(tmp_path):
    with pytest.raises(ZeroDivisionError), Tracker(QUIET, tmp_path, tmp_path / "run", "bad") as tracker:
        raise ZeroDivisionError
    assert client_of(tracker).get_run(tracker.run_id).info.status == "FAILED"


def test_half_a_line_of_a_killed_process_is_forgotten(tmp_path):
    with Tracker(QUIET, tmp_path, tmp_path / "run", "killed") as tracker:
        tracker.metrics({"loss": 1.0}, 1)
    with (tmp_path / "run" / "tracking" / tracking.EVENTS).open("a") as file:
        file.write('{"metrics": {"loss": 2.0}, "st')
    with Tracker(QUIET, tmp_path, tmp_path / "run", "killed") as tracker:
        tracker.metrics({"loss": 3.0}, 2)
    assert curve(tracker, "loss") == [(1, 1.0), (2, 3.0)]


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
    assert curve(tracker, "loss") == [(1, 1.0)]
    assert client_of(tracker).get_run(tracker.run_id).info.status == "FINISHED"


@pytest.mark.slow
def test_a_dead_server_delays_but_loses_nothing(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(tracking, "RETRY_SECONDS", 0.5)
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
        assert curve(tracker, "loss") == [(1, 1.0), (2, 2.0)]
    finally:
        server.terminate()
        server.wait(120)  # uvicorn lets its connections time out first
