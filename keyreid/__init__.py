"""Distributed training of keypoint-guided video person re-identification (KeyRe-ID)."""

__version__ = "0.1.0"
