"""An evaluation as one HTML page beside its pictures: scores, what they mean, and every picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment

from keyreid.evaluation.report import table
from keyreid.files import writing

CAPTIONS = {
    "ranked": "Ranked lists: the query on the left, its nearest tracklets beside it; green right, red wrong.",
    "cmc": "Cumulative matching: the share of queries whose first match stands at a rank or before it.",
    "guidance": "Guidance: the part heatmaps of the best and worst queries over their frames.",
    "attention": "Attention of the class token in the last block, frame by frame, and of each part's token.",
}

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>{{ dataset }} · {{ protocol }}</title>
<style>
body { font-family: "DejaVu Sans", Verdana, sans-serif; margin: 2rem; color: #111827; background: #fff; }
pre { background: #f1f5f9; padding: 1rem; overflow-x: auto; border-radius: 6px; }
figure { margin: 2.5rem 0; }
figcaption { color: #64748b; margin-bottom: .5rem; }
img { max-width: 100%; height: auto; }
</style>
</head>
<body>
<h1>{{ dataset }} · protocol {{ protocol }}</h1>
<pre>{{ table }}</pre>
<p>{{ facts }}</p>
{% for name, caption in pictures %}
<figure><figcaption>{{ caption }}</figcaption><img src="{{ name }}" alt="{{ caption }}"></figure>
{% endfor %}
</body>
</html>
"""


def write_page(path: Path, result: Mapping[str, Any], pictures: Sequence[Path]) -> None:
    """Write the page. Pictures lie in its folder and are named relative to it.

    Args:
        result: `evaluation.report.combine`'s object.
    """
    facts = [f"distance {result['distance']}"] if "distance" in result else []
    if result.get("rerank"):
        facts.append("re-ranked by k-reciprocal neighbours")
    page = Environment(autoescape=True).from_string(_PAGE)
    text = page.render(
        dataset=result["dataset"],
        protocol=result["protocol"],
        table=table(result),
        facts=", ".join(facts),
        pictures=[(picture.name, CAPTIONS.get(picture.stem, picture.stem)) for picture in pictures],
    )
    with writing(path):
        path.write_text(text)
