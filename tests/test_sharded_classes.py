"""Sharded classes against classifiers of all classes in one process: their losses, their steps, their checkpoints."""

import contextlib
import math
import time
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from training_runs import StopAfter, logged, newest_tensors, run, start, together, toy_config, toy_shards, train

from keyreid.checkpoints import folder as checkpoints
from keyreid.checkpoints import manifest
from keyreid.checkpoints.start import start_network
from keyreid.checkpoints.trained import load_trained
from keyreid.checkpoints.weights_file import read_weights
from keyreid.config import ClipConfig, ModelConfig, OptimizerConfig, check_config
from keyreid.distributed import owned_rows
from keyreid.distributed.parts import Part, shared_out
from keyreid.distributed.ranks import Ranks, join, leave
from keyreid.errors import CheckpointError, ConfigError
from keyreid.export.source import export_weights, open_source
from keyreid.model import build_model
from keyreid.model.sharded_classes import CLASSIFIERS, ClassGroup, ShardedClasses, ShardedLogits, _uniform
from keyreid.tracking import Tracker
from keyreid.training.class_optimizer import ClassOptimizer
from keyreid.training.engine_config import check_classes
from keyreid.training.loop import Interrupted, Trainer

CLASSES, CLIPS, WIDTHS, PARTS = 13, 8, (16, 32), 3
LABELS = torch.tensor([0, 0, 5, 5, 12, 12, 7, 5])
CASES = [
    (None, 0.1, 1.0, "sgd"),
    (None, 0.0, 1.0, "adamw"),
    (1, 0.1, 0.3, "sgd"),
    (2, 0.1, 0.3, "sgd"),
    (2, 0.1, 0, "sgd"),
]
SHARDED = {"classifiers": "sharded"}


def given():
    """Necks of the clips, what follows of their cross entropies, and the whole weights."""
    torch.manual_seed(5)
    rows = torch.randn(1, CLIPS, WIDTHS[0]), torch.randn(PARTS, CLIPS, WIDTHS[1])
    by = torch.rand(1 + PARTS, CLIPS) * (torch.rand(1 + PARTS, CLIPS) > 0.3)  # clips that do not show a part: 0
    return rows, by, (torch.randn(1, CLASSES, WIDTHS[0]), torch.randn(PARTS, CLASSES, WIDTHS[1]))


def optimizer_of(name):
    return OptimizerConfig(name=name, lr=0.5, weight_decay=0.01), torch.optim.SGD([torch.zeros(1)], lr=0.05)


