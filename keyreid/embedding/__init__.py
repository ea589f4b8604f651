"""Vectors of tracklets: made by a network, kept in a file, compared."""
