"""Names with markup, formulas or a terminal's escapes: shown as they are, steering nothing, in every output."""

import html
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from keyreid.cli import app
from keyreid.embedding.vectors import Vectors, VectorsAbout, description
from keyreid.evaluation.pictures import write_result_page
from keyreid.evaluation.protocols import PROTOCOLS
from keyreid.pages import Section, write_page
from keyreid.plain_text import cell, say, visible
from keyreid.visualization.canvas import text_width
from keyreid.visualization.curves import draw_cmc
from keyreid.visualization.ranked import RankedRow, Tile, draw_ranked
from keyreid.visualization.strips import Strip, draw_strips

MARKUP = [
    "x [/b]",
    "Anna [left]",
    "[red]R[/red]",
    "[link=file:///etc]L[/link]",
    "\\[b]",
    "<b>&amp;",
    "{task.total}",
    "$\\frac{",
    "%s",
]
STEERING = [
    "\x1b[2J\x1b[31mX",
    "a\rb",
    "a\bb",
    "\x9b2J",
    "\x1b]0;title\x07",
    "\u202egnp.exe",
    "\u2066x",
    "two\nlines",
    "tab\tbed",
    "\x00",
]
NAMES = [*MARKUP, *STEERING, "🙂 é", "_underscore", ""]
CONTROLS = re.compile("[\0-\x09\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def test_what_steers_is_spelt_out(capsys):
    assert [visible(name) for name in MARKUP] == MARKUP
    assert visible("\x1b[2J a\rb \u202e \ud800 two\nlines") == r"\x1b[2J a\rb \u202e \ud800 two\nlines"
    assert visible("two\nlines\tand\r", lines=True) == "two\nlines\tand\\r"
    assert (
        visible("\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645 \U0001f468\u200d\U0001f469")
        == "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645 \U0001f468\u200d\U0001f469"
    )
    say("\x1b[2J\u2066")
    assert capsys.readouterr().out == "\\x1b[2J\\u2066\n"
    assert all(cell(name).plain == visible(name) and not cell(name).spans for name in NAMES)


@pytest.fixture
def gallery(tmp_path):
    """A vector file whose keys, cameras and people have such names."""
    count = len(NAMES)
    columns = {
        **{"key": [f"{name}#{row}" for row, name in enumerate(NAMES)], "camera": list(range(count))},
        **{"camera_name": NAMES, "identity": list(range(count)), "identity_name": NAMES[::-1], "frames": [3] * count},
    }
    about = VectorsAbout(8, 2, 4, "set [/b]\x1b[2J", {"name": "w [/x]\x1b[2J", "sha256": "w"}, fingerprint="f")
    numbers = np.random.default_rng(0).normal(size=(count, 8)).astype(np.float32)
    path = tmp_path / "vectors.parquet"
    Vectors(about, description(columns), numbers, np.ones((count, 2), np.float32)).save(path)
    return path


def test_search_shows_them(gallery, tmp_path):
    command = ["search", str(gallery), "--top", "30", "--picture", str(tmp_path / "ranked.png")]
    for row, name in [(0, NAMES[0]), (len(MARKUP), STEERING[0])]:
        done = CliRunner().invoke(app, [*command, "--query", f"{name}#{row}"], env={"COLUMNS": "250"})
        assert done.exit_code == 0, done.output
        assert not CONTROLS.search(done.stdout)
        said = re.sub(r"\s+", " ", done.stdout)
        assert all(re.sub(r"\s+", " ", visible(shown)) in said for shown in NAMES)
    with Image.open(tmp_path / "ranked.png") as picture:
        assert picture.width > 1000


def test_pages_show_them(tmp_path):
    table = [NAMES, *[[name] for name in NAMES]]
    section = Section("x <i>\x1b", NAMES, "\n".join(NAMES), table, 1, [(name, name) for name in NAMES], NAMES)
    write_page(tmp_path / "page.html", "title </title>\u202e", [section])
    page = (tmp_path / "page.html").read_text()
    assert not CONTROLS.search(page.replace("\t", "")) and "<b>" not in page and "<i>" not in page
    paragraphs = [html.unescape(text) for text in re.findall(r"<p>(.*?)</p>", page, re.DOTALL)]
    assert paragraphs == [visible(name, lines=True) for name in NAMES]
    scores = {"protocol": "official", "mAP": 0.5, "mINP": 0.5, "rank1": 0.5, "rank5": 0.5, "rank10": 0.5, "rank20": 0.5}
    scores |= dict.fromkeys(("queries", "valid_queries", "gallery", "junk", "distractors"), 1)
    protocol = next(iter(PROTOCOLS))
    result = {"dataset": "a [/b]\x1b[2J", "protocol": protocol, "protocols": {protocol: scores}}
    write_result_page(tmp_path / "result.html", result, [tmp_path / "x\x1b.png"])
    assert not CONTROLS.search((tmp_path / "result.html").read_text())


def test_pictures_show_them(tmp_path):
    """Nothing is interpreted and nothing crashes: a name is as wide as its letters, on one line."""
    flat = np.zeros((8, 4, 3), np.uint8)
    for name in ["x [/b]", "$\\frac{", *STEERING, "\ud800", "x" * 3000]:
        assert text_width(name, 12) == text_width(visible(name), 12)
        tile = Tile(flat, (name, name, name))
        draw_ranked([(name, [RankedRow(name, tile, [tile])])], name, name)
        draw_strips([Strip(name, [name], [(name, [flat])])], name, name)
    scores = {"cmc": [0.5, 1.0], "mAP": 0.5, "valid_queries": 2}
    draw_cmc({f"{name}#{row}": scores for row, name in enumerate(NAMES)}, "$\\frac{ \x1b", tmp_path / "cmc.png")
    with Image.open(tmp_path / "cmc.png") as picture:
        assert picture.width > 500


PROGRESS = """
import sys
from keyreid.progress import track
names = eval(sys.stdin.read())
for name in names:
    for _ in track(range(2), 2, name, "items"): pass
"""


def test_progress_shows_them():
    """On a real terminal, where rich draws it."""
    ours, theirs = os.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    names = [name for name in NAMES if name]
    done = subprocess.run(
        [sys.executable, "-c", PROGRESS], input=repr(names), text=True, stderr=theirs, env=environment, timeout=60
    )
    os.close(theirs)
    said = b""
    while True:
        try:
            said += os.read(ours, 65536)
        except OSError:  # the end, on Linux
            break
    os.close(ours)
    assert done.returncode == 0
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", said.decode())
    assert all(visible(name) in text for name in names)
    assert b"\x1b[2J" not in said and b"\x1b]0" not in said
