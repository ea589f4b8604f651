"""A backbone that is no VisionTransformer, added by one class and one name: trains, resumes, is judged and exported."""

import json

import numpy as np
import pytest
import timm
import torch
from torch import nn
from training_runs import StopAfter, logged, newest_tensors, printed, run, toy_config, toy_shards

from keyreid.backbones import FAMILIES, Backbone, LastStage, PatchGrid, family, patch_grid
from keyreid.backbones.vit import ViT, _patch_size, create
from keyreid.checkpoints import folder as checkpoints
from keyreid.checkpoints.start import start_network
from keyreid.cli import app
from keyreid.config import ClipConfig, ModelConfig
from keyreid.errors import CheckpointError, ConfigError
from keyreid.model import build_model

NAME = "test-conv"
WIDTH, STRIDE = 24, 16
CLIP = ClipConfig(frames=2, height=64, width=32)


class ConvBackbone(Backbone):
    """Two strided convolutions; each cell of the last grid is a token, and their mean stands for the frame."""

    def __init__(self, grid: PatchGrid, num_cameras: int, camera_factor: float) -> None:
        super().__init__(WIDTH, grid)
        self.stem = nn.Sequential(nn.Conv2d(3, 12, 4, 4), nn.GELU(), nn.Conv2d(12, WIDTH, 4, 4), nn.GELU())
        self.body = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU())
        self.last = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.SiLU())
        self.norm = nn.LayerNorm(WIDTH)
        self.add_camera_table(num_cameras, camera_factor)

    @classmethod
    def grid_of(cls, model, clip):
        return PatchGrid.tiling(model, clip, STRIDE, STRIDE)

    @classmethod
    def build(cls, model, clip, num_cameras):
        return cls(cls.grid_of(model, clip), num_cameras, model.camera_embedding)

    def forward(self, images, cameras, prompts=None):
        cells = self.stem(images.to(self.stem[0].weight.dtype)).flatten(2).mT
        if prompts is not None:
            cells = cells + prompts
        cells = torch.cat([cells.mean(1, keepdim=True), cells], 1)
        return self.run(self.body, self.with_cameras(cells, cameras))

    def last_stage(self):
        stage = LastStage(self.last, self.norm, nn.SiLU)
        del self.last, self.norm
        return stage


FAMILIES[NAME] = ConvBackbone


