"""The fast form against the naive oracle: features, vectors, logits, statistics and gradients."""

import pytest
import torch
from oracle import Oracle

from keyreid.backbones import patch_grid
from keyreid.config import ClipConfig, LossConfig, ModelConfig, TcssConfig
from keyreid.losses import Criterion
from keyreid.model import build_model


def small(mode: str, frames: int = 4, height: int = 64, width: int = 32, **settings):
    """A small network with weights large enough to tell errors apart, its oracle, and random clips."""
    torch.manual_seed(3)
    config = ModelConfig(backbone="vit_tiny_patch16_224", depth=3, guidance=mode, drop_path=0.0, **settings)
    clip = ClipConfig(frames=frames, height=height, width=width)
    model = build_model(config, clip, num_identities=5, num_cameras=3)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, mean=float(name.endswith("norm_weight")), std=0.15)
    grid = patch_grid(config, clip).shape
    images = torch.rand(4, frames, 3, height, width) * 2 - 1
    guidance = torch.rand(4, frames, config.parts, *grid)
    guidance = guidance * 2 - 1 if mode == "released" else guidance
    cameras = torch.tensor([0, 2, 1, 1])
    return model, Oracle(model, heads=3, tcss=config.tcss), (images, guidance, cameras)


@pytest.mark.parametrize("mode", ["released", "aligned"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"frames": 3, "parts": 3},
        {"height": 48, "width": 48, "tcss": TcssConfig(shift=2)},  # 9 rows: one is repeated
        {"tcss": TcssConfig(enabled=False)},
    ],
    ids=["default", "three", "odd", "no-tcss"],
)
def test_same_numbers_and_gradients(mode, settings):
    if mode == "released" and settings.get("height") == 48:
        pytest.skip("the published code does not run with an odd number of rows")
    model, oracle, inputs = small(mode, **settings)
    model, oracle, inputs = (
        model.double(),
        oracle.double(),
        [t.double() if t.is_floating_point() else t for t in inputs],
    )
    labels, erased = torch.tensor([0, 0, 3, 3]), torch.randint(0, 2, (4, model.frames))
    criterion = Criterion(LossConfig(), 5, model.width, model.part_width, model.parts).double()
    totals = []
    for network in (model, oracle):
        features = network.features(*inputs)
        logits = network.heads(features)
        total, _ = criterion(features, logits, labels, erased)
        total.backward()
        totals.append((features, logits, total))
    for ours, theirs in zip((*totals[0][0], *totals[0][1:]), (*totals[1][0], *totals[1][1:]), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    theirs = oracle.gradients()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(
                parameter.grad, theirs[name].view_as(parameter), rtol=1e-7, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}"
            )
    with torch.no_grad():
        torch.testing.assert_close(model.eval().embed(*inputs), oracle.eval().embed(*inputs), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("mode", ["released", "aligned"])
def test_float32_gradients(mode):
    """The same in float32, where the order of summation matters: relative to each tensor's norm within 1e-4."""
    model, oracle, inputs = small(mode)
    for network in (model, oracle):
        features = network.features(*inputs)
        sum(f.square().mean() for f in features).backward()
    theirs = oracle.gradients()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            other = theirs[name].view_as(parameter)
            assert (parameter.grad - other).norm() <= 1e-4 * other.norm() + 1e-7, name
