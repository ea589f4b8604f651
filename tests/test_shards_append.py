"""A set that grows: what is new is packed beside what was there, which stays as it is; and identities in an order."""

from __future__ import annotations

import pickle
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from packed import make_dataset
from typer.testing import CliRunner

from keyreid.cli import app
from keyreid.datasets.tracklet import Dataset
from keyreid.errors import DataError
from keyreid.shards import layout as layouts
from keyreid.shards.layout import plan_append, plan_shards
from keyreid.shards.pack import finish, missing, pack
from keyreid.shards.shard_set import ShardSet
from keyreid.shards.verify import compare, verify
from keyreid.shards.writer import PackSettings

DAYS = (10, 20, 21, 32)  # tracklets that were recorded after so many days


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    root = tmp_path_factory.mktemp("source")
    return make_dataset(root), root


def until(dataset: Dataset, day: int) -> Dataset:
    """What was recorded until then: people and cameras come in no order, a dataset has its own."""
    there = np.sort(np.random.default_rng(2).permutation(32)[:day])
    return replace(dataset, tracklets=tuple(dataset.tracklets[n] for n in there))


def add(dataset: Dataset, root, out) -> None:
    settings = PackSettings(root)
    layout = plan_append(dataset, settings, ShardSet.open(out), 150_000)
    pack(layout, out, quiet=True)
    finish(layout, out)


def members(shards: ShardSet) -> dict[str, tuple]:
    """All that a set holds, by key."""
    return {
        record.key: (
            (*record.facts, record.visible.tolist(), shards.metadata(position), shards.keypoints(position).tobytes()),
            [shards.read_frame(position, frame) for frame in range(record.frames)],
        )
        for position, record in enumerate(shards.tracklets)
    }


def test_three_days_are_the_set_packed_at_once_and_old_bytes_stay(source, tmp_path):
    dataset, root = source
    layout = plan_shards(until(dataset, DAYS[0]), PackSettings(root), 150_000)
    pack(layout, tmp_path / "grown", quiet=True)
    finish(layout, tmp_path / "grown")
    for day in DAYS[1:]:
        before = {p: p.read_bytes() for p in (tmp_path / "grown").iterdir() if p.suffix in (".tar", ".npz")}
        add(until(dataset, day), root, tmp_path / "grown")
        assert all(path.read_bytes() == content for path, content in before.items())
        assert len(ShardSet.open(tmp_path / "grown")) == day
    once = plan_shards(dataset, PackSettings(root), 150_000)
    pack(once, tmp_path / "once", quiet=True)
    finish(once, tmp_path / "once")
    grown, whole = ShardSet.open(tmp_path / "grown"), ShardSet.open(tmp_path / "once")
    assert members(grown) == members(whole)
    differs = ("shards", "card_sha256", "counts")
    assert {k: v for k, v in grown.card.items() if k not in differs} == {
        k: v for k, v in whole.card.items() if k not in differs
    }
    assert grown.card["counts"] == whole.card["counts"]
    assert not [problem for _, found in verify(tmp_path / "grown") for problem in found]
    assert not [problem for _, found in compare(grown, dataset, PackSettings(root)) for problem in found]
    assert plan_append(dataset, PackSettings(root), grown) is None


