"""The aligned local branch: what guidance does, how it travels with its rows, how it starts, and what is refused."""

import pytest
import torch

from keyreid.backbones import patch_grid
from keyreid.config import ClipConfig, ModelConfig, TcssConfig
from keyreid.errors import ConfigError
from keyreid.model import build_model
from keyreid.model.local_branch import row_order

CLIP = ClipConfig(frames=4, height=64, width=32)


def tiny(clip: ClipConfig = CLIP, **settings):
    torch.manual_seed(0)
    settings = {"backbone": "vit_tiny_patch16_224", "depth": 2, "drop_path": 0.0} | settings
    return build_model(ModelConfig(**settings), clip, num_identities=5, num_cameras=3).eval()


def inputs(model, batch: int = 2, seed: int = 1):
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(batch, model.frames, 3, *model.image_size, generator=generator) * 2 - 1
    guidance = torch.rand(batch, model.frames, model.parts, *model.patch_grid, generator=generator)
    return images, guidance, torch.arange(batch) % 3


def relative_change(before: torch.Tensor, after: torch.Tensor) -> float:
    return ((after - before).norm() / before.norm()).item()


@torch.no_grad()
def test_positive_guidance_steers_the_parts():
    """In the released form only its sign acts (LayerNorm takes the factor away); in the aligned form its size does."""
    changes = {}
    for mode in ("aligned", "released"):
        model = tiny(guidance=mode)
        # random weights of the usual size; .02 lets no attention stand out
        for parameter in model.local_branch.parameters():
            if parameter.dim() == 2:
                torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
        images, guidance, cameras = inputs(model)
        other = guidance.flip(-2) * 0.5 + 0.1
        before = model.features(images, guidance + 0.1, cameras).part_features
        changes[mode] = relative_change(before, model.features(images, other, cameras).part_features)
    assert changes["aligned"] > 1e-2
    assert changes["released"] < 1e-4


@torch.no_grad()
def test_a_part_looks_where_its_guidance_is():
    """What lies outside a part's guidance hardly moves the part."""
    model = tiny(guidance_epsilon=1e-9)
    guidance = inputs(model)[1]
    guidance[:] = 0
    guidance[..., 0, :] = 1  # the top row of patches
    tokens = torch.randn(2 * model.frames, 1 + 8, model.width)
    before = model.local_branch(tokens, guidance)
    tokens[:, 1 + model.patch_grid[1] :] += torch.randn_like(tokens[:, 1 + model.patch_grid[1] :])
    torch.testing.assert_close(model.local_branch(tokens, guidance), before)
    tokens[:, 1] += torch.randn_like(tokens[:, 1])
    assert relative_change(before, model.local_branch(tokens, guidance)) > 1e-3


def test_tcss_order():
    assert row_order(128, TcssConfig()).tolist()[:4] == [4, 68, 5, 69]  # the rows 5, 69, 6, 70 counted from 1
    assert sorted(row_order(128, TcssConfig()).tolist()) == list(range(128))
    assert row_order(9, TcssConfig(shift=2)).tolist() == [2, 7, 3, 8, 4, 0, 5, 1, 6, 0]  # 0, the last but one, repeated
    assert row_order(10, TcssConfig(shift=0, groups=4)).tolist() == [0, 3, 6, 9, 1, 4, 7, 8, 2, 5, 8, 8]
    assert row_order(5, TcssConfig(enabled=False)).tolist() == [0, 1, 2, 3, 4]


@torch.no_grad()
def test_guidance_travels_with_its_rows():
    """One query attends alike in any order: TCSS that takes the guidance along changes nothing."""
    plain, shuffled = tiny(tcss=TcssConfig(enabled=False)), tiny(tcss=TcssConfig(shift=3))
    clips = inputs(plain)
    before = plain.features(*clips).part_features
    torch.testing.assert_close(shuffled.features(*clips).part_features, before, rtol=1e-5, atol=1e-5)
    order = shuffled.local_branch.order
    assert not torch.equal(order, torch.arange(8))
    plain.local_branch.gather[1:] = 1 + order  # rows without their guidance
    assert relative_change(before, plain.features(*clips).part_features) > 1e-5


