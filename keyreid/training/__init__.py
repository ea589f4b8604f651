"""The DeepSpeed engine, the loop, and checkpoints."""

from collections.abc import Callable, Mapping
from pathlib import Path

# Called on the first rank with the epochs done, their evaluation and last training numbers, and the checkpoint that
# holds them; whether the run continues.
OnEvaluation = Callable[[int, Mapping[str, float], Path], bool]
