"""The commands of README, docs and recipes: each is one that the command line takes, and all run, on small data.

A block of commands begins with ```sh. They run in a folder that has small data where the pages say that data are, with
these differences: a training is one of seconds, keypoints come from the small walkers network (without OpenPifPaf only
rendered people have any), a search has one trial, what goes to a cluster is a dry run (tests/slurm has a real one).
Installation and launchers are marked ```sh no-test.
"""

import importlib.util
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import click
import numpy as np
import pytest
import scipy.io
import typer
from PIL import Image
from test_import import make_table, make_tracks, make_video
from training_runs import run, train
from typer.testing import CliRunner

from keyreid.cli import app
from keyreid.config import Config, _known_keys, load_config
from keyreid.synthetic.walkers import render

REPOSITORY = Path(__file__).resolve().parents[1]
PAGES = sorted(
    path
    for path in (*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/*.md"), *REPOSITORY.glob("shards/*.md"))
    if not path.name.startswith(".")
)
BLOCK = re.compile(r"^```sh([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# In this order, since a page uses what those before it made
RUN_PAGES = (
    *("docs/mars.md", "docs/own_data.md", "docs/own_video.md", "shards/mars.md", "shards/own.md"),
    *("shards/ilids_vid.md", "shards/prid2011.md", "docs/datasets.md", "docs/evaluation.md", "docs/training.md"),
    *("docs/pose.md", "docs/tuning.md", "docs/scaling.md", "docs/slurm.md", "README.md"),
)
NOT_OURS = {
    "python",
    "cp",
    "git",
    "cd",
    "export",
    "sbatch",
    "tail",
    "launch/install-pose",
    "./launch/install-slurm",
    ".venv/bin/pip",
}
STANDS_FOR = {"/data/": "data/", "afterok:JOB": "afterok:7", "$SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT": "0/1"}
PEOPLE = range(1, 9)
POSE = importlib.util.find_spec("openpifpaf") is not None
# What makes a run of any configuration one of seconds.
TINY = [
    *("model.backbone=vit_tiny_patch16_224", "model.weights=null", "model.depth=2", "model.local_heads=6"),
    *("clip.frames=2", "clip.height=64", "clip.width=32", "data.workers=1"),
    *("data.identities=2", "data.tracklets=2", "schedule.epochs=1", "schedule.warmup_epochs=0"),
    *("schedule.steps_per_epoch=2", "training.precision=fp32", "evaluation.pictures=1"),
]


def commands(page: Path, tested_only: bool = False) -> list[list[str]]:
    """The commands of a page as words: lines are joined where they go on and cut at `&&` and `|`; no comments."""
    lines = []
    for info, text in BLOCK.findall(page.read_text()):
        if tested_only and "no-test" in info:
            continue
        lines += re.sub(r"\\\n", " ", text).splitlines()
    found: list[list[str]] = []
    for line in lines:
        found.append([])
        for word in shlex.split(line, comments=True):
            if word in ("&&", "||", "|", ";", "&"):
                found.append([])
            else:
                found[-1].append(word)
    return [words for words in found if words]


def test_all_pages_with_commands_run():
    assert {str(page.relative_to(REPOSITORY)) for page in PAGES if commands(page, tested_only=True)} == set(RUN_PAGES)
    for page in PAGES:  # a block without a language would escape
        blocks = re.findall(r"^```([^\n]*)\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
        assert not [text for info, text in blocks if not info.startswith("sh") and re.search(r"^keyreid ", text, re.M)]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_every_command_is_one_that_there_is(page):
    for words in commands(page):
        if words[0] == "keyreid":
            check_command(words[1:])
        for word in words[:-1] if words[0] == "cp" else words:
            if re.match(r"(\./)?(launch|slurm|configs|examples|benchmarks)/[\w./-]+$", word):
                assert (REPOSITORY / word).exists(), f"{page.name}: {' '.join(words)}: no {word}"


def check_command(arguments: list[str]) -> None:
    """Parse a command line without running it; unknown verbs, options, choices and configuration keys are errors."""
    command = typer.main.get_command(app)
    rest = list(arguments)
    while isinstance(command, click.Group) or hasattr(command, "commands"):
        assert rest and rest[0] in command.commands, f"keyreid {' '.join(arguments)}: no such verb"
        command = command.commands[rest.pop(0)]
    if {"--help", "-h"} & set(rest):
        return
    try:
        command.make_context(command.name, rest)
    except Exception as error:
        pytest.fail(f"keyreid {' '.join(arguments)}: {getattr(error, 'message', None) or error}")
    for word in arguments:
        key, equals, _ = word.partition("=")
        if equals and key.split(".")[0] in Config.model_fields and "." in key:
            assert key in _known_keys(Config), f"keyreid {' '.join(arguments)}: no configuration key {key}"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder that has what the pages speak of, small: datasets, pictures, a table, videos, what other runs left."""
    folder = tmp_path_factory.mktemp("world")
    size = {"frames": (4, 6), "height": 64, "width": 32}
    render(folder / "data/MARS", 8, cameras=3, seed=1, processes=1, tracklets=2, distractors=2, junk=1, **size)
    if POSE:
        shutil.rmtree(folder / "data/MARS/keypoints")  # the renderer's; the pages find their own
    two_cameras(folder / "data/iLIDS-VID/i-LIDS-VID/sequences", ("cam1", "cam2"), "person{:03d}")
    splits = folder / "data/iLIDS-VID/train-test people splits"
    splits.mkdir()
    rows = np.stack([np.random.default_rng(row).permutation(len(PEOPLE)) + 1 for row in range(10)])
    scipy.io.savemat(splits / "train_test_splits_ilidsvid.mat", {"ls_set": rows})
    two_cameras(folder / "data/prid_2011/multi_shot", ("cam_a", "cam_b"), "person_{:04d}", frames=27)
    two_cameras(folder / "data/mine", ("north", "south"), "{}/walk")
    rows = [
        f"mine/{camera}/{n}/walk/{f}.png,{n},{camera}" for camera in ("north", "south") for n in PEOPLE for f in (1, 2)
    ]
    (folder / "data/mine.csv").write_text("\n".join(["path,identity,camera", *rows]))
    sequence = folder / "data/MOT17/train/MOT17-01"
    (sequence / "gt").mkdir(parents=True)
    make_tracks(sequence / "gt/gt.txt")
    for number in range(1, 13):
        picture(sequence / f"img1/{number:06d}.jpg", number, (160, 200))
    for name in ("configs", "slurm", "benchmarks"):
        (folder / name).symlink_to(REPOSITORY / name)
    make_table(folder, people=6)
    for person in range(8):
        for camera in ("north", "south"):
            for frame in range(3):
                picture(folder / f"pictures/person {person}/{camera}/walk 1/{frame}.jpg", person, (70, 30))
    for name in ("yard", "gate"):
        make_video(folder / f"{name}.mp4")
    make_tracks(folder / "yard.txt")
    make_tracks(folder / "gate.csv", header=True)
    rng = np.random.default_rng(0)
    sides = {f"{side}_{what}": rng.integers(1, 4, 6) for side in ("query", "gallery") for what in ("ids", "cameras")}
    np.savez(folder / "matrix.npz", distance=rng.random((6, 6)), **sides)
    return folder


def two_cameras(root: Path, cameras: tuple[str, str], pattern: str, frames: int = 2) -> None:
    """People of two cameras."""
    for camera in cameras:
        for number in PEOPLE:
            for frame in range(1, frames + 1):
                picture(root / camera / pattern.format(number) / f"{frame}.png", number, (64, 32))


def picture(path: Path, person: int, size: tuple[int, int]) -> None:
    """A grey person in noise; [height, width]."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng([person, len(path.name)]).integers(0, 40, (*size, 3))
    Image.fromarray(np.clip(25 * person + noise, 0, 255).astype(np.uint8)).save(path)


def prepare_old_pose_trees() -> None:
    """What the published pipeline left, for the page that imports it."""
    invoke("pose-export", "mars", "data/MARS", "data/MARS/keypoints", "old/poses")
    invoke("pose-export", "mars", "data/MARS", "data/MARS/keypoints", "old/heatmaps", "--kind", "npy")


def prepare_runs() -> None:
    """Runs that the page on evaluation judges: of iLIDS-VID, one and one a split, and somebody else's scores."""
    train_tiny(["configs/ilids_vid.yaml", "name=ilids", "data.shards=shards/ilids_vid"])
    for split in range(10):
        shutil.copytree("runs/ilids", f"runs/ilids-{split}")
    invoke("evaluate", "runs/mars", "--out", "results/other", "evaluation.pictures=0")


def prepare_walkers() -> None:
    """The quickstart's data, and its run."""
    invoke("shard", "mars", "data/MARS", "--out", "shards/walkers")
    train_tiny(["configs/walkers.yaml"])


BEFORE = {
    "docs/evaluation.md": prepare_runs,
    "docs/training.md": prepare_walkers,
    "docs/pose.md": prepare_old_pose_trees,
}
MADE = {
    "docs/mars.md": ["exported/mars.safetensors", "exported/mars.safetensors.card.md", "exported/mars.onnx"],
    "docs/own_data.md": ["runs/people/result.json", "found.json", "found.png"],
    "docs/own_video.md": ["site.parquet", "yard.parquet", "found.png", "yard.faiss"],
    "docs/evaluation.md": ["ranked.png", "guidance.png", "attention.png", "cmc.png", "scores.json"],
    "docs/tuning.md": ["runs/walkers-alpha/best.yaml"],
    "shards/own.md": ["sheet.png"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RUN_PAGES)
def test_pages_run(name, world, monkeypatch):
    monkeypatch.chdir(world)
    BEFORE.get(name, lambda: None)()
    for words in commands(REPOSITORY / name, tested_only=True):
        words = without_missing_keypoints([stand_in(word) for word in words])
        if words[1:] == ["benchmarks/scaling.py"]:
            subprocess.run([sys.executable, words[1]], check=True)
        elif words[0] != "keyreid":
            assert words[0] in NOT_OURS, f"{name}: {' '.join(words)}"
        elif words[1] == "train" and "--dry-run" not in words:
            train_tiny(words[2:])
        elif words[1] == "pose":
            walkers_network(words[1:])
        elif words[1] == "tune":
            one_trial(words[1:])
        elif words[1] == "submit":
            invoke(*words[1:3], "--dry-run", *words[3:])
        else:
            if "runs/mars-released" in words:
                train_tiny(["configs/mars.yaml", "name=mars-released", "model.guidance=released"])
            invoke(*words[1:], *(TINY if words[1] == "train" else ()))
    for path in MADE.get(name, []):
        assert (world / path).is_file(), path


@pytest.mark.slow
def test_the_readmes_python_runs(world, monkeypatch, capsys):
    """On the run and the shards that the page on training made."""
    monkeypatch.chdir(world)
    (code,) = re.findall(r"^```python\n(.*?)^```$", (REPOSITORY / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    exec(compile(code, "README.md", "exec"), {})
    assert "(8, " in capsys.readouterr().out


def stand_in(word: str) -> str:
    for said, meant in STANDS_FOR.items():
        word = word.replace(said, meant)
    return word


def without_missing_keypoints(words: list[str]) -> list[str]:
    """The command without its keypoints, where OpenPifPaf was not there to find them."""
    if not POSE and "--keypoints" in words:
        at = words.index("--keypoints")
        if not Path(words[at + 1]).exists():
            return words[:at] + words[at + 2 :]
    return words


def invoke(*words: str) -> None:
    """Run a command in this process."""
    result = CliRunner().invoke(app, list(words), catch_exceptions=True)
    assert result.exit_code == 0, f"{' '.join(words)}\n{result.output}\n{result.exception!r}"


def train_tiny(words: list[str]) -> None:
    """`keyreid train`, as small as it goes: in a process of its own, as a rank is."""
    overrides = [word for word in words[1:] if "=" in word] + TINY
    run(train, load_config(words[0], [*overrides, "output=runs"]))


def walkers_network(words: list[str]) -> None:
    """`keyreid pose` without a download; nothing where OpenPifPaf is not installed."""
    if not POSE:
        return
    if "--checkpoint" in words:
        words[words.index("--checkpoint") + 1] = "walkers"
    invoke(*[word for word in words if word != "--trust"])


def one_trial(words: list[str]) -> None:
    """`keyreid tune`: the walkers' search for real, with one trial of one epoch; others only checked."""
    if "configs/tune/walkers.yaml" in words:
        changes = [f"settings.{change}" for change in TINY if not change.startswith("clip.")]
        command = [sys.executable, "-m", "keyreid.cli", *words, "trials=1", "concurrency=1", "budget.epochs=1"]
        subprocess.run([*command, *changes], check=True, timeout=300)
        return
    for option in ("--address", "HOST:PORT", "--resume", "--dry-run"):
        words = [word for word in words if word != option]
    invoke(*words, "--dry-run")
