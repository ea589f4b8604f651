"""Vectors, distances and the protocols that judge them."""
