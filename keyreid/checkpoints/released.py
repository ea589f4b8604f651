"""The published checkpoint's layout, and ours, both ways.

The published state dict names the local block twice (`block1.*` and `b2.0.*`), and holds three modules that nothing
reads: the backbone's last block and norm (the global branch has its own copies, `b1.0` and `b1.1`) and the ImageNet
classifier `base.fc`.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch

from keyreid.backbones.backbone import Source, fill
from keyreid.backbones.vit import ViT
from keyreid.config import ModelConfig
from keyreid.errors import CheckpointError
from keyreid.model.keyreid import KeyReID
from keyreid.pose.parts import part_names

HEADS = 12
PATCHES_HIGH_PER_WIDE = 2  # the published pictures are 256 x 128
IMAGENET_CLASSES = 1000

_SINGLE_QUERY = {"b1.0.": "global_branch.block.", "block1.": "local_branch.block."}
_PAIR, _NECK = ("weight", "bias"), ("weight", "bias", "running_mean", "running_var")
_QKV = "attn.qkv.weight"
_BLOCK = (
    *(f"{layer}.{kind}" for layer in ("norm1", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2") for kind in _PAIR),
    "attn.qkv.bias",
)
_NAMES_DIFFER = {
    "base.patch_embed.proj": "backbone.patch_embed.proj",
    "b1.1": "global_branch.norm",
    "b2.1": "local_branch.norm",
    "attention_tconv": "global_branch.temporal",
    "bottleneck": "global_neck",
}
_Convert = Callable[[list[torch.Tensor]], Sequence[torch.Tensor]]


def _layout(depth: int, parts: int) -> Iterator[tuple[list[str], list[str], _Convert, _Convert]]:
    """Published entries, ours of the same numbers, and how to make the second of the first and back."""
    for name in ("cls_token", "pos_embed", *(f"blocks.{i}.{n}" for i in range(depth - 1) for n in (*_BLOCK, _QKV))):
        yield [f"base.{name}"], [f"backbone.{name}"], list, list
    for theirs, ours in _NAMES_DIFFER.items():
        for name in _PAIR if ours != "global_neck" else (*_NECK, "num_batches_tracked"):
            yield [f"{theirs}.{name}"], [f"{ours}.{name}"], list, list
    for theirs, ours in _SINGLE_QUERY.items():
        for name in _BLOCK:
            own = name.replace("norm1.", "attention.norm_").replace("qkv.", "qkv_").replace("attn.", "attention.")
            yield [theirs + name], [ours + own], list, list
        thirds = [f"{ours}attention.{which}_weight" for which in "qkv"]
        yield [theirs + _QKV], thirds, lambda t: t[0].tensor_split(3), lambda t: [torch.cat(t)]
    yield ["base.Cam"], ["backbone.camera"], lambda t: [t[0].squeeze(1)], lambda t: [t[0].unsqueeze(1)]
    yield ["attention_conv.bias"], ["global_branch.attention.bias"], list, list
    attention = ["attention_conv.weight"], ["global_branch.attention.weight"]
    yield *attention, lambda t: [t[0].flatten(1)], lambda t: [t[0][..., None, None]]
    yield ["classifier.weight"], ["global_classifier.weight"], lambda t: [t[0].unsqueeze(0)], lambda t: [t[0][0]]
    numbers = range(1, parts + 1)
    classifiers = [f"classifier_{part}.weight" for part in numbers]
    yield classifiers, ["part_classifiers.weight"], lambda t: [torch.stack(t)], lambda t: t[0].unbind()
    for name in _NECK:
        necks = [f"bottleneck_{part}.{name}" for part in numbers]
        yield necks, [f"part_necks.{name}"], lambda t: [torch.cat(t)], lambda t: t[0].chunk(parts)
    counts = [f"bottleneck_{part}.num_batches_tracked" for part in numbers]
    yield counts, ["part_necks.num_batches_tracked"], lambda t: t[:1], lambda t: t * parts


def is_released(state: Mapping[str, torch.Tensor]) -> bool:
    """Whether a state dict has the published layout."""
    return "base.cls_token" in state and "block1.norm1.weight" in state


def released_grid(state: Mapping[str, torch.Tensor]) -> tuple[int, int]:
    """Hp, Wp of a published checkpoint in our names: its pictures are twice as high as wide."""
    wide = math.isqrt(max(state["backbone.pos_embed"].shape[1] - 1, 0) // PATCHES_HIGH_PER_WIDE)
    return PATCHES_HIGH_PER_WIDE * wide, wide


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
        wide = released_grid(state)[1]
    except (IndexError, ValueError):
        raise CheckpointError("the published classifier, norm, patch or position weights lack a side") from None
    if not width or wide * wide * PATCHES_HIGH_PER_WIDE != patches or width % HEADS or part_width % width:
        raise CheckpointError(
            f"the checkpoint's {patches} patches, width {width} and local width {part_width} are not those of the "
            f"published model: pictures twice as high as wide, {HEADS} heads, local width a multiple of the width"
        )
    from timm.models.vision_transformer import VisionTransformer

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
    fill(network, state, Source("published checkpoint"))
    return network


def from_released(released: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The published layout -> ours.

    Raises:
        CheckpointError: an entry is missing, and the first ones are named; or entries do not fit each other.
    """
    released = {name.removeprefix("module."): tensor for name, tensor in released.items()}
    depth = len({match[1] for name in released if (match := re.match(r"base\.blocks\.(\d+)\.", name))})
    parts = sum(bool(re.fullmatch(r"bottleneck_\d+\.weight", name)) for name in released)
    if depth == 0 or parts == 0:
        raise CheckpointError("not the published layout: no base.blocks.* or no bottleneck_* entries")
    layout = list(_layout(depth, parts))
    missing = [name for theirs, *_ in layout for name in theirs if name not in released]
    if missing:
        raise CheckpointError(
            f"the published layout lacks {len(missing)} entries: {', '.join(missing[:6])}{' ...' * (len(missing) > 6)}"
        )
    state = {}
    try:
        for theirs, ours, to_ours, _ in layout:
            state |= zip(ours, to_ours([released[name] for name in theirs]), strict=True)
    except (IndexError, RuntimeError) as error:  # a side that is not there, tensors that do not stack
        raise CheckpointError(f"the published layout's entries do not fit each other: {error}") from None
    return state


