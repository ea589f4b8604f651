"""What surrounds the arithmetic: inputs, compilation, checkpointing, half precision, stochastic depth, patch grids."""

import pytest
import torch
from timm.layers import DropPath
from torch.autograd.graph import saved_tensors_hooks

from keyreid.backbones import patch_grid
from keyreid.config import ClipConfig, LossConfig, ModelConfig
from keyreid.guidance import named
from keyreid.losses import Criterion
from keyreid.model import build_model
from keyreid.model.inputs import prepare
from keyreid.shards.batch import ClipBatch

CLIP = ClipConfig(frames=2, height=64, width=32)
LABELS, ERASED = torch.tensor([0, 0, 1, 1]), torch.tensor([[0.0, 1], [0, 0], [1, 0], [0, 0]])


def tiny(**settings):
    torch.manual_seed(0)
    settings = {"backbone": "vit_tiny_patch16_224", "depth": 3, "drop_path": 0.0} | settings
    return build_model(ModelConfig(**settings), CLIP, num_identities=5, num_cameras=3)


def inputs(mode: str = "aligned"):
    torch.manual_seed(1)
    images, guidance = torch.rand(4, 2, 3, 64, 32) * 2 - 1, torch.rand(4, 2, 6, 4, 2)
    return images, guidance * 2 - 1 if mode == "released" else guidance, torch.tensor([0, 1, 2, -1])


def loss_of(model, criterion, clips):
    features = model.features(*clips)
    total, _ = criterion(features, model.heads(features), LABELS, ERASED)
    return total


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture
def criterion():
    torch.manual_seed(2)
    return Criterion(LossConfig(), 5, 192, 384, 6)


def test_prepare():
    """Normalised by .5/.5, erased to the published colour after that, guidance in the mode's range."""
    images = torch.randint(0, 256, (2, 2, 3, 8, 4), dtype=torch.uint8)
    erase = torch.zeros(2, 2, 4, dtype=torch.int32)
    erase[1, 0] = torch.tensor([2, 1, 3, 2])
    numbers = torch.zeros(2, dtype=torch.long)
    guidance = torch.rand(2, 2, 6, 4, 2)
    batch = ClipBatch(images, guidance, erase, torch.ones(2, 6), numbers, numbers, numbers, numbers, ["a", "b"])
    prepared, same = prepare(batch, named("aligned"))
    expected = (images.float() / 255 - 0.5) / 0.5
    expected[1, 0, :, 2:5, 1:3] = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    torch.testing.assert_close(prepared, expected, rtol=0, atol=1e-6)
    assert torch.equal(same, guidance)
    torch.testing.assert_close(prepare(batch, named("released"))[1], (guidance - 0.5) / 0.5)
    assert batch.erased.tolist() == [[0, 0], [1, 0]]


