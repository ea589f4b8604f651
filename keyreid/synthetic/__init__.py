"""Rendered walkers: pictures of people that nobody has to be asked for, with the truth about each joint."""
