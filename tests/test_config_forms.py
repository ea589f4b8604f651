"""What people's files and command lines really hold: each wrong form is a message, each right one what was written."""

import os
import subprocess
import sys

import pytest
import yaml

from keyreid.config import load_config
from keyreid.errors import ConfigError, KeyreidError
from keyreid.plain_yaml import DEEPEST, MOST_BYTES

BASE = "data: {shards: here}\n"
BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 30)
)
FILES = {
    "not UTF-8": (b"name: caf\xe9\n" + BASE.encode(), "is not YAML"),
    "a picture": (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "is not YAML"),
    "NUL": (b"name: a\0b\n", "is not YAML"),
    "escaped NUL": (b'output: "a\\0b"\n', "control characters"),
    "escaped surrogate": (b'output: "\\ud800"\n', "control characters"),
    "a line in a key": (b'"a\\nb": 1\n', "not a line of text"),
    "empty": (b"", "a mapping of sections, this is NoneType"),
    "a list": (b"- 1\n", "this is list"),
    "a value": (b"2026-11-25", "this is str"),
    "two documents": (BASE.encode() + b"---\n" + BASE.encode(), "single document"),
    "deep": (b"a: " + b"[" * 50_000, f"deeper than {DEEPEST}"),
    "deep blocks": (b"- " * 50_000, f"deeper than {DEEPEST}"),
    "an alias in itself": (b"data: &a [*a]\n", "alias inside itself"),
    "a mapping in itself": (b"data: &a {shards: *a}\n", "alias inside itself"),
    "a bomb": (BOMB.encode(), "more than 50000 values"),
    "merge keys": (b"a: &a {b: 1}\nc: {<<: *a}\n", "unknown key"),
    "large": (b"# " + b"x" * MOST_BYTES, "larger than 128 KiB"),
    "digits without end": (b"9" * 100_000 + b"x", "this is str"),
    "a duplicate": (b"data: {shards: a, shards: b}\n", "line 1: duplicate key shards"),
    "a duplicate, quoted": (b"seed: 1\n'seed': 2\n", "duplicate key seed"),
    "a time stamp": (BASE.encode() + b"seed: !!timestamp 2026-11-25\n", "timestamp is no kind of setting"),
    "binary": (BASE.encode() + b"name: !!binary aGVsbG8=\n", "binary is no kind of setting"),
    "a set": (b"data: !!set {a, b}\n", "set is no kind of setting"),
    "a key that is a list": (b"? [a]\n: 1\n", "not a line of text"),
    "a wrong truth value": (b"seed: !!bool x\n", "is not YAML"),
    "a huge number": (BASE.encode() + b"seed: " + b"9" * 30, "no finite number"),
    "a number of 5000 digits": (BASE.encode() + b"seed: " + b"9" * 5000, "is not YAML"),
    "infinite": (BASE.encode() + b"training: {deepspeed: {clip: .inf}}\n", "no finite number"),
    "not a number": (BASE.encode() + b"loss: {alpha: .nan}\n", "no finite number"),
    "beyond all numbers": (BASE.encode() + b"loss: {alpha: 1e999}\n", "no finite number"),
    "an interpolation": (b"data: {shards: '${output}/x'}\n", "nothing is filled in"),
    "the environment": (BASE.encode() + b"output: ${oc.env:HOME}/runs\n", "nothing is filled in"),
    "an empty interpolation": (BASE.encode() + b"output: ${}\n", "nothing is filled in"),
    "extends a list": (b"extends: [a]\n", "names one file"),
    "extends a folder": (b"extends: .\n", "not a file, named by|: not a file"),
    "extends a long name": (b"extends: " + b"x" * 300, "File name too long, named by `extends`"),
    "extends the home of nobody": (b"extends: ~nobody-of-that-name/x.yaml\n", "home directory"),
    "output of nobody": (BASE.encode() + b"output: ~nobody-of-that-name/runs\n", "nobody here has this home"),
    "a long name": (BASE.encode() + b"name: " + b"x" * 300, "name: "),
    "a name that leads out": (BASE.encode() + b"name: ..\n", "name: "),
}


@pytest.mark.parametrize("form", FILES)
def test_a_file_that_is_no_configuration_is_named(form, tmp_path):
    content, message = FILES[form]
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message) as error:
        load_config(path)
    assert str(tmp_path) in str(error.value)
    assert len(str(error.value)) < 1000


