"""Stores that are lost, servers that answer nonsense, logs that a full disk damaged: the rest arrives all the same."""

import http.server
import json
import resource
import threading

import mlflow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keyreid.config import TrackingConfig, check_config, save_config
from keyreid.tracking import EVENTS, SINKS, EventLog, Tracker, sender
from keyreid.tracking.sender import _event
from keyreid.training import run

QUIET = TrackingConfig(system_metrics=False)
ANSWERS = {
    "a page": (200, b"<html>Sign in</html>"),
    "no JSON": (200, b'{"run": '),
    "an empty object": (200, b"{}"),
    "nothing": (200, b""),
    "a failure": (500, b"oops"),
    "a failure in JSON": (404, b'{"error": "no such page"}'),
    "a refusal": (400, b"<html>Bad request</html>"),
}


def start(folder, steps, config=QUIET, **values):
    """A start of the run that logs the steps; ended in order."""
    with Tracker(config, folder, folder / "run", "lost") as tracker:
        tracker.params({"alpha": 1, **values})
        for step in steps:
            tracker.metrics({"loss": step / 10}, step)
    return tracker


def curve(uri, run_id):
    points = mlflow.MlflowClient(uri).get_metric_history(run_id, "loss")
    return sorted((point.step, point.value) for point in points)


def log_of(folder):
    return folder / "run" / "tracking" / EVENTS


def test_a_store_that_was_deleted_gets_all_in_a_new_run(tmp_path):
    (tmp_path / "page.html").write_text("page")
    with Tracker(QUIET, tmp_path, tmp_path / "run", "lost") as tracker:
        tracker.params({"alpha": 1})
        tracker.artifact(tmp_path / "page.html")
        tracker.metrics({"loss": 0.1}, 1)
    first = tracker.run_id
    (tmp_path / "mlflow.db").unlink()
    # By another name of the file: within a process MLflow holds a store open.
    uri = f"sqlite:///{tmp_path}/run/../mlflow.db"
    tracker = start(tmp_path, (2, 3), QUIET.model_copy(update={"uri": uri}), beta=2)
    assert tracker.run_id != first and tracker.all_sent
    assert curve(uri, tracker.run_id) == [(1, 0.1), (2, 0.2), (3, 0.3)]
    found = mlflow.MlflowClient(uri).get_run(tracker.run_id)
    assert found.data.tags["keyreid.replaces"] == first
    assert found.data.params == {"alpha": "1", "beta": "2"}
    assert found.info.status == "FINISHED"
    assert [file.path for file in mlflow.MlflowClient(uri).list_artifacts(tracker.run_id)] == ["page.html"]


def test_a_deleted_experiment_and_run_get_all_in_a_new_run_while_the_run_goes_on(tmp_path):
    tracker = Tracker(QUIET, tmp_path, tmp_path / "run", "lost")
    tracker.metrics({"loss": 0.1}, 1)
    while not (tracker.run_id and tracker.all_sent):
        pass
    first, uri = tracker.run_id, f"sqlite:///{tmp_path}/mlflow.db"
    client = mlflow.MlflowClient(uri)
    client.delete_run(first)
    client.delete_experiment(client.get_run(first).info.experiment_id)
    tracker.metrics({"loss": 0.2}, 2)
    tracker.close("FINISHED")
    assert tracker.run_id != first and tracker.all_sent
    assert curve(uri, tracker.run_id) == [(1, 0.1), (2, 0.2)]


