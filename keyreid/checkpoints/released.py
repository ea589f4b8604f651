"""The published checkpoint's layout, and ours, both ways.

The published state dict names the local block twice (`block1.*` and `b2.0.*`), and holds three modules that nothing
reads: the backbone's last block and norm (the global branch has its own copies, `b1.0` and `b1.1`) and the ImageNet
classifier `base.fc`.
"""

import math
import re
from collections.abc import Mapping
from itertools import chain

import torch
from timm.models.vision_transformer import VisionTransformer

from keyreid.backbones.vit import ViT
from keyreid.checkpoints.pretrained import load_network
from keyreid.config import ModelConfig
from keyreid.errors import CheckpointError
from keyreid.model.keyreid import KeyReID
from keyreid.pose.parts import part_names

HEADS = 12
PATCHES_HIGH_PER_WIDE = 2  # the published pictures are 256 x 128
IMAGENET_CLASSES = 1000

_BLOCK = {
    "norm1.weight": "attention.norm_weight",
    "norm1.bias": "attention.norm_bias",
    "attn.qkv.bias": "attention.qkv_bias",
    "attn.proj.weight": "attention.proj.weight",
    "attn.proj.bias": "attention.proj.bias",
    "norm2.weight": "norm2.weight",
    "norm2.bias": "norm2.bias",
    "mlp.fc1.weight": "mlp.fc1.weight",
    "mlp.fc1.bias": "mlp.fc1.bias",
    "mlp.fc2.weight": "mlp.fc2.weight",
    "mlp.fc2.bias": "mlp.fc2.bias",
}
_QKV = "attn.qkv.weight"
_SINGLE_QUERY = {"b1.0": "global_branch.block", "block1": "local_branch.block"}
_THIRDS = {
    f"{block}.{_QKV}": [f"{own}.attention.{which}_weight" for which in "qkv"] for block, own in _SINGLE_QUERY.items()
}
_SAME_TENSOR = {
    "base.cls_token": "backbone.cls_token",
    "base.pos_embed": "backbone.pos_embed",
    "base.patch_embed.proj.weight": "backbone.patch_embed.proj.weight",
    "base.patch_embed.proj.bias": "backbone.patch_embed.proj.bias",
    "b1.1.weight": "global_branch.norm.weight",
    "b1.1.bias": "global_branch.norm.bias",
    "b2.1.weight": "local_branch.norm.weight",
    "b2.1.bias": "local_branch.norm.bias",
    **{f"{block}.{name}": f"{own}.{_BLOCK[name]}" for block, own in _SINGLE_QUERY.items() for name in _BLOCK},
    "attention_conv.bias": "global_branch.attention.bias",
    "attention_tconv.weight": "global_branch.temporal.weight",
    "attention_tconv.bias": "global_branch.temporal.bias",
    **{f"bottleneck.{n}": f"global_neck.{n}" for n in ("weight", "bias", "running_mean", "running_var")},
    "bottleneck.num_batches_tracked": "global_neck.num_batches_tracked",
}
_PART_NECK = ("weight", "bias", "running_mean", "running_var")


def is_released(state: dict[str, torch.Tensor]) -> bool:
    """Whether a state dict has the published layout."""
    return "base.cls_token" in state and "block1.norm1.weight" in state


