"""Search results as people and programs read them: a table, JSON, and the ranked picture."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image
from rich.table import Table

from keyreid.embedding.vectors import VectorFiles
from keyreid.files import writing
from keyreid.retrieval.search import Found, SearchSettings
from keyreid.visualization.ranked import RankedRow, Tile, draw_ranked

NO_PICTURE = np.full((160, 80, 3), 226, np.uint8)


def table_of(found: Found) -> Table:
    """A table of one query's hits."""
    table = Table(title=f"query {found.query['key']}  ({_where(found.query)})", title_justify="left")
    for heading in ("rank", "tracklet", "camera", "when", "person", "distance"):
        table.add_column(heading, justify="right" if heading in ("rank", "distance") else "left", overflow="fold")
    for rank, hit in enumerate(found.hits, start=1):
        who = person(hit) + ("  same" if same_person(found.query, hit) else "")
        table.add_row(str(rank), hit["key"], hit["camera_name"], when(hit), who, f"{hit['distance']:.4g}")
    return table


def summary(results: Sequence[Found]) -> str:
    """One line: how many queries, and how often the nearest is the same person, where persons are known."""
    line = f"{len(results)} queries"
    judged = [same_person(found.query, found.hits[0]) for found in results if found.hits]
    if known := [verdict for verdict in judged if verdict is not None]:
        line += f"; of {len(known)} whose person is known, {sum(known)} have the same person first"
    return line


def write_matches(results: Sequence[Found], settings: SearchSettings, path: Path) -> None:
    """Write all results, with the settings that they were found by.

    Raises:
        KeyreidError: the file cannot be written.
    """
    how = {name: getattr(settings, name) for name in ("metric", "other_cameras", "rerank")}
    values = {**how, "results": [{"query": found.query, "hits": found.hits} for found in results]}
    with writing(path):
        path.write_text(json.dumps(values, indent=1) + "\n")


def ranked_picture(
    results: Sequence[Found], queries: VectorFiles, gallery: VectorFiles, settings: SearchSettings
) -> Image.Image:
    """Each query beside its hits, by the pictures that the vector files hold; grey where they hold none."""
    asked = _pictures(queries, queries.rows_of([found.query["key"] for found in results]))
    rows = sorted({hit["row"] for found in results for hit in found.hits})
    shown = dict(zip(rows, _pictures(gallery, np.array(rows, np.int64)), strict=True))

    def tile(picture: np.ndarray, head: str, row: dict[str, Any], verdict: bool | None = None) -> Tile:
        return Tile(picture, (head, _where(row), person(row) or row["key"]), verdict)

    lines = []
    for found, picture in zip(results, asked, strict=True):
        query = found.query
        hits = [tile(shown[hit["row"]], f"{hit['distance']:.4g}", hit, same_person(query, hit)) for hit in found.hits]
        lines.append(RankedRow(query["key"], tile(picture, "query", query), hits))
    how = settings.metric + ", re-ranked" * settings.rerank + ", other cameras only" * settings.other_cameras
    title = f"{gallery.about.dataset} · {len(gallery)} tracklets · {gallery.about.weights.get('name', '')}"
    note = f"{how} · blue: query, grey: not known, green: same person, red: another"
    return draw_ranked([("", lines)], title, note)


def same_person(one: dict[str, Any], other: dict[str, Any]) -> bool | None:
    """Whether two rows are of one person; None where that is not known of both."""
    names = one["identity_name"], other["identity_name"]
    if None in names:
        names = one["identity"], other["identity"]
    return None if None in names else names[0] == names[1]


def person(row: dict[str, Any]) -> str:
    """A name, a number, or nothing."""
    if row["identity_name"] is not None:
        return row["identity_name"]
    return "" if row["identity"] is None else f"identity {row['identity']}"


def when(row: dict[str, Any]) -> str:
    """Time in the video, or frame numbers, or nothing."""
    if row["start_seconds"] is not None:
        return f"{_clock(row['start_seconds'])} - {_clock(row['end_seconds'])}"
    if row["first_frame"] is not None:
        return f"frames {row['first_frame']} - {row['last_frame']}"
    return f"{row['frames']} frames"


def _where(row: dict[str, Any]) -> str:
    if row["start_seconds"] is not None:
        return f"{row['camera_name']} {_clock(row['start_seconds'])}"
    return row["camera_name"] + ("" if row["first_frame"] is None else f" f{row['first_frame']}")


def _clock(seconds: float) -> str:
    minutes, rest = divmod(seconds, 60)
    hours, minutes = divmod(int(minutes), 60)
    return f"{hours}:{minutes:02d}:{rest:05.2f}"


def _pictures(files: VectorFiles, rows: np.ndarray) -> list[np.ndarray]:
    """uint8 RGB pictures of rows."""
    pictures = []
    for content in files.take(rows, ["picture"])["picture"].to_pylist():
        picture = None if content is None else cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR_RGB)
        pictures.append(NO_PICTURE if picture is None else picture)
    return pictures
