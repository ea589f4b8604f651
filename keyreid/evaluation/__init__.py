"""Judging the comparison of embedded tracklets by a named protocol."""
