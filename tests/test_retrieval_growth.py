"""An index grows with its gallery: nothing is built anew, nothing is lost by a kill, and it finds what is new."""

import json
import multiprocessing

import numpy as np
import pytest
from kills import Killer
from typer.testing import CliRunner

from keyreid.cli import app
from keyreid.embedding.vectors import VectorFiles, Vectors, VectorsAbout, description
from keyreid.errors import ConfigError, DataError
from keyreid.retrieval import index as indexing
from keyreid.retrieval.index import GalleryIndex
from keyreid.retrieval.search import SearchSettings, search

faiss = pytest.importorskip("faiss")
KINDS = ["graph", "lists"]


def write(path, seed, count, weights="w"):
    """A day's vectors."""
    about = VectorsAbout(8, 1, 8, "made", {"name": weights, "sha256": weights})
    columns = {"key": [f"{path.stem}-{n}" for n in range(count)], "identity": np.arange(count), "frames": [2] * count}
    columns |= {"camera": [1] * count, "camera_name": [f"camera {n % 3}" for n in range(count)]}
    vectors = np.random.default_rng(seed).standard_normal((count, 8), np.float32)
    Vectors(about, description(columns), vectors, np.ones((count, 1), np.float32)).save(path)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "days").mkdir()
    write(tmp_path / "days" / "b.parquet", 1, 60)
    write(tmp_path / "days" / "c.parquet", 2, 30)
    return tmp_path / "days"


def fitting(folder, kind=None):
    return GalleryIndex.fitting(folder.parent / "index.faiss", VectorFiles([folder]), "euclidean", 200, kind)


def finds_the_nearest(folder, index):
    files = VectorFiles([folder])
    for settings in (SearchSettings(5), SearchSettings(5, other_cameras=True)):
        exact, found = (list(search(files, None, files, settings, way)) for way in (None, index))
        for one, other in zip(exact, found, strict=True):
            assert len({hit["key"] for hit in one.hits} & {hit["key"] for hit in other.hits}) >= 4  # near ties may swap
            distances = [[hit["distance"] for hit in result.hits] for result in (one, other)]
            np.testing.assert_allclose(*distances, atol=5e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_days_are_added_wherever_they_stand_in_the_folder(folder, kind, monkeypatch):
    index = fitting(folder, kind)
    assert (index.kind, index.made) == (kind, 90)
    monkeypatch.setattr(GalleryIndex, "build", None)
    assert fitting(folder).made == 0
    write(folder / "a.parquet", 3, 25)  # before the others
    write(folder / "d.parquet", 4, 25)
    index = fitting(folder)
    assert (index.kind, index.made, index._index.ntotal) == (kind, 50, 140)
    finds_the_nearest(folder, index)
    assert fitting(folder).made == 0


def grow_until(folder, at):
    faiss.omp_set_num_threads(1)
    Killer(folder.parent / ".index.faiss", at)  # what the index and its card are written to
    fitting(folder)


def test_a_kill_while_it_grows_loses_nothing(folder):
    fitting(folder)
    write(folder / "d.parquet", 4, 25)
    server, path = multiprocessing.get_context("forkserver"), folder.parent / "index.faiss"
    server.set_forkserver_preload(["keyreid.retrieval.search", "kills", "faiss"])
    first = path.read_bytes(), path.with_name("index.faiss.json").read_text()
    for at in range(1, 40):
        path.write_bytes(first[0])
        path.with_name("index.faiss.json").write_text(first[1])
        child = server.Process(target=grow_until, args=(folder, at))
        child.start()
        child.join()
        assert child.exitcode in (0, -9)
        assert faiss.read_index(str(path)).ntotal in (90, 115)
        again = fitting(folder)
        assert again.made in (0, 25)  # never all of them
        finds_the_nearest(folder, again)
        if child.exitcode == 0:
            break
    assert 3 < at < 39 and again.made == 0


def test_vectors_of_another_network_are_refused_and_change_nothing(folder):
    fitting(folder)
    before = (folder.parent / "index.faiss").read_bytes()
    write(folder / "d.parquet", 4, 25, weights="other")
    with pytest.raises(DataError, match="vectors of different networks cannot be compared"):
        fitting(folder)
    assert (folder.parent / "index.faiss").read_bytes() == before


def test_a_gallery_that_changed_is_indexed_anew(folder, monkeypatch):
    monkeypatch.setattr(indexing, "GRAPH_MOST", 70)
    assert fitting(folder).kind == "lists"
    write(folder / "b.parquet", 5, 61)
    assert fitting(folder).made == 91
    (folder / "b.parquet").unlink()
    index = fitting(folder)
    assert (index.kind, index.made) == ("graph", 30)
    assert (fitting(folder, "lists").kind, fitting(folder).made) == ("lists", 0)


def test_an_index_of_the_last_version_is_opened(folder):
    fitting(folder, "lists")
    files, card = VectorFiles([folder]), folder.parent / "index.faiss.json"
    values = json.loads(card.read_text())
    del values["kind"]
    values["rows"] = 90
    for file in values["files"]:
        del file["rows"]
        file["fingerprint"] = files.about.fingerprint
    card.write_text(json.dumps(values))
    assert fitting(folder).made == 0
    finds_the_nearest(folder, fitting(folder))
    card.write_text(json.dumps({**values, "rows": 89}))
    assert fitting(folder).made == 90


def test_the_command_says_what_it_built(folder):
    words = ["search", str(folder), "--query", "b-3", "--index", str(folder.parent / "index.faiss")]
    built, again = (CliRunner().invoke(app, [*words, *more]) for more in (["--index-kind", "lists"], []))
    assert (built.exit_code, again.exit_code) == (0, 0), (built.output, again.output)
    assert "90 of 90 rows added to the lists" in built.output.replace("\n", " ")
    assert "of the true 10 nearest" in built.output
    assert "rows added" not in again.output
    alone = CliRunner().invoke(app, [*words[:-2], "--index-kind", "graph"])
    assert isinstance(alone.exception, ConfigError) and "name it with --index FILE" in str(alone.exception)


def test_what_cannot_be_indexed_is_refused(folder):
    with pytest.raises(ConfigError, match="cannot be indexed"):
        GalleryIndex.build(VectorFiles([folder]), folder.parent / "index.faiss", "visible")
