"""Hyperparameter search with Ray Tune and Optuna: what a search is, its trials, and what comes out."""

from importlib.util import find_spec

from keyreid.errors import ConfigError, install_hint

if not (find_spec("ray") and find_spec("optuna")):
    raise ConfigError(f"a search needs Ray and Optuna; {install_hint('tune')}")
