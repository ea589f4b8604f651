"""`keyreid search`: find people in vector files."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from keyreid.commands.options import Metric
from keyreid.errors import ConfigError

TABLES = 10  # queries whose hits are printed
PICTURE_ROWS = 24  # queries in the ranked picture

Gallery = Annotated[list[Path], typer.Argument(help="The gallery: `embed` or `evaluate` files, or folders of them.")]
Query = Annotated[list[str], typer.Option(help="A tracklet's key, or a vector file (all rows). Repeat for several.")]
_INDEX = "Search with this index, approximately; built if absent or outdated, grown by files that it does not have."
Index = Annotated[Path | None, typer.Option(help=_INDEX)]
_KIND = "Of an index that is built: a graph (default up to 100,000 rows) or inverted lists."
Kind = Annotated[Literal["graph", "lists"] | None, typer.Option(help=_KIND, show_default=False)]
_PROBES = "How far the index looks: lists searched (default a sixteenth), or candidates in a graph (default 64)."
Probes = Annotated[int | None, typer.Option(min=1, help=_PROBES, show_default=False)]


def search(
    vectors: Gallery,
    query: Query,
    top: Annotated[int, typer.Option(min=1, help="Hits per query.")] = 10,
    metric: Metric = "euclidean",
    other_cameras: Annotated[bool, typer.Option(help="Leave out tracklets of the query's own camera.")] = False,
    rerank: Annotated[bool, typer.Option(help="k-reciprocal re-ranking of each query's 200 nearest.")] = False,
    index: Index = None,
    index_kind: Kind = None,
    probes: Probes = None,
    json: Annotated[Path | None, typer.Option(help="Write all results to this file.")] = None,
    picture: Annotated[Path | None, typer.Option(help="Draw the ranked picture (.png).")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default: a GPU if there is one.")] = None,
) -> None:
    """Find the tracklets nearest to the queries, as a table, JSON and a ranked picture.

    A tracklet never finds itself. People's names are compared if both are known.
    """
    import torch
    from rich.console import Console

    from keyreid.embedding.vectors import VectorFiles
    from keyreid.retrieval.index import GalleryIndex
    from keyreid.retrieval.matches import ranked_picture, summary, table_of, write_matches
    from keyreid.retrieval.search import SearchSettings, recall
    from keyreid.retrieval.search import search as find
    from keyreid.visualization.canvas import save_picture

    if index is None and (probes or index_kind):
        raise ConfigError(f"--{'probes' if probes else 'index-kind'} is of an index; name it with --index FILE")
    gallery = VectorFiles(vectors)
    settings = SearchSettings(top, metric, other_cameras, rerank)
    queries, rows = _queries(query, gallery)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    lookup = None if index is None else GalleryIndex.fitting(index, gallery, metric, probes, index_kind)
    if lookup is not None and lookup.made:
        found, size = recall(gallery, lookup, device), index.stat().st_size / 2**20
        added = f"{lookup.made} of {len(gallery)} rows added to the {lookup.kind}"
        print(f"{index}: {added}, {size:.1f} MiB, mapped; of the true 10 nearest {found:.1%} are found")
    results = list(find(queries, rows, gallery, settings, lookup, device))
    console = Console()
    for found in results[:TABLES]:
        console.print(table_of(found))
    if len(results) > TABLES:
        print(f"... and {len(results) - TABLES} more queries" + ("" if json else "; write all with --json FILE"))
    print(summary(results))
    if json is not None:
        write_matches(results, settings, json)
    if picture is not None:
        save_picture(ranked_picture(results[:PICTURE_ROWS], queries, gallery, settings), picture)
        print(f"{picture}: ranked picture of {min(len(results), PICTURE_ROWS)} queries")


def _queries(texts: list[str], gallery):
    """The files and rows that ask: keys of the gallery, or other files."""
    from keyreid.embedding.vectors import VectorFiles

    files = [Path(text) for text in texts if Path(text).suffix in (".parquet", ".npz") or Path(text).is_dir()]
    if not files:
        return gallery, gallery.rows_of(texts)
    if len(files) < len(texts):
        raise ConfigError("--query: either keys or vector files, not both")
    return VectorFiles(files), None
