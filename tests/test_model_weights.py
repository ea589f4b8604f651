"""Initial weights: layouts, sizes that differ, what is listed, and what is refused."""

import logging

import pytest
import safetensors.torch
import timm
import torch

from keyreid.checkpoints.released import released_model, to_released
from keyreid.checkpoints.start import start_network
from keyreid.config import ClipConfig, ModelConfig
from keyreid.errors import CheckpointError

CLIP = ClipConfig(frames=2, height=64, width=32)
TINY = "vit_tiny_patch16_224"


def build(weights=None, backbone=TINY, identities=5, cameras=3, clip=CLIP, **settings):
    config = ModelConfig(backbone=backbone, weights=weights and str(weights), depth=2, drop_path=0.0, **settings)
    return start_network(config, clip, identities, cameras)


def vit_state(name=TINY, depth=3, classes=7, **settings):
    torch.manual_seed(5)
    return timm.create_model(name, depth=depth, num_classes=classes, **settings).state_dict()


def embed(model, cameras=(0, 1)):
    torch.manual_seed(1)
    images = torch.rand(2, model.frames, 3, *model.image_size)
    guidance = torch.rand(2, model.frames, 6, *model.patch_grid)
    with torch.no_grad():
        return model.eval().embed(images, guidance, torch.tensor(cameras))


@pytest.fixture
def lines(caplog):
    caplog.set_level(logging.INFO, logger="keyreid")
    return lambda: caplog.text


def test_timm_file(tmp_path, lines):
    state = vit_state()
    torch.save(state, tmp_path / "vit.pth")
    safetensors.torch.save_file(state, tmp_path / "vit.safetensors")
    torch.save({"model": {f"module.{k}": v for k, v in state.items()}}, tmp_path / "wrapped.pth")
    for name in ("vit.pth", "vit.safetensors", "wrapped.pth"):
        model = build(tmp_path / name)
        assert torch.equal(model.backbone.blocks[0].attn.qkv.weight, state["blocks.0.attn.qkv.weight"])
        attention = model.global_branch.block.attention
        thirds = torch.cat([attention.q_weight, attention.k_weight, attention.v_weight])
        assert torch.equal(thirds, state["blocks.1.attn.qkv.weight"])
        assert torch.equal(model.global_branch.norm.weight, state["norm.weight"])
        assert model.backbone.pos_embed.shape == (1, 1 + 8, 192)  # 14 x 14 resampled to 4 x 2
        assert torch.equal(model.backbone.pos_embed[:, 0], state["pos_embed"][:, 0])
        frame_half = model.local_branch.block.mlp.fc1.weight[:768, :192]
        assert torch.equal(frame_half, state["blocks.1.mlp.fc1.weight"])
    assert "without a place in the network: blocks.2.norm1.weight" in lines()
    assert "the local block starts as the backbone's last block" in lines()


def test_hugging_face_layout(tmp_path):
    state, renamed = vit_state(), {}
    for name, tensor in state.items():
        if "attn.qkv" in name:
            for which, piece in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                hf = name.replace("blocks.", "vit.encoder.layer.").replace("attn.qkv", f"attention.attention.{which}")
                renamed[hf] = piece.clone()
            continue
        for ours, theirs in {
            "patch_embed.proj": "vit.embeddings.patch_embeddings.projection",
            "cls_token": "vit.embeddings.cls_token",
            "pos_embed": "vit.embeddings.position_embeddings",
            "blocks.": "vit.encoder.layer.",
            ".norm1.": ".layernorm_before.",
            ".norm2.": ".layernorm_after.",
            "attn.proj": "attention.output.dense",
            "mlp.fc1": "intermediate.dense",
            "mlp.fc2": "output.dense",
            "head.": "classifier.",
        }.items():
            name = name.replace(ours, theirs)
        renamed[name.replace("norm.", "vit.layernorm.") if name.startswith("norm.") else name] = tensor
    assert "vit.encoder.layer.1.attention.attention.key.bias" in renamed
    safetensors.torch.save_file(renamed, tmp_path / "hf.safetensors")
    torch.save(state, tmp_path / "timm.pth")
    ours, theirs = build(tmp_path / "timm.pth").state_dict(), build(tmp_path / "hf.safetensors").state_dict()
    for name in ours:
        if name.startswith(("backbone.blocks", "backbone.pos", "backbone.patch", "global_branch.block")):
            assert torch.equal(ours[name], theirs[name]), name


@pytest.mark.parametrize(
    "backbone",
    [
        "vit_small_patch16_224",
        "deit_tiny_distilled_patch16_224",
        "deit3_small_patch16_224",
        "vit_small_patch14_dinov2",
        "vit_small_patch14_reg4_dinov2",
        "vit_base_patch16_clip_224",
        "vit_small_patch16_18x2_224",  # parallel attentions in a block: not rewritten but run whole
    ],
)
def test_backbones(tmp_path, backbone):
    """Each kind loads its own timm file, and its class token is timm's own after the last block and norm."""
    patch = 14 if "patch14" in backbone else 16
    clip = ClipConfig(frames=2, height=4 * patch, width=2 * patch)
    torch.manual_seed(7)
    vit = timm.create_model(backbone, depth=2, num_classes=0, img_size=(4 * patch, 2 * patch)).eval()
    for name, parameter in vit.named_parameters():
        torch.nn.init.normal_(parameter, mean=float("norm" in name and "weight" in name), std=0.1)
    torch.save(vit.state_dict(), tmp_path / "vit.pth")
    model = build(tmp_path / "vit.pth", backbone, clip=clip, camera_embedding=0.0).eval()
    images = torch.rand(2, 3, *model.image_size)
    with torch.no_grad():
        tokens = model.backbone(images, torch.tensor([0, 1]))
        ours = model.global_branch.norm(model.global_branch.block(tokens)[:, 0])
        torch.testing.assert_close(ours, vit.forward_features(images)[:, 0], rtol=1e-4, atol=1e-4)
    assert embed(model).shape == (2, model.width * 13)


