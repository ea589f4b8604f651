"""Bring one's own videos, folders and tables into the one form that the rest reads."""
