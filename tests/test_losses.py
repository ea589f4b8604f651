"""Losses against their definitions, the published numbers, and one rank against two."""

import numpy as np
import pytest
import torch
import torch.multiprocessing as multiprocessing
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from keyreid.config import ClipConfig, LossConfig, ModelConfig
from keyreid.distributed.ranks import gather
from keyreid.errors import DataError
from keyreid.losses import (
    Criterion,
    attention_loss,
    centre_loss,
    check_labels,
    gather_features,
    identity_loss,
    triplet_loss,
)
from keyreid.model import Features, build_model

LABELS = torch.tensor([0, 0, 3, 3, 1, 1])


def features(batch: int = 6, width: int = 8, part_width: int = 16, parts: int = 6) -> Features:
    torch.manual_seed(4)
    return Features(torch.randn(batch, width), torch.randn(parts, batch, part_width), torch.rand(batch, 4))


def test_published_numbers(shared):
    """The fixtures' losses, from their generator; docs of the fixtures give the order of the draws."""
    numbers = np.load(shared / "fixtures" / "released_forward.npz")
    generator = np.random.Generator(np.random.PCG64([7, int(numbers["salt"])]))
    for shape in ((2, 4, 3, 256, 128), (2, 4, 6, 256, 128)):
        generator.uniform(-1, 1, shape)
    generator.integers(0, 6, (2,))

    def normal(*shape):
        return torch.from_numpy(generator.standard_normal(shape).astype(np.float32))

    logits = torch.stack([normal(8, 625) for _ in range(7)])
    whole, parts = normal(8, 768), torch.stack([normal(8, 3072) for _ in range(6)])
    centres = normal(625, 768), normal(625, 3072)
    scores, erased = normal(8, 4).abs(), torch.from_numpy(generator.integers(0, 2, (8, 4)))
    criterion = Criterion(LossConfig(centres="released"), 625, 768, 3072, 6)
    criterion.global_centres, criterion.part_centres = centres[0], centres[1].unsqueeze(0)
    labels = torch.from_numpy(numbers["loss_pid"])
    total, terms = criterion(Features(whole, parts, scores), logits, labels, erased)
    published = {
        "identity_global": "id_global",
        "identity_parts": "id_local",
        "triplet_global": "triplet_global",
        "triplet_parts": "triplet_local",
        "attention": "attention",
    }
    for ours, theirs in published.items():
        assert abs(terms[ours].item() - numbers[f"loss_{theirs}"]) < 1e-5, ours
    for ours, theirs in {"centre_global": "center_global", "centre_parts": "center_local"}.items():
        assert abs(terms[ours].item() / numbers[f"loss_{theirs}"] - 1) < 1e-6, ours  # thousands: 1e-5 is below float32
    assert abs(total.item() - numbers["loss_total"]) < 1e-5


def test_triplet_is_batch_hard():
    points = torch.tensor([[0.0, 0], [0, 1], [3, 0], [9, 0]])
    labels = torch.tensor([0, 0, 1, 1])
    positive = torch.tensor([1.0, 1, 6, 6])
    negative = torch.tensor([3.0, 10**0.5, 3, 9])
    torch.testing.assert_close(triplet_loss(points, labels), (1 + (positive - negative).exp()).log().mean())
    torch.testing.assert_close(triplet_loss(points, labels, margin=0.3), (positive - negative + 0.3).relu().mean())
    stacked = triplet_loss(torch.stack([points, 2 * points]), labels)
    torch.testing.assert_close(stacked[1], triplet_loss(2 * points, labels))


def every_pair(features, labels, margin=None, weights=None):
    """The definition of the triplet loss, over the distances of all pairs."""
    distance = torch.cdist(features, features, compute_mode="donot_use_mm_for_euclid_dist")
    same = labels.unsqueeze(1) == labels
    seen = torch.ones_like(same) if weights is None else (weights > 0).unsqueeze(-2)
    positive = torch.where(same & seen, distance, 0.0).amax(-1)
    negative = torch.where(~same & seen, distance, torch.inf).amin(-1)
    hard = positive - negative
    loss = torch.nn.functional.softplus(hard) if margin is None else (hard + margin).relu()
    return loss.mean(-1) if weights is None else (loss * weights).sum(-1) / weights.sum(-1).clamp(min=1e-6)


@pytest.mark.parametrize("offset", [0.0, 100.0])  # far from the origin a float32 product loses small distances
@pytest.mark.parametrize("margin", [None, 0.3])
def test_triplet_finds_the_hardest_of_all_pairs(offset, margin):
    for trial, (batch, width, identities) in enumerate(((1, 8, 1), (5, 9, 3), (16, 64, 4), (40, 300, 9), (40, 8, 40))):
        torch.manual_seed(trial)
        labels = torch.randint(0, identities, (batch,))
        side = torch.where(torch.arange(batch) % 2 == 0, offset, -offset).unsqueeze(1)
        x = (0.01 * torch.randn(6, batch, width) + side).requires_grad_()
        for weights in (None, (torch.rand(6, batch) > 0.3).float()):
            found, plain = (
                [loss.detach(), *torch.autograd.grad(loss.sum(), x)]
                for loss in (function(x, labels, margin, weights) for function in (triplet_loss, every_pair))
            )
            torch.testing.assert_close(found[0], plain[0], rtol=1e-6, atol=0)
            if not offset:  # far away, distances that are equal in float32 share the gradient of the plain form
                torch.testing.assert_close(found[1], plain[1], rtol=1e-5, atol=1e-6)


