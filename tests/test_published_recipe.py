"""The published recipe where a training really uses it: over the first and the last steps of one.

The numbers are written down here and read from no configuration: those of KeyRe-ID (arXiv 2507.07393) and of the code
published with it, as docs/model.md and docs/training.md describe them. What a step used is seen from outside: from the
weights, momenta and centres before and after it, and from what its losses were given and gave.
"""

import contextlib
import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from packed import index_only, make_dataset, pack_dataset
from training_runs import StopAfter, logged
from training_runs import run as on_ranks

from keyreid.config import Config, check_config, load_config
from keyreid.datasets.tracklet import Dataset
from keyreid.distributed.ranks import join, leave
from keyreid.model import build_model
from keyreid.shards.plan import TrainingPlan
from keyreid.shards.shard_set import ShardSet
from keyreid.tracking import Tracker
from keyreid.training.loop import Interrupted, Trainer

IDENTITIES, TRACKLETS, FRAMES = 4, 4, 4  # a batch: 16 clips of 4 frames
LR, WARMUP_LR, FLOOR_LR = 0.008, 8e-5, 1.6e-5
EPOCHS, WARMUP_EPOCHS = 120, 5  # of one step each in the run that is watched
LAST = EPOCHS - 1
BIAS_FACTOR, MOMENTUM, WEIGHT_DECAY = 2.0, 0.9, 1e-4
ALPHA, IDENTITY, TRIPLET, CENTRE, ATTENTION = 0.75, 1.0, 1.0, 5e-4, 1.0
SMOOTHING, CENTRE_RATE = 0.1, 0.5
SEED = 1234
CAMERA_TABLE = "network.backbone.camera"
MOMENTA = "/momentum_buffer"
KEPT = (CAMERA_TABLE, "global_centres", "part_centres")
UNSEEN = 2  # row of the camera that no training tracklet has


def published_rate(step: int) -> float:
    """Linear from 8e-5 over 5 epochs, then a cosine over all 120 from .008 to 1.6e-5."""
    if step < WARMUP_EPOCHS:
        return WARMUP_LR + (LR - WARMUP_LR) * step / WARMUP_EPOCHS
    return FLOOR_LR + (LR - FLOOR_LR) * (1 + math.cos(math.pi * step / EPOCHS)) / 2


@dataclass
class Seen:
    """One step: what its losses were given and gave, and the run before and after it."""

    step: int
    batch: object
    given: tuple  # features, logits, labels, erased, visibility
    loss: float
    rates: dict[str, float]  # by which weights and biases moved along their momentum
    before: dict[str, torch.Tensor]  # the camera table, its momentum, the centres
    after: dict[str, torch.Tensor]


def one_sided(dataset: Dataset) -> Dataset:
    """Of half the tracklets the left arm is never seen, of the others the right leg; one camera sees no training."""
    records = []
    for number, record in enumerate(dataset.tracklets):
        keypoints = record.keypoints.copy()
        keypoints[..., 2] = 1
        keypoints[:, [7, 9] if number % 2 else [14, 16], 2] = 0
        camera = 1 + number % 2 if record.split == "train" else record.camera
        records.append(replace(record, keypoints=keypoints, camera=camera))
    return Dataset(dataset.name, tuple(records))


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    root = tmp_path_factory.mktemp("recipe")
    return pack_dataset(one_sided(make_dataset(root / "pictures", identities=10)), root / "pictures", root / "shards")


def small(shards, output):
    """The defaults, but for the size of network, pictures and epochs: nothing that the recipe says is said here."""
    values = {
        "output": str(output),
        "data": {"shards": str(shards.location), "workers": 1},
        "clip": {"height": 64, "width": 32},
        "model": {"backbone": "vit_tiny_patch16_224", "depth": 2},
        "schedule": {"steps_per_epoch": 1},
        "training": {"precision": "fp32", "log_every_steps": 1, "checkpoint_every_epochs": 1000},
        "evaluation": {"every_epochs": 0, "pictures": 0},
        "tracking": {"sinks": [], "system_metrics": False},
    }
    return check_config(values, "small")


def state_of(engine) -> dict[str, torch.Tensor]:
    """Weights, momenta (NAME/momentum_buffer) and centre tables."""
    momenta = ((name, held.get().view(held.part.shape)) for name, held in engine.held_states().items())
    tables = engine.module.criterion.named_buffers()
    return {name: value.detach().clone() for name, value in (*engine.weights(), *momenta, *tables)}


