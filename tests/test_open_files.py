"""A set of more shards than a process may have files open: read by each reader, checked, and let go."""

import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from packed import make_dataset, pack_dataset

from keyreid.shards import storage
from keyreid.shards.batch import ClipBatch
from keyreid.shards.storage import LocalShardFiles

FILES = 256
EPOCH = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[2]), int(sys.argv[2])))
from pathlib import Path
sys.path.insert(0, sys.argv[4])
from packed import make_config
from keyreid.shards import open_reader
from keyreid.shards.plan import TrainingPlan
from keyreid.shards.shard_set import ShardSet
from keyreid.shards.verify import verify

if __name__ == "__main__":
    shards = ShardSet.open(sys.argv[1])
    config = make_config(sys.argv[1], data__reader=sys.argv[3], data__identities=8, data__tracklets=4)
    plan = TrainingPlan(shards, config.data, config.clip, 0)
    seen, epoch = set(), (plan.step(0, step) for step in range(plan.steps_per_epoch))
    for batch in open_reader(shards, epoch, config):
        seen |= set(batch.tracklets.tolist())
    assert seen == set(shards.select("train")), len(seen)
    if config.data.reader == "dali":
        assert not any(problems for _, problems in verify(Path(sys.argv[1]), 2))
    print(len(shards.card["shards"]))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("files")
    pack_dataset(make_dataset(root / "source", 100, 3, (1, 2)), root / "source", root / "shards", 1)
    return root / "shards"


@pytest.mark.parametrize("reader", ["dali", "plain"])
def test_an_epoch_of_more_shards_than_files_may_be_open(folder, tmp_path, reader):
    (tmp_path / "epoch.py").write_text(EPOCH)  # a file: workers import it
    command = [sys.executable, tmp_path / "epoch.py", folder, str(FILES), reader, Path(__file__).parent]
    assert int(subprocess.check_output(command, text=True)) == 300 > FILES


def test_a_batch_from_another_process_takes_an_open_file_for_its_large_tensors_alone():
    """Of 8 workers with 4 batches each, 256 were open."""
    small = {"erase": torch.arange(16).view(2, 2, 4).int(), "visibility": torch.rand(2, 6)}
    small |= {name: torch.tensor([3, 1]) for name in ("labels", "identities", "cameras", "tracklets")}
    large = {"images": torch.zeros(2, 2, 3, 256, 128, dtype=torch.uint8), "guidance": torch.rand(2, 2, 6, 64, 32)}
    batch = ClipBatch(**large, **small, keys=["a", "b"])
    assert {name for name, value in batch.__getstate__().items() if isinstance(value, torch.Tensor)} == set(large)
    again = pickle.loads(pickle.dumps(batch))
    for name in large | small:
        assert torch.equal(getattr(again, name), getattr(batch, name))
        assert getattr(again, name).dtype == getattr(batch, name).dtype
    assert again.keys == batch.keys


def open_in(folder: Path) -> int:
    return sum(os.path.realpath(link).startswith(str(folder)) for link in Path("/proc/self/fd").iterdir())


def test_a_file_is_closed_when_nobody_reads_it_any_more(tmp_path, monkeypatch):
    """Threads push each other's files out while they read them."""
    monkeypatch.setattr(storage, "OPEN_FILES", 2)
    paths = [tmp_path / f"{number}.tar" for number in range(16)]
    for number, path in enumerate(paths):
        path.write_bytes(bytes([number]) * 1000)
    files, wrong = LocalShardFiles(paths), []

    def read() -> None:
        for turn in range(3000):
            number = turn * 7 % 16
            if files.read(number, 10, 500) != bytes([number]) * 10:
                wrong.append(number)

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert open_in(tmp_path) == 2
    files = None
    assert open_in(tmp_path) == 0
