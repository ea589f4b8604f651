"""Networks from a run, a checkpoint, a weights file or a published checkpoint."""

import pytest
import torch

from keyreid.checkpoints.released import to_released
from keyreid.checkpoints.trained import find_weights, load_state, load_trained
from keyreid.checkpoints.weights_file import WeightsHeader, write_weights
from keyreid.config import ClipConfig, ModelConfig
from keyreid.errors import CheckpointError
from keyreid.model import build_model

CLIP = ClipConfig(frames=1, height=64, width=32)
MODEL = ModelConfig(backbone="vit_tiny_patch16_224", depth=2, parts=3)


@pytest.fixture
def network():
    torch.manual_seed(0)
    return build_model(MODEL, CLIP, num_identities=3, num_cameras=2)


def write(path, network):
    path.parent.mkdir(parents=True, exist_ok=True)
    header = WeightsHeader(MODEL.model_copy(update={"weights": "gone.pth"}), CLIP, [4, 7, 9], [1, 2], {})
    write_weights(path, network.state_dict(), header)


def test_weights_file_builds_its_network(tmp_path, network):
    write(tmp_path / "trained.safetensors", network)
    loaded, header = load_trained(tmp_path / "trained.safetensors")
    assert list(header.identities) == [4, 7, 9]
    assert not loaded.training
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name
    state, _ = load_state(tmp_path / "trained.safetensors")
    assert state.keys() == network.state_dict().keys()


def test_of_a_run_the_best_and_averaged(tmp_path, network):
    root = tmp_path / "run" / "checkpoints"
    for step, name in ((1, "weights"), (1, "ema"), (2, "weights")):
        write(root / f"step-0000000{step}" / f"{name}.safetensors", network)
    (root / "latest").write_text("step-00000002\n")
    assert find_weights(tmp_path / "run") == root / "step-00000002" / "weights.safetensors"
    (root / "best").write_text("step-00000001")
    assert find_weights(tmp_path / "run") == root / "step-00000001" / "ema.safetensors"
    assert find_weights(root / "step-00000002") == root / "step-00000002" / "weights.safetensors"
    (root / "best").write_text("step-00000009")  # pruned: the newest is left
    assert find_weights(tmp_path / "run") == root / "step-00000002" / "weights.safetensors"


def test_published_and_bare_state_dicts(tmp_path):
    torch.manual_seed(0)
    config = ModelConfig(backbone="vit_tiny_patch16_224", depth=2, guidance="released")
    network = build_model(config, CLIP, 3, 2)
    torch.save(to_released(network.state_dict()), tmp_path / "published.pth")
    torch.save(network.state_dict(), tmp_path / "bare.pth")
    loaded, header = load_trained(tmp_path / "published.pth")
    assert header is None
    for state in (loaded.state_dict(), load_state(tmp_path / "published.pth")[0], load_state(tmp_path / "bare.pth")[0]):
        assert torch.equal(state["part_necks.weight"], network.part_necks.weight)
    with pytest.raises(CheckpointError, match="not a published KeyRe-ID checkpoint"):
        load_trained(tmp_path / "bare.pth")


def test_refusals(tmp_path, network):
    with pytest.raises(CheckpointError, match="no run, checkpoint or weights file"):
        load_trained(tmp_path / "nothing")
    write(tmp_path / "trained.safetensors", network)
    whole = (tmp_path / "trained.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"cut\.safetensors"):
        load_trained(tmp_path / "cut.safetensors")
    torch.save({"fc.weight": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match="not a KeyRe-ID network"):
        load_state(tmp_path / "other.pth")
