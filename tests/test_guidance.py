"""Guidance modes by name, and one of one's own: prompts on the tokens, parts that start from their patches."""

import pytest
import torch
from torch import nn
from training_runs import logged, newest_tensors, run, toy_config, toy_shards, train

from keyreid.config import ClipConfig, ModelConfig, check_config
from keyreid.errors import ConfigError
from keyreid.guidance import MODES, Guidance, named
from keyreid.model import build_model

NAME = "test-pooled"
CLIP = ClipConfig(frames=2, height=64, width=32)


class Heatmaps(nn.Module):
    """Part heatmaps, each patch's P values linearly to its token's width."""

    def __init__(self, parts: int, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(parts, width)

    def forward(self, guidance: torch.Tensor) -> torch.Tensor:
        return self.linear(guidance.to(self.linear.weight.dtype).flatten(2).mT)


class Pooled(Guidance):
    """A part starts as the guided mean of its patches and attends to the patches: the class token has no part in it."""

    name = NAME
    starts_as_backbone = False

    def prompts(self, parts, width):
        return Heatmaps(parts, width)

    def part_features(self, branch, tokens, guidance):
        rows = tokens.unflatten(0, (-1, branch.frames)).transpose(1, 2).index_select(1, branch.gather[1:]).flatten(2)
        weights = guidance.index_select(2, branch.order) + branch.epsilon
        start = (weights / weights.sum(-1, keepdim=True)).to(rows.dtype) @ rows
        own = torch.cat([start.unsqueeze(2), rows.unsqueeze(1).expand(-1, start.shape[1], -1, -1)], 2)
        parts = branch.block(own.flatten(0, 1), log_weight=weights.log().flatten(0, 1).unsqueeze(1))
        return parts.squeeze(1).unflatten(0, (-1, start.shape[1]))


MODES[NAME] = Pooled()


def train_pooled(config):
    """In the ranks' own processes this module is imported too, and with it the name is known."""
    train(config)


def test_names():
    assert named("released").is_published and not named("aligned").is_published
    with pytest.raises(ConfigError, match="no guidance is called 'alined'; the nearest is 'aligned'"):
        named("alined")
    with pytest.raises(ConfigError, match=r"model\.guidance: .* the nearest is 'released'|guidance: .*'released'"):
        check_config({"guidance": "relased"}, "test", ModelConfig)


def test_an_own_mode_decides_tokens_and_parts():
    """Its prompts reach the tokens, and a part is what its own patches say."""
    torch.manual_seed(0)
    model = ModelConfig(backbone="vit_tiny_patch16_224", depth=2, local_heads=6, drop_path=0.0, guidance=NAME)
    network = build_model(model, CLIP, 5, 3).eval()
    images, cameras, heatmaps = torch.rand(2, 2, 3, 64, 32), torch.tensor([0, 1]), torch.zeros(2, 2, 6, 4, 2)
    heatmaps[..., 0, :] = 1
    with torch.no_grad():
        whole = network.features(images, heatmaps, cameras).global_feature
        assert (network.features(images, heatmaps.flip(3), cameras).global_feature - whole).abs().max() > 1e-3
        tokens = torch.randn(4, 9, network.width)
        parts = network.local_branch(tokens, heatmaps)
        tokens[:, 0] *= -1  # the class token
        torch.testing.assert_close(network.local_branch(tokens, heatmaps), parts, rtol=0, atol=0)
        tokens[:, 1] *= -1
        assert (network.local_branch(tokens, heatmaps) - parts).abs().max() > 1e-3


@pytest.mark.slow
def test_an_own_mode_is_trained_judged_and_exported(tmp_path):
    from keyreid.export.onnx import export_onnx
    from keyreid.export.source import open_source

    config = toy_config(
        toy_shards(tmp_path / "data"), tmp_path, model={"guidance": NAME}, schedule={"epochs": 2}, seed=3
    )
    run(train_pooled, config)
    losses = [loss for _, loss in logged(config, "train/loss")]
    assert len(losses) == 10 and losses[-1] < losses[0]
    torch.manual_seed(3)
    begun = build_model(config.model, CLIP, 6, 3).prompts.linear.weight
    assert not torch.equal(newest_tensors(config)["weights.safetensors:prompts.linear.weight"], begun)
    assert (config.run_dir / "result.json").is_file()
    pytest.importorskip("onnxruntime")
    assert export_onnx(open_source(config.run_dir), tmp_path / "pooled.onnx") < 1e-4