class Shapes(TorchDispatchMode):
    """The shapes of all tensors that are made."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        self.seen |= {tuple(value.shape) for value in tree_leaves(made) if isinstance(value, torch.Tensor)}
        return made


def on_rank(folder):
    owned_rows._BLOCK = 4
    rank, ranks = dist.get_rank(), dist.get_world_size()
    place, found = Ranks(rank, ranks, rank, torch.device("cpu"), dist.group.WORLD), []
    for size, smoothing, negatives, name in CASES:
        group = ClassGroup.of(place, min(size or ranks, ranks))
        rows, by, whole = given()
        own = slice(rank * CLIPS // ranks, (rank + 1) * CLIPS // ranks)
        with Shapes() as shapes:
            classes = ShardedClasses(WIDTHS, PARTS, CLASSES, group)
        classes.load(dict(zip(CLASSIFIERS, whole, strict=True)))
        with shapes:
            optimizer = ClassOptimizer(classes, *optimizer_of(name), steps=0)
            leaves = [value[:, own].clone().requires_grad_() for value in rows]
            classes.choose(LABELS[own], negatives, key=7)
            judged = ShardedLogits(*leaves, classes).judged(LABELS[own], smoothing)
            ((judged.entropies * by[:, own]).sum() * ranks).backward()
            optimizer.complete()
            gradients = [parameter.grad.clone() for parameter in optimizer.parameters]
            optimizer.step()
        seen = torch.arange(len(gradients[0][0])) if classes.seen is None else classes.seen
        found.append(
            {
                "judged": [judged.entropies.detach(), judged.right],
                "rows": [leaf.grad / ranks for leaf in leaves],
                "gradients": saved([(name, classes.held(gradient)) for name, gradient in enumerate(gradients)]),
                "norm": optimizer.squared_norm,
                "seen": (seen * group.place.world_size + group.place.rank).tolist(),
                "weights": saved(optimizer.held_weights().items()),
                "states": saved(optimizer.held_states().items()),
                "large": [shape for shape in shapes.seen if CLASSES in shape and group.place.world_size > 1],
            }
        )
    torch.save(found, f"{folder}/{rank}.pt")


def saved(held):
    """What this rank would save of it: name -> (part, its numbers)."""
    names, held = zip(*held, strict=True)
    own = shared_out(held)
    cut = [each.get().flatten()[p.start - each.part.start :][: len(p)] for each, p in zip(held, own, strict=True)]
    return {name: (part, value.clone()) for name, part, value in zip(names, own, cut, strict=True)}


def whole(of_ranks):
    """The whole tensors of what all ranks save, each number of which one rank has."""
    found = {}
    for name, (part, _) in of_ranks[0].items():
        assert sum(len(of_rank[name][0]) for of_rank in of_ranks) == math.prod(part.shape)
        found[name] = torch.full(part.shape, torch.nan)
        for of_rank in of_ranks:
            Part.whole(part.shape).fill(found[name].view(-1), *of_rank[name])
    return found


def plain(seen, smoothing, name):
    """The same of all clips, against the classes `seen` of whole weights."""
    rows, by, weights = given()
    for value in (*rows, *weights):
        value.requires_grad_()
    logits = torch.cat([value @ weight[:, seen].mT for value, weight in zip(rows, weights, strict=True)])
    labels = torch.tensor([seen.index(label) for label in LABELS.tolist()])
    flat = F.cross_entropy(logits.flatten(0, 1), labels.repeat(1 + PARTS), label_smoothing=smoothing, reduction="none")
    entropies = flat.view(1 + PARTS, CLIPS)
    (entropies * by).sum().backward()
    kind = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[name]
    more = {"momentum": 0.9} if name == "sgd" else {}
    optimizer = kind(weights, lr=0.05, weight_decay=0.01, **more)
    optimizer.step()
    state = {
        f"network.{n}/{key}": optimizer.state[weight][key]
        for n, weight in zip(CLASSIFIERS, weights, strict=True)
        for key in (["momentum_buffer"] if name == "sgd" else ["exp_avg", "exp_avg_sq"])
    }
    gradients = [weight.grad for weight in weights]
    return {
        "judged": [entropies.detach(), (logits.argmax(-1) == labels).float()],
        "rows": [value.grad for value in rows],
        "gradients": gradients,
        "norm": sum(gradient.square().sum() for gradient in gradients),
        "weights": {n: weight.detach() for n, weight in zip(CLASSIFIERS, weights, strict=True)},
        "states": state,
    }


@pytest.mark.parametrize("ranks", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_together_are_one(ranks, tmp_path):
    together(on_rank, ranks, str(tmp_path))
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(ranks)]
    for number, (size, smoothing, negatives, name) in enumerate(CASES):
        of_ranks = [of_rank[number] for of_rank in found]
        size = min(size or ranks, ranks)
        for first in range(0, ranks, size):  # groups draw the same
            seen = sorted(row for of_rank in of_ranks[first : first + size] for row in of_rank["seen"])
            drawn = set((_uniform(torch.arange(CLASSES).numpy(), 7) < negatives).nonzero()[0].tolist())
            assert seen == sorted(drawn | set(LABELS.tolist()))
        assert (len(seen) < CLASSES) == (negatives < 1)
        expected = plain(seen, smoothing, name)
        for rank, of_rank in enumerate(of_ranks):
            own = slice(rank * CLIPS // ranks, (rank + 1) * CLIPS // ranks)
            for key in ("judged", "rows"):
                torch.testing.assert_close(of_rank[key], [value[:, own] for value in expected[key]], msg=key)
            torch.testing.assert_close(of_rank["norm"], expected["norm"])
            assert of_rank["large"] == []
        for key in ("gradients", "weights", "states"):
            named = dict(enumerate(expected[key])) if key == "gradients" else expected[key]
            torch.testing.assert_close(whole([of_rank[key] for of_rank in of_ranks]), named)


def test_a_share_of_the_classes_is_drawn_for_each_step():
    numbers = torch.arange(100_000).numpy()
    draws = [_uniform(numbers, key) < 0.3 for key in (7, 8, 7)]
    assert all(abs(draw.mean() - 0.3) < 0.01 for draw in draws)
    assert (draws[0] & draws[1]).mean() == pytest.approx(0.09, abs=0.01)
    assert (draws[0] == draws[2]).all()


NETWORK = {"backbone": "vit_tiny_patch16_224", "depth": 2, "local_heads": 6}


def test_ranks_draw_their_rows_of_the_same_classifiers():
    clip = ClipConfig(frames=2, height=64, width=32)
    torch.manual_seed(1)
    whole, after = build_model(ModelConfig(**NETWORK), clip, 11, 2), torch.rand(3)
    for rank in range(3):
        torch.manual_seed(1)
        group = ClassGroup(Ranks(rank, 3, rank, torch.device("cpu"), None))
        network = build_model(ModelConfig(**NETWORK, **SHARDED), clip, 11, 2, group=group)
        assert torch.equal(torch.rand(3), after)
        assert [*network.state_dict()] == [name for name in whole.state_dict() if name not in CLASSIFIERS]
        for name, weight in network.classes.weights.items():
            assert torch.equal(weight, whole.state_dict()[name][:, rank::3])


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"training": {"zero_stage": 3}}, "training.zero_stage=3 gathers and saves the weights that it shards"),
        ({"training": {"precision": "fp16"}}, "training.precision=fp16 looks for overflows in the engine's gradients"),
        ({"training": {"casting": "engine"}}, "training.casting=engine keeps float32 copies of the engine's weights"),
        (
            {"training": {"clip_gradient_norm": 1}},
            "clip_gradient_norm with zero_stage=1 clips by the norm of the engine",
        ),
        ({"model": {}, "loss": {"negative_classes": 0.5}}, "loss.negative_classes is a setting of model.classifiers="),
        ({"model": {}, "training": {"class_group": 2}}, "training.class_group is a setting of model.classifiers="),
    ],
)
def test_what_cannot_go_together_is_refused(sections, message):
    config = check_config({"data": {"shards": "here"}, "model": SHARDED} | sections, "test")
    with pytest.raises(ConfigError, match=message):
        check_classes(config)


def test_what_can_go_together_is_not_refused():
    for training in (
        {"zero_stage": 2},
        {"zero_stage": 0, "clip_gradient_norm": 1},
        {"casting": "engine", "precision": "fp32"},
    ):
        check_classes(check_config({"data": {"shards": "here"}, "model": SHARDED, "training": training}, "test"))
    with pytest.raises(ConfigError, match=r"training\.class_group=3 does not divide 4 ranks"):
        ClassGroup.of(Ranks(0, 4, 0, torch.device("cpu"), None), 3)


# ------------------------------------------------------------------------------------------------ training on one rank
QUIET = {"schedule": {"epochs": 1, "warmup_epochs": 0, "steps_per_epoch": 4}, "tracking": {"sinks": []}}
SAVED = {"zero_stage": 1, "ema_decay": 0.5, "checkpoint_every_epochs": 100}


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return toy_shards(tmp_path_factory.mktemp("data"))


def trainer_of(config, steps=99, allowed=(), resume=True):
    tracker = Tracker(config.tracking, config.run_dir.parent, config.run_dir, config.name)
    return Trainer(config, Ranks.alone(), tracker, StopAfter(steps), resume=resume, allowed=allowed)


def some_steps(config):
    """Losses and norms of some steps, and the weights after them."""
    trainer = trainer_of(config, resume=False)
    trainer.engine.train()
    outcomes = [trainer.stepper.step(next(trainer.reader), step) for step in range(3)]
    weights = dict(trainer.engine.weights()) | classes_of(trainer)
    trainer.reader.close()
    weights = {name.removeprefix("network."): value.clone() for name, value in weights.items()}
    return [o.loss for o in outcomes], [float(o.gradient_norm) for o in outcomes], weights


def classes_of(trainer):
    classes = trainer.engine.classes
    return {name: each.get().clone() for name, each in classes.held_weights().items()} if classes else {}


def a_bad_step(config):
    """What is left of a step whose loss is not finite: gradients, and changes of the classes."""
    trainer = trainer_of(config, resume=False)
    trainer.engine.train()
    trainer.network.global_branch.norm.weight.data[0] = float("nan")
    before = classes_of(trainer)
    outcome = trainer.stepper.step(next(trainer.reader), 0)
    trainer.reader.close()
    assert not outcome.applied
    gradients = [parameter.grad for parameter in trainer.engine.classes.parameters]
    return gradients, [torch.equal(value, before[name]) for name, value in classes_of(trainer).items()]


def record(_, configs, file):
    join()
    plain, changing, pairs, bad = configs
    trainer_of(plain).run()
    for classifiers, steps in (("sharded", 1), ("replicated", 1), ("sharded", 99)):
        model = changing.model.model_copy(update={"classifiers": classifiers})
        with contextlib.suppress(Interrupted):
            trainer_of(changing.model_copy(update={"model": model}), steps, allowed=("model.classifiers",)).run()
    said = ""
    try:
        trainer_of(plain.model_copy(update={"model": changing.model}))
    except CheckpointError as error:
        said = str(error)
    torch.save({"pairs": [list(map(some_steps, pair)) for pair in pairs], "bad": a_bad_step(bad), "said": said}, file)
    leave()


@pytest.fixture(scope="module")
def recorded(shards, tmp_path_factory):
    root = tmp_path_factory.mktemp("one rank")

    def config(name, training, model=None, **sections):
        return toy_config(shards, root / name, training=training, model=model or {}, **QUIET, **sections)

    limited, adamw = {"zero_stage": 0, "clip_gradient_norm": 0.5}, {"optimizer": {"name": "adamw", "lr": 1e-4}}
    half = {"zero_stage": 0, "precision": "bf16"}
    pairs = [
        [config("a", limited), config("b", limited, SHARDED)],
        [config("c", {"zero_stage": 1}, **adamw), config("d", {"zero_stage": 1, "accumulation": 2}, SHARDED, **adamw)],
        [config("e", half), config("f", half, SHARDED)],
    ]
    configs = (
        config("plain", SAVED),
        config("changing", SAVED, SHARDED),
        pairs,
        config("bad", {"zero_stage": 0}, SHARDED),
    )
    run(record, configs[0], 1, configs, root / "seen.pt")
    return configs, torch.load(root / "seen.pt", weights_only=False)


def rms(value):
    return value.double().square().mean().sqrt()


def assert_same_weights(ours, theirs, within=1e-5):
    """Root mean squares of differences against the tensor's own, of small tensors against .1, and 1 for momenta.

    Not the keys' bias: its gradient is nothing but rounding, of which AdamW makes steps of the whole rate.
    """
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        far, least = rms(ours[name].double() - value), 1.0 if "/" in name else 0.1
        assert far <= within * rms(value).clamp(min=least) or "qkv.bias" in name, f"{name}: {far}"


def test_steps_are_those_of_replicated_classes(recorded):
    for (one, other), within in zip(recorded[1]["pairs"], (1e-5, 1e-5, 3e-3), strict=True):  # the last in bf16
        (losses, norms, weights), (other_losses, other_norms, other_weights) = one, other
        assert other_losses == pytest.approx(losses, rel=within)
        assert other_norms == pytest.approx(norms, rel=within)
        assert_same_weights(other_weights, weights, within)


def test_a_discarded_step_leaves_nothing(recorded):
    assert recorded[1]["bad"] == ([None, None], [True, True])


def test_a_run_may_change_its_form_and_back(recorded):
    """Sharded, replicated, sharded: the checkpoint is that of a run that was replicated from beginning to end."""
    plain, changing, *_ = recorded[0]
    ours, theirs = newest_tensors(changing), newest_tensors(plain)
    averages = {f"ema.safetensors:{name}" for name in CLASSIFIERS}
    assert ours.keys() == theirs.keys() - averages
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-5, atol=1e-5, msg=name)
    assert [value for _, value in logged(changing, "train/loss")] == pytest.approx(
        [value for _, value in logged(plain, "train/loss")], rel=1e-5
    )
    assert "model.classifiers is 'replicated' there and 'sharded' here" in recorded[1]["said"]


def test_classes_are_neither_built_nor_loaded_to_evaluate_and_export(recorded, tmp_path):
    plain, changing, *_ = recorded[0]
    (network, _), (whole, _) = (load_trained(config.run_dir) for config in (changing, plain))
    assert network.classes is None and not any("classifier" in name for name in network.state_dict())
    images, guidance = torch.randn(2, 2, 3, 64, 32), torch.rand(2, 2, 6, *network.patch_grid)
    inputs = images, guidance, torch.zeros(2, dtype=torch.long)
    with torch.no_grad():
        torch.testing.assert_close(network.embed(*inputs), whole.embed(*inputs), rtol=1e-4, atol=1e-4)
    export_weights(open_source(changing.run_dir), tmp_path / "exported.safetensors")
    again, header = load_trained(tmp_path / "exported.safetensors")
    assert header.model.classifiers == "sharded"
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in network.state_dict().items())
    model = ModelConfig(**NETWORK, weights=str(tmp_path / "exported.safetensors"))
    other = start_network(model, plain.clip, whole.num_identities, whole.num_cameras)  # as the start of another run
    assert torch.equal(other.local_branch.norm.weight, network.local_branch.norm.weight)


def test_another_runs_classifiers_are_taken_if_they_are_wanted(recorded):
    plain = recorded[0][0]
    file = checkpoints.newest_whole(plain.run_dir / "checkpoints") / manifest.WEIGHTS
    theirs = read_weights(file)
    for keep in (True, False):
        group = ClassGroup(Ranks(1, 2, 1, torch.device("cpu"), None))
        model = ModelConfig(**NETWORK, **SHARDED, weights=str(file), keep_classifiers=keep)
        network = start_network(model, plain.clip, theirs[CLASSIFIERS[0]].shape[1], 2, group=group)
        for name, weight in network.classes.weights.items():
            assert torch.equal(weight, theirs[name][:, 1::2]) == keep


# ------------------------------------------------------------------------------------------------------- several ranks
LONG = {"schedule": {"epochs": 1, "warmup_epochs": 0, "steps_per_epoch": 20}}
ADAMW = {"optimizer": {"name": "adamw", "lr": 1e-4}}
LANES = {"data": {"lanes": 2}, "loss": {"compare": "lane"}}


@pytest.fixture(scope="module")
def replicated(shards, tmp_path_factory):
    """What a replicated run of one rank ends with, of several settings, each trained once."""
    done = {}

    def get(name, **sections):
        if name not in done:
            done[name] = toy_config(shards, tmp_path_factory.mktemp(name), **LONG, **sections)
            run(train, done[name])
        return done[name]

    return get


def assert_same_ending(config, other):
    assert_same_weights(newest_tensors(config), newest_tensors(other))
    ours, theirs = logged(config, "train/loss"), logged(other, "train/loss")
    assert [step for step, _ in ours] == [step for step, _ in theirs]
    assert [loss for _, loss in ours] == pytest.approx([loss for _, loss in theirs], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "name", "sections", "training"),
    [
        (2, "sgd", {}, {"zero_stage": 1}),
        (2, "adamw", ADAMW, {"zero_stage": 0}),
        (2, "lanes", LANES, {"zero_stage": 2}),
        (4, "sgd", {}, {"zero_stage": 2, "class_group": 2}),
        (4, "adamw", ADAMW, {"zero_stage": 1}),
        (2, "sgd", {}, {"zero_stage": 0, "class_group": 1, "accumulation": 2}),
    ],
)
def test_twenty_steps_are_those_of_replicated_classes(replicated, shards, tmp_path, ranks, name, sections, training):
    config = toy_config(shards, tmp_path, model=SHARDED, training=training, **LONG, **sections)
    run(train, config, ranks)
    assert_same_ending(config, replicated(name, **sections))


@pytest.mark.slow
@pytest.mark.parametrize("negatives", [1.0, 0.5])
def test_killed_on_four_ranks_and_resumed_on_two(shards, tmp_path, negatives):
    training = {"checkpoint_every_steps": 1, "class_group": 2}
    sections = {"model": SHARDED, "loss": {"negative_classes": negatives}, "training": training}
    undisturbed, config = (toy_config(shards, tmp_path / name, **sections) for name in ("whole", "killed"))
    run(train, undisturbed, 4)
    ranks = start(train, config, 4)
    root = config.run_dir / "checkpoints"
    while len(checkpoints.checkpoints(root)) < 2 and ranks.processes[0].is_alive():
        time.sleep(0.01)
    ranks.kill()
    assert 2 <= checkpoints.read_state(checkpoints.newest_whole(root)).step < 10
    run(train, config, 2)
    assert_same_ending(config, undisturbed)


def made_shapes(config, folder):
    """Shapes of all tensors that a rank makes in two steps, a save and a resume; draws come in small blocks."""
    owned_rows._BLOCK = 16
    ranks = join()
    with Shapes() as shapes:
        trainer = Trainer(config, ranks, Tracker(config.tracking, folder, folder, "", enabled=False), StopAfter(99))
        trainer.engine.train()
        for step in range(2):
            trainer.stepper.step(next(trainer.reader), step)
        trainer.state = replace(trainer.state, step=2)
        trainer._save(None)
        trainer.writer.wait()
        trainer.reader.close()
        trainer = Trainer(config, ranks, Tracker(config.tracking, folder, folder, "", enabled=False), StopAfter(99))
        assert trainer.resumed.name == "step-00000002"
    trainer.reader.close()
    torch.save([trainer.plan.num_identities, *shapes.seen], folder / f"{ranks.rank}.pt")
    leave()


@pytest.mark.slow
def test_no_rank_holds_a_table_of_all_classes(tmp_path):
    config = toy_config(toy_shards(tmp_path / "data", identities=46), tmp_path, model=SHARDED)
    run(made_shapes, config, 2, tmp_path)
    for rank in range(2):
        classes, *shapes = torch.load(tmp_path / f"{rank}.pt", weights_only=False)
        assert classes == 23
        assert [shape for shape in shapes if classes in shape] == []
        assert not {23 * 192, 6 * 23 * 2 * 192} & {math.prod(shape) for shape in shapes}  # nor one without its shape
        assert any((23 + 1 - rank) // 2 in shape for shape in shapes)