def released_model(state_dict: Mapping[str, torch.Tensor]) -> KeyReID:
    """The network of a published checkpoint; all sizes are read from it.

    Raises:
        CheckpointError: entries are missing or do not fit each other.
    """
    state = from_released(state_dict)
    try:
        classes, width = state["global_classifier.weight"].shape[1:]
        part_width = state["local_branch.norm.weight"].shape[0]
        patch = state["backbone.patch_embed.proj.weight"].shape[-1]
        patches = state["backbone.pos_embed"].shape[1] - 1
        wide = math.isqrt(max(patches, 0) // PATCHES_HIGH_PER_WIDE)
    except (IndexError, ValueError):
        raise CheckpointError("the published classifier, norm, patch or position weights lack a side") from None
    if not width or wide * wide * PATCHES_HIGH_PER_WIDE != patches or width % HEADS or part_width % width:
        raise CheckpointError(
            f"the checkpoint's {patches} patches, width {width} and local width {part_width} are not those of the "
            f"published model: pictures twice as high as wide, {HEADS} heads, local width a multiple of the width"
        )
    vit = VisionTransformer(
        img_size=(PATCHES_HIGH_PER_WIDE * wide * patch, wide * patch),
        patch_size=patch,
        embed_dim=width,
        depth=1 + sum(bool(re.fullmatch(r"backbone\.blocks\.\d+\.norm1\.weight", name)) for name in state),
        num_heads=HEADS,
        num_classes=0,
        weight_init="skip",
    )
    cameras = len(state["backbone.camera"])
    parts = len(part_names(len(state["part_classifiers.weight"])))  # refuses other numbers than 3, 4 and 6
    model = ModelConfig(guidance="released", parts=parts, local_heads=HEADS, drop_path=0.0)
    backbone = ViT(vit, cameras, model.camera_embedding)
    network = KeyReID(backbone, model, part_width // width, classes, cameras)
    load_network(network, state, "published checkpoint", keep_classifiers=True, strict=True)
    return network


def from_released(released: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The published layout -> ours.

    Raises:
        CheckpointError: an entry is missing, and the first ones are named; or entries do not fit each other.
    """
    released = {name.removeprefix("module."): tensor for name, tensor in released.items()}
    depth = len({match[1] for name in released if (match := re.match(r"base\.blocks\.(\d+)\.", name))})
    parts = sum(bool(re.fullmatch(r"bottleneck_\d+\.weight", name)) for name in released)
    if depth == 0 or parts == 0:
        raise CheckpointError("not the published layout: no base.blocks.* or no bottleneck_* entries")
    names = _backbone_blocks(depth) | _SAME_TENSOR
    needed = [*names, *_THIRDS, "base.Cam", "attention_conv.weight", "classifier.weight"]
    for part in range(1, parts + 1):
        needed += [f"bottleneck_{part}.{name}" for name in (*_PART_NECK, "num_batches_tracked")]
        needed.append(f"classifier_{part}.weight")
    missing = [name for name in needed if name not in released]
    if missing:
        raise CheckpointError(
            f"the published layout lacks {len(missing)} entries: {', '.join(missing[:6])}{' ...' * (len(missing) > 6)}"
        )
    try:
        return _renamed(released, names, parts)
    except (IndexError, RuntimeError) as error:  # a side that is not there, tensors that do not stack
        raise CheckpointError(f"the published layout's entries do not fit each other: {error}") from None


def _renamed(released: dict[str, torch.Tensor], names: dict[str, str], parts: int) -> dict[str, torch.Tensor]:
    state = {ours: released[theirs] for theirs, ours in names.items()}
    for theirs, thirds in _THIRDS.items():
        state |= zip(thirds, released[theirs].tensor_split(3), strict=True)
    state["backbone.camera"] = released["base.Cam"].squeeze(1)
    state["global_branch.attention.weight"] = released["attention_conv.weight"].flatten(1)
    state["global_classifier.weight"] = released["classifier.weight"].unsqueeze(0)
    state["part_classifiers.weight"] = torch.stack([released[f"classifier_{p}.weight"] for p in range(1, parts + 1)])
    for name in _PART_NECK:
        state[f"part_necks.{name}"] = torch.cat([released[f"bottleneck_{p}.{name}"] for p in range(1, parts + 1)])
    state["part_necks.num_batches_tracked"] = released["bottleneck_1.num_batches_tracked"]
    return state


def to_released(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Our layout -> the published one, entry for entry.

    What the published code holds without reading is filled as it was when its training began (copies of the global
    branch's block and norm) or with zeros (the ImageNet classifier).

    Raises:
        CheckpointError: the network is not one that the published code can build.
    """
    depth = 1 + len({name.split(".")[2] for name in state if name.startswith("backbone.blocks.")})
    names = _backbone_blocks(depth) | _SAME_TENSOR
    needed = [*names.values(), *chain.from_iterable(_THIRDS.values()), "backbone.camera"]
    missing = [ours for ours in needed if ours not in state]
    beyond = {name for name in state if re.search(r"reg_token|norm_pre|\.gamma$|k_norm", name)}
    if missing or beyond:
        raise CheckpointError(
            "the published code has no place for this network: "
            f"missing {', '.join(missing[:4]) or 'nothing'}; beyond it {', '.join(sorted(beyond)[:4]) or 'nothing'}"
        )
    released = {theirs: state[ours] for theirs, ours in names.items()}
    released |= {theirs: torch.cat([state[third] for third in thirds]) for theirs, thirds in _THIRDS.items()}
    released["base.Cam"] = state["backbone.camera"].unsqueeze(1)
    released["attention_conv.weight"] = state["global_branch.attention.weight"][..., None, None]
    released["classifier.weight"] = state["global_classifier.weight"][0]
    classifiers = state["part_classifiers.weight"]
    parts = len(classifiers)
    for part in range(1, parts + 1):
        released[f"classifier_{part}.weight"] = classifiers[part - 1]
        for name in _PART_NECK:
            released[f"bottleneck_{part}.{name}"] = state[f"part_necks.{name}"].chunk(parts)[part - 1]
        released[f"bottleneck_{part}.num_batches_tracked"] = state["part_necks.num_batches_tracked"]
    # Tensors of their own (slices would drag the whole along into the file), then those that share one.
    released = {name: tensor.detach().cpu().clone() for name, tensor in released.items()}
    for name in (*_BLOCK, _QKV):
        released[f"b2.0.{name}"] = released[f"block1.{name}"]
        released[f"base.blocks.{depth - 1}.{name}"] = released[f"b1.0.{name}"]
    released["base.norm.weight"], released["base.norm.bias"] = released["b1.1.weight"], released["b1.1.bias"]
    released["base.fc.weight"] = torch.zeros(IMAGENET_CLASSES, len(released["b1.1.weight"]))
    released["base.fc.bias"] = torch.zeros(IMAGENET_CLASSES)
    return released


def _backbone_blocks(depth: int) -> dict[str, str]:
    names = (f"blocks.{index}.{name}" for index in range(depth - 1) for name in (*_BLOCK, _QKV))
    return {f"base.{name}": f"backbone.{name}" for name in names}