@pytest.mark.parametrize("after", [1, 2, 3])
def test_a_kill_leaves_the_set_as_it_was_and_the_next_try_goes_on(source, tmp_path, after):
    """SIGKILL when so many files of the new shards were begun."""
    dataset, root = source
    layout = plan_shards(until(dataset, 10), PackSettings(root), 150_000)
    pack(layout, tmp_path, quiet=True)
    finish(layout, tmp_path)
    card = (tmp_path / "dataset.json").read_bytes()
    code = (
        "import os, pickle, signal, sys; from keyreid.shards import pack as packing, writer\n"
        "replace, seen = writer.replace_bytes, []\n"
        "def killing(*args):\n"
        f"    seen.append(1)\n    len(seen) == {after} and os.kill(os.getpid(), signal.SIGKILL)\n    replace(*args)\n"
        "writer.replace_bytes = packing.replace_bytes = killing\n"
        "layout, out = pickle.load(sys.stdin.buffer)\n"
        "packing.pack(layout, out, quiet=True); packing.finish(layout, out)"
    )
    layout = plan_append(until(dataset, 24), PackSettings(root), ShardSet.open(tmp_path), 150_000)
    killed = subprocess.run([sys.executable, "-c", code], input=pickle.dumps((layout, tmp_path)), check=False)
    assert killed.returncode == -signal.SIGKILL
    assert (tmp_path / "dataset.json").read_bytes() == card
    assert len(ShardSet.open(tmp_path)) == 10
    again = plan_append(until(dataset, 24), PackSettings(root), ShardSet.open(tmp_path), 150_000)
    _, kept = pack(again, tmp_path, quiet=True)
    assert (kept > 0) == (after > 1)
    finish(again, tmp_path)
    assert len(ShardSet.open(tmp_path)) == 24
    assert not [problem for _, found in verify(tmp_path) for problem in found]


@pytest.mark.parametrize("change", ["identity", "frames", "settings", "names"])
def test_what_changed_since_is_refused_by_name(source, tmp_path, change):
    dataset, root = source
    named = replace(until(dataset, 10), names={"identity": {"anna": 1}, "camera": {}})
    layout = plan_shards(named, PackSettings(root), 150_000)
    pack(layout, tmp_path, quiet=True)
    finish(layout, tmp_path)
    grown, settings = replace(until(dataset, 24), names=named.names), PackSettings(root)
    first = grown.tracklets[3]
    if change == "settings":
        settings = PackSettings(root, parts=3)
    elif change == "names":
        grown = replace(grown, names={"identity": {"adam": 1, "anna": 2}, "camera": {}})
    else:
        other = (
            replace(first, identity=77)
            if change == "identity"
            else replace(first, frames=first.frames[:1], keypoints=None)
        )
        grown = replace(grown, tracklets=(*grown.tracklets[:3], other, *grown.tracklets[4:]))
    named = {"settings": "other settings", "names": "anna has the number 1"}.get(change, first.key)
    with pytest.raises(DataError, match=named):
        plan_append(grown, settings, ShardSet.open(tmp_path), 150_000)


def test_the_command_appends_and_says_when_nothing_is_new(tmp_path):
    make_dataset(tmp_path / "source", identities=4)
    for path in sorted((tmp_path / "source").iterdir()):  # KEY/frames -> camera/identity/tracklet/frames
        place = tmp_path / "people" / path.name[4:6] / path.name[:4] / path.name
        place.parent.mkdir(parents=True, exist_ok=True)
        if path.name != "0003C1T0003":
            path.rename(place)

    def shard(*options: str) -> str:
        words = ["shard", "folder", str(tmp_path / "people"), "--out", str(tmp_path / "shards"), *options]
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 0, result.output
        return result.output

    assert "15 tracklets" in shard()
    assert "nothing is new: all 15 tracklets" in shard("--append")
    (tmp_path / "source" / "0003C1T0003").rename(tmp_path / "people" / "C1" / "0003" / "0003C1T0003")
    assert "1 tracklets" in shard("--append", "--dry-run")
    assert "16 tracklets" in shard("--append")
    assert len(ShardSet.open(tmp_path / "shards").card["shards"]) == 2


