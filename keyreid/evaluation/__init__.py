"""Embedding tracklets, comparing them, and judging the comparison by a named protocol."""

from typing import Any


def __getattr__(name: str) -> Any:
    """`evaluate` on first use: judging a distance matrix needs no torch."""
    if name == "evaluate":
        from keyreid.evaluation.judging import evaluate

        return evaluate
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
