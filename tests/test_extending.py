"""The examples of docs/extending.md, taken from the page: each touches at most two files, and works for real.

An example is applied to a copy of the project. Rendered walkers are packed once; each test runs one process of its own,
which imports keyreid from its copy and trains for a few steps.
"""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from training_runs import logged, newest_tensors, toy_config

from keyreid.config import Config, save_config
from keyreid.datasets import open_dataset
from keyreid.shards.layout import plan_shards
from keyreid.shards.pack import finish, pack
from keyreid.shards.shard_set import ShardSet
from keyreid.shards.writer import PackSettings
from keyreid.synthetic.walkers import render

REPOSITORY = Path(__file__).resolve().parents[1]
PAGE = (REPOSITORY / "docs" / "extending.md").read_text()
TITLES = ("A dataset", "A loss", "A backbone", "A guidance mode", "A sampler", "A tracker")
NEW_FILE = re.compile(r"^`(keyreid/[\w/]+\.py)`:\n\n```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
DIFF = re.compile(r"^```diff\n(.*?)^```$", re.MULTILINE | re.DOTALL)
MOST_TOUCHED = 2
KEYREID = """
import sys
from keyreid.cli import app

def keyreid(*words):
    app([str(word) for word in words], standalone_mode=False)
"""
TRAIN = "keyreid('train', *sys.argv[1:])\n"


def section(title: str) -> str:
    """The text below a heading of the page."""
    return re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)[1]


def git(copy: Path, *words: str, text: str | None = None) -> str:
    identity = ("-c", "user.name=test", "-c", "user.email=test@example.org")
    command = ["git", "-C", str(copy), *identity, *words]
    return subprocess.run(command, input=text, capture_output=True, text=True, check=True).stdout


