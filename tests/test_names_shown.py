"""Names that a terminal, rich, HTML, PIL or matplotlib would obey or stumble over are shown as they are."""

from __future__ import annotations

import html.parser
import json
import os
import pty
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from damages import write_card
from packed import make_dataset, pack_dataset
from PIL import Image
from typer.testing import CliRunner

from keyreid.cli import app
from keyreid.embedding.vectors import Vectors, VectorsAbout, description, write_vectors
from keyreid.pages import Section, write_page
from keyreid.shards.shard_set import ShardSet
from keyreid.text import printable
from keyreid.visualization.canvas import text_width, titled
from keyreid.visualization.curves import draw_cmc
from keyreid.visualization.strips import Strip, draw_strips

NAMES = [
    *("x [/b]", "Anna [left]", "\x1b[2J\x1b[31mred", "<script>alert(1)</script>", "[link=file:///etc]a", "$x$ ${"),
    *(":smile:", "two\nlines", "back\rwards", "\x9b2J", "turned \u202eround", "a & b", "[bold red]", "\\[/]", "nul\0"),
    *("山田\u3000太郎", "Zoë 🧍", '"quoted"'),  # these are nobody's markup
]
HARMLESS = NAMES[-3:]


def test_only_what_is_obeyed_is_escaped():
    assert [printable(name) for name in HARMLESS] == HARMLESS
    assert printable("\x1b[2J\n\u202e\x9b\ud800") == r"\x1b[2J\n\u202e\x9b\ud800"
    assert all(printable(name).isprintable() or name in HARMLESS for name in NAMES)


@pytest.fixture(scope="module")
def vectors(tmp_path_factory) -> Path:
    """A vector file whose people and cameras have these names."""
    path = tmp_path_factory.mktemp("names") / "gallery.parquet"
    total = len(NAMES)
    columns = {
        **{"key": [f"k{n}" for n in range(total)], "camera": list(range(total)), "frames": [3] * total},
        **{"identity": list(range(total)), "identity_name": NAMES, "camera_name": NAMES[::-1]},
    }
    about = VectorsAbout(8, 2, 4, NAMES[2], {"name": NAMES[0], "sha256": "w"}, fingerprint="f")
    numbers = np.random.default_rng(0).normal(size=(total, 8)).astype(np.float32)
    table = Vectors(about, description(columns), numbers, np.ones((total, 2), np.float32)).table
    write_vectors(path, about, iter([table]))
    return path


def test_search_shows_every_name_in_its_table_and_in_a_picture(vectors, tmp_path):
    words = ["search", str(vectors), "--query", "k0", "--top", "99", "--picture", str(tmp_path / "x.png")]
    result = CliRunner().invoke(app, [*words, "--json", str(tmp_path / "x.json")], env={"COLUMNS": "300"})
    assert result.exit_code == 0, result.output
    for name in NAMES[1:]:
        assert result.output.count(printable(name)) >= 2, name  # a person, and a camera
    assert not set(result.output) & set("\x1b\r\0\x9b\u202e")
    assert Image.open(tmp_path / "x.png").height > 100
    found = json.loads((tmp_path / "x.json").read_text())["results"][0]["hits"]
    assert {hit["identity_name"] for hit in found} == set(NAMES[1:])  # programs get the names themselves


def test_inspect_shows_the_names_of_a_card_and_of_stray_files(tmp_path):
    folder = tmp_path / "shards"
    dataset = make_dataset(tmp_path / "source", identities=2, tracklets=1, frames=(2, 2))
    pack_dataset(replace(dataset, names={"camera": {name: n for n, name in enumerate(NAMES)}}), tmp_path, folder)
    card = json.loads((folder / "dataset.json").read_text())
    write_card(folder, card | {"name": NAMES[2], "tool": NAMES[1], "by_split": {NAMES[2]: card["by_split"]["train"]}})
    result = CliRunner().invoke(app, ["inspect", str(folder)])
    assert result.exit_code == 0, result.output
    assert "\x1b" not in result.output
    assert printable(NAMES[2]) in result.output
    assert NAMES[1] in result.output
    for name in ("\x1b[2Jx", "a [b]", os.fsdecode(b"\xff.tar")):
        (folder / name).write_bytes(b"")
    result = CliRunner().invoke(app, ["inspect", str(folder), "--verify"])
    assert result.exit_code == 1
    assert "\x1b" not in result.output
    assert all(f"{name}: is no part of the dataset" in result.output for name in (r"\x1b[2Jx", "a [b]", r"\udcff.tar"))


def test_an_error_on_the_terminal_obeys_nothing(tmp_path):
    words = [sys.executable, "-m", "keyreid.cli", "inspect", str(tmp_path / "\x1b[2J[/b]")]
    result = subprocess.run(words, capture_output=True, text=True)
    assert result.returncode == 1
    assert r"\x1b[2J[/b]/dataset.json: no dataset card" in result.stderr
    assert "\x1b" not in result.stderr


def test_progress_on_a_terminal_takes_names_as_they_are():
    parent, child = pty.openpty()
    code = "from keyreid.progress import track\nfor _ in track(range(3), 3, 'run x [/b] [left]'): pass"
    process = subprocess.Popen([sys.executable, "-c", code], stderr=child, env={**os.environ, "COLUMNS": "200"})
    os.close(child)
    shown = b""
    try:
        while more := os.read(parent, 4096):
            shown += more
    except OSError:  # its end
        pass
    os.close(parent)
    assert process.wait() == 0
    assert b"run x [/b] [left]" in shown


def test_a_page_escapes_every_text(tmp_path):
    table = [["name"], *([name] for name in NAMES)]
    sections = [
        Section(name, [name], name, table, 0, [(f"{n} # ?%.png", name)], [name]) for n, name in enumerate(NAMES)
    ]
    write_page(tmp_path / "x.html", NAMES[3], sections)
    tags: list[tuple[str, dict]] = []

    class Reader(html.parser.HTMLParser):
        def handle_starttag(self, tag, attrs):
            tags.append((tag, dict(attrs)))

    Reader().feed((tmp_path / "x.html").read_text())
    assert not any(tag == "script" for tag, _ in tags)
    pictures = [attrs for tag, attrs in tags if tag == "img"]
    assert pictures[0]["src"] == "0%20%23%20%3F%25.png"
    assert pictures[3]["alt"] == NAMES[3]


def test_pictures_take_every_name_in_one_line(tmp_path):
    for name in NAMES:
        image, _, top = titled(10, 10, name, name)
        assert image.width >= text_width(name, 22, bold=True)
        assert top == titled(10, 10, "a", "a")[2]
    black = np.zeros((8, 4, 3), np.uint8)
    draw_strips([Strip(name, [name], [(name, [black])]) for name in NAMES], NAMES[2], NAMES[7])
    score = {"cmc": [0.5, 1.0], "mAP": 0.5, "valid_queries": 2}
    draw_cmc(dict.fromkeys(NAMES, score), "$x$ ${ $\\frac{", tmp_path / "cmc.png")
    assert Image.open(tmp_path / "cmc.png").width > 100


def test_the_json_of_a_tracklet_is_printed_on_one_line(tmp_path):
    dataset = make_dataset(tmp_path / "source", identities=2, tracklets=1, frames=(2, 2))
    shards = pack_dataset(dataset, tmp_path / "source", tmp_path / "shards")
    key = shards.tracklets[0].key
    result = CliRunner().invoke(app, ["inspect", str(tmp_path / "shards"), "--tracklet", key])
    assert json.loads(result.output) == ShardSet.open(tmp_path / "shards").metadata(0)
