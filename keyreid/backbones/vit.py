"""timm's VisionTransformers: all blocks but the last, with a camera embedding on every token, and their files.

timm takes seconds to import, so only what builds a network or reads its files does.
"""

import difflib
import math
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from keyreid.backbones.backbone import Backbone, LastStage, PatchGrid, Source, fill, log
from keyreid.config import ClipConfig, ModelConfig
from keyreid.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from timm.models.vision_transformer import VisionTransformer


class ViT(Backbone):
    """Patch, position and camera embedding and the first depth-1 blocks.

    Args:
        vit: taken apart: its modules and parameters become this module's.
        num_cameras: rows of the camera embedding; 0 for none.
        camera_factor: what the camera embedding is multiplied with (published: 3).
    """

    def __init__(self, vit: "VisionTransformer", num_cameras: int, camera_factor: float):
        from timm.layers import Mlp

        patches = vit.patch_embed
        grid = PatchGrid(*patches.img_size, patches.patch_size[0], patches.proj.stride[0])
        super().__init__(vit.embed_dim, grid, vit.num_prefix_tokens)
        self._whole = (vit,)  # until the last stage is asked for; in a tuple, so that it is no child of this module
        extra = getattr(vit, "dist_token", None)  # DeiT's distillation token is one more register
        self.patch_embed, self.cls_token = patches, vit.cls_token
        self.reg_token, self.pos_embed = vit.reg_token if extra is None else extra, vit.pos_embed
        self.embed_prefix = not vit.no_embed_class
        self.norm_pre, self.blocks = vit.norm_pre, vit.blocks[:-1]
        for mlp in (getattr(block, "mlp", None) for block in self.blocks):
            if type(mlp) is Mlp and type(mlp.act) is nn.GELU:
                mlp.act = InPlaceGELU(mlp.act.approximate)
        self.add_camera_table(num_cameras, camera_factor)

    @classmethod
    def grid_of(cls, model: ModelConfig, clip: ClipConfig) -> PatchGrid:
        """See Backbone."""
        patch = _patch_size(model.backbone)
        return PatchGrid.tiling(model, clip, patch, model.patch_stride or patch)

    @classmethod
    def build(cls, model: ModelConfig, clip: ClipConfig, num_cameras: int) -> "ViT":
        """See Backbone: position embeddings fit the grid, and stochastic depth grows linearly to `drop_path`."""
        from timm.layers import build_sincos2d_pos_embed

        grid = cls.grid_of(model, clip)
        size = clip.height, clip.width
        vit = create(model.backbone, depth=model.depth, drop_path_rate=model.drop_path, img_size=size)
        if model.patch_stride:
            vit.patch_embed.proj.stride = (model.patch_stride, model.patch_stride)
        vit.patch_embed.grid_size = grid.shape
        vit.patch_embed.num_patches = math.prod(grid.shape)
        if vit.pos_embed is not None:
            tokens = vit.patch_embed.num_patches + (0 if vit.no_embed_class else vit.num_prefix_tokens)
            # From random weights, sines and cosines (Beyer et al., arXiv 2205.01580) let attention tell places apart
            # from the first step: the quickstart's network learns nearly twice as fast as from small random numbers.
            places = build_sincos2d_pos_embed(list(grid.shape), vit.embed_dim)
            vit.pos_embed = nn.Parameter(F.pad(places, (0, 0, tokens - len(places), 0)).unsqueeze(0))
        return cls(vit, num_cameras, model.camera_embedding)

    def forward(self, images: torch.Tensor, cameras: torch.Tensor, prompts: torch.Tensor | None = None) -> torch.Tensor:
        """See Backbone; the class token comes first."""
        x = self.patch_embed(images.to(self.cls_token.dtype))
        if prompts is not None:
            x = x + prompts
        prefix = [token.expand(x.shape[0], -1, -1) for token in (self.cls_token, self.reg_token) if token is not None]
        if self.pos_embed is not None and not self.embed_prefix:
            x = x + self.pos_embed
        x = torch.cat([*prefix, x], 1)
        if self.pos_embed is not None and self.embed_prefix:
            x = x + self.pos_embed
        x = self.norm_pre(self.with_cameras(x, cameras))
        for block in self.blocks:
            x = self.run(block, x)
        return x

    def last_stage(self) -> LastStage:
        """The last block and the last norm."""
        from timm.layers import Mlp

        (vit,), self._whole = self._whole, ()
        mlp = getattr(vit.blocks[-1], "mlp", None)
        return LastStage(vit.blocks[-1], vit.norm, type(mlp.act) if type(mlp) is Mlp else nn.GELU)

    def load(self, state: Mapping[str, torch.Tensor], source: Source) -> None:
        """See Backbone; jax names, Hugging Face's and what timm converts too, positions resampled to the grid."""
        from timm.models.vision_transformer import checkpoint_filter_fn

        (vit,) = self._whole
        positions, vit.pos_embed = vit.pos_embed, None  # timm would take any grid for a square
        try:
            state = checkpoint_filter_fn(_from_hugging_face(state), vit, adapt_layer_scale=True)
        except (RuntimeError, AssertionError, KeyError, ValueError, IndexError, AttributeError) as error:
            kind = f"{type(vit).__name__} of width {vit.embed_dim}"
            raise CheckpointError(f"{source}: does not fit {kind}: {error}") from None
        finally:
            vit.pos_embed = positions
        fill(vit, self.resized(state, source), source)

    def resized(self, state: Mapping[str, torch.Tensor], source: Source) -> Mapping[str, torch.Tensor]:
        """Resample position embeddings to this grid from the one that they were learnt on: see `Source.grid_of`."""
        from timm.layers import resample_abs_pos_embed

        positions = state.get("pos_embed")
        if positions is None or self.pos_embed is None or positions.ndim != 3:
            return state
        prefix = self.prefix_tokens if self.embed_prefix else 0
        try:
            old, new = source.grid_of(positions.shape[1] - prefix, self.grid.shape), self.grid.shape
        except CheckpointError:
            if source.lets_miss("pos_embed", "backbone.pos_embed"):
                return {name: tensor for name, tensor in state.items() if name != "pos_embed"}
            raise
        if old == new:
            return state
        log.info("%s: position embeddings of %d x %d resampled to %d x %d patches", source, *old, *new)
        return {**state, "pos_embed": resample_abs_pos_embed(positions, list(new), list(old), prefix)}

    @classmethod
    def download(cls, name: str) -> Mapping[str, torch.Tensor]:
        """See Backbone: from timm's cache or the network."""
        import timm

        try:
            return timm.create_model(name, pretrained=True, num_classes=0).state_dict()
        except Exception as error:  # the hub's client raises what its HTTP library raises
            raise CheckpointError(
                f"model.weights=timm: no weights for {name} ({type(error).__name__}: {error}); "
                "without a network, give the path of a file that was downloaded elsewhere"
            ) from None