def copy_of_project(folder: Path) -> Path:
    """The files that git knows, committed in a repository of their own."""
    for name in git(REPOSITORY, "ls-files", "-z").split("\0")[:-1]:
        if (REPOSITORY / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(REPOSITORY / name, folder / name)
    git(folder, "init", "--quiet")
    git(folder, "add", "--all", "--force")
    git(folder, "commit", "--quiet", "--message", "The project")
    return folder


def extend(copy: Path, title: str) -> list[str]:
    """Write the example's file and apply its diffs; gives the files of the project that this touched."""
    text = section(title)
    for name, code in NEW_FILE.findall(text):
        assert not (copy / name).exists()
        (copy / name).write_text(code)
    for diff in DIFF.findall(text):
        git(copy, "apply", "-", text=diff)
    return [line.split("\t")[2] for line in git(copy, "diff", "--numstat", "HEAD").splitlines()]


def run(copy: Path, code: str, *words: object) -> str:
    """What Python code prints, with keyreid from the copy."""
    path = os.pathsep.join([str(copy), str(REPOSITORY / "tests")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", KEYREID + code, *map(str, words)]
    done = subprocess.run(command, env=environment, cwd=copy.parent, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture
def extended(request, tmp_path):
    """A copy of the project with the example that the test names."""
    copy = copy_of_project(tmp_path / "project")
    assert 1 <= len(extend(copy, request.param)) <= MOST_TOUCHED
    return copy


example = lambda title: pytest.mark.parametrize("extended", [title], indirect=True, ids=[title])  # noqa: E731


@pytest.fixture(scope="module")
def walkers(tmp_path_factory) -> Path:
    """Twelve rendered people, as MARS."""
    root = tmp_path_factory.mktemp("walkers") / "MARS"
    render(root, 12, 3, frames=(4, 6), height=64, width=32, distractors=2, junk=1, quiet=True)
    return root


@pytest.fixture(scope="module")
def shards(walkers) -> Path:
    layout = plan_shards(open_dataset("mars", walkers), PackSettings(walkers, walkers / "keypoints"), 10**6)
    pack(layout, walkers.parent / "shards", quiet=True)
    finish(layout, walkers.parent / "shards")
    return walkers.parent / "shards"


@pytest.fixture
def config(shards, tmp_path) -> tuple[Path, Config]:
    """The file of a run of six steps in two epochs, judged after them."""
    settings = toy_config(
        shards,
        tmp_path / "runs",
        data={"reader": "plain"},
        schedule={"epochs": 2, "steps_per_epoch": 3},
        tracking={"sinks": []},
    )
    save_config(settings, tmp_path / "run.yaml")
    return tmp_path / "run.yaml", settings


def test_each_example_touches_at_most_two_files(tmp_path):
    """One after another on one copy, each counted by itself; all together keep the rules of the house."""
    copy = copy_of_project(tmp_path)
    assert tuple(re.findall(r"^## (.*)$", PAGE, re.MULTILINE)) == TITLES
    for title in TITLES:
        touched = extend(copy, title)
        assert 1 <= len(touched) <= MOST_TOUCHED, f"{title}: {touched}"
        assert all(name.startswith("keyreid/") for name in touched)
        git(copy, "add", "--all")
        git(copy, "commit", "--quiet", "--message", title)
    tests = [copy / "tests" / name for name in ("test_house.py", "test_datasets_readers.py")]
    code = "import pytest; sys.exit(pytest.main(sys.argv[1:]))"
    run(copy, code, *tests, "-p", "no:cacheprovider", f"--rootdir={copy}")


DATASET = """
from pathlib import Path
from keyreid.errors import DataError

root, out, option = sys.argv[1:]
keyreid("shard", "corridor", root, "--out", out, "--option", option)
keyreid("inspect", out, "--verify", "--against", root)
Path(root, "train", "stranger").mkdir()
try:
    keyreid("shard", "corridor", root, "--out", out)
except DataError as error:
    print("refused:", error)
"""


@example("A dataset")
@pytest.mark.slow
def test_dataset(extended, walkers, tmp_path):
    """The walkers under other names are packed as MARS's are, but for distractors and junk."""
    root, expected = tmp_path / "corridor", {}
    for tracklet in open_dataset("mars", walkers).tracklets:
        if tracklet.identity > 0:
            folder = root / tracklet.split / tracklet.key
            folder.mkdir(parents=True)
            for frame in tracklet.frames:
                shutil.copy(frame.path, folder)
            expected[tracklet.key] = (tracklet.identity, tracklet.camera, tracklet.split, len(tracklet.frames))
    shutil.copytree(walkers / "keypoints", root / "keypoints")
    said = run(extended, DATASET, root, tmp_path / "packed", "min_frames=5")
    assert "are whole" in said and f"the same as {root}" in said
    packed = ShardSet.open(tmp_path / "packed")
    given = {t.key: (t.identity, t.camera, t.split, t.frames) for t in packed.tracklets}
    assert given == {key: row for key, row in expected.items() if row[3] >= 5} != expected
    assert packed.card["counts"]["frames_with_keypoints"] == packed.card["counts"]["frames"]
    assert f"refused: {root}/train/stranger: not a tracklet's folder such as 0007C2T0013" in said


LOSS = """
import torch
import torch.nn.functional as F
from keyreid.losses import contrastive_loss

torch.manual_seed(0)
labels = torch.tensor([0, 0, 0, 1, 1, 2])
features, weights = torch.randn(2, 6, 8, requires_grad=True), torch.tensor([[1.0] * 6, [1, 0, 1, 1, 1, 1]])
for part in range(2):
    there = [n for n in range(6) if weights[part, n]]
    unit, losses = F.normalize(features[part], dim=-1), []
    for a in there:
        same = [n for n in there if n != a and labels[n] == labels[a]]
        all_ = torch.logsumexp(torch.stack([unit[a] @ unit[n] / 0.1 for n in there if n != a]), 0)
        losses.append(-sum(unit[a] @ unit[n] / 0.1 - all_ for n in same) / max(len(same), 1))
    torch.testing.assert_close(contrastive_loss(features, labels, weights)[part], sum(losses) / len(there))
weights[1] = torch.tensor([1.0, 0, 0, 0, 0, 0])
contrastive_loss(features, labels, weights).sum().backward()
assert features.grad.isfinite().all()
"""


@example("A loss")
@pytest.mark.slow
def test_loss(extended, config):
    """It is what its formula says, is logged, and is part of what is minimised."""
    path, settings = config
    said = run(extended, TRAIN + LOSS, path, "loss.contrastive=0.5")
    assert len(re.findall(r"contrastive \d\.\d+/\d\.\d+", said)) == 6
    loss = settings.loss
    weights = {"identity": loss.identity, "triplet": loss.triplet, "centre": loss.centre, "contrastive": 0.5}
    total = [loss.attention * value for _, value in logged(settings, "train/attention")]
    for branch, share in (("global", loss.alpha), ("parts", 1 - loss.alpha)):
        for name, weight in weights.items():
            for step, value in logged(settings, f"train/{name}_{branch}"):
                assert name != "contrastive" or value > 0
                total[step - 1] += share * weight * value
    assert [value for _, value in logged(settings, "train/loss")] == pytest.approx(total, rel=1e-5)


BACKBONE = """
import multiprocessing
from keyreid.training import loop  # imported once, for all forks
import timm, torch
from training_runs import StopAfter
from keyreid.config import load_config
from keyreid.training.run import train

def apart(target, *arguments):  # DeepSpeed trains once a process
    process = multiprocessing.get_context("fork").Process(target=target, args=arguments)
    process.start()
    process.join()
    assert process.exitcode == 0

def train_four_steps():
    train(load_config(path, [*words, "name=stopped"]), stop=StopAfter(4))

path, out, *words = sys.argv[1:]
torch.manual_seed(0)
torch.save(timm.create_model("convnext_atto").state_dict(), f"{out}/atto.pth")
words += ["model.backbone=convnext_atto", "model.depth=null", "model.local_heads=4", f"model.weights={out}/atto.pth"]
apart(keyreid, "train", path, *words)
apart(train_four_steps)
apart(keyreid, "train", path, *words, "name=stopped")
keyreid("export", "weights", f"{out}/runs/toy", f"{out}/toy.safetensors")
keyreid("export", "onnx", f"{out}/runs/toy", f"{out}/toy.onnx")
keyreid("evaluate", f"{out}/toy.safetensors", "--out", f"{out}/judged", "data.shards=" + load_config(path).data.shards)
"""


@example("A backbone")
@pytest.mark.slow
def test_backbone(extended, config, tmp_path):
    """It starts from timm's file, trains, resumes bit for bit, is exported, and judged from the file as in its run."""
    pytest.importorskip("onnxruntime")
    path, settings = config
    said = run(extended, BACKBONE, path, tmp_path, "training.activation_checkpointing=true")
    assert "network: convnext_atto" in said and "resuming from" in said
    assert re.search(r"atto\.pth: loaded \d\d+ of \d+ entries", (settings.run_dir / "logs" / "rank-0.log").read_text())
    stopped = settings.model_copy(update={"name": "stopped"})
    assert len(logged(settings, "train/loss")) == 6
    assert logged(stopped, "train/loss") == logged(settings, "train/loss")
    ours, theirs = newest_tensors(stopped), newest_tensors(settings)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    scores = json.loads((tmp_path / "judged" / "scores.json").read_text())
    assert scores["mAP"] == pytest.approx(json.loads((settings.run_dir / "result.json").read_text())["mAP"])
    assert (tmp_path / "toy.onnx").stat().st_size > 0  # what it gives was compared with the network


GUIDANCE = """
import torch
from keyreid.checkpoints.trained import load_trained
from keyreid.config import load_config
from keyreid.guidance import named

network, _ = load_trained(load_config(sys.argv[1]).run_dir)
assert network.guidance.name == network.local_branch.mode.name == "masked"
torch.manual_seed(0)
images, cameras = torch.rand(3, 2, 3, 64, 32), torch.tensor([0, 1, -1])
soft = torch.rand(3, 1, 6, 4, 2).expand(-1, 2, -1, -1, -1)
hard = (soft > 0.5).float()
hard[:, :, 0] = 1
with torch.no_grad():
    masked = [network.features(images, heatmaps, cameras).part_features for heatmaps in (soft, hard)]
    network.local_branch.mode = named("aligned")
    aligned = [network.features(images, heatmaps, cameras).part_features for heatmaps in (soft, hard)]
assert (masked[0] - aligned[0]).abs().max() > 1e-3 and not torch.equal(masked[0], masked[1])
torch.testing.assert_close(masked[1], aligned[1])  # heatmaps of 0 and 1 are masks already
"""


@example("A guidance mode")
@pytest.mark.slow
def test_guidance(extended, config):
    """A run is trained and judged by it, its weights name it, and it decides the parts' features."""
    path, settings = config
    said = run(extended, TRAIN + GUIDANCE, path, "model.guidance=masked")
    assert "guidance masked" in said
    assert len(logged(settings, "train/loss")) == 6 and (settings.run_dir / "result.json").is_file()


SAMPLER = """
from keyreid.training.step import Stepper

plain = Stepper.step
def step(self, batch, number):
    print("tracklets:", *batch.keys)
    return plain(self, batch, number)
Stepper.step = step
"""


@example("A sampler")
@pytest.mark.slow
def test_sampler(extended, config, shards):
    """Every training identity comes once an epoch, with two tracklets of its own."""
    path, settings = config
    words = ["data.sampler=balanced", "data.identities=2", "schedule.steps_per_epoch=null"]
    said = run(extended, SAMPLER + TRAIN, path, *words)
    opened = ShardSet.open(shards)
    rows = [line.split()[1:] for line in said.splitlines() if line.startswith("tracklets:")]
    assert len(rows) == len(logged(settings, "train/loss")) == 6
    epochs = [[key for row in part for key in row] for part in (rows[:3], rows[3:])]
    for keys in epochs:
        who = [opened.tracklets[opened.position_of(key)].identity for key in keys]
        assert who[::2] == who[1::2] and sorted(who[::2]) == [1, 2, 3, 4, 5, 6]
        assert len(set(keys)) == len(keys)  # everyone has two tracklets at least
    assert epochs[0] != epochs[1]


@example("A tracker")
@pytest.mark.slow
def test_tracker(extended, config):
    """The table holds each number that was logged, once."""
    path, settings = config
    run(extended, TRAIN, path, "tracking.sinks=[csv]")
    with (settings.run_dir / "tracking" / "metrics.csv").open(newline="") as file:
        rows = [(name, int(step), float(value)) for step, name, value in csv.reader(file)]
    names = {name for name, _, _ in rows}
    assert {"train/loss", "train/lr", "test/torchreid/mAP"} <= names
    assert sorted(rows) == sorted((name, *point) for name in names for point in logged(settings, name))