def to_released(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Our layout -> the published one, entry for entry.

    What the published code holds without reading is filled as it was when its training began (copies of the global
    branch's block and norm) or with zeros (the ImageNet classifier).

    Raises:
        CheckpointError: the network is not one that the published code can build.
    """
    depth = 1 + len({name.split(".")[2] for name in state if name.startswith("backbone.blocks.")})
    layout = list(_layout(depth, parts=len(state.get("part_classifiers.weight", ()))))
    ours = [name for entries in layout for name in entries[1]]
    missing, beyond = [name for name in ours if name not in state], sorted(state.keys() - ours)
    if missing or beyond:
        raise CheckpointError(
            "the published code has no place for this network: "
            f"missing {', '.join(missing[:4]) or 'nothing'}; beyond it {', '.join(beyond[:4]) or 'nothing'}"
        )
    released = {}
    for theirs, ours, _, to_theirs in layout:
        # Tensors of their own: slices would drag the whole along into the file.
        tensors = (tensor.detach().cpu().clone() for tensor in to_theirs([state[name] for name in ours]))
        released |= zip(theirs, tensors, strict=True)
    for name in (*_BLOCK, _QKV):
        released[f"b2.0.{name}"] = released[f"block1.{name}"]
        released[f"base.blocks.{depth - 1}.{name}"] = released[f"b1.0.{name}"]
    released["base.norm.weight"], released["base.norm.bias"] = released["b1.1.weight"], released["b1.1.bias"]
    released["base.fc.weight"] = torch.zeros(IMAGENET_CLASSES, len(released["b1.1.weight"]))
    released["base.fc.bias"] = torch.zeros(IMAGENET_CLASSES)
    return released