def test_places_that_are_no_file(tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for place in (
        tmp_path,
        tmp_path / "loop",
        "/dev/null",
        "/dev/zero",
        tmp_path / ("x" * 300),
        "~nobody-of-that-name/x",
    ):
        with pytest.raises(ConfigError):
            load_config(place)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_file_is_named(tmp_path):
    (tmp_path / "run.yaml").write_text(BASE)
    (tmp_path / "run.yaml").chmod(0)
    with pytest.raises(ConfigError, match="Permission denied"):
        load_config(tmp_path / "run.yaml")


def test_a_file_of_a_windows_editor_is_read(tmp_path):
    for encoding in ("utf-8-sig", "utf-16"):
        (tmp_path / "run.yaml").write_bytes("data: {shards: ö}\r\nname: a\r\n".encode(encoding))
        assert load_config(tmp_path / "run.yaml").data.shards == "ö"


@pytest.mark.parametrize(
    ("written", "meant"),
    [*((text, text) for text in ("20261125", "007", "1e5", "on", "2026-11-25", "1.10", "1_000")), ("'7'", "7")],
)
def test_a_name_is_text_as_it_was_written(written, meant, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(f"{BASE}name: {written}\n")
    assert load_config(path).name == load_config(path, [f"name={written}"]).name == meant
    assert load_config(path, ["data.shards=0123", "training.deepspeed=12"]).data.shards == "0123"


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("seed=010", "seed", 10),
        ("schedule.epochs=08", "schedule.epochs", 8),
        ("optimizer.lr=1e-3", "optimizer.lr", 0.001),
        ("evaluation.rerank=yes", "evaluation.rerank", True),
        ("model.depth=null", "model.depth", None),
        ("training.deepspeed={a: {b: [1e-3, on, 7]}}", "training.deepspeed", {"a": {"b": [0.001, True, 7]}}),
        ("training.deepspeed.a.b=1", "training.deepspeed", {"a": {"b": 1}}),
        ("tracking.sinks=[]", "tracking.sinks", ()),
        ("output=a=b", "output", "a=b"),
        ("data.shards=ä ö", "data.shards", "ä ö"),
    ],
)
def test_an_override_is_what_was_meant(override, key, value, tmp_path):
    (tmp_path / "run.yaml").write_text(BASE)
    found = load_config(tmp_path / "run.yaml", [override])
    for name in key.split("."):
        found = getattr(found, name)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    "override",
    [
        *["a..b=1", "=1", ".=1", "a=", "model.weights=", "data.shards= ", "model", "model=5", "training.x.y.z=1"],
        *["a[0]=1", "name=[", "name={", "name=*a", "name=&a [*a]", "name=${x}", "name=${oc.env:HOME}", "name=.."],
        *["name=a/b", "name=é", "seed=-1", "seed=1:30", f"seed={2**63}", f"seed={'9' * 5000}", "loss.alpha=.nan"],
        *["loss.alpha=inf", "loss.alpha.x=1", "name=" + "x" * 300, "name=a\0b", "name=\x1b[2J", "data=\udc80", "é=1"],
        *[".".join("a" * 2000) + "=1", "output=~nobody-x/y"],
        *["data.augment.erase_area=[1]", "data.augment.erase_area=[0,1,2]", "model.parts=4.5", "tracking.sinks=mlflow"],
    ],
)  # fmt: skip
def test_a_wrong_override_is_named(override, tmp_path):
    (tmp_path / "run.yaml").write_text(BASE)
    with pytest.raises(ConfigError) as error:
        load_config(tmp_path / "run.yaml", [override])
    assert len(str(error.value)) < 1000


def test_the_environment_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET", "swordfish")
    (tmp_path / "run.yaml").write_text(BASE + "name: ${oc.env:SECRET}\n")
    with pytest.raises(ConfigError) as error:
        load_config(tmp_path / "run.yaml")
    assert "swordfish" not in str(error.value)


def test_searches_are_bounded(tmp_path):
    pytest.importorskip("optuna")
    from keyreid.tuning.search import load_search

    (tmp_path / "base.yaml").write_text(BASE)
    search = {"base": "base.yaml", "algorithm": "grid", "space": {}}
    for key in ("loss.alpha", "loss.identity", "loss.triplet", "loss.centre"):
        search["space"][key] = {"grid": [number / 100 for number in range(50)]}
    (tmp_path / "search.yaml").write_text(yaml.safe_dump(search))
    with pytest.raises(ConfigError, match="would have 6250000 trials, and 10000 are the most"):
        load_search(tmp_path / "search.yaml")
    search["space"] = {"loss.alpha": {"grid": [0.5]}}
    (tmp_path / "search.yaml").write_text(yaml.safe_dump(search))
    for change, message in {"base=" + "x" * 300: "is no file", "space={a..b: {grid: [1]}}": "is no key"}.items():
        with pytest.raises(ConfigError, match=message):
            load_search(tmp_path / "search.yaml", [change])


