"""The published model: its numbers, its size in operations, and its file, both ways."""

import json
import zlib

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from keyreid.checkpoints.released import released_model
from keyreid.cli import app
from keyreid.model import Features, KeyReID

pytestmark = pytest.mark.slow  # 219 M weights drawn for the module


def drawn(name: str, shape: list[int], salt: int) -> torch.Tensor:
    """The fixtures' weights: each entry from its own name."""
    name = name.replace("b2.0.", "block1.")
    rng = np.random.Generator(np.random.PCG64([zlib.crc32(name.encode()), salt]))
    values = rng.standard_normal(shape, dtype=np.float32)
    if name.endswith("num_batches_tracked"):
        return torch.tensor(0)
    if name.endswith("running_var"):
        values = 1 + 0.25 * np.abs(values)
    elif name.endswith("running_mean"):
        values *= 0.1
    elif len(shape) == 1 and not name.endswith("bias"):
        values = 1 + 0.1 * values
    else:
        values *= 0.02
    return torch.from_numpy(values)


@pytest.fixture(scope="module")
def numbers(shared):
    with np.load(shared / "fixtures" / "released_forward.npz") as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


@pytest.fixture(scope="module")
def names(shared):
    return json.loads((shared / "fixtures" / "released_state_dict_keys.json").read_text())


@pytest.fixture(scope="module")
def model(names, numbers) -> KeyReID:
    state = {name: drawn(name, shape, int(numbers["salt"])) for name, shape, _ in names if not name.startswith("b2.0.")}
    return released_model(state)


@pytest.fixture(scope="module")
def inputs(numbers):
    generator = np.random.Generator(np.random.PCG64([7, int(numbers["salt"])]))
    images = torch.from_numpy(generator.uniform(-1, 1, (2, 4, 3, 256, 128)).astype(np.float32))
    heatmaps = torch.from_numpy(generator.uniform(-1, 1, (2, 4, 6, 256, 128)).astype(np.float32))
    cameras = torch.from_numpy(generator.integers(0, 6, (2,)))
    assert torch.equal(cameras, numbers["camera"])
    return images, torch.nn.functional.avg_pool2d(heatmaps.flatten(0, 1), 16).unflatten(0, (2, 4)), cameras


def within(ours: torch.Tensor, published: torch.Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(ours, published, rtol=0, atol=tolerance)


@torch.no_grad()
def test_evaluation(model, inputs, numbers):
    model.eval()
    vectors = model.embed(*inputs)
    within(vectors, numbers["eval_feature"])
    assert vectors.shape == (2, 19200)
    for autocast in (False, True):
        with (
            torch.inference_mode(),
            torch.autocast("cpu", torch.bfloat16, enabled=autocast),
            sdpa_kernel(SDPBackend.MATH),  # the counter does not know the fused attention of CPUs
            FlopCounterMode(display=False) as counter,
        ):
            model.embed(*(tensor[:1] for tensor in inputs))
        assert 84e9 < counter.get_total_flops() <= 85.5e9
    tokens = model.backbone(inputs[0][:1, 0], inputs[2][:1])
    within(tokens[0, :3], numbers["backbone_tokens_row0"])


@torch.no_grad()
def test_training_outputs(model, inputs, numbers):
    model.train()
    running = {name: buffer.clone() for name, buffer in model.named_buffers()}
    features = model.features(*inputs)
    within(features.global_feature, numbers["train_global"])
    within(features.part_features, numbers["train_parts"])
    within(features.temporal_scores, numbers["temporal_scores"])
    # BatchNorm over 2 clips divides by |a - b| / 2, down to 1e-5: rounding of the features grows in the logits. The
    # published numbers themselves are 3.6e-5 from those of float64; from their own features the logits agree.
    within(model.heads(features)[..., :64], numbers["train_logits"], tolerance=1e-4)
    given = Features(numbers["train_global"], numbers["train_parts"], numbers["temporal_scores"])
    within(model.heads(given)[..., :64], numbers["train_logits"])
    model.load_state_dict(running, strict=False)


def test_export_is_the_published_file(model, names, tmp_path):
    """Exactly the published keys, shapes and types, on disk and back, by the command."""
    ours = tmp_path / "ours.pth"
    torch.save(model.state_dict(), ours)
    result = CliRunner().invoke(app, ["export", "released", str(ours), str(tmp_path / "published.pth")])
    assert result.exit_code == 0, result.output
    ours.unlink()
    exported = torch.load(tmp_path / "published.pth", weights_only=True, mmap=True)
    shapes = {name: (list(tensor.shape), str(tensor.dtype)) for name, tensor in exported.items()}
    assert shapes == {name: (shape, f"torch.{dtype}") for name, shape, dtype in names}
    assert (tmp_path / "published.pth").stat().st_size < 0.9e9  # the local block once, not twice
    again = released_model(exported).state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again[name]), name
