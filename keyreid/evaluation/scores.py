"""Scores as people and programs read them: a table and a JSON object, protocol and data set beside each number."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from keyreid.errors import DataError
from keyreid.evaluation.protocols import CMC_RANKS, COUNTS, PROTOCOLS
from keyreid.files import replace_text, writing
from keyreid.plain_text import visible

RATES = ("mAP", "mINP", *(f"rank{rank}" for rank in CMC_RANKS))


def combine(scores: Mapping[str, Mapping[str, Any]], dataset: str, **about: Any) -> dict[str, Any]:
    """One object of an evaluation: the first protocol's scores, what was evaluated, and all protocols by name.

    Args:
        scores: `Scores.as_dict` by protocol.
        about: further facts (split, distance, ...).

    Returns:
        `protocol`, RATES (fractions) and COUNTS of the first protocol, `dataset`, `about`; `protocols`: the same
        numbers of each; `metrics`: all rates and counts flat as {"torchreid/mAP": ...}; `summary`: one line.
    """
    first = next(iter(scores.values()))
    rates = ", ".join(f"{name} {first[name]:.1%}" for name in ("mAP", "rank1", "rank5", "rank10"))
    valid = f"({first['valid_queries']} valid queries of {first['queries']})"
    flat = {f"{name}/{key}": value for name, values in scores.items() for key, value in values.items()}
    return {
        **first,
        "dataset": dataset,
        **about,
        "protocols": {name: dict(values) for name, values in scores.items()},
        "metrics": {name: value for name, value in flat.items() if not name.endswith(("/protocol", "/cmc"))},
        "summary": f"{dataset}, protocol {first['protocol']}: {rates} {valid}",
    }


def mean_over_splits(results: Sequence[Mapping[str, Any]], dataset: str) -> dict[str, Any]:
    """One object of several splits' results: rates are means, `RATE_deviation` sample standard deviations.

    Counts are means too (whole numbers where the splits agree), `cmc` the mean curve; `splits` holds each split's own.
    """
    scores = {}
    for name in results[0]["protocols"]:
        each = [result["protocols"][name] for result in results]
        rates = {rate: fmean(split[rate] for split in each) for rate in RATES}
        deviations = {f"{rate}_deviation": stdev(split[rate] for split in each) for rate in RATES}
        counts = {key: fmean(split[key] for split in each) for key in COUNTS}
        counts = {key: int(value) if value.is_integer() else value for key, value in counts.items()}
        curve = [fmean(values) for values in zip(*(split["cmc"] for split in each), strict=True)]
        scores[name] = {"protocol": name, **rates, **deviations, **counts, "cmc": curve}
    about = {key: results[0][key] for key in ("part", "distance", "rerank")}
    splits = [result["protocols"] for result in results]
    return combine(scores, f"{dataset}, {len(results)} splits", **about, splits=splits)


def table(result: Mapping[str, Any]) -> str:
    """A table with a line for each protocol, and under it what a reader must know about them."""
    head = ("data set", "protocol", "mAP", "mINP", *(f"rank-{rank}" for rank in CMC_RANKS))
    rows = [(*head, "queries", "valid", "gallery", "junk", "distractors")]
    for name, scores in result["protocols"].items():
        rates = (_percent(scores[rate], scores.get(f"{rate}_deviation")) for rate in RATES)
        rows.append((visible(result["dataset"]), name, *rates, *(str(scores[count]) for count in COUNTS)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    ways = "<<" + ">" * len(widths[2:])  # words to the left, numbers to the right
    shape = "  ".join(f"{{:{way}{width}}}" for way, width in zip(ways, widths, strict=True))
    notes = [f"{name}: {PROTOCOLS[name].summary}" for name in result["protocols"]]
    return "\n".join([*(shape.format(*row).rstrip() for row in rows), *notes])


def write_scores(result: Mapping[str, Any], path: Path) -> None:
    """Write `combine`'s object; KeyreidError where that fails."""
    with writing(path):
        replace_text(path, json.dumps(result, indent=1) + "\n")


def read_scores(path: Path) -> dict[str, Any]:
    """Read what `write_scores` wrote; DataError where it is missing or something else."""
    try:
        result = json.loads(path.read_text())
        if not (result["protocols"] and result["dataset"]):
            raise ValueError("they are empty")
        return result
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: no scores of an evaluation ({error})") from None


def _percent(value: float, deviation: float | None) -> str:
    return f"{100 * value:.2f} %" if deviation is None else f"{100 * value:.2f} ± {100 * deviation:.2f} %"