def keyreid(*words, cwd, **environment):
    command = [sys.executable, "-m", "keyreid.cli", *map(str, words)]
    return subprocess.run(command, cwd=cwd, env={**os.environ, **environment}, capture_output=True, timeout=120)


def test_files_that_nobody_foresaw_are_a_message(tmp_path):
    """And a bug keeps its traceback."""
    code = "import sys; sys.argv[1:] = ['x']; import keyreid.cli as cli\n@cli.app.command()\ndef x(): {}\ncli.main()"
    for line, message in {
        "open('/nowhere/x\\x1b[2J')": b"error: /nowhere/x\\x1b[2J: No such file or directory\n",
        "from pathlib import Path; Path('~nobody-x').expanduser()": b"error: Could not determine home directory.\n",
    }.items():
        done = subprocess.run([sys.executable, "-c", code.format(line)], cwd=tmp_path, capture_output=True)
        assert (done.returncode, done.stderr) == (1, message)
    for line in ("1 / 0", "raise OSError('of nothing')", "raise RuntimeError('of a bug')"):
        done = subprocess.run([sys.executable, "-c", code.format(line)], cwd=tmp_path, capture_output=True)
        assert done.returncode == 1 and b"Traceback" in done.stderr


def test_the_command_line_says_it_in_one_message(tmp_path):
    (tmp_path / "run.yaml").write_text(BASE)
    for words in (["run.yaml", "name=\x1b]0;x\x07"], ["run.yaml", b"name=\xff"], [b"caf\xe9.yaml"]):
        done = keyreid("config", *[os.fsdecode(word) for word in words], cwd=tmp_path)
        assert done.returncode == 1 and done.stderr.startswith(b"error: ") and b"Traceback" not in done.stderr
        assert done.stderr.count(b"\n") == 1 and b"\x1b" not in done.stderr


SUBMIT = {
    "--nodes": ["1-99999999", "5-2", "0", "-1", "two", "1-2-3", "9" * 5000, "²", "1-"],
    "--gpus-per-node": ["0", "²", "a100:", "-1", "a:1,b:2"],
    "--time": ["tomorrow", "-1", "", "1:2:3:4", "25h"],
    "--mem": ["-1", "12Q", "many"],
    "--array": ["abc", "0-9%", "-1"],
    "--job-name": ["two\nlines", "a\x1b[2J", ""],
    "--extra": ["--comment='open", '"', "\\"],
}


@pytest.mark.parametrize(
    ("option", "value"), [(option, value) for option, values in SUBMIT.items() for value in values]
)
def test_submit_refuses_what_cannot_be(option, value, tmp_path, monkeypatch):
    from keyreid.cli import app

    monkeypatch.chdir(tmp_path)
    with pytest.raises(KeyreidError) as error:
        app(["submit", "--dry-run", f"{option}={value}", "evaluate", "runs/x"], standalone_mode=False)
    assert option in str(error.value) or option == "--extra"


def test_submit_takes_what_can_be(tmp_path, monkeypatch, capsys):
    from keyreid.cli import app

    monkeypatch.chdir(tmp_path)
    options = ["--nodes=2-4,8", "--gpus-per-node=a100:8", "--time=1-00:00:00", "--mem=64G", "--array=0-9,12%2"]
    app(
        ["submit", "--dry-run", *options, "--job-name=é x", "--extra=--comment='a b'", "pose", "x"],
        standalone_mode=False,
    )
    printed = capsys.readouterr().out
    assert all(option in printed for option in [*options, "'--job-name=é x'", "'--comment=a b'"])


@pytest.mark.parametrize("text", ["²/3", "3/3", "1/", "/2", "-1/2", "9999999999/99999999999", "a/b"])
def test_a_share_is_two_numbers(text):
    from keyreid.commands.options import parse_share

    with pytest.raises(ConfigError, match="write I/N"):
        parse_share(text)
    assert parse_share("007/8") == (7, 8)


def test_other_json_from_people(tmp_path):
    from keyreid.training.engine_config import _read_user_configuration

    for content in (b"[" * 100_000, b"\xff", b'{"a": 1', b"7"):
        (tmp_path / "deepspeed.json").write_bytes(content)
        with pytest.raises(ConfigError, match=r"deepspeed\.json"):
            _read_user_configuration(str(tmp_path / "deepspeed.json"))
