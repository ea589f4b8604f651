"""A network is not taken for one that knows the cameras and people of shards because both number them 1, 2, ..."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from keyreid.checkpoints.same_data import data_about, keep_known, same_data
from keyreid.checkpoints.trained import Trained
from keyreid.checkpoints.weights_file import WeightsHeader, write_weights
from keyreid.config import ClipConfig, ModelConfig


def card(name: str = "folder", cameras: tuple[str, ...] = (), frames: int = 90, identities: int = 2) -> dict:
    counts = {"tracklets": 8, "frames": frames, "identities": identities}
    names = {"camera": {c: n for n, c in enumerate(cameras, 1)}, "identity": {"Ada": 1, "Bob": 2}} if cameras else {}
    return {"name": name, "by_split": {"train": counts, "gallery": counts}, "splits": [], "names": names}


def header(of: dict | None, **about) -> WeightsHeader:
    return WeightsHeader(ModelConfig(), ClipConfig(), [1, 2], [1, 2], about | (data_about(of) if of else {}))


OFFICE, HARBOUR, NUMBERED = (card(cameras=c) for c in (("hall", "lift"), ("quay", "gate"), ("1", "2")))
GROWN = card(cameras=("hall", "lift"), frames=200)
WALKERS, MARS = card("mars", frames=70), card("mars", frames=99, identities=625)


@pytest.mark.parametrize(
    ("trained", "judged", "same"),
    [
        (OFFICE, OFFICE, True),
        (OFFICE, HARBOUR | {"by_split": {"train": {}}}, False),
        (OFFICE, GROWN, True),  # the same cameras, more people
        (NUMBERED, NUMBERED, True),
        (NUMBERED, card(cameras=("1", "2"), frames=91), False),  # numbers are no names
        (MARS, MARS, True),
        (MARS, {**MARS, "by_split": {"gallery": MARS["by_split"]["gallery"]}}, True),  # its test half alone
        (WALKERS, MARS, False),
        (MARS, card("prid2011", frames=99, identities=625), False),
    ],
)
def test_what_is_not_known_to_be_the_same_is_not(trained: dict, judged: dict, same: bool) -> None:
    assert same_data(header(trained), 2, judged) is same
    shards = SimpleNamespace(card=judged, camera_index={1: 0, 2: 1}, identities=np.array([2]))
    network = SimpleNamespace(num_cameras=2, num_identities=2)
    known = Trained(network, None, header(trained), None, None)
    assert known.knows_cameras(shards) is same and known.trained_on(shards, [0]) == ({2} if same else set())


def test_files_that_say_little_are_believed_of_datasets_with_their_own_numbers() -> None:
    earlier = header(None, dataset="mars")
    assert same_data(earlier, 625, MARS) and not same_data(header(None, dataset="folder"), 2, OFFICE)
    assert not same_data(header(None), 625, MARS)
    assert same_data(None, 625, MARS) and not same_data(None, 625, WALKERS) and not same_data(None, 2, OFFICE)


def test_a_training_starts_with_the_mean_of_cameras_that_are_not_its_own(tmp_path) -> None:
    state = {"c": torch.tensor([[1.0, 3.0], [3.0, 5.0]]), "w": torch.zeros(1, 2, 4)}
    path = str(tmp_path / "w.safetensors")
    write_weights(tmp_path / "w.safetensors", state, header(OFFICE))
    own = SimpleNamespace(card=OFFICE, camera_index={1: 0, 2: 1}, label_of={1: 0, 2: 1})
    kept = dict(state)
    assert keep_known(kept, path, own, "w", "c") and torch.equal(kept["c"], state["c"])
    other = SimpleNamespace(
        card=card(cameras=("quay", "gate"), frames=7), camera_index={1: 0, 2: 1}, label_of={1: 0, 2: 1}
    )
    assert not keep_known(kept, path, other, "w", "c") and kept["c"].tolist() == [[2.0, 4.0]]
    heldout = SimpleNamespace(card=OFFICE, camera_index={1: 0, 2: 1}, label_of={1: 0})
    assert not keep_known(dict(state), path, heldout, "w", "c")
