"""Readers of datasets: each turns pictures on disk into tracklets."""