def create(name: str, depth: int | None, **settings) -> "VisionTransformer":
    """timm's network of this name, with random weights.

    Raises:
        ConfigError: there is none, or it is not a VisionTransformer with a class token.
    """
    import timm
    from timm.models.vision_transformer import VisionTransformer

    if not timm.is_model(name):
        known = timm.list_models("*vit*") + timm.list_models("deit*")
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
        raise ConfigError(f"model.backbone={name!r}: timm has no such model; near names: {', '.join(near) or 'none'}")
    settings |= {} if depth is None else {"depth": depth}
    try:
        vit = timm.create_model(name, pretrained=False, num_classes=0, **settings)
    except (TypeError, AssertionError, RuntimeError) as error:
        raise ConfigError(f"model.backbone={name!r}: cannot be built as a VisionTransformer: {error}") from None
    if not isinstance(vit, VisionTransformer):
        raise ConfigError(f"model.backbone={name!r} is a {type(vit).__name__}; only timm's VisionTransformer will do")
    if vit.cls_token is None:
        raise ConfigError(f"model.backbone={name!r} has no class token, which both branches read")
    return vit


@lru_cache
def _patch_size(name: str) -> int:
    """Pixels; from timm's name where it says so, else from the network without weights."""
    if said := re.search(r"_patch(\d+)(_|$)", name):
        return int(said[1])
    with torch.device("meta"):
        return create(name, depth=1).patch_embed.patch_size[0]


class InPlaceGELU(nn.GELU):
    """GELU that overwrites its argument where no gradient will ask for it.

    The widest tensor of a block is then there once instead of twice: an evaluation holds a quarter less beside the
    weights (benchmarks/README.md).
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Elementwise; the argument must be the caller's own, as a linear layer's output is."""
        if torch.is_grad_enabled() and input.requires_grad:
            return super().forward(input)
        return torch.ops.aten.gelu_(input, approximate=self.approximate)


# Hugging Face's names -> timm's. DINOv2's differ from ViT's only in what its own checkpoints already call the same.
_HUGGING_FACE = (
    ("embeddings.patch_embeddings.projection.", "patch_embed.proj."),
    ("embeddings.cls_token", "cls_token"),
    ("embeddings.register_tokens", "register_tokens"),
    ("embeddings.mask_token", "mask_token"),
    ("embeddings.position_embeddings", "pos_embed"),
    ("encoder.layer.", "blocks."),
    (".layernorm_before.", ".norm1."),
    (".layernorm_after.", ".norm2."),
    (".attention.output.dense.", ".attn.proj."),
    (".intermediate.dense.", ".mlp.fc1."),
    (".output.dense.", ".mlp.fc2."),
    (".layer_scale1.lambda1", ".ls1.gamma"),
    (".layer_scale2.lambda1", ".ls2.gamma"),
    ("layernorm.", "norm."),
)


def _from_hugging_face(state: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    """`google/vit-base-patch16-224` and `facebook/dinov2-*` as transformers saves them -> timm's names."""
    if not any("embeddings.patch_embeddings.projection" in name for name in state):
        return state
    renamed = {}
    for name, tensor in state.items():
        name = re.sub(r"^(vit|dinov2|dinov2_with_registers)\.", "", name)
        for theirs, ours in _HUGGING_FACE:
            name = name.replace(theirs, ours)
        renamed[name] = tensor
    for name in [name for name in renamed if ".attention.attention.query." in name]:
        projections = [renamed.pop(name.replace("query", which)) for which in ("query", "key", "value")]
        renamed[name.replace(".attention.attention.query.", ".attn.qkv.")] = torch.cat(projections)
    return renamed
