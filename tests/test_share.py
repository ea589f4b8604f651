"""Losses of clips that lie on several ranks, against the plain form of all clips in one process."""

import itertools

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from oracle import triplet_of_all_pairs
from training_runs import together

from keyreid.config import LossConfig
from keyreid.distributed.share import Compared, Share, peers_of
from keyreid.errors import ConfigError
from keyreid.losses import Criterion, Scope, centre_loss, identity_loss
from keyreid.model import Features
from keyreid.model.heads import Neck
from keyreid.triplet import triplet_loss, triplet_loss_across

CLIPS, CLASSES, WIDTH, PART_WIDTH, PARTS = 32, 12, 5, 7, 3
LAYOUTS = {  # identities side by side by four, cut by ranks and scopes, and alone
    "groups": torch.arange(CLIPS) // 4,
    "cut": torch.arange(CLIPS) // 3,
    "alone": torch.arange(CLIPS) % 11,
}
CASES = [*itertools.product((1, 2, 4), LAYOUTS, (False, True), (None, 0.3))]
CONFIG = LossConfig(alpha=0.6, identity=1.5, triplet=0.7, centre=0.01, attention=0.3)


def inputs(offset: float = 0.0) -> dict[str, torch.Tensor]:
    torch.manual_seed(7)
    values = {
        "whole": torch.randn(CLIPS, WIDTH) + offset,
        "parts": torch.randn(PARTS, CLIPS, PART_WIDTH) - offset,
        "scores": torch.rand(CLIPS, 4),
        "erased": torch.randint(0, 2, (CLIPS, 4)).float(),
        "visibility": (torch.rand(CLIPS, PARTS) * 3).floor() / 3,
    }
    values["visibility"][:, 2] = 0  # a part that nobody shows
    return values


def heads() -> tuple[Neck, Neck, torch.Tensor, torch.Tensor, Criterion]:
    torch.manual_seed(8)
    weights = torch.randn(1, CLASSES, WIDTH), torch.randn(PARTS, CLASSES, PART_WIDTH)
    return Neck(1, WIDTH), Neck(PARTS, PART_WIDTH), *weights, Criterion(CONFIG, CLASSES, WIDTH, PART_WIDTH, PARTS)


