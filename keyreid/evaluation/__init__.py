"""Embedding tracklets, comparing them, and judging the comparison by a named protocol."""

from typing import Any


def __getattr__(name: str) -> Any:
    """`evaluate` and `extract` on first use: judging a distance matrix needs no torch."""
    if name == "evaluate":
        from keyreid.evaluation.run import evaluate

        return evaluate
    if name == "extract":
        from keyreid.embedding.features import extract

        return extract
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
