"""Arithmetic that must not be done in half precision."""

import torch


def full(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in float32; float32 and float64 stay what they are."""
    return tensor.float() if tensor.dtype.itemsize < 4 else tensor