def test_triplet_never_holds_the_differences_of_all_pairs():
    class Largest(TorchDispatchMode):
        numbers = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            made = function(*args, **kwargs or {})
            tensors = [value for value in tree_leaves(made) if isinstance(value, torch.Tensor)]
            self.numbers = max([self.numbers, *(tensor.untyped_storage().nbytes() // 4 for tensor in tensors)])
            return made

    batch, width = 96, 512
    x = torch.randn(2, batch, width, requires_grad=True)
    with Largest() as largest:
        triplet_loss(x, torch.arange(batch) // 4).sum().backward()
    assert largest.numbers <= 2 * 2 * 2 * batch * max(batch, width)  # two neighbours each, in float64


def test_triplet_of_equal_features_has_finite_gradients():
    points = torch.ones(4, 3, requires_grad=True)
    loss = triplet_loss(points, torch.tensor([0, 0, 1, 1]))
    loss.backward()
    assert torch.isfinite(points.grad).all()
    alone = torch.randn(3, 5, requires_grad=True)
    loss = triplet_loss(alone, torch.tensor([2, 2, 2]))  # no other identity
    loss.backward()
    assert loss == 0
    assert torch.equal(alone.grad, torch.zeros_like(alone))


def test_unseen_parts_take_no_part():
    """A clip of weight 0 changes nothing, whatever its features are, and gets no gradient."""
    weights = torch.tensor([1.0, 1, 1, 0, 1, 1])
    seen = weights > 0
    x = torch.randn(6, 5, requires_grad=True)
    logits = torch.randn(6, 4)
    centres = torch.randn(4, 5)
    for loss, rest in (
        (triplet_loss(x, LABELS, weights=weights), triplet_loss(x[seen], LABELS[seen])),
        (identity_loss(logits, LABELS, weights=weights), identity_loss(logits[seen], LABELS[seen])),
        (centre_loss(x, LABELS, centres, weights), centre_loss(x[seen], LABELS[seen], centres)),
    ):
        torch.testing.assert_close(loss, rest)
    triplet_loss(x, LABELS, weights=weights).backward()
    assert torch.equal(x.grad[3], torch.zeros(5))
    assert identity_loss(logits, LABELS, weights=torch.zeros(6)) == 0


def test_weights_and_terms():
    given = features()
    logits = torch.randn(7, 6, 5)
    config = LossConfig(alpha=0.6, identity=2, triplet=3, centre=0.1, attention=0.5)
    criterion = Criterion(config, 5, 8, 16, 6)
    total, t = criterion(given, logits, LABELS, torch.ones(6, 4), torch.rand(6, 6))
    whole = 2 * t["identity_global"] + 3 * t["triplet_global"] + 0.1 * t["centre_global"]
    parts = 2 * t["identity_parts"] + 3 * t["triplet_parts"] + 0.1 * t["centre_parts"]
    torch.testing.assert_close(total, 0.6 * whole + 0.4 * parts + 0.5 * t["attention"])
    torch.testing.assert_close(t["attention"], given.temporal_scores.sum(1).mean())
    assert attention_loss(given.temporal_scores, torch.zeros(6, 4)) == 0
    assert not list(criterion.parameters())


def test_the_parts_losses_are_those_of_each_part_on_average():
    """By the plain functions, part by part, of the clips that show it; a part that nobody shows costs nothing."""
    given, logits = features(), torch.randn(7, 6, 5)
    criterion = Criterion(LossConfig(centre=0.1), 5, 8, 16, 6)
    visibility = torch.ones(6, 6)
    visibility[1, 2] = visibility[3, 5] = 0
    visibility[:, 4] = 0
    total, terms = criterion(given, logits, LABELS, torch.ones(6, 4), visibility)
    parts = torch.zeros(3)
    for part in (0, 1, 2, 3, 5):
        seen = visibility[:, part] > 0
        x, labels = given.part_features[part, seen], LABELS[seen]
        parts[0] += identity_loss(logits[1 + part, seen], labels) / 6
        parts[1] += triplet_loss(x, labels) / 6
        parts[2] += centre_loss(x, labels, criterion.part_centres[part]) / 6
    for name, expected in zip(("identity", "triplet", "centre"), parts, strict=True):
        torch.testing.assert_close(terms[f"{name}_parts"], expected)
    whole = terms["identity_global"] + terms["triplet_global"] + 0.1 * terms["centre_global"]
    weighted = parts[0] + parts[1] + 0.1 * parts[2]
    torch.testing.assert_close(total, 0.75 * whole + 0.25 * weighted + terms["attention"])


def test_smoothing_gives_each_class_its_share():
    """.1 by default, over all classes, the right one included."""
    logits = torch.randn(6, 5)
    target = torch.full((6, 5), 0.1 / 5)
    target[torch.arange(6), LABELS] += 0.9
    expected = -(target * logits.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(identity_loss(logits, LABELS), expected)
    assert identity_loss(logits, LABELS, 0.0) != expected


def test_centres_move_by_the_mean_whatever_the_batch():
    given = features()
    criterion = Criterion(LossConfig(centre_rate=0.5), 5, 8, 16, 6)
    before, parts_before = criterion.global_centres.clone(), criterion.part_centres.clone()
    visibility = torch.ones(6, 6)
    visibility[1, 2] = 0  # the second clip of identity 0 does not show part 2
    criterion.update_centres(given, LABELS, visibility)
    moved = before[3] + 0.5 * (given.global_feature[2:4] - before[3]).sum(0) / 3
    torch.testing.assert_close(criterion.global_centres[3], moved)
    torch.testing.assert_close(criterion.global_centres[[2, 4]], before[[2, 4]])
    moved = parts_before[2, 0] + 0.5 * (given.part_features[2, 0] - parts_before[2, 0]) / 2
    torch.testing.assert_close(criterion.part_centres[2, 0], moved)


def test_released_centres():
    """Gradient descent on the mean squared distance for the global table; the one local table is never learnt."""
    given = features()
    criterion = Criterion(LossConfig(centres="released"), 5, 8, 16, 6)
    assert criterion.part_centres.shape == (1, 5, 16)
    local = criterion.part_centres.clone()
    table = criterion.global_centres.clone().requires_grad_()
    centre_loss(given.global_feature, LABELS, table).backward()
    criterion.update_centres(given, LABELS)
    torch.testing.assert_close(criterion.global_centres, (table - 0.5 * table.grad).detach())
    assert torch.equal(criterion.part_centres, local)


def test_labels_outside_the_classifiers():
    check_labels(torch.tensor([0, 4]), 5, ["a", "b"])
    with pytest.raises(DataError, match=r"2 of 3 clips .* 0\.\.4: 0007C1T0001 \(label 5\), 0009C1T0001 \(label -1\)"):
        check_labels(torch.tensor([5, 0, -1]), 5, ["0007C1T0001", "0008C1T0001", "0009C1T0001"])


def one_step(rank: int, ranks: int) -> dict[str, torch.Tensor]:
    """Losses, averaged gradients and running statistics of one step on this rank's share of 16 clips."""
    torch.manual_seed(0)
    clip = ClipConfig(frames=2, height=32, width=16)
    config = ModelConfig(backbone="vit_tiny_patch16_224", depth=2, drop_path=0.0)
    model = build_model(config, clip, num_identities=4, num_cameras=2)
    for classifier in (model.global_classifier, model.part_classifiers):
        torch.nn.init.normal_(classifier.weight, std=0.05)
    criterion = Criterion(LossConfig(centre=0.01), 4, model.width, model.part_width, 6)
    images, guidance = torch.randn(16, 2, 3, 32, 16), torch.rand(16, 2, 6, *model.patch_grid)
    labels, erased = torch.arange(4).repeat_interleave(4), torch.randint(0, 2, (16, 2)).float()
    own = slice(rank * 16 // ranks, (rank + 1) * 16 // ranks)
    own_features = model.features(images[own], guidance[own], torch.zeros(len(labels[own]), dtype=torch.long))
    everywhere = gather_features(own_features)
    total, terms = criterion(everywhere, model.heads(everywhere), gather(labels[own]), gather(erased[own]))
    total.backward()
    criterion.update_centres(everywhere, gather(labels[own]))
    gradients = {f"gradient {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    if ranks > 1:
        for gradient in gradients.values():
            torch.distributed.all_reduce(gradient)
            gradient /= ranks
    buffers = dict(model.named_buffers()) | dict(criterion.named_buffers())
    return {"total": total.detach()} | terms | gradients | buffers


def rank_of_two(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    torch.save(one_step(rank, 2), f"{folder}/rank{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_are_one(tmp_path):
    """2 gloo ranks of 8 clips: the loss, gradients, BatchNorm statistics and centres of 1 rank of 16."""
    multiprocessing.spawn(rank_of_two, args=(str(tmp_path),), nprocs=2)
    alone = one_step(0, 1)
    assert sum(name.startswith("gradient") for name in alone) > 40
    for rank in range(2):
        together = torch.load(tmp_path / f"rank{rank}.pt", weights_only=True)
        assert together.keys() == alone.keys()
        for name, value in alone.items():
            torch.testing.assert_close(together[name], value, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