def test_released_checkpoint_with_other_counts(tmp_path, lines):
    torch.manual_seed(2)
    base = {"backbone": "vit_base_patch16_224", "clip": ClipConfig(frames=1, height=64, width=32)}
    base["guidance"] = "released"  # 12 heads, as the published model has
    original = build(identities=7, cameras=4, **base)
    torch.nn.init.normal_(original.backbone.camera)
    torch.nn.init.normal_(original.global_neck.running_mean)
    torch.save(to_released(original.state_dict()), tmp_path / "released.pth")

    same = released_model(torch.load(tmp_path / "released.pth", weights_only=True))
    assert (same.num_identities, same.num_cameras, same.frames, same.parts) == (7, 4, 1, 6)
    torch.testing.assert_close(embed(same), embed(original), rtol=0, atol=0)

    other = build(tmp_path / "released.pth", **base, identities=5, cameras=6)
    assert "classifiers of 7 identities dropped, 5 new ones are random" in lines()
    assert "camera embeddings extended from 4 to 6 by their mean" in lines()
    torch.testing.assert_close(embed(other), embed(original), rtol=0, atol=0)
    torch.testing.assert_close(embed(other, (4, 5)), embed(original, (-1, -1)), rtol=1e-5, atol=1e-5)

    fewer = build(tmp_path / "released.pth", **base, identities=7, cameras=2, keep_classifiers=False)
    assert "camera embeddings cut from 4 to 2" in lines()
    assert not torch.equal(fewer.part_classifiers.weight, original.part_classifiers.weight)
    kept = build(tmp_path / "released.pth", **base, identities=7, cameras=2)
    assert torch.equal(kept.part_classifiers.weight, original.part_classifiers.weight)


def test_whole_network_at_another_size(tmp_path, lines):
    """Positions are resampled; what depends on the number of frames starts anew, if that is allowed by name."""
    original = build()
    safetensors.torch.save_file(original.state_dict(), tmp_path / "own.safetensors")
    clip, told = ClipConfig(frames=3, height=128, width=64), {"weights_grid": (4, 2)}
    with pytest.raises(
        CheckpointError, match=r"entries do not fit .*model.allow_partial=\[local_branch\*,part_necks\*\]"
    ):
        build(tmp_path / "own.safetensors", clip=clip, **told)
    larger = build(tmp_path / "own.safetensors", clip=clip, allow_partial=("local_branch*", "part_necks*"), **told)
    assert "position embeddings of 4 x 2 resampled to 8 x 4 patches" in lines()
    assert "local_branch.block.attention.norm_weight (384,) for (576,)" in lines()
    assert torch.equal(larger.backbone.patch_embed.proj.weight, original.backbone.patch_embed.proj.weight)


def test_refusals(tmp_path):
    with pytest.raises(CheckpointError, match="no such weights file"):
        build(tmp_path / "none.pth")
    (tmp_path / "text.pth").write_text("not a file of tensors")
    with pytest.raises(CheckpointError, match=r"text\.pth"):
        build(tmp_path / "text.pth")
    torch.save({"head": torch.nn.Linear(2, 2)}, tmp_path / "pickled.pth")
    with pytest.raises(CheckpointError, match="holds more than tensors"):
        build(tmp_path / "pickled.pth")
    torch.save({"epoch": 3}, tmp_path / "empty.pth")
    with pytest.raises(CheckpointError, match="holds no named tensors"):
        build(tmp_path / "empty.pth")
    torch.save({"layer1.weight": torch.zeros(3)}, tmp_path / "resnet.pth")
    with pytest.raises(CheckpointError, match=r"nothing of it fits. It has layer1\.weight"):
        build(tmp_path / "resnet.pth")
    torch.save(vit_state(depth=1) | {"pos_embed": torch.zeros(1, 31, 192)}, tmp_path / "odd.pth")
    with pytest.raises(CheckpointError, match=r"odd\.pth"):
        build(tmp_path / "odd.pth")
    released = to_released(build(guidance="released").state_dict())
    del released["bottleneck_3.running_var"]
    with pytest.raises(CheckpointError, match=r"lacks 1 entries: bottleneck_3\.running_var"):
        released_model(released)
    released["bottleneck_3.running_var"] = torch.ones(7)
    with pytest.raises(CheckpointError, match=r"part_necks"):
        released_model(released)
    dinov2 = build(backbone="vit_small_patch14_reg4_dinov2", clip=ClipConfig(frames=2, height=56, width=28))
    with pytest.raises(CheckpointError, match="no place for this network"):
        to_released(dinov2.state_dict())


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        *[("block1.attn.qkv.weight", shape) for shape in [(), (2, 384), (1153, 384)]],
        *[("classifier.weight", shape) for shape in [(), (10,), (10, 0)]],
        *[("base.Cam", ()), ("classifier_1.weight", (3, 384)), ("b2.1.weight", ()), ("b1.0.mlp.fc1.weight", (3, 3))],
        *[("base.patch_embed.proj.weight", ()), ("base.pos_embed", (1,)), ("base.pos_embed", (1, 0, 192))],
    ],
)
def test_an_entry_of_another_shape_is_an_error(name, shape):
    released = to_released(build(guidance="released").state_dict())
    released[name] = torch.zeros(shape)
    with pytest.raises(CheckpointError, match=r"of another shape|do not fit each other|lack a side|are not those of"):
        released_model(released)
