"""Networks from a run, a checkpoint, a weights file or a published checkpoint."""

import json
import random

import pytest
import torch
from safetensors.torch import save_file

from keyreid.checkpoints.released import to_released
from keyreid.checkpoints.run_folder import find_weights
from keyreid.checkpoints.trained import load_state, load_trained
from keyreid.checkpoints.weights_file import WeightsHeader, check_sha256, read_header, write_weights
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


def test_the_same_weights_are_the_same_bytes(tmp_path, network):
    for number in range(4):
        write(tmp_path / f"{number}.safetensors", network)
    assert len({(tmp_path / f"{number}.safetensors").read_bytes() for number in range(4)}) == 1


def test_every_flipped_byte_of_a_weights_file_is_found(tmp_path, network):
    path = tmp_path / "trained.safetensors"
    write(path, network)
    content = path.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    draw = random.Random(0)
    for place in [*range(100), *draw.sample(range(100, header), 80), *draw.sample(range(header, len(content)), 40)]:
        damaged = bytearray(content)
        damaged[place] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"trained\.safetensors: "):
            load_state(path)
    load_trained(path, verify=False)  # of the last one, in a tensor


def test_files_of_the_first_format_are_still_read(tmp_path, network):
    metadata = {
        "format": "keyreid-weights-1",
        "model": MODEL.model_dump_json(),
        "clip": CLIP.model_dump_json(),
        "identities": "[4, 7, 9]",
        "cameras": "[1, 2]",
        "about": json.dumps({"step": 3}),
    }
    save_file(network.state_dict(), tmp_path / "old.safetensors", metadata)
    loaded, header = load_trained(tmp_path / "old.safetensors")
    assert header == WeightsHeader(MODEL, CLIP, [4, 7, 9], [1, 2], {"step": 3})
    assert torch.equal(loaded.part_necks.weight, network.part_necks.weight)
    metadata["model"] = metadata["model"][1:]
    save_file(network.state_dict(), tmp_path / "damaged.safetensors", metadata)
    with pytest.raises(CheckpointError, match=r"damaged\.safetensors: damaged header"):
        load_trained(tmp_path / "damaged.safetensors")
    save_file(network.state_dict(), tmp_path / "foreign.safetensors")
    check_sha256(tmp_path / "foreign.safetensors")  # has none
    with pytest.raises(CheckpointError, match="not one of keyreid's"):
        read_header(tmp_path / "foreign.safetensors")


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
