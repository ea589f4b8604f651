"""BatchNorm necks and linear classifiers."""

import torch
import torch.nn.functional as F
from torch import nn

from keyreid.distributed.share import WHOLE, Share
from keyreid.model.precision import full


class Neck(nn.BatchNorm1d):
    """BatchNorm of `branches` features at once, each channel on its own; its bias is not learnt.

    Statistics and arithmetic are float32 whatever the weights are cast to.
    """

    def __init__(self, branches: int, width: int):
        super().__init__(branches * width)
        self.waiting: list[torch.Tensor] = []  # statistics of a step's scopes, [2, channels], that are not learnt yet
        self.bias.requires_grad_(False)

    def forward(self, features: torch.Tensor, share: Share = WHOLE) -> torch.Tensor:
        """[branches, B, width] -> the same, normalised over each scope (training) or by the running statistics."""
        branches, _, width = features.shape
        # Shape: [B, branches * width], since a channel of a branch is a channel of the norm
        with torch.autocast(features.device.type, enabled=False):
            flat = full(features).transpose(0, 1).flatten(1)
            if self.training and share.clips is not None:
                return self._by_scope(flat, share).unflatten(1, (branches, width)).transpose(0, 1)
            if self.training:
                self.num_batches_tracked.add_(1)
            running, learnt = (self.running_mean, self.running_var), (full(self.weight), full(self.bias))
            flat = F.batch_norm(flat, *running, *learnt, self.training, self.momentum, self.eps)
        return flat.unflatten(1, (branches, width)).transpose(0, 1)

    def _by_scope(self, flat: torch.Tensor, share: Share) -> torch.Tensor:
        """[n, channels], normalised by the statistics of each scope; these wait for `learn_statistics`."""
        rows = flat.unflatten(0, (share.scopes, -1))
        clips = rows.shape[1] * share.size
        mean = share.add(rows.sum(1, keepdim=True)) / clips
        centred = rows - mean
        variance = share.add(centred.square().sum(1, keepdim=True)) / clips
        with torch.no_grad():  # of a scope that several ranks hold, each adds a part
            of_scopes = torch.stack([mean, variance * (clips / max(clips - 1, 1))])
            self.waiting.append(of_scopes.sum((1, 2)) / share.size)
        scale = (variance + self.eps).rsqrt() * full(self.weight)  # first, so that rows are kept once for the gradient
        return (centred * scale + full(self.bias)).flatten(0, 1)

    @torch.no_grad()
    def learn_statistics(self, share: Share, scopes: int) -> None:
        """Take the mean over all `scopes` of a batch into the running statistics, once its passes are done."""
        if self.waiting:
            mean, variance = share.add_all(torch.stack(self.waiting).sum(0)) / scopes
            self.waiting.clear()
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance, self.momentum)

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
