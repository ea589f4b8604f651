"""Initial weights of a network.

Three kinds, told apart by their names: a backbone (timm or jax names, Hugging Face's ViT and DINOv2 names, and what
timm itself converts), a published KeyRe-ID checkpoint, and a network of our own. What a file did not fill, and what of
it found no place, is listed in the log; a file that fills nothing is an error.
"""

from __future__ import annotations

import logging
import math
import pickle
import re
from collections.abc import Sequence
from pathlib import Path

import safetensors
import safetensors.torch
import timm
import torch
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import nn

from keyreid.errors import CheckpointError
from keyreid.model.keyreid import KeyReID

log = logging.getLogger(__name__)

CLASSIFIERS = ("global_classifier.weight", "part_classifiers.weight")
POSITIONS = "backbone.pos_embed"
CAMERAS = "backbone.camera"
NAMES_LISTED = 12


def read_state(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a .safetensors or a torch file, on the CPU; nothing in the file is executed.

    Raises:
        CheckpointError: the file is missing, damaged, or holds more than tensors.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such weights file")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:  # torch's own words advise to load it all the same
        raise CheckpointError(
            f"{path}: holds more than tensors, which would run its code on loading; save its state_dict alone"
        ) from None
    except (safetensors.SafetensorError, RuntimeError, EOFError, OSError, ValueError) as error:
        why = str(error).partition("weights_only")[0].partition("\n")[0]
        raise CheckpointError(f"{path}: not a whole weights file: {why}") from None
    for wrapper in ("state_dict", "model", "teacher"):
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    state = {}
    if isinstance(content, dict):
        state = {str(k).removeprefix("module."): v for k, v in content.items() if isinstance(v, torch.Tensor)}
    if not state:
        raise CheckpointError(f"{path}: holds no named tensors")
    return state


def download_backbone(name: str) -> dict[str, torch.Tensor]:
    """The weights that timm publishes under a model name, from its cache or the network.

    Raises:
        CheckpointError: there are none, or the network does not give them.
    """
    try:
        return timm.create_model(name, pretrained=True, num_classes=0).state_dict()
    except Exception as error:  # the hub's client raises what its HTTP library raises
        raise CheckpointError(
            f"model.weights=timm: no weights for {name} ({type(error).__name__}: {error}); "
            "without a network, give the path of a file that was downloaded elsewhere"
        ) from None


def load_backbone(vit: VisionTransformer, state: dict[str, torch.Tensor], source: str) -> None:
    """Fill a timm network before it is taken apart; position embeddings are resampled to its patch grid.

    Raises:
        CheckpointError: nothing fits.
    """
    state = _from_hugging_face(state)
    try:
        state = checkpoint_filter_fn(state, vit, adapt_layer_scale=True)
    except (RuntimeError, AssertionError, KeyError, ValueError, IndexError) as error:
        raise CheckpointError(
            f"{source}: does not fit {type(vit).__name__} of width {vit.embed_dim}: {error}"
        ) from None
    _fill(vit, state, source)


def load_network(
    network: KeyReID, state: dict[str, torch.Tensor], source: str, keep_classifiers: bool, strict: bool = False
) -> None:
    """Fill a network from another one's state dict in our names, whatever its identities and cameras.

    Args:
        network: filled in place.
        state: our names.
        source: names the weights in messages.
        keep_classifiers: keep the classifiers if they have as many classes; False starts them anew.
        strict: anything else that is missing or does not fit is an error.

    Raises:
        CheckpointError: nothing fits, or (strict) not everything does.
    """
    state = dict(state)
    own = network.state_dict()
    theirs, ours = (values[CLASSIFIERS[0]].shape[1] if CLASSIFIERS[0] in values else 0 for values in (state, own))
    if not keep_classifiers or theirs != ours:
        log.info("%s: classifiers of %d identities dropped, %d new ones are random", source, theirs, ours)
        for name in CLASSIFIERS:
            state[name] = own[name]
    if CAMERAS in own and CAMERAS in state:
        state[CAMERAS] = _fit_cameras(state[CAMERAS], len(own[CAMERAS]), source)
    if POSITIONS in own and POSITIONS in state:
        state[POSITIONS] = _fit_positions(state[POSITIONS], network, source)
    _fill(network, state, source, strict)


def _fit_cameras(table: torch.Tensor, cameras: int, source: str) -> torch.Tensor:
    learnt = len(table)
    if cameras < learnt:
        log.info("%s: camera embeddings cut from %d to %d", source, learnt, cameras)
        return table[:cameras]
    if cameras > learnt:
        log.info("%s: camera embeddings extended from %d to %d by their mean", source, learnt, cameras)
        return torch.cat([table, table.mean(0, keepdim=True).expand(cameras - learnt, -1)])
    return table


def _fit_positions(positions: torch.Tensor, network: KeyReID, source: str) -> torch.Tensor:
    """Resample position embeddings of pictures twice as high as wide, or square, to the network's patch grid."""
    backbone = network.backbone
    prefix = backbone.prefix_tokens if backbone.embed_prefix else 0
    patches = positions.shape[1] - prefix
    for high_per_wide in (2, 1):
        wide = math.isqrt(patches // high_per_wide)
        if positions.shape[1] != backbone.pos_embed.shape[1] and high_per_wide * wide * wide == patches:
            log.info("%s: position embeddings resampled to %d x %d patches", source, *network.patch_grid)
            old_grid = (high_per_wide * wide, wide)
            return resample_abs_pos_embed(positions, list(network.patch_grid), list(old_grid), prefix)
    return positions


def _fill(module: nn.Module, state: dict[str, torch.Tensor], source: str, strict: bool = False) -> None:
    """Copy what fits by name and shape, and list what does not."""
    own = module.state_dict()
    fitting = {name: tensor for name, tensor in state.items() if name in own and own[name].shape == tensor.shape}
    if not fitting:
        raise CheckpointError(
            f"{source}: nothing of it fits. It has {_listed(list(state))}; the network has {_listed(list(own))}"
        )
    other_shape = [
        f"{name} {tuple(tensor.shape)} for {tuple(own[name].shape)}"
        for name, tensor in state.items()
        if name in own and name not in fitting
    ]
    lists = {
        "of another shape": other_shape,
        "not in the file": [name for name in own if name not in state],
        "without a place in the network": [name for name in state if name not in own],
    }
    if strict and (lists["of another shape"] or lists["not in the file"]):
        raise CheckpointError(
            f"{source}: " + "; ".join(f"{what}: {_listed(names)}" for what, names in lists.items() if names)
        )
    module.load_state_dict(fitting, strict=False)
    log.info("%s: loaded %d of %d entries", source, len(fitting), len(own))
    for what, names in lists.items():
        if names:
            log.info("%s: did not load, %s: %s", source, what, _listed(names))


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:NAMES_LISTED])
    return shown + (f" and {len(names) - NAMES_LISTED} more" if len(names) > NAMES_LISTED else "")


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
    (".layer_scale1.lambda1", ".ls1.gamma"),
    (".layer_scale2.lambda1", ".ls2.gamma"),
    ("layernorm.", "norm."),
)


def _from_hugging_face(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`google/vit-base-patch16-224` and `facebook/dinov2-*` as transformers saves them -> timm's names."""
    if not any("embeddings.patch_embeddings.projection" in name for name in state):
        return state
    renamed = {}
    for name, tensor in state.items():
        name = re.sub(r"^(vit|dinov2|dinov2_with_registers)\.", "", name)
        for theirs, ours in _HUGGING_FACE:
            name = name.replace(theirs, ours)
        name = re.sub(r"(blocks\.\d+)\.output\.dense\.", r"\1.mlp.fc2.", name)
        renamed[name] = tensor
    for name in [name for name in renamed if ".attention.attention.query." in name]:
        projections = [renamed.pop(name.replace("query", which)) for which in ("query", "key", "value")]
        renamed[name.replace(".attention.attention.query.", ".attn.qkv.")] = torch.cat(projections)
    return renamed
