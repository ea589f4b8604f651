"""The table of readers: every name has its function, and options reach it as the command line gives them."""

import importlib
import inspect
import pickle

import pytest
from typer.testing import CliRunner

from keyreid.cli import app
from keyreid.datasets import READERS, parse_options
from keyreid.datasets.tracklet import Frame, Pictures, Tracklet
from keyreid.errors import ConfigError


@pytest.mark.parametrize("name", READERS)
def test_every_name_has_a_reader_with_annotated_options(name):
    reader = getattr(importlib.import_module(f"keyreid.datasets.{READERS[name]}"), f"open_{name}")
    root, *options = inspect.signature(reader).parameters.values()
    assert root.name == "root"
    assert all(option.annotation is not option.empty and option.default is not option.empty for option in options)


def test_commands_name_every_dataset():
    shown = CliRunner().invoke(app, ["pose", "--help"], env={"COLUMNS": "400"}).output
    assert all(name in shown for name in READERS)


def test_options_are_yaml():
    texts = ["max_frames=16", "min_size=[12, 24]", "splits=a=b.json"]
    assert parse_options(texts) == {"max_frames": 16, "min_size": [12, 24], "splits": "a=b.json"}
    with pytest.raises(ConfigError, match="--option speed: write NAME=VALUE"):
        parse_options(["speed"])
    with pytest.raises(ConfigError, match=r"--option size=\[1: the value is not YAML"):
        parse_options(["size=[1"])


def test_pictures_of_a_folder_are_the_frames_that_a_tuple_would_be(tmp_path):
    names = ["a.jpg", "b 1.png", "c.jpg"]
    frames, plain = Pictures(tmp_path, names), tuple(Frame(tmp_path / name) for name in names)
    assert (len(frames), frames[1], frames[-1], frames[::2], list(frames)) == (
        3,
        plain[1],
        plain[2],
        plain[::2],
        [*plain],
    )
    assert frames == plain and hash(frames) == hash(plain) and pickle.loads(pickle.dumps(frames)) == plain
    assert not Pictures(tmp_path, []) and list(Pictures(tmp_path, [])) == []
    with pytest.raises(IndexError):
        frames[3]
    assert Tracklet("k", 1, 1, "all", frames) == Tracklet("k", 1, 1, "all", plain)
