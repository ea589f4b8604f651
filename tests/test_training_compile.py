"""`training.compile`: a step's real path runs compiled, whole, with the same numbers, and comes back after a stop."""

import functools
import json
from pathlib import Path

import pytest
import torch
from training_runs import StopAfter, newest_tensors, run, toy_config, toy_shards

from keyreid.checkpoints import folder as checkpoints
from keyreid.config import ClipConfig, LossConfig, ModelConfig
from keyreid.losses import Criterion
from keyreid.model import KeyReID, build_model
from keyreid.training import stochastic_depth

pytestmark = pytest.mark.slow
STEPS = 3


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return toy_shards(tmp_path_factory.mktemp("data"))


def record(config, folder, backend):
    """Train some steps on this rank; write down the curve, and dynamo's graphs and breaks after each step."""
    from torch._dynamo.utils import counters

    from keyreid.distributed.preemption import StopRequest
    from keyreid.distributed.ranks import join, leave
    from keyreid.tracking import Tracker
    from keyreid.training.loop import Trainer

    KeyReID.compile = functools.partialmethod(KeyReID.compile, backend=backend)
    ranks = join()
    trainer = Trainer(config, ranks, Tracker(config.tracking, Path(), Path(), "", enabled=False), StopRequest())
    trainer.engine.train()
    seen = {"losses": [], "norms": [], "graphs": [], "breaks": []}
    for step in range(STEPS):
        batch = next(trainer.reader)
        trainer.schedule.step_update(step)
        outcome = trainer.stepper.step(batch, step)
        seen["losses"].append(outcome.loss)
        seen["norms"].append(outcome.gradient_norm)
        seen["graphs"].append(counters["stats"]["unique_graphs"])
        seen["breaks"].append(sum(counters["graph_break"].values()))
    weights = torch.cat([weight.flatten() for _, weight in trainer.engine.weights()])
    seen["sample"] = weights[:: max(1, len(weights) // 5000)].tolist()
    trainer.reader.close()
    if ranks.first:
        folder.write_text(json.dumps(seen))
    leave()


def train_until(config, steps):
    from keyreid.training.run import train

    KeyReID.compile = functools.partialmethod(KeyReID.compile, backend="aot_eager")
    train(config, stop=StopAfter(steps) if steps else None)


@pytest.mark.parametrize(
    ("graphs", "settings"),
    [
        (3, {"zero_stage": 0}),
        (3, {"zero_stage": 2, "activation_checkpointing": True}),
        (6, {"zero_stage": 1, "accumulation": 2}),  # once without gradients for the cache, once with
    ],
)
def test_a_step_runs_compiled_without_breaks(shards, tmp_path, graphs, settings):
    curves = []
    for compiled in (False, True):
        training = {"clip_gradient_norm": 10.0, "compile": compiled, **settings}
        run(record, toy_config(shards, tmp_path, training=training), 1, tmp_path / "seen.json", "aot_eager")
        curves.append(json.loads((tmp_path / "seen.json").read_text()))
    eager, compiled = curves
    assert eager["graphs"] == [0] * STEPS
    assert compiled["graphs"] == [graphs] * STEPS  # all of them in the first step, and no recompilation
    assert compiled["breaks"] == [0] * STEPS
    assert compiled["losses"] == pytest.approx(eager["losses"], rel=1e-5)
    assert compiled["norms"] == pytest.approx(eager["norms"], rel=1e-5)
    assert compiled["sample"] == pytest.approx(eager["sample"], abs=1e-5)
    assert eager["losses"][0] != pytest.approx(eager["losses"][-1], rel=1e-3)


def test_a_compiled_run_resumes_bit_for_bit(shards, tmp_path):
    training = {"compile": True, "ema_decay": 0.9}
    whole, stopped = (toy_config(shards, tmp_path / name, training=training) for name in ("whole", "stopped"))
    run(train_until, whole, 1, None)
    run(train_until, stopped, 1, 4)
    assert checkpoints.read_state(checkpoints.named(stopped.run_dir / "checkpoints", "latest")).step == 4
    run(train_until, stopped, 1, None)
    ours, theirs = newest_tensors(stopped), newest_tensors(whole)
    assert ours.keys() == theirs.keys() and not any("_orig_mod" in name for name in ours)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("guidance", ["aligned", "released"])
def test_inductors_numbers_are_the_eager_ones(guidance):
    """Generated code too, with stochastic depth's draws: features and gradients within 1e-5."""
    results = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = ModelConfig(backbone="vit_tiny_patch16_224", depth=2, drop_path=0.3, local_heads=6, guidance=guidance)
        network = build_model(model, ClipConfig(frames=2, height=64, width=32), 5, 3).train()
        names = set(network.state_dict())
        criterion = Criterion(LossConfig(), 5, network.width, network.part_width, 6)
        paths = stochastic_depth.use_clip_draws(network)
        stochastic_depth.use(paths, stochastic_depth.draw(paths, 1, 0, 4, 6), slice(0, 4), torch.device("cpu"))
        network.checkpoint_activations = guidance == "aligned"
        if compiled:
            network.compile()
        torch.manual_seed(1)
        images, heatmaps = torch.rand(4, 2, 3, 64, 32) * 2 - 1, torch.rand(4, 2, 6, 4, 2)
        features = network.features(images, network.guidance.scaled(heatmaps), torch.tensor([0, 1, 2, -1]))
        labels, erased = torch.tensor([0, 0, 1, 1]), torch.tensor([[0.0, 1], [0, 0], [1, 0], [0, 0]])
        criterion(features, network.heads(features), labels, erased)[0].backward()
        gradients = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
        assert set(network.state_dict()) == names
        results.append((features, gradients))
    (plain, expected), (ours, gradients) = results
    for feature, reference in zip(ours, plain, strict=True):
        assert (feature - reference).abs().max() <= 1e-5 * max(1.0, reference.abs().max())
    assert gradients.keys() == expected.keys()
    largest = max(gradient.abs().max() for gradient in expected.values())
    for name, gradient in gradients.items():
        assert (gradient - expected[name]).abs().max() <= 1e-5 * max(largest, 1.0), name