@pytest.mark.parametrize("mode", ["aligned", "released"])
def test_compiles_without_graph_breaks(mode, criterion):
    """fullgraph raises at a break. Tracing, not code generation, is what is ours: the eager backend runs the graph."""
    model, clips = tiny(guidance=mode, drop_path=0.2), inputs(mode)
    model.checkpoint_activations = mode == "aligned"

    def step(*clips):
        return loss_of(model, criterion, clips)

    torch.manual_seed(5)
    eager = gradients(model, step(*clips))
    torch.manual_seed(5)
    compiled = gradients(model, torch.compile(step, fullgraph=True, backend="eager")(*clips))
    for name, gradient in eager.items():
        torch.testing.assert_close(compiled[name], gradient, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        expected = model.eval().embed(*clips)
        torch.testing.assert_close(torch.compile(model.embed, fullgraph=True, backend="eager")(*clips), expected)


def kept_bytes(model, function) -> int:
    """Bytes that autograd keeps between the passes, beyond the weights."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    sizes = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        kept = function()
    del kept
    return sum(sizes.values())


def test_checkpointing_keeps_less_and_gives_the_same(criterion):
    """Also where stochastic depth draws: the recomputation draws again what was drawn."""
    model, clips = tiny(depth=6, drop_path=0.3), inputs()
    torch.manual_seed(5)
    plain_bytes = kept_bytes(model, lambda: loss_of(model, criterion, clips))
    torch.manual_seed(5)
    plain = gradients(model, loss_of(model, criterion, clips))
    model.checkpoint_activations = True
    torch.manual_seed(5)
    checkpointed = gradients(model, loss_of(model, criterion, clips))
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, rtol=1e-5, atol=1e-7)
    assert kept_bytes(model, lambda: loss_of(model, criterion, clips)) < 0.4 * plain_bytes


@pytest.mark.parametrize("casting", ["autocast", "weights"])
def test_bfloat16(casting, criterion):
    """Features near those of float32, losses and statistics in float32, finite gradients, even for large logits."""
    model, clips = tiny(), inputs()
    for block in (model.global_branch.block, model.local_branch.block):
        for weight in (block.attention.q_weight, block.attention.k_weight, block.attention.v_weight):
            torch.nn.init.normal_(weight, std=0.1)  # attention that is far from uniform
    reference = model.features(*clips)
    if casting == "weights":
        model.bfloat16()
        assert model.part_necks.running_var.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16, enabled=casting == "autocast"):
        features = model.features(*clips)
        logits = model.heads(features)
        total, _ = criterion(features, logits, LABELS, ERASED)
    for ours, full in zip(features, reference, strict=True):
        assert ours.dtype == torch.float32
        assert (ours - full).norm() < 0.04 * full.norm()
    assert logits.dtype == total.dtype == torch.float32
    assert all(gradient.isfinite().all() for gradient in gradients(model, total).values())


def test_extreme_guidance_is_finite(criterion):
    """No guidance at all, guidance of exactly 0 in the released form, and a row without variance."""
    for mode, value in (("aligned", 0.0), ("aligned", 1.0), ("released", -1.0), ("released", 0.0)):
        model, (images, guidance, cameras) = tiny(guidance=mode), inputs(mode)
        guidance = torch.full_like(guidance, value).requires_grad_()
        images[0] = 0
        loss = loss_of(model, criterion, (images, guidance, cameras))
        assert all(gradient.isfinite().all() for gradient in gradients(model, loss).values()), (mode, value)
        assert guidance.grad.isfinite().all()


def test_gelu_overwrites_only_where_no_gradient_is_asked_for():
    model, clips = tiny().eval(), inputs()
    kept = [tensor.clone() for tensor in clips]
    with_gradient = model.embed(*clips)
    with torch.inference_mode():
        torch.testing.assert_close(model.embed(*clips), with_gradient, rtol=0, atol=0)
        hidden = torch.randn(3, 5)
        assert model.backbone.blocks[0].mlp.act(hidden) is hidden
    assert all(torch.equal(tensor, before) for tensor, before in zip(clips, kept, strict=True))


def test_stochastic_depth_grows_linearly():
    model = tiny(depth=5, drop_path=0.2)
    rates = [
        block.drop_path1.drop_prob if isinstance(block.drop_path1, DropPath) else 0 for block in model.backbone.blocks
    ]
    assert rates == pytest.approx([0, 0.05, 0.1, 0.15])
    for branch in (model.global_branch, model.local_branch):
        assert branch.block.drop_path1.drop_prob == branch.block.drop_path2.drop_prob == pytest.approx(0.2)


def test_features_are_each_clips_own():
    """What gradient caching relies on: a clip's features do not depend on the others of its batch."""
    model, clips = tiny().train(), inputs()
    together = model.features(*clips)
    alone = [model.features(*(tensor[row : row + 1] for tensor in clips)) for row in range(4)]
    for ours, theirs in zip(together.concatenate(alone), together, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_patch_grid_is_the_networks():
    assert patch_grid(ModelConfig(), ClipConfig()).shape == (16, 8)
    assert patch_grid(ModelConfig(backbone="vit_small_patch14_dinov2"), ClipConfig(height=252, width=126)).shape == (
        18,
        9,
    )
    assert patch_grid(ModelConfig(backbone="vit_tiny_patch16_224"), CLIP).shape == tiny().patch_grid == (4, 2)


def test_every_parameter_is_used(criterion):
    """Data-parallel training waits for the gradient of each parameter."""
    model = tiny()
    used = gradients(model, loss_of(model, criterion, inputs()))
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == set(used)