def test_a_store_deleted_under_a_running_training_is_told(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(sender, "LAST_WAIT_SECONDS", 0.01)
    tracker = Tracker(QUIET, tmp_path, tmp_path / "run", "lost")
    while not (tracker.run_id and tracker.all_sent):
        pass
    (tmp_path / "mlflow.db").unlink()
    tracker.metrics({"loss": 0.1}, 1)
    tracker.close("FINISHED")
    said = capfd.readouterr().err
    assert "mlflow.db was deleted" in said and "2 events are unsent; the run's next start sends them" in said
    uri = f"sqlite:///{tmp_path}/run/../mlflow.db"
    assert start(tmp_path, (2,), QUIET.model_copy(update={"uri": uri})).all_sent
    assert curve(uri, tracker.run_id) == [(1, 0.1), (2, 0.2)]


@pytest.fixture
def server():
    """A real server; gives its address and a list to fill with the answer to everything; what is asked comes after."""
    answer = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            answer.append(self.path)
            self.send_response(answer[0])
            self.send_header("Content-Length", str(len(answer[1])))
            self.end_headers()
            self.wfile.write(answer[1])

        do_POST = do_GET  # noqa: N815

        def log_message(self, *_):
            """Nothing."""

    serving = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=serving.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{serving.server_address[1]}", answer
    serving.shutdown()
    serving.server_close()


@pytest.mark.parametrize("kind", ANSWERS)
def test_a_server_that_answers_nonsense_delays_but_loses_nothing(kind, server, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(sender, "LAST_WAIT_SECONDS", 0.01)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    address, answer = server
    answer[:] = ANSWERS[kind]
    tracker = start(tmp_path, (1, 2), QUIET.model_copy(update={"uri": address}))
    assert not tracker.all_sent and not log_of(tmp_path).with_name("run_id").exists()
    assert f"MLflow at {address}: 5 events are unsent; the run's next start sends them" in capfd.readouterr().err
    assert len(log_of(tmp_path).read_text().splitlines()) == 5


def test_empty_answers_are_no_receipt_and_the_next_start_sends_what_was_not_taken(server, tmp_path, monkeypatch):
    monkeypatch.setattr(sender, "LAST_WAIT_SECONDS", 0.01)
    address, answer = server
    answer[:] = ANSWERS["an empty object"]  # what MLflow says to numbers that it took
    first = start(tmp_path, (1,)).run_id
    assert not start(tmp_path, (2,), QUIET.model_copy(update={"uri": address})).all_sent
    assert answer[2:] and not [path for path in answer[2:] if path.endswith("runs/create")]  # nor is the run lost
    tracker = start(tmp_path, (3,))
    assert tracker.all_sent and tracker.run_id == first
    assert curve(f"sqlite:///{tmp_path}/mlflow.db", tracker.run_id) == [(1, 0.1), (2, 0.2), (3, 0.3)]


def test_a_finished_run_sends_its_rest_when_it_is_started_again(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(sender, "LAST_WAIT_SECONDS", 0.01)
    store = tmp_path / "store" / "mlflow.db"
    tracking = {"system_metrics": False, "uri": f"sqlite:///{store}"}
    values = {"name": "run", "output": str(tmp_path), "tracking": tracking}
    config = check_config({**values, "data": {"shards": "nowhere"}}, "test")
    store.parent.touch()  # where no folder can be
    tracker = start(tmp_path, (1,), config.tracking)
    assert not tracker.all_sent
    (config.run_dir / run.RESULT).write_text('{"mAP": 0.5}')
    (config.run_dir / run.COMPLETED).touch()
    save_config(config, config.run_dir / run.RESOLVED)
    store.parent.unlink()
    assert run.completed_result(config) == {"mAP": 0.5}
    assert curve(f"sqlite:///{store}", tracker.run_id) == [(1, 0.1)]
    assert mlflow.MlflowClient(f"sqlite:///{store}").get_run(tracker.run_id).info.status == "FINISHED"


def test_what_the_store_refuses_holds_back_nothing_else(tmp_path, capfd):
    tracker = start(tmp_path, (1,))
    with log_of(tmp_path).open("a") as file:  # another value of a parameter, as after a line that was lost
        file.write('{"params": {"alpha": "5", "beta": "2"}}\n')
        file.write('{"metrics": {"no! name?": 1.0, "other": 2.0}, "step": 1, "time": 1}\n')
        file.write(r'{"tag": ["note", "\udcff"]}' + "\n")
    assert start(tmp_path, (2,)).all_sent
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    assert curve(uri, tracker.run_id) == [(1, 0.1), (2, 0.2)]
    data = mlflow.MlflowClient(uri).get_run(tracker.run_id).data
    assert data.params == {"alpha": "1", "beta": "2"} and data.metrics["other"] == 2.0
    assert data.tags["note"] == "?"
    assert 'refused 2 events, which are left out; the first: {"params"' in capfd.readouterr().err


# --- the log on a disk that was full ------------------------------------------------------------------------------


class ListSink:
    """Keeps what it is sent."""

    events: list = []  # noqa: RUF012

    def __init__(self, *_):
        """Nothing to connect to."""

    def send(self, events):
        self.events += events

    def close(self):
        """Nothing is open."""


@pytest.fixture
def sent(monkeypatch):
    """What a run's sink got, over all its starts."""
    monkeypatch.setitem(SINKS, "list", ListSink)
    monkeypatch.setattr(ListSink, "events", [])
    return ListSink.events


LISTED = QUIET.model_copy(update={"sinks": ("list",)})


@pytest.mark.parametrize(
    "damage",
    [
        b'{"metrics": {"loss": 2.0}, "st\n',
        b"\0" * 100 + b"\n",
        b"\n",
        b"\xff\xfe\n",
        b"[" * 100_000 + b"\n",
        b'"text"\n[]\n{}\n{"other": 1}\n',
        b'{"metrics": [1], "step": 2, "time": 1}\n',
        b'{"metrics": {"loss": null}, "step": 2, "time": 1}\n',
        b'{"metrics": {"loss": 2.0}, "step": 1' + b"0" * 40 + b', "time": 1}\n',
        b'{"metrics": {"loss": 2.0}}\n',
        b'{"params": {"alpha": 1}}\n',
        b'{"tag": ["one"]}\n',
        b'{"artifact": 5, "folder": ""}\n',
        b'{"metrics": {"loss": 2.0}, "step": 2',  # and no end
    ],
)
def test_a_damaged_line_is_skipped_and_counted_and_all_else_arrives(damage, tmp_path, sent, capfd):
    start(tmp_path, (1,), LISTED)
    with log_of(tmp_path).open("ab") as file:
        file.write(damage)
    tracker = start(tmp_path, (2,), LISTED)
    assert tracker.all_sent
    assert [event["step"] for event in sent if "metrics" in event] == [1, 2]
    assert f"{max(1, damage.count(chr(10).encode()))} damaged lines are skipped" in capfd.readouterr().err


def test_nuls_before_an_event_do_not_hide_it(tmp_path, sent):
    start(tmp_path, (1,), LISTED)
    with log_of(tmp_path).open("ab") as file:
        file.write(b"\0" * 50)
    start(tmp_path, (2,), LISTED)
    with log_of(tmp_path).open("ab") as file:
        file.write(b'\0\0{"metrics": {"loss": 0.3}, "step": 3, "time": 1}\n')
    start(tmp_path, (4,), LISTED)
    assert [event["step"] for event in sent if "metrics" in event] == [1, 2, 3, 4]


@pytest.mark.parametrize("content", [b"", b"\0\0\0", b"x", b"-5", b"99999999", b"17", b"\xff"])
def test_an_unreadable_sent_sends_all_again(content, tmp_path, sent):
    """MLflow takes a number of the same step and time once."""
    start(tmp_path, (1,), LISTED)
    (tmp_path / "run" / "tracking" / "sent-list").write_bytes(content)
    assert start(tmp_path, (2,), LISTED).all_sent
    assert [event["step"] for event in sent if "metrics" in event] == [1, 1, 2]


def test_what_is_sent_again_is_in_mlflow_once(tmp_path):
    start(tmp_path, (1, 2))
    (tmp_path / "run" / "tracking" / "sent-mlflow").write_bytes(b"")
    tracker = start(tmp_path, (3,))
    assert curve(f"sqlite:///{tmp_path}/mlflow.db", tracker.run_id) == [(1, 0.1), (2, 0.2), (3, 0.3)]


@pytest.mark.parametrize("content", [b"", b"\0" * 32])
def test_an_unreadable_run_id_gives_a_new_run_with_everything(content, tmp_path):
    start(tmp_path, (1,))
    (tmp_path / "run" / "tracking" / "run_id").write_bytes(content)
    tracker = start(tmp_path, (2,))
    assert curve(f"sqlite:///{tmp_path}/mlflow.db", tracker.run_id) == [(1, 0.1), (2, 0.2)]


def test_a_disk_that_fills_within_a_line_takes_the_next_one_whole(tmp_path):
    log = EventLog(tmp_path)
    log.append({"tag": ["before", "x"]})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (log.path.stat().st_size + 10, limits[1]))
    try:
        with pytest.raises(OSError):
            log.append({"tag": ["lost", "x" * 100]})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not log.path.read_bytes().endswith(b"\n")
    log.append({"tag": ["after", "x"]})
    assert [event["tag"][0] for event in log.read(0, 10)[0]] == ["before", "after"]


EVENT = {"metrics": {"loss": 0.5}, "step": 1, "time": 1}
ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from([*EVENT, "params", "tag", "x"]) | st.text(), inner),
    max_leaves=8,
)


@settings(max_examples=300)
@given(st.binary() | ANY_JSON.map(lambda value: json.dumps(value).encode()))
def test_any_bytes_are_an_event_or_none(line):
    event = _event(line)
    assert event is None or isinstance(event, dict)


@settings(max_examples=300)
@given(ANY_JSON, st.sampled_from([*EVENT, "params", "provenance", "artifact", "folder", "tag", "status"]))
def test_what_is_taken_for_an_event_can_be_recalled(value, key):
    event = _event(json.dumps({**EVENT, key: value}).encode())
    if event and "metrics" in event:
        assert all(isinstance(number, float) for number in event["metrics"].values())
        assert isinstance(event["step"], int)
