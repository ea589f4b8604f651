"""A start is whole or it is an error, and positions come from the grid that they were learnt on."""

import logging
import re

import pytest
import safetensors.torch
import timm
import torch
from timm.layers import resample_abs_pos_embed

from keyreid.backbones import patch_grid
from keyreid.checkpoints.released import to_released
from keyreid.checkpoints.start import start_network
from keyreid.checkpoints.weights_file import WeightsHeader, write_weights
from keyreid.config import ClipConfig, ModelConfig
from keyreid.errors import CheckpointError
from keyreid.model import build_model

TINY = "vit_tiny_patch16_224"


def model_config(**settings) -> ModelConfig:
    return ModelConfig(**{"backbone": TINY, "depth": 2, "drop_path": 0.0, **settings})


def clip_config(height=64, width=32) -> ClipConfig:
    return ClipConfig(frames=2, height=height, width=width)


def start(path, clip=None, **settings):
    return start_network(model_config(weights=str(path), **settings), clip or clip_config(), 5, 3)


def vit(depth=2, name=TINY, **settings):
    torch.manual_seed(0)
    return timm.create_model(name, depth=depth, num_classes=0, **settings).state_dict()


def whole(path, height=64, width=32, **settings):
    """A network of keyreid in its own file, with positions that are not smooth; gives these."""
    torch.manual_seed(0)
    model, clip = model_config(**settings), clip_config(height, width)
    network = build_model(model, clip, 5, 3)
    torch.nn.init.normal_(network.backbone.pos_embed)
    write_weights(path, network.state_dict(), WeightsHeader(model, clip, range(5), range(3), {}))
    return network.backbone.pos_embed.detach()


def without(state, *beginnings):
    return {name: tensor for name, tensor in state.items() if not name.startswith(beginnings)}


HALVES = {  # what is wrong with a file, what the message must name, and the pattern it offers
    "one tensor of all": (lambda: {"cls_token": vit()["cls_token"]}, "patch_embed.proj.weight", "blocks.0.*"),
    "fewer blocks": (lambda: vit(depth=1), "blocks.1.norm1.weight", "blocks.1.*"),
    "no positions": (lambda: without(vit(), "pos_embed"), "pos_embed", "pos_embed*"),
    "no class token": (lambda: without(vit(), "cls_token"), "cls_token", "cls_token*"),
    "no last norm": (lambda: without(vit(), "norm."), "norm.weight", "norm*"),
    "one bias too few": (lambda: without(vit(), "blocks.0.attn.qkv.bias"), "blocks.0.attn.qkv.bias", "blocks.0.*"),
    "another width": (lambda: vit(name="vit_small_patch16_224"), "cls_token (1, 1, 384) for (1, 1, 192)", "norm*"),
    "another MLP": (lambda: vit(mlp_ratio=2), "blocks.0.mlp.fc1.weight (384, 192) for (768, 192)", "blocks.0.*"),
    "layer scales that are dropped": (lambda: vit(init_values=0.1), "blocks.0.ls1.gamma", "blocks.0.*"),
    "normed queries that are dropped": (lambda: vit(qk_norm=True), "blocks.0.attn.q_norm.weight", "blocks.0.*"),
}  # fmt: skip


@pytest.mark.parametrize("kind", HALVES)
def test_a_half_fitting_backbone_is_an_error(kind, tmp_path):
    make, named, pattern = HALVES[kind]
    torch.save(make(), tmp_path / "half.pth")
    with pytest.raises(CheckpointError, match=re.escape(named)) as error:
        start(tmp_path / "half.pth")
    offered = str(error.value).partition("model.allow_partial=")[2]
    assert "half.pth" in str(error.value) and pattern in offered


def test_what_may_be_missing_is_named_and_logged(tmp_path, caplog):
    state = vit(depth=1)
    torch.save(state, tmp_path / "half.pth")
    caplog.set_level(logging.INFO, logger="keyreid")
    network = start(tmp_path / "half.pth", allow_partial=["blocks.1.*"])
    assert torch.equal(network.backbone.blocks[0].mlp.fc1.weight, state["blocks.0.mlp.fc1.weight"])
    assert [line for line in caplog.messages if "did not load, not in the file: blocks.1.norm1.weight" in line]
    with pytest.raises(CheckpointError, match="12 entries do not fit"):
        start(tmp_path / "half.pth", allow_partial=["blocks.2.*"])


@pytest.mark.parametrize(
    ("settings", "lost", "pattern"),
    [({"depth": 3}, "backbone.blocks.1.", "backbone.blocks.1.*"), ({"parts": 3}, "part_necks.weight", "part_necks*")],
)
def test_a_half_fitting_network_is_an_error(settings, lost, pattern, tmp_path):
    """Heads and camera tables may differ, nothing else."""
    whole(tmp_path / "own.safetensors", camera_embedding=0.0)
    assert start(tmp_path / "own.safetensors").num_cameras == 3
    with pytest.raises(CheckpointError, match=re.escape(lost)) as error:
        start(tmp_path / "own.safetensors", **settings)
    assert pattern in str(error.value).partition("allow_partial=")[2]
    start(tmp_path / "own.safetensors", **settings, allow_partial=[pattern])