def test_an_order_of_identities_cuts_none_and_keeps_splits_apart(source, tmp_path):
    dataset, root = source
    settings = PackSettings(root, order=5)
    layout = plan_shards(until(dataset, 32), settings, 60_000)
    pack(layout, tmp_path, quiet=True)
    card = finish(layout, tmp_path)
    shards = ShardSet.open(tmp_path)
    assert card["settings"]["order"] == 5
    train = [record for record in shards.tracklets if record.split == "train"]
    people = list(dict.fromkeys(record.identity for record in train))
    assert sorted(people) == [0, 1, 2, 3] and people != sorted(people)
    assert [r.identity for r in train] == [person for person in people for _ in range(4)]
    assert all(len({record.shard for record in train if record.identity == person}) == 1 for person in people)
    assert len({record.shard for record in train}) > 1
    splits = [{record.split for record in shards.tracklets if record.shard == n} for n in range(len(card["shards"]))]
    assert all(len(split) == 1 for split in splits)
    # Another seed, another order; the order of one identity does not depend on who else is there.
    others = [t.identity for _, group in plan_shards(dataset, PackSettings(root, order=6)).shards for t in group]
    assert others != [record.identity for record in shards.tracklets]
    few = plan_shards(replace(dataset, tracklets=tuple(t for t in dataset.tracklets if t.identity != 1)), settings)
    some = list(dict.fromkeys(t.identity for _, group in few.shards for t in group if t.split == "train"))
    assert some == [person for person in people if person != 1]
    assert not [problem for _, found in compare(shards, dataset, settings) for problem in found]


def test_a_share_asks_for_no_other_shares_keypoints_and_notes_what_it_finished(source, tmp_path, monkeypatch):
    dataset, root = source
    asked = []
    real = layouts.fingerprint
    monkeypatch.setattr(layouts, "fingerprint", lambda name, *rest: asked.append(name) or real(name, *rest))
    layout = plan_shards(dataset, PackSettings(root), 150_000)
    names = [name for name, _ in layout.shards]
    for number in (1, 2, 0):
        asked.clear()
        pack(plan_shards(dataset, PackSettings(root), 150_000), tmp_path, share=(number, 3), quiet=True)
        assert asked == names[number::3]
    asked.clear()
    finish(layout, tmp_path)
    assert not asked
    assert not list(tmp_path.glob(".packed-*"))
    finish(layout, tmp_path)  # nobody packed since: all is asked of the dataset
    assert asked == names


def test_a_share_of_checking_checks_its_shards_alone(source, tmp_path):
    dataset, root = source
    layout = plan_shards(dataset, PackSettings(root), 60_000)
    pack(layout, tmp_path, quiet=True)
    finish(layout, tmp_path)
    names = [name for name, _ in layout.shards]
    for number in (1, 3):
        with (tmp_path / names[number]).open("r+b") as file:
            file.seek(3000)
            file.write(b"xyz" * 300)
    (tmp_path / "stray").touch()
    found = {n: {p.file for _, problems in verify(tmp_path, share=(n, 3)) for p in problems} for n in range(3)}
    assert found == {0: {names[3], "stray"}, 1: {names[1]}, 2: set()}
    result = CliRunner().invoke(app, ["inspect", str(tmp_path), "--verify", "--share", "2/3"])
    assert result.exit_code == 0 and f"{len(names[2::3])} shards are whole" in result.output
    assert CliRunner().invoke(app, ["inspect", str(tmp_path), "--verify", "--share", "1/3"]).exit_code == 1


def test_what_an_earlier_packing_noted_does_not_count(source, tmp_path):
    """The dataset changed between two tries: what was packed of the old one is missing."""
    dataset, root = source
    pack(plan_shards(dataset, PackSettings(root), 150_000), tmp_path, share=(0, 2), quiet=True)
    first = replace(dataset.tracklets[0], frames=dataset.tracklets[0].frames[:1], keypoints=None)
    changed = replace(dataset, tracklets=(first, *dataset.tracklets[1:]))
    layout = plan_shards(changed, PackSettings(root), 150_000)
    pack(layout, tmp_path, share=(1, 2), quiet=True)
    assert missing(layout, tmp_path) == [name for name, _ in layout.shards][::2]
    with pytest.raises(DataError, match="run their shares again"):
        finish(layout, tmp_path)
