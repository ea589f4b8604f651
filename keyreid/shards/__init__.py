"""Packed datasets: the format, the order of an epoch, and the readers."""