def addends(rank: int, ranks: int, scopes: int, layout: str, shown: bool, margin: float | None, offset: float) -> dict:
    """What a rank has: its addends of the losses, gradients of its rows and of the weights, statistics and centres."""
    given, labels = inputs(offset), LAYOUTS[layout]
    whole_neck, part_necks, w, v, criterion = heads()
    criterion.loss = CONFIG.model_copy(update={"triplet_margin": margin})
    rows = slice(rank * CLIPS // ranks, (rank + 1) * CLIPS // ranks)
    own = Features(given["whole"][rows], given["parts"][:, rows], given["scores"][rows])
    own = Features(*(value.clone().requires_grad_() for value in own))
    visibility = given["visibility"][rows] if shown else None
    share = Share(CLIPS, max(1, scopes // ranks), ranks, peers_of(scopes, ranks, "lanes"))
    share = Share(
        *list(vars(share).values())[:4], seen=share.add_all((visibility > 0).float().sum(0)) if shown else None
    )
    w.requires_grad_(), v.requires_grad_()
    logits = torch.cat(
        [whole_neck(own.global_feature.unsqueeze(0), share) @ w.mT, part_necks(own.part_features, share) @ v.mT]
    )
    scope = Scope.gathered(own, labels[rows], visibility, share)
    total, terms = criterion(own, logits, labels[rows], given["erased"][rows], visibility, share, scope)
    total.backward()
    for neck in (whole_neck, part_necks):
        neck.learn_statistics(share, scopes)
    found = {"total": total.detach(), **terms, "w": w.grad, "v": v.grad}
    found |= {f"gain {n}": neck.weight.grad for n, neck in enumerate((whole_neck, part_necks))}
    found = dict(zip(found, (share.add_all(value) for value in found.values()), strict=True))
    statistics = {
        f"{n} {m}": value for n, neck in enumerate((whole_neck, part_necks)) for m, value in neck.named_buffers()
    }
    return (
        found
        | statistics
        | {"whole": own.global_feature.grad, "parts": own.part_features.grad, "scores": own.temporal_scores.grad}
    )


def plain(scopes: int, layout: str, shown: bool, margin: float | None, offset: float) -> dict:
    """The same of all clips, each scope by itself, from the definitions."""
    given, labels = inputs(offset), LAYOUTS[layout]
    whole_neck, part_necks, w, v, criterion = heads()
    x, y, scores = (given[name].requires_grad_() for name in ("whole", "parts", "scores"))
    seen = (given["visibility"] > 0).float().T if shown else None
    w.requires_grad_(), v.requires_grad_()
    normal, statistics = {}, {}
    for n, (neck, value) in enumerate(((whole_neck, x.unsqueeze(0)), (part_necks, y))):
        flat = value.transpose(0, 1).flatten(1)
        pieces = flat.chunk(scopes)
        means = torch.stack([piece.mean(0) for piece in pieces]).mean(0).detach()
        variances = torch.stack([piece.var(0) for piece in pieces]).mean(0).detach()
        statistics |= {f"{n} running_mean": 0.1 * means, f"{n} running_var": 0.9 + 0.1 * variances}
        normed = torch.cat([F.batch_norm(p, None, None, neck.weight, neck.bias, True, 0.1, neck.eps) for p in pieces])
        normal[n] = normed.unflatten(1, value.shape[::2]).transpose(0, 1)
    logits = torch.cat([normal[0] @ w.mT, normal[1] @ v.mT])

    def triplet(value, weights):
        found = 0.0
        for part in range(scopes):
            rows = slice(part * CLIPS // scopes, (part + 1) * CLIPS // scopes)
            within = None if weights is None else weights[..., rows]
            count = CLIPS / scopes if weights is None else within.sum(-1)
            found += triplet_of_all_pairs(value[..., rows, :], labels[rows], margin, within) * count
        return found / (CLIPS if weights is None else weights.sum(-1).clamp(min=1e-6))

    terms = {
        "identity_global": identity_loss(logits[0], labels),
        "triplet_global": triplet(x, None),
        "centre_global": centre_loss(x, labels, criterion.global_centres),
        "identity_parts": identity_loss(logits[1:], labels, weights=seen).mean(),
        "triplet_parts": triplet(y, seen).mean(),
        "centre_parts": centre_loss(y, labels, criterion.part_centres, seen).mean(),
        "attention": (scores * given["erased"]).sum(1).mean(),
    }
    weight = {"identity": 1.5, "triplet": 0.7, "centre": 0.01}
    total = 0.3 * terms["attention"]
    for name, by in weight.items():
        total = total + by * (0.6 * terms[f"{name}_global"] + 0.4 * terms[f"{name}_parts"])
    total.backward()
    found = {
        "total": total,
        **terms,
        "accuracy": (logits[0].argmax(-1) == labels).float().mean(),
        "w": w.grad,
        "v": v.grad,
    }
    found |= {f"gain {n}": neck.weight.grad for n, neck in enumerate((whole_neck, part_necks))}
    found |= {"0 num_batches_tracked": torch.tensor(1), "1 num_batches_tracked": torch.tensor(1)}
    return {
        n: t.detach()
        for n, t in (found | statistics | {"whole": x.grad, "parts": y.grad, "scores": scores.grad}).items()
    }


def on_rank(folder: str, offset: float) -> None:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.save([addends(rank, ranks, *case, offset) for case in CASES], f"{folder}/{rank}.pt")


@pytest.mark.parametrize("offset", [0.0, pytest.param(30.0, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "ranks", [1, 2, pytest.param(4, marks=pytest.mark.slow), pytest.param(8, marks=pytest.mark.slow)]
)
def test_ranks_together_are_one(ranks, offset, tmp_path):
    together(on_rank, ranks, str(tmp_path), offset)
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(ranks)]
    for case, *of_ranks in zip(CASES, *found, strict=True):
        expected = plain(*case, offset)
        for rank, ours in enumerate(of_ranks):
            rows = slice(rank * CLIPS // ranks, (rank + 1) * CLIPS // ranks)
            assert ours.keys() == expected.keys()
            for name, theirs in expected.items():
                theirs = (
                    {"whole": theirs[rows], "scores": theirs[rows]}[name] if name in ("whole", "scores") else theirs
                )
                theirs = theirs[:, rows] if name == "parts" else theirs
                torch.testing.assert_close(
                    ours[name], theirs, rtol=1e-5, atol=1e-5, msg=lambda m, w=(case, name): f"{w}: {m}"
                )


def test_a_loss_by_its_plain_function_is_the_triplets_own_form():
    """`compare`, which an added loss uses, and the form of the triplet loss that knows of ranks; alone, equal clips."""
    x = torch.ones(2, 6, 4).index_fill_(1, torch.tensor([1, 4]), 2.0).requires_grad_()
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    share = Share(6)
    scope = Compared(x.detach(), labels, None)
    for loss in (share.compare(triplet_loss, x, scope), triplet_loss_across(x, scope, None, share)):
        torch.testing.assert_close(loss, triplet_loss(x, labels))
        assert torch.autograd.grad(loss.sum(), x)[0].isfinite().all()


def test_ranks_and_lanes_that_do_not_go_together():
    with pytest.raises(ConfigError, match=r"data\.lanes=6 and 4 ranks: one must divide the other"):
        peers_of(6, 4, "data.lanes=6")
    assert peers_of(8, 4, "data.lanes=8") is None
