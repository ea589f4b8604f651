"""BatchNorm necks and linear classifiers."""

import torch
import torch.nn.functional as F
from torch import nn

from keyreid.model.precision import full


class Neck(nn.BatchNorm1d):
    """BatchNorm of `branches` features at once, each channel on its own; its bias is not learnt.

    Statistics and arithmetic are float32 whatever the weights are cast to.
    """

    def __init__(self, branches: int, width: int):
        super().__init__(branches * width)
        self.bias.requires_grad_(False)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """[branches, B, width] -> the same shape, normalised over B (training) or by the running statistics."""
        branches, _, width = features.shape
        # Shape: [B, branches * width], since a channel of a branch is a channel of the norm
        with torch.autocast(features.device.type, enabled=False):
            flat = full(features).transpose(0, 1).flatten(1)
            if self.training:
                self.num_batches_tracked.add_(1)
            running, learnt = (self.running_mean, self.running_var), (full(self.weight), full(self.bias))
            flat = F.batch_norm(flat, *running, *learnt, self.training, self.momentum, self.eps)
        return flat.unflatten(1, (branches, width)).transpose(0, 1)

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self.running_mean, self.running_var = full(self.running_mean), full(self.running_var)
        return self


class Classifiers(nn.Module):
    """One linear classifier without bias for each of `branches` features."""

    def __init__(self, branches: int, width: int, classes: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(branches, classes, width))
        nn.init.normal_(self.weight, std=0.001)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """[branches, B, width] -> logits [branches, B, classes], in float32."""
        with torch.autocast(features.device.type, enabled=False):
            # weights on the left: their gradient then comes as they lie
            return (full(self.weight) @ full(features).mT).mT
