"""Embed one's own tracklets, keep the vectors in Parquet files, and find people in them."""