def train_until(config, steps=None):
    """In the ranks' own processes this module is imported too, and with it the name is known."""
    from keyreid.training.run import train

    train(config, stop=StopAfter(steps) if steps else None)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return toy_shards(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def trained(shards, tmp_path_factory):
    """20 steps, its blocks recomputed in the backward pass."""
    config = conv_config(shards, tmp_path_factory.mktemp("trained"))
    run(train_until, config)
    return config


def conv_config(shards, folder):
    return toy_config(
        shards,
        folder,
        model={"backbone": NAME, "depth": None, "local_heads": 4},
        schedule={"epochs": 4},
        training={"activation_checkpointing": True, "zero_stage": 2},
    )


def model_config(**settings) -> ModelConfig:
    return ModelConfig(backbone=NAME, local_heads=4, **settings)


@pytest.mark.parametrize("mode", ["aligned", "released"])
def test_forward_is_the_naive_one(mode):
    """Tokens, and a last stage that is run whole because it is no transformer block."""
    torch.manual_seed(0)
    network = build_model(model_config(guidance=mode), CLIP, 5, 3).eval()
    torch.nn.init.normal_(network.backbone.camera)
    images, heatmaps, cameras = torch.rand(3, 2, 3, 64, 32), torch.rand(3, 2, 6, 4, 2), torch.tensor([0, -1, 2])
    assert (network.width, network.part_width, network.patch_grid) == (WIDTH, 2 * WIDTH, (4, 2))
    with torch.no_grad():
        features = network.features(images, network.guidance.scaled(heatmaps), cameras)
        stem, table = network.backbone.stem, network.backbone.camera
        cells = stem(images.flatten(0, 1)).permute(0, 2, 3, 1).reshape(6, 8, WIDTH)
        known = torch.stack([table[0], table[0], table.mean(0), table.mean(0), table[2], table[2]])
        tokens = torch.cat([cells.mean(1, keepdim=True), cells], 1) + 3 * known[:, None]
        frames = network.global_branch.norm(network.global_branch.block(network.backbone.body(tokens)))[:, 0]
        weights = features.temporal_scores.softmax(1).unsqueeze(-1)
        expected = (weights * frames.unflatten(0, (3, 2))).sum(1)
    torch.testing.assert_close(features.global_feature, expected)
    assert features.part_features.shape == (6, 3, 2 * WIDTH)
    assert network.embed(images, heatmaps, cameras).shape == (3, WIDTH + 6 * 2 * WIDTH)
    assert type(network.local_branch.block.mlp.act) is nn.SiLU


def test_weights_of_the_backbone_alone(tmp_path, caplog):
    """A file in the backbone's own names fills it, last stage included; what is no transformer block starts none."""
    torch.manual_seed(1)
    source = ConvBackbone.build(model_config(), CLIP, 0).state_dict()
    torch.save(source, tmp_path / "conv.pth")
    caplog.set_level("INFO", logger="keyreid")
    network = start_network(model_config(weights=str(tmp_path / "conv.pth")), CLIP, 5, 3)
    assert torch.equal(network.backbone.stem[0].weight, source["stem.0.weight"])
    assert torch.equal(network.global_branch.block[1].weight, source["last.1.weight"])
    assert "not in the file: camera" in caplog.text and "the local block starts at random" in caplog.text
    with pytest.raises(CheckpointError, match="timm has no weights for test-conv"):
        start_network(model_config(weights="timm"), CLIP, 5, 3)
    with pytest.raises(ConfigError, match=r"clip.width=40: patches of 16 .* use 32 or 48 with test-conv"):
        build_model(model_config(), ClipConfig(frames=2, height=64, width=40), 5, 3)


@pytest.mark.slow
def test_trains_and_resumes(shards, trained, tmp_path):
    losses = [loss for _, loss in logged(trained, "train/loss")]
    assert len(losses) == 20 and losses[-1] < losses[0]
    stopped = conv_config(shards, tmp_path)
    run(train_until, stopped, 1, 7)
    assert checkpoints.read_state(checkpoints.named(stopped.run_dir / "checkpoints", "latest")).step == 7
    run(train_until, stopped)
    assert logged(stopped, "train/loss") == logged(trained, "train/loss"), printed(stopped)
    ours, theirs = newest_tensors(stopped), newest_tensors(trained)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.slow
def test_is_evaluated_and_exported(shards, trained, tmp_path):
    """Scores of the run, of its weights file, and vectors of its ONNX agree."""
    from keyreid.checkpoints.trained import load_trained
    from keyreid.export.onnx import example_inputs

    def invoke(*words):
        app([str(word) for word in words], standalone_mode=False)

    weights, graph = tmp_path / "conv.safetensors", tmp_path / "conv.onnx"
    invoke("export", "weights", trained.run_dir, weights)
    invoke("evaluate", weights, "--out", tmp_path / "judged", f"data.shards={shards}")
    scores = json.loads((tmp_path / "judged" / "scores.json").read_text())
    assert scores["mAP"] == pytest.approx(json.loads((trained.run_dir / "result.json").read_text())["mAP"])

    invoke("export", "onnx", trained.run_dir, graph)
    onnxruntime = pytest.importorskip("onnxruntime")
    network, _ = load_trained(weights)
    images, heatmaps, cameras = example_inputs(network, 3, seed=1)
    with torch.no_grad():
        expected = network.embed(images.float() / 127.5 - 1, heatmaps, cameras).numpy()
    session = onnxruntime.InferenceSession(str(graph), providers=["CPUExecutionProvider"])
    inputs = {"images": images.numpy(), "guidance": heatmaps.numpy(), "cameras": cameras.numpy()}
    given = session.run(None, inputs)[0]
    assert np.abs(given - expected).max() < 1e-4 * max(1, np.abs(expected).max())


def test_names_lead_to_families():
    assert family("vit_base_patch16_224") is family("deit_tiny_patch16_224") is ViT
    assert family(f"{NAME}-large") is ConvBackbone
    assert patch_grid(model_config(), CLIP) == PatchGrid(64, 32, 16, 16)


def test_patch_sizes_read_from_names_are_the_networks():
    """Readers ask for the grid without timm; every VisionTransformer that can be built says the same."""
    names = [*timm.list_models(module="vision_transformer"), *timm.list_models(module="deit")]
    checked = 0
    for name in names[::4]:
        try:
            with torch.device("meta"):
                built = create(name, depth=1).patch_embed.patch_size[0]
        except ConfigError:  # no class token
            continue
        assert _patch_size(name) == built, name
        checked += 1
    assert checked > 20
