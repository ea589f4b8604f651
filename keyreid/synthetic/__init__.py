"""Rendered walkers: pictures of people that nobody has to be asked for, with the truth about each joint.

What they are made of (colours, clothes, drawn pieces, cameras) is data: `keyreid/assets/walkers.yaml`.
"""

from importlib import resources
from typing import Any

import numpy as np
import yaml

MATERIALS = yaml.safe_load(resources.files("keyreid").joinpath("assets/walkers.yaml").read_text(encoding="utf-8"))


def pick(rng: np.random.Generator, kind: str) -> Any:
    """One of the things of a kind, each as often as its share says."""
    shares = MATERIALS[kind]
    return rng.choice(list(shares), p=list(shares.values()))
