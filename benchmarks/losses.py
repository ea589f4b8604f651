"""The batch-hard triplet loss, forward and backward, against the distances of all pairs, in turns."""

import argparse
import statistics
import time

import torch
import torch.nn.functional as F

from keyreid.losses import triplet_loss


def all_pairs(features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The same loss over all distances, each differentiated: features [P, B, D], labels [B] -> [P]."""
    distance = torch.cdist(features, features, compute_mode="donot_use_mm_for_euclid_dist")
    same = labels.unsqueeze(1) == labels
    positive, negative = torch.where(same, distance, 0.0).amax(-1), torch.where(same, torch.inf, distance).amin(-1)
    return F.softplus(positive - negative).mean(-1)


def main() -> None:
    """Print a row for each batch size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clips", type=int, nargs="+", default=[64, 128, 256, 512])
    parser.add_argument("--width", type=int, default=3072, help="of a part's feature")
    parser.add_argument("--pairs", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(
        "| clips | all pairs, CPU s | keyreid, CPU s | ratio (median, range) | loss differs by | gradient differs by |"
    )
    print("|---|---|---|---|---|---|")
    for clips in arguments.clips:
        torch.manual_seed(0)
        labels = torch.arange(clips) // 4
        people = torch.randn(6, int(labels.max()) + 1, arguments.width)
        features = (torch.randn(6, clips, arguments.width) + 0.3 * people[:, labels] + 3).requires_grad_()
        seconds, found = {all_pairs: [], triplet_loss: []}, {}
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
