"""Search of hyperparameters with Ray Tune."""