@torch.no_grad()
def test_flip_with_swapped_parts_is_the_mirrored_clip():
    """Mirrored rows, mirrored guidance and swapped left and right give the swapped parts, exactly."""
    from keyreid.pose.parts import flip_permutation

    model = tiny()
    swap = torch.as_tensor(flip_permutation(6))
    guidance = inputs(model)[1]
    grid = model.patch_grid
    tokens = torch.randn(2 * model.frames, 1 + grid[0] * grid[1], model.width)
    patches = tokens[:, 1:].unflatten(1, grid).flip(2).flatten(1, 2)
    mirrored = torch.cat([tokens[:, :1], patches], 1)
    parts = model.local_branch(tokens, guidance)
    swapped = model.local_branch(mirrored, guidance.flip(-1)[:, :, swap])
    torch.testing.assert_close(swapped, parts[swap], rtol=1e-4, atol=1e-5)
    assert relative_change(parts, swapped) > 1e-4  # left and right are not alike


@torch.no_grad()
@pytest.mark.parametrize("local_heads", [3, 12, 6])
def test_local_block_starts_as_the_backbones_last(local_heads):
    model = tiny(local_heads=local_heads)
    for parameter in model.global_branch.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    assert model.local_branch.start_from(model.global_branch)
    frame = torch.randn(2, 1, 9, model.width)
    tokens = frame.expand(-1, model.frames, -1, -1).flatten(0, 1)
    neutral = torch.full((2, model.frames, model.parts, *model.patch_grid), 1 - model.local_branch.epsilon)
    whole, _ = model.global_branch(tokens, model.frames)
    parts = model.local_branch(tokens, neutral)
    torch.testing.assert_close(parts, whole.repeat(1, model.frames).expand_as(parts), rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_unknown_camera_is_the_mean_of_the_learnt():
    model = tiny()
    torch.nn.init.normal_(model.backbone.camera)
    images, guidance, _ = inputs(model)
    unknown = model.embed(images, guidance, torch.tensor([-1, -1]))
    model.backbone.camera[1] = model.backbone.camera.mean(0)
    model.backbone.camera[[0, 2]] = model.backbone.camera[1].clone()
    torch.testing.assert_close(unknown, model.embed(images, guidance, torch.tensor([1, 1])), rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(("frames", "parts", "heads"), [(1, 3, 12), (3, 4, 12), (6, 6, 8)])
def test_frames_and_parts(frames, parts, heads):
    model = tiny(ClipConfig(frames=frames, height=64, width=32), parts=parts, local_heads=heads)
    assert model.embed(*inputs(model)).shape == (2, 192 + parts * frames * 192)
    features = model.features(*inputs(model))
    assert features.part_features.shape == (parts, 2, frames * 192)
    assert features.temporal_scores.shape == (2, frames)
    assert model.heads(features).shape == (1 + parts, 2, 5)


def test_overlapping_patches():
    config = ModelConfig(backbone="vit_tiny_patch16_224", depth=2, patch_stride=12)
    clip = ClipConfig(height=256, width=128)
    with pytest.raises(ConfigError, match=r"clip.width=128.*124 or 136"):
        patch_grid(config, clip)
    clip = ClipConfig(height=256, width=124)
    assert patch_grid(config, clip).shape == (21, 10)
    assert (patch_grid(config, clip).patch, patch_grid(config, clip).stride) == (16, 12)
    model = tiny(clip, patch_stride=12)
    assert model.embed(*inputs(model, batch=1)).shape == (1, 192 + 6 * 4 * 192)


def test_refusals():
    with pytest.raises(ConfigError, match=r"local_heads=7 .* 4 frames x 192 = 768. Heads that do: 1, 2, 3, 4, 6, 8"):
        tiny(local_heads=7)
    with pytest.raises(ConfigError, match="near names: vit_tiny_patch16_224"):
        tiny(backbone="vit_tiny_patch16_225")
    with pytest.raises(ConfigError, match=r"resnet18.*VisionTransformer"):
        tiny(backbone="resnet18")
    with pytest.raises(ConfigError, match="class token"):
        tiny(backbone="vit_medium_patch16_gap_240")
    with pytest.raises(ConfigError, match=r"clip.height=60.* use 48 or 64"):
        tiny(ClipConfig(height=60, width=32))
    with pytest.raises(RuntimeError, match="eval"):
        model = tiny().train()
        model.embed(*inputs(model))