def rates(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> dict[str, float]:
    """r of w' - w = -r m, least squares over all weights and over all biases."""
    sums = {"weight": [0.0, 0.0], "bias": [0.0, 0.0]}
    for key in (key for key in after if key.endswith(MOMENTA)):
        name, momentum = key.removesuffix(MOMENTA), after[key].flatten()
        of = sums["bias" if name.endswith("bias") else "weight"]
        of[0] += torch.dot((before[name] - after[name]).flatten(), momentum).item()
        of[1] += momentum.square().sum().item()
    return {kind: moved / length for kind, (moved, length) in sums.items()}


def watch(trainer, seen: list[Seen]) -> None:
    """Note each step of a training, which is left as it is."""
    given, step_of, state = [], trainer.stepper.step, state_of(trainer.engine)

    def note(_module, inputs, _output):
        features, *others = inputs[:5]
        given.append(([value.detach() for value in features], *(value.detach() for value in others)))

    def step(batch, number):
        nonlocal state
        before, outcome = state, step_of(batch, number)
        state = state_of(trainer.engine)
        kept = [{name: of[name] for name in of if name.startswith(KEPT)} for of in (before, state)]
        seen.append(Seen(number, batch, given.pop(), outcome.loss, rates(before, state), *kept))
        return outcome

    trainer.engine.module.criterion.register_forward_hook(note)
    trainer.stepper.step = step


def record(config, file):
    """On a rank: the steps of a training, 0 to 6, then the last two; and the rates in between."""
    seen, between, ranks = [], {}, join()
    tracker = Tracker(config.tracking, config.run_dir.parent, config.run_dir, "recipe")
    for first, steps in ((0, 7), (LAST - 1, 2)):
        trainer = Trainer(config, ranks, tracker, StopAfter(steps), resume=False)
        trainer.state = replace(trainer.state, step=first)
        watch(trainer, seen)
        with contextlib.suppress(Interrupted):
            trainer.run()
    for step in (30, 60, 90):
        trainer.schedule.step_update(step)
        between[step] = [group["lr"] for group in trainer.schedule.optimizer.param_groups]
    torch.save((seen, between, trainer.total_steps), file)
    leave()


@dataclass
class Run:
    """What `record` wrote, and the plan that it must have followed."""

    config: Config
    shards: ShardSet
    plan: TrainingPlan
    steps: dict[int, Seen]
    between: dict[int, list[float]]
    total_steps: int


@pytest.fixture(scope="module")
def run(shards, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    config = small(shards, folder)
    on_ranks(record, config, 1, folder / "seen.pt")
    seen, between, total = torch.load(folder / "seen.pt", weights_only=False)
    plan = TrainingPlan(shards, config.data, config.clip, SEED)
    return Run(config, shards, plan, {each.step: each for each in seen}, between, total)


def test_learning_rates_of_first_and_last_steps(run):
    """By what the weights did, not by what is said: w' - w = -rate * momentum, for biases twice the rate."""
    assert run.total_steps == EPOCHS
    assert list(run.steps) == [*range(7), LAST - 1, LAST]
    published = {step: published_rate(step) for step in run.steps}
    assert published[0] == WARMUP_LR
    assert published[1] == pytest.approx(0.001664)
    assert published[WARMUP_EPOCHS] == pytest.approx(0.0079659, rel=1e-4)
    assert published[LAST] == pytest.approx(1.737e-5, rel=1e-3)
    for step, rate in ((30, 0.0068306), (60, 0.004008), (90, 0.0011852)):
        assert run.between[step] == pytest.approx([rate, BIAS_FACTOR * rate], rel=1e-3)
    assert dict(logged(run.config, "train/lr")) == pytest.approx(
        {step + 1: rate for step, rate in published.items()}, rel=1e-6
    )
    for step, of in run.steps.items():
        assert of.rates["weight"] == pytest.approx(published[step], rel=2e-3), step
        assert of.rates["bias"] == pytest.approx(BIAS_FACTOR * published[step], rel=2e-3), step


def test_momentum_and_weight_decay(run):
    """A camera that no clip has gets no gradient, so that it shows both alone: m' = .9 m + 1e-4 w."""
    key = CAMERA_TABLE + MOMENTA
    for step in (0, 1, 2, 5, LAST):
        before, after = run.steps[step].before, run.steps[step].after
        expected = MOMENTUM * before[key][UNSEEN] + WEIGHT_DECAY * before[CAMERA_TABLE][UNSEEN]
        assert expected.any()
        torch.testing.assert_close(after[key][UNSEEN], expected, rtol=1e-5, atol=1e-12)


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """[B], towards .9 + .1 / C for the label and .1 / C for the others."""
    classes = logits.shape[1]
    target = torch.full_like(logits, SMOOTHING / classes)
    target[torch.arange(len(labels)), labels] += 1 - SMOOTHING
    return -(target * logits.log_softmax(1)).sum(1)


def batch_hard(features: torch.Tensor, labels: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """[B], log(1 + exp(farthest of one's identity - nearest of another)); unseen clips are nobody's."""
    losses = []
    for anchor, label in zip(features, labels, strict=True):
        distance = (features - anchor).square().sum(1).sqrt()
        positive = distance[(labels == label) & seen].max() if ((labels == label) & seen).any() else torch.tensor(0.0)
        losses.append(F.softplus(positive - distance[(labels != label) & seen].min()))
    return torch.stack(losses)


def branch(features, logits, labels, centres, seen) -> torch.Tensor:
    distance = (features - centres[labels]).square().sum(1)
    each = IDENTITY * cross_entropy(logits, labels) + TRIPLET * batch_hard(features, labels, seen) + CENTRE * distance
    return each[seen].mean()


@pytest.mark.parametrize("step", [0, 1, LAST])
def test_what_is_minimised(run, step):
    """Alpha, the four weights, label smoothing, the soft margin, and who is erased and seen: from the plan itself."""
    of = run.steps[step]
    (whole, parts, scores), logits, labels, *_ = of.given
    erased, seen = (torch.as_tensor(values) for values in planned(run, of.batch))
    whole_loss = branch(whole, logits[0], labels, of.before["global_centres"], torch.ones(16, dtype=torch.bool))
    centres = of.before["part_centres"]
    part_losses = [branch(parts[p], logits[1 + p], labels, centres[p], seen[:, p] > 0) for p in range(6)]
    attention = (scores * erased).sum(1).mean()
    assert attention > 1e-3
    expected = ALPHA * whole_loss + (1 - ALPHA) * torch.stack(part_losses).mean() + ATTENTION * attention
    assert of.loss == pytest.approx(expected.item(), rel=1e-5)


def planned(run, batch) -> tuple[np.ndarray, np.ndarray]:
    """Erased frames [B, T] and the share of frames that show each part [B, P] (left and right swapped by a flip)."""
    steps = [run.plan.step(epoch, step) for epoch in range(7) for step in range(run.plan.steps_per_epoch)]
    keys = {tuple(run.shards.tracklets[clip.tracklet].key for clip in clips): clips for clips in steps}
    clips = keys[tuple(batch.keys)]
    erased = np.stack([clip.erase[:, 2] > 0 for clip in clips])
    seen = np.zeros((len(clips), FRAMES, 6), bool)
    for row, clip in enumerate(clips):
        for number, (frame, flip) in enumerate(zip(clip.frames, clip.flip, strict=True)):
            visible = run.shards.tracklets[clip.tracklet].visible[frame]
            seen[row, number] = visible[[0, 1, 3, 2, 5, 4]] if flip else visible
    return erased.astype(np.float32), seen.mean(1)


def test_losses_know_what_the_plan_did(run):
    for step in (0, 1, 5):
        erased, seen = planned(run, run.steps[step].batch)
        given = run.steps[step].given
        assert 0.2 < erased.mean() < 0.8
        assert len(np.unique(seen)) > 2  # flips show in it
        np.testing.assert_array_equal(given[3].numpy(), erased)
        np.testing.assert_allclose(given[4].numpy(), seen, atol=1e-6)


def test_centres_move_with_each_step(run):
    """By .5 * sum(x - c) / (1 + n) after the step, the parts' by the clips that show them."""
    for step in (0, 1, 6, LAST):
        of = run.steps[step]
        (whole, parts, _), _, labels, *_ = of.given
        _, seen = planned(run, of.batch)
        seen = torch.as_tensor(seen > 0)
        for identity in range(5):
            own = labels == identity
            centre = of.before["global_centres"][identity]
            expected = centre + CENTRE_RATE * (whole[own] - centre).sum(0) / (1 + own.sum())
            torch.testing.assert_close(of.after["global_centres"][identity], expected, rtol=1e-5, atol=1e-5)
            for part in range(6):
                shown, centre = own & seen[:, part], of.before["part_centres"][part, identity]
                expected = centre + CENTRE_RATE * (parts[part, shown] - centre).sum(0) / (1 + shown.sum())
                torch.testing.assert_close(of.after["part_centres"][part, identity], expected, rtol=1e-5, atol=1e-5)


def test_a_batch_is_four_identities_of_four_tracklets_of_four_frames(run):
    for of in run.steps.values():
        assert of.batch.images.shape == (IDENTITIES * TRACKLETS, FRAMES, 3, 64, 32)
        labels = of.batch.labels.view(IDENTITIES, TRACKLETS)
        assert (labels == labels[:, :1]).all()
        assert len(set(labels[:, 0].tolist())) == IDENTITIES


PUBLISHED = {
    "seed": SEED,
    "data": {"identities": IDENTITIES, "tracklets": TRACKLETS, "sampler": "identity", "holdout": 0},
    "data.augment": {
        **{"flip_probability": 0.5, "pad_pixels": 10, "erase_probability": 0.5},
        **{"erase_area": (0.02, 0.4), "erase_aspect": (0.3, 3.3)},
    },
    "clip": {"frames": FRAMES, "height": 256, "width": 128},
    "model": {"parts": 6, "local_heads": 12, "camera_embedding": 3.0, "drop_path": 0.1, "depth": None},
    "model.tcss": {"enabled": True, "shift": 4, "groups": 2},
    "loss": {
        **{"alpha": ALPHA, "identity": IDENTITY, "triplet": TRIPLET, "centre": CENTRE, "attention": ATTENTION},
        **{"label_smoothing": SMOOTHING, "triplet_margin": None, "centre_rate": CENTRE_RATE},
    },
    "optimizer": {
        **{"name": "sgd", "lr": LR, "bias_lr_factor": BIAS_FACTOR},
        **{"momentum": MOMENTUM, "weight_decay": WEIGHT_DECAY},
    },
    "schedule": {
        **{"epochs": EPOCHS, "warmup_epochs": WARMUP_EPOCHS, "warmup_lr": WARMUP_LR, "floor_lr": FLOOR_LR},
        "steps_per_epoch": None,
    },
    "training": {"accumulation": 1, "clip_gradient_norm": 0.0, "ema_decay": None},
}


@pytest.mark.parametrize("source", ["configs/mars.yaml", "defaults"])
def test_configurations_say_the_published_values(source):
    config = load_config(source) if "/" in source else check_config({"data": {"shards": "x"}}, source)
    for place, values in PUBLISHED.items():
        section = config
        for name in place.split(".") if place != "seed" else ():
            section = getattr(section, name)
        values = {"seed": values} if place == "seed" else values
        assert {key: getattr(section, key) for key in values} == values, place


def test_the_network_of_the_recipe():
    """With fewer blocks and a narrower backbone: rows and their order, heads, stochastic depth, the camera's factor."""
    config = load_config("configs/mars.yaml")
    assert config.model.backbone == "vit_base_patch16_224.orig_in21k_ft_in1k"
    assert config.model.weights == "timm"
    narrow = config.model.model_copy(update={"backbone": "vit_tiny_patch16_224", "depth": 3, "weights": None})
    network = build_model(narrow, config.clip, 625, 6)
    assert network.patch_grid == (16, 8)
    assert network.part_width == FRAMES * 192
    assert network.local_branch.order[:6].tolist() == [4, 68, 5, 69, 6, 70]  # shifted by 4, two halves interleaved
    assert network.local_branch.order[-2:].tolist() == [67, 3]
    assert network.local_branch.block.attention.heads == 12
    assert network.local_branch.block.drop_path1.drop_prob == pytest.approx(0.1)
    assert network.global_branch.block.drop_path2.drop_prob == pytest.approx(0.1)
    assert network.global_branch.temporal.kernel_size == (3,)
    assert network.global_classifier.weight.shape == (1, 625, 192)
    assert network.part_classifiers.weight.shape == (6, 625, FRAMES * 192)
    assert not network.part_necks.bias.requires_grad
    assert network.part_classifiers.weight.std().item() == pytest.approx(0.001, rel=0.01)
    network.eval()
    first, other = (network.backbone.with_cameras(torch.zeros(1, 1, 192), torch.tensor([n])) for n in (0, 1))
    table = network.backbone.camera.detach()
    torch.testing.assert_close((first - other).flatten().detach(), 3.0 * (table[0] - table[1]).flatten())


def test_frames_are_changed_as_published():
    """Flip .5, 10 pixels of border and a random crop, erase .5 of .02 to .4 at .3 to 3.3, each frame by itself."""
    config = load_config("configs/mars.yaml")
    shards = index_only(np.repeat(np.arange(40), 4), np.ones(160, int), np.full(160, 30))
    plan = TrainingPlan(shards, config.data, config.clip, config.seed)
    clips = [clip for epoch in range(12) for step in range(plan.steps_per_epoch) for clip in plan.step(epoch, step)]
    flip, crop, erase = (np.stack([getattr(clip, name) for clip in clips]) for name in ("flip", "crop", "erase"))
    erased = erase[..., 2] > 0
    for flags in (flip, erased):
        assert abs(flags.mean() - 0.5) < 0.02
        assert abs((flags[:, 0] == flags[:, 1]).mean() - 0.5) < 0.04  # a frame's draw says nothing of the next one's
    for axis in (0, 1):
        assert np.unique(crop[..., axis]).tolist() == list(range(-10, 11))
        assert abs(crop[..., axis].mean()) < 0.3
    height, width = (erase[erased][:, axis].astype(float) for axis in (2, 3))
    area, aspect = height * width / (256 * 128), height / width
    assert 0.018 < area.min() < 0.025
    assert 0.38 < area.max() < 0.41
    assert 0.28 < aspect.min() < 0.35
    assert 3.0 < aspect.max() < 3.5
