"""The table of deliberate breaks does not rot: each can still be made, and its tests are there."""

import importlib.util
import shlex
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]


def table():
    spec = importlib.util.spec_from_file_location("mutations", REPOSITORY / "benchmarks" / "mutations.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_break_can_still_be_made():
    mutations = table()
    assert [why for each in mutations.BREAKS if (why := mutations.stale(each))] == []
    assert all(each.old != each.new for each in mutations.BREAKS)
    assert len({each.name for each in mutations.BREAKS}) == len(mutations.BREAKS) > 85


def test_its_tests_are_there():
    words = {word for each in table().BREAKS for word in shlex.split(each.tests) if word.endswith(".py")}
    assert [word for word in sorted(words) if not (REPOSITORY / word).is_file()] == []
