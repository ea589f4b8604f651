"""A transformer block of which only the first token's output is computed, exactly.

Both branches of KeyRe-ID read one token of their last block. Its attention has one query, so keys and values need not
be built: the query is folded through the key projection, and rows are weighed before the value projection instead of
after it. docs/model.md has the derivation. What the branches add is a guidance per part and row, which either scales
the row before its LayerNorm (`scale`, the published code) or weighs its key (`log_weight`).
"""

import torch
import torch.nn.functional as F
from torch import nn

from keyreid.model.precision import full


class FewRowsLinear(nn.Linear):
    """A linear layer for rows that are few beside its width, as one token of each part is: the weights stand left.

    A CPU spends the time of such a product on reading the weights, and MKL reads them twice as fast where they are the
    left factor (12 rows of 3072 to 12288: 9 instead of 17 ms). The backward products are fast from contiguous rows.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out]."""
        columns = torch.addmm(self.bias.unsqueeze(1), self.weight, x.flatten(0, -2).mT)
        return columns.mT.contiguous().unflatten(0, x.shape[:-1])


class SingleQueryAttention(nn.Module):
    """LayerNorm and multi-head self-attention for the first token's query.

    The weights are those of `attn(norm1(x))` in a timm Block. They are parameters of this very module, not of children
    that it would reach into, because ZeRO-3 gathers the weights of the module whose forward runs.
    """

    def __init__(self, width: int, heads: int, attention_width: int | None = None, eps: float = 1e-6):
        super().__init__()
        attention_width = attention_width or width
        self.heads, self.eps = heads, eps
        self.norm_weight = nn.Parameter(torch.ones(width))
        self.norm_bias = nn.Parameter(torch.zeros(width))
        # Three parameters, because the gradients of one that is cut in three would have to be joined again.
        weights = (nn.Parameter(torch.empty(attention_width, width)) for _ in range(3))
        self.q_weight, self.k_weight, self.v_weight = weights
        self.qkv_bias = nn.Parameter(torch.zeros(3 * attention_width))
        self.proj = FewRowsLinear(attention_width, width)
        for weight in (self.q_weight, self.k_weight, self.v_weight, self.proj.weight):
            nn.init.trunc_normal_(weight, std=0.02)
        nn.init.zeros_(self.proj.bias)

    def forward(
        self, x: torch.Tensor, scale: torch.Tensor | None = None, log_weight: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Attend from the first token, once for each part: [S, P, D]; P = 1 without guidance.

        Args:
            x: [S, 1+N, D], the token first; not normalised yet.
            scale: [S, P, N], factor on each row before the LayerNorm.
            log_weight: [S, P, N], addend to each row's attention logits.
        """
        x_hat = F.layer_norm(full(x), x.shape[-1:], eps=self.eps)
        q_bias, _, v_bias = self.qkv_bias.chunk(3)  # a key's bias shifts all logits alike: softmax drops it
        dtype = self.q_weight.dtype

        token = (x_hat[:, 0] * self.norm_weight + self.norm_bias).to(dtype)
        query = F.linear(token, self.q_weight, q_bias).unflatten(-1, (self.heads, -1))
        query = query * query.shape[-1] ** -0.5
        # Shape: [h, S, d] @ [h, d, D]. A product, since einsum hides one from autocast where operations are counted.
        folded = (query.transpose(0, 1) @ self.k_weight.unflatten(0, (self.heads, -1))).transpose(0, 1)

        with torch.autocast(x.device.type, enabled=False):  # logits, softmax and the weighing in float32
            folded = full(folded) * full(self.norm_weight)
            logits = (folded @ x_hat.mT).unsqueeze(1)  # [S, 1, h, 1+N]
            row_scale = None
            if scale is not None:
                row_scale = F.pad(self._normalised_scale(x, scale), (1, 0), value=1.0).unsqueeze(2)
                logits = logits * row_scale
            if log_weight is not None:
                logits = logits + F.pad(full(log_weight), (1, 0)).unsqueeze(2)
            attention = logits.softmax(-1)
            if row_scale is not None:
                attention = attention * row_scale
            # Shape: [S, P*h, 1+N] @ [S, 1+N, D], the same normalised rows for all parts
            mixed = attention.flatten(1, 2) @ x_hat
            # The weights of the rows sum to 1, so the norm's bias comes along whole.
            mixed = mixed.unflatten(1, (-1, self.heads)) * full(self.norm_weight) + full(self.norm_bias)

        # Shape: [h, d, D] @ [h, D, S*P]; weights on the left, so that their gradient needs no transposition
        columns = mixed.to(dtype).flatten(0, 1).permute(1, 2, 0)
        value = self.v_weight.unflatten(0, (self.heads, -1)) @ columns
        value = value.permute(2, 0, 1).reshape(*mixed.shape[:2], -1) + v_bias
        return self.proj(value)

    def _normalised_scale(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """R with LN(w x) = r g x^ + b: what is left of a row's factor after the LayerNorm; [S, P, N]."""
        variance = full(x[:, 1:]).var(-1, correction=0).unsqueeze(1)
        scale = full(scale)
        return scale * ((variance + self.eps) / (scale.square() * variance + self.eps)).sqrt()


class SingleQueryBlock(nn.Module):
    """A pre-norm transformer block (timm's Block) for its first token."""

    def __init__(self, attention: SingleQueryAttention, mlp: nn.Module, norm2: nn.Module, drop_path: float = 0.0):
        from timm.layers import DropPath

        super().__init__()
        self.attention = attention
        self.ls1 = nn.Identity()
        self.drop_path1 = DropPath(drop_path) if drop_path else nn.Identity()
        self.norm2 = norm2
        self.mlp = mlp
        self.ls2 = nn.Identity()
        self.drop_path2 = DropPath(drop_path) if drop_path else nn.Identity()

    @classmethod
    def from_block(cls, block: nn.Module) -> "SingleQueryBlock":
        """The same block with the same weights; see `is_rewritable`."""
        norm, theirs = block.norm1, block.attn
        attention = SingleQueryAttention(norm.normalized_shape[0], theirs.num_heads, theirs.attn_dim, norm.eps)
        attention.norm_weight, attention.norm_bias = norm.weight, norm.bias
        thirds = theirs.qkv.weight.detach().chunk(3)
        attention.q_weight, attention.k_weight, attention.v_weight = (nn.Parameter(w.clone()) for w in thirds)
        if theirs.qkv.bias is not None:
            attention.qkv_bias = theirs.qkv.bias
        attention.proj = theirs.proj
        own = cls(attention, block.mlp, block.norm2)
        own.ls1, own.ls2 = block.ls1, block.ls2
        own.drop_path1, own.drop_path2 = block.drop_path1, block.drop_path2
        return own

    def forward(
        self, x: torch.Tensor, scale: torch.Tensor | None = None, log_weight: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The first token after the block, for each part: x [S, 1+N, D] -> [S, P, D]; arguments as the attention's."""
        attended = self.ls1(self.attention(x, scale, log_weight))
        parts = attended.shape[1]
        # Stochastic depth is drawn for each sample and part, as if every part were a pass of its own.
        token = x[:, :1].expand(-1, parts, -1).flatten(0, 1) + self.drop_path1(attended.flatten(0, 1))
        token = token + self.drop_path2(self.ls2(self.mlp(self.norm2(token))))
        return token.unflatten(0, (-1, parts))


def is_rewritable(block: nn.Module) -> bool:
    """Whether the rewriting holds for a timm block: plain attention whose keys and values are linear in LN(x)."""
    from timm.layers import Attention
    from timm.models.vision_transformer import Block

    if type(block) is not Block or type(block.attn) is not Attention:
        return False
    attention = block.attn
    plain = all(isinstance(m, nn.Identity) for m in (attention.q_norm, attention.k_norm, attention.norm))
    affine = isinstance(block.norm1, nn.LayerNorm) and block.norm1.bias is not None
    no_dropout = attention.attn_drop.p == 0 and attention.proj_drop.p == 0
    return plain and affine and no_dropout and attention.gate is None and attention.proj.bias is not None
