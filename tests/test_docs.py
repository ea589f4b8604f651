"""The commands of README, docs, recipes: each is one that the command line takes, and the main pages run on small data.

A block of commands begins with ```sh. Those that need a download, a GPU, a cluster or hours are marked ```sh no-test:
they are held against the command line all the same.
"""

import re
import shlex
from collections import Counter
from pathlib import Path

import click
import numpy as np
import pytest
import typer
from PIL import Image
from test_import import make_table, make_tracks, make_video
from training_runs import run, train
from typer.testing import CliRunner

from keyreid.cli import app
from keyreid.config import Config, _known_keys, load_config
from keyreid.datasets.walkers import render

REPOSITORY = Path(__file__).resolve().parents[1]
PAGES = sorted(
    path
    for path in (*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/*.md"), *REPOSITORY.glob("shards/*.md"))
    if not path.name.startswith(".")
)
BLOCK = re.compile(r"^```sh([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
RUN_PAGES = ("docs/README.md", "docs/mars.md", "docs/own_data.md", "docs/own_video.md")
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


def test_blocks_are_marked_and_counted():
    counts = Counter(
        "no-test" if "no-test" in info else "tested"
        for name in RUN_PAGES
        for info, _ in BLOCK.findall((REPOSITORY / name).read_text())
    )
    print(dict(counts))
    assert counts["tested"] >= 2 * counts["no-test"] > 0


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
    """A folder that has what the pages speak of, small: MARS (walkers), pictures, a table, videos, configurations."""
    folder = tmp_path_factory.mktemp("world")
    render(
        folder / "data" / "MARS",
        8,
        cameras=3,
        seed=1,
        processes=1,
        tracklets=2,
        frames=(4, 6),
        height=64,
        width=32,
        distractors=2,
        junk=1,
    )
    (folder / "configs").symlink_to(REPOSITORY / "configs")
    make_table(folder, people=6)
    rng = np.random.default_rng(0)
    for person in range(8):
        for camera in ("north", "south"):
            place = folder / "pictures" / f"person {person}" / camera / "walk 1"
            place.mkdir(parents=True)
            for frame in range(3):
                pixels = np.clip(30 * person + rng.integers(0, 40, (70, 30, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(place / f"{frame}.jpg")
    for name in ("yard", "gate"):
        make_video(folder / f"{name}.mp4")
    make_tracks(folder / "yard.txt")
    make_tracks(folder / "gate.csv", header=True)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", RUN_PAGES)
def test_pages_run(name, world, monkeypatch):
    """In their order, since a page uses what those before it made."""
    monkeypatch.chdir(world)
    for words in commands(REPOSITORY / name, tested_only=True):
        assert words[0] == "keyreid", f"{name}: only keyreid's commands are tested: {' '.join(words)}"
        if words[1] == "train":
            _train(words[2:])
        else:
            result = CliRunner().invoke(app, words[1:], catch_exceptions=True)
            assert result.exit_code == 0, f"{' '.join(words)}\n{result.output}\n{result.exception!r}"
    made = {
        "docs/mars.md": ["exported/mars.safetensors", "exported/mars.safetensors.card.md", "exported/mars.onnx"],
        "docs/own_data.md": ["runs/people/result.json", "found.json", "found.png"],
        "docs/own_video.md": ["site.parquet", "yard.parquet", "found.png", "yard.faiss"],
    }
    for path in made.get(name, []):
        assert (world / path).is_file(), path


def _train(words: list[str]) -> None:
    """`keyreid train`, as small as it goes: in a process of its own, as a rank is."""
    overrides = [word for word in words[1:] if "=" in word] + TINY
    if "--dry-run" in words:
        result = CliRunner().invoke(app, ["train", words[0], "--dry-run", *overrides])
        assert result.exit_code == 0, f"{result.output}\n{result.exception!r}"
        return
    run(train, load_config(words[0], [*overrides, "output=runs"]))