PAIRS = [  # height, width, stride of the file and of the network
    ((256, 128, 16), (128, 64, 16)),
    ((256, 136, 12), (256, 128, 16)),
    ((384, 128, 16), (256, 128, 16)),
    ((256, 192, 16), (256, 128, 16)),
    ((128, 256, 16), (64, 128, 16)),
    ((128, 256, 16), (256, 128, 16)),
    ((224, 224, 16), (256, 128, 16)),
    ((256, 64, 16), (128, 128, 16)),
    ((256, 128, 16), (384, 128, 16)),
    ((256, 128, 16), (256, 136, 12)),
    ((224, 224, 16), (256, 136, 12)),
    ((64, 64, 16), (256, 64, 16)),
    ((128, 32, 16), (64, 64, 16)),
    ((160, 96, 16), (240, 64, 16)),
    ((64, 32, 16), (64, 32, 8)),
]


@pytest.mark.parametrize(("theirs", "ours"), PAIRS)
@pytest.mark.parametrize("told_by", ["header", "weights_grid", "wrong weights_grid"])
def test_positions_come_from_their_own_grid(theirs, ours, told_by, tmp_path):
    positions = whole(tmp_path / "own.safetensors", *theirs[:2], patch_stride=theirs[2])
    old, new = (
        patch_grid(model_config(patch_stride=stride), clip_config(height, width)).shape
        for height, width, stride in (theirs, ours)
    )
    path, settings = tmp_path / "own.safetensors", {"patch_stride": ours[2]}
    if told_by != "header":
        state = safetensors.torch.load_file(path)
        torch.save(state, path := tmp_path / "bare.pth")
        settings["weights_grid"] = old if told_by == "weights_grid" else (old[0] + 1, old[1])
    if told_by == "wrong weights_grid":
        with pytest.raises(CheckpointError, match=r"model\.weights_grid="):
            start(path, clip_config(*ours[:2]), **settings)
        return
    network = start(path, clip_config(*ours[:2]), **settings)
    assert network.patch_grid == new
    torch.testing.assert_close(network.backbone.pos_embed, resample_abs_pos_embed(positions, list(new), list(old), 1))


def bare(path, grid):
    """A backbone's file that tells no grid, as published ones are."""
    state = vit(img_size=(16 * grid[0], 16 * grid[1]))
    torch.nn.init.normal_(state["pos_embed"])
    torch.save(state, path)
    return state["pos_embed"]


@pytest.mark.parametrize(
    ("grid", "taken_for", "own"),
    [
        ((14, 14), (14, 14), (16, 8)),  # a square number of patches: pictures of ImageNet
        ((14, 14), (14, 14), (14, 14)),
        ((16, 8), (16, 8), (16, 8)),  # as many as the network has, and no square
        ((21, 10), (21, 10), (21, 10)),
        ((16, 8), None, (24, 8)),  # 16 x 8 or 8 x 16
        ((8, 16), None, (8, 8)),
        ((21, 10), None, (16, 8)),  # 21 x 10 or 14 x 15
        ((24, 8), None, (16, 8)),
        ((8, 8), None, (16, 4)),  # as many as the network has, yet a square
    ],
)
def test_a_grid_that_no_one_tells(grid, taken_for, own, tmp_path):
    positions = bare(tmp_path / "vit.pth", grid)
    clip = clip_config(16 * own[0], 16 * own[1])
    if taken_for is None:
        with pytest.raises(CheckpointError, match=rf"positions of {grid[0] * grid[1]} patches.*model.weights_grid="):
            start(tmp_path / "vit.pth", clip)
    network = start(tmp_path / "vit.pth", clip, weights_grid=None if taken_for else grid)
    expected = resample_abs_pos_embed(positions, list(own), list(taken_for or grid), 1)
    torch.testing.assert_close(network.backbone.pos_embed, expected)


def test_a_bare_network_is_never_taken_for_a_square(tmp_path):
    whole(tmp_path / "own.safetensors", 256, 64)
    torch.save(safetensors.torch.load_file(tmp_path / "own.safetensors"), tmp_path / "bare.pth")
    with pytest.raises(CheckpointError, match="positions of 64 patches"):
        start(tmp_path / "bare.pth", clip_config(128, 64))
    started = start(tmp_path / "bare.pth", clip_config(128, 64), allow_partial=["backbone.pos_embed"])
    assert started.patch_grid == (8, 4)


def test_a_published_network_is_twice_as_high_as_wide(tmp_path):
    base = {"backbone": "vit_base_patch16_224", "guidance": "released"}
    torch.manual_seed(0)
    original = build_model(model_config(**base), clip_config(128, 64), 5, 3)
    torch.nn.init.normal_(original.backbone.pos_embed)
    torch.save(to_released(original.state_dict()), tmp_path / "released.pth")
    started = start(tmp_path / "released.pth", clip_config(96, 64), **base)
    expected = resample_abs_pos_embed(original.backbone.pos_embed, [6, 4], [8, 4], 1)
    torch.testing.assert_close(started.backbone.pos_embed, expected)


def test_a_header_and_the_configuration_that_contradict(tmp_path):
    whole(tmp_path / "own.safetensors", 128, 64)
    with pytest.raises(CheckpointError, match=r"its grid is \(8, 4\), not model.weights_grid=\(4, 8\)"):
        start(tmp_path / "own.safetensors", weights_grid=(4, 8))
