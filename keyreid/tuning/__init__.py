"""Hyperparameter search with Ray Tune: what a search is, its trials, and what comes out."""
