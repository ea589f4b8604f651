"""Processor time of the losses: the triplet loss against all pairs, and heads and losses of one of many ranks.

    python benchmarks/losses.py [--clips 64 512] [--pairs 3]

One of many ranks is simulated: its collectives give back at once what it says itself, so nothing is counted for them.
"""

import argparse
import math
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from heads_alone import OneOf, recipe
from oracle import triplet_of_all_pairs

from keyreid.losses import triplet_loss


def of_one_rank(clips: int, ranks: int, rounds: int) -> float:
    """Processor seconds of heads and losses of one of so many ranks, forward and backward: the least of some rounds."""
    one, times = OneOf(recipe(clips), 768, 625, ranks), []
    for _ in range(rounds + 1):  # the first makes the gradients' memory
        start = time.process_time()
        one.losses()
        times.append(time.process_time() - start)
    one.leave()
    return min(times[1:])


def of_ranks(sizes: list[int], rounds: int) -> None:
    """Print a row for each batch size, and how times grow."""
    print("| clips | heads and losses, 8 own rows, CPU s | of 8 ranks, CPU s |\n|---|---|---|")
    columns = {"8 own rows": lambda clips: clips // 8, "8 ranks": lambda _: 8}
    found = [[of_one_rank(clips, ranks(clips), rounds) for ranks in columns.values()] for clips in sizes]
    for clips, seconds in zip(sizes, found, strict=True):
        print(f"| {clips} | {' | '.join(f'{of:.3f}' for of in seconds)} |", flush=True)
    for name, one, other in zip(columns, found[0], found[-1], strict=True):
        print(f"{name}: exponent in clips {math.log(other / one) / math.log(sizes[-1] / sizes[0]):.2f}")


def of_memory(clips: int = 1024, ranks: int = 8) -> None:
    """Print what a rank holds at once beside its features and their gradients, against what it gathered."""
    for precision, bytes_ in ("fp32", 4), ("bf16", 2):
        one = OneOf(recipe(clips, precision=precision), 768, 625, ranks)
        logits = torch.randn(7, clips // ranks, 625, requires_grad=True)
        held = [log.peak(without) / 1e6 for log, without in (one.held(logits), one.held())]
        one.leave()
        gathered = clips * 768 * 25 * bytes_ / 1e6
        words = " and ".join(f"{of:.0f} MB, {of / gathered:.2f} times" for of in held)
        print(f"{clips} clips, {ranks} ranks, {precision}: gathered {gathered:.1f} MB; losses, and with heads: {words}")


def main() -> None:
    """Print all tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, nargs="+", default=[64, 128, 256, 512], help="of all pairs")
    parser.add_argument("--of-ranks", type=int, nargs="+", default=[64, 128, 256, 512, 1024], help="of all ranks")
    parser.add_argument("--width", type=int, default=3072, help="of a part's feature")
    parser.add_argument("--pairs", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    of_ranks(arguments.of_ranks, arguments.pairs)
    of_memory()
    of_pairs(arguments)


def of_pairs(arguments: argparse.Namespace) -> None:
    """Print a row for each batch size."""
    print("| clips | all pairs, CPU s | ours, CPU s | ratio (median, range) | loss differs by | gradient differs by |")
    print("|---|---|---|---|---|---|")
    for clips in arguments.clips:
        torch.manual_seed(0)
        labels = torch.arange(clips) // 4
        people = torch.randn(6, int(labels.max()) + 1, arguments.width)
        features = (torch.randn(6, clips, arguments.width) + 0.3 * people[:, labels] + 3).requires_grad_()
        seconds, found = {triplet_of_all_pairs: [], triplet_loss: []}, {}
        for _ in range(arguments.pairs):
            for function, times in seconds.items():
                start = time.process_time()
                loss = function(features, labels)
                (gradient,) = torch.autograd.grad(loss.sum(), features)
                times.append(time.process_time() - start)
                found[function] = loss.detach(), gradient
        ratios = [plain / ours for plain, ours in zip(*seconds.values(), strict=True)]
        differences = (
            f"{((one - other).abs().max() / one.abs().max()).item():.0e}"
            for one, other in zip(*found.values(), strict=True)
        )
        plain, ours = (min(times) for times in seconds.values())
        ratio = f"{statistics.median(ratios):.1f} ({min(ratios):.1f} to {max(ratios):.1f})"
        print(f"| {clips} | {plain:.2f} | {ours:.2f} | {ratio} | {' | '.join(differences)} |", flush=True)


if __name__ == "__main__":
    main()
