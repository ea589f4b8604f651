"""A base network for OpenPifPaf that is small enough to be kept in a repository and trained in minutes on a core.

`walkers`, the weights that come with keyreid, are of this kind. The architecture stands here, beside OpenPifPaf's own
base networks, because weights files name it and loading them must not depend on the renderer of walkers; how it was
trained on them is `keyreid/synthetic/pose_training.py`. It is a plain residual network of stride 8, on which
`keyreid/pose/pifpaf.py` puts OpenPifPaf's heads.
"""

import torch
from torch import nn
from torchvision.ops import Conv2dNormActivation

WIDTHS = (24, 48, 96)
DILATIONS = (1, 2, 4, 2, 1)  # grow and shrink again, so that a cell sees the whole body and what is between


class SmallNet(nn.Module):
    """Pictures [N, 3, H, W] to features [N, 96, ceil(H / 8), ceil(W / 8)]."""

    name = "walkers"  # in weights files
    stride = 8
    out_features = WIDTHS[-1]

    def __init__(self) -> None:
        super().__init__()
        self.first = Conv2dNormActivation(3, WIDTHS[0], 5, stride=2)
        self.second = _Block(WIDTHS[0], WIDTHS[1], stride=2)
        self.third = _Block(WIDTHS[1], WIDTHS[2], stride=2)
        self.body = nn.Sequential(*(_Block(WIDTHS[2], WIDTHS[2], dilation=dilation) for dilation in DILATIONS))

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        """Features at a stride of 8 pixels."""
        return self.body(self.third(self.second(self.first(pictures))))


class _Block(nn.Module):
    """Two 3 x 3 convolutions beside an identity, or a 1 x 1 convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1, dilation: int = 1) -> None:
        super().__init__()
        self.first = Conv2dNormActivation(inputs, outputs, stride=stride, dilation=dilation)
        self.second = Conv2dNormActivation(outputs, outputs, dilation=dilation, activation_layer=None)
        self.skip = nn.Identity()
        if inputs != outputs or stride != 1:
            self.skip = Conv2dNormActivation(inputs, outputs, 1, stride, activation_layer=None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.skip(x) + self.second(self.first(x)))
