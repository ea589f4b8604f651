"""How part heatmaps lead the network, by the name that `model.guidance` gives.

A mode of your own is a file here with a class made from `Guidance`, and its object in `MODES`.
"""

import difflib

from keyreid.errors import ConfigError
from keyreid.guidance.mode import Aligned, Guidance, Released

__all__ = ["MODES", "Guidance", "named"]

MODES: dict[str, Guidance] = {mode.name: mode for mode in (Aligned(), Released())}


def named(name: str) -> Guidance:
    """The mode of this name.

    Raises:
        ConfigError: there is none; the nearest name is given.
    """
    if name not in MODES:
        near = difflib.get_close_matches(name, MODES, n=1, cutoff=0.0)[0]
        raise ConfigError(f"no guidance is called {name!r}; the nearest is {near!r} (there are {', '.join(MODES)})")
    return MODES[name]
