"""The keypoint-guided local branch: one feature for each body part, by one shared transformer block of width T x D."""

import math

import torch
from torch import nn

from keyreid.backbones import Backbone
from keyreid.config import ModelConfig, TcssConfig
from keyreid.errors import ConfigError
from keyreid.guidance import named
from keyreid.model.global_branch import GlobalBranch
from keyreid.model.precision import full
from keyreid.model.single_query import FewRowsLinear, SingleQueryAttention, SingleQueryBlock


class LocalBranch(nn.Module):
    """Rows of width T x D, shifted and shuffled (TCSS), attended to from one token for each part.

    What rows and tokens are, and how guidance leads the attention, is the mode's (`keyreid.guidance`).

    Args:
        model: guidance, heads (they divide T x D), TCSS and stochastic depth.
        frames: T.
        activation: of the block's MLP.
    """

    def __init__(self, model: ModelConfig, frames: int, backbone: Backbone, activation: type[nn.Module]):
        from timm.layers import Mlp

        super().__init__()
        local_width, heads = frames * backbone.width, model.local_heads
        _check_heads(frames, backbone.width, heads)
        self.frames, self.mode, self.epsilon = frames, named(model.guidance), model.guidance_epsilon
        if not self.mode.rows_are_patches and backbone.prefix_tokens != 1:
            raise ConfigError(
                f"model.guidance={model.guidance} needs a backbone whose only extra token is the class token"
            )
        mlp = Mlp(local_width, act_layer=activation, device="meta")  # its two layers are replaced
        mlp.fc1 = FewRowsLinear(local_width, 4 * local_width)
        mlp.fc2 = FewRowsLinear(4 * local_width, local_width)
        for layer in (mlp.fc1, mlp.fc2):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        self.block = SingleQueryBlock(
            attention=SingleQueryAttention(local_width, heads, eps=1e-6),
            mlp=mlp,
            norm2=nn.LayerNorm(local_width, eps=1e-6),
            drop_path=model.drop_path,
        )
        self.norm = nn.LayerNorm(local_width)  # eps 1e-5 as published
        # Positions from the first patch on; the token stays in front.
        order = row_order(math.prod(backbone.grid.shape), model.tcss)
        self.register_buffer("order", order, persistent=False)
        gather = torch.cat([torch.zeros(1).long(), order + backbone.prefix_tokens])
        self.register_buffer("gather", gather, persistent=False)

    def forward(self, tokens: torch.Tensor, guidance: torch.Tensor) -> torch.Tensor:
        """Part features [P, B, T*D] of tokens [B*T, R+N, D] and scaled guidance [B, T, P, Hp, Wp]."""
        parts = self.mode.part_features(self, tokens, full(guidance).mean(1).flatten(2))
        return full(self.norm(parts)).transpose(0, 1)

    @torch.no_grad()
    def start_from(self, last: GlobalBranch) -> bool:
        """Give the block the weights of the backbone's last block, each frame's on that frame's share of the width.

        Every linear map becomes the block-diagonal of T copies. The outputs are ordered so that a head sees the same
        backbone head in several frames, and the query is scaled so that its logits are the mean of theirs: for T equal
        frames and guidance that prefers no row, a part's feature is the frame's global feature, T times.

        Returns:
            False, and nothing changes, where the backbone's block is of another kind (gated MLP, normed keys).
        """
        from timm.layers import Mlp

        source = last.block
        if not isinstance(source, SingleQueryBlock) or type(source.mlp) is not Mlp:
            return False
        own, theirs, frames = self.block, source.attention, self.frames
        sizes = [(len(block.attention.q_weight), block.mlp.fc1.out_features) for block in (source, own)]
        if [size * frames for size in sizes[0]] != list(sizes[1]):
            return False

        def to_heads(rows: torch.Tensor) -> torch.Tensor:
            """[T * heads * d, ...] -> the same rows with the frames of a head side by side."""
            return rows.unflatten(0, (frames, theirs.heads, -1)).transpose(0, 1).flatten(0, 2)

        def each_frame(weight: torch.Tensor) -> torch.Tensor:
            return torch.block_diag(*[weight] * frames)

        share = max(frames * theirs.heads / own.attention.heads, 1)  # backbone heads that a head consists of
        own.attention.q_weight.copy_(to_heads(each_frame(theirs.q_weight)) * share**-0.5)
        own.attention.k_weight.copy_(to_heads(each_frame(theirs.k_weight)))
        own.attention.v_weight.copy_(to_heads(each_frame(theirs.v_weight)))
        biases = [to_heads(b.repeat(frames)) for b in theirs.qkv_bias.chunk(3)]
        own.attention.qkv_bias.copy_(torch.cat([biases[0] * share**-0.5, *biases[1:]]))
        for layer, model, factor in (
            (own.attention.proj, theirs.proj, _layer_scale(source.ls1)),
            (own.mlp.fc1, source.mlp.fc1, 1.0),
            (own.mlp.fc2, source.mlp.fc2, _layer_scale(source.ls2)),
        ):
            layer.weight.copy_(each_frame((model.weight.T * factor).T))
            layer.bias.copy_((model.bias * factor).repeat(frames))
        own.attention.proj.weight.copy_(to_heads(own.attention.proj.weight.T).T)
        own.attention.norm_weight.copy_(theirs.norm_weight.repeat(frames))
        own.attention.norm_bias.copy_(theirs.norm_bias.repeat(frames))
        for norm, model in ((own.norm2, source.norm2), (self.norm, last.norm)):
            norm.weight.copy_(model.weight.repeat(frames))
            norm.bias.copy_(model.bias.repeat(frames))
        return True


def _layer_scale(module: nn.Module) -> torch.Tensor | float:
    from timm.layers import LayerScale

    return module.gamma if isinstance(module, LayerScale) else 1.0


def _check_heads(frames: int, width: int, heads: int) -> None:
    local_width = frames * width
    if local_width % heads:
        fitting_heads = [str(h) for h in range(1, 4 * heads + 1) if local_width % h == 0]
        fitting_frames = [str(t) for t in range(1, 4 * frames + 1) if (t * width) % heads == 0]
        raise ConfigError(
            f"model.local_heads={heads} does not divide the local branch's width of {frames} frames x {width} = "
            f"{local_width}. Heads that do: {', '.join(fitting_heads)}. Frames a clip (clip.frames) that "
            f"{heads} heads would divide: {', '.join(fitting_frames) or 'none'}"
        )


def row_order(rows: int, tcss: TcssConfig) -> torch.Tensor:
    """Positions of N rows after temporal clip shift and shuffle (TCSS), int64 [N'].

    The first `shift` rows move to the end, the sequence is cut into `groups` equal parts, and the parts are
    interleaved: 128 rows with shift 4 and 2 groups give 4, 68, 5, 69, ... Where the groups do not divide the rows, the
    last row but one of the shifted sequence is repeated until they do (once for 2 groups, as in the published code).
    Where TCSS is off, the rows stay as they are.
    """
    order = torch.arange(rows)
    if not tcss.enabled:
        return order
    order = order.roll(-tcss.shift)
    missing = -rows % tcss.groups
    order = torch.cat([order, order[-2:-1].expand(missing) if rows > 1 else order.expand(missing)])
    return order.view(tcss.groups, -1).T.flatten()
