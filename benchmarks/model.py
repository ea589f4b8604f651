"""The network against its naive form: same weights, clips and precision, in one process.

    python benchmarks/model.py                          # ViT-B, the published model, 2 clips: the figures in README.md
    python benchmarks/model.py --guidance aligned
    python benchmarks/model.py --backbone vit_small_patch16_224 --guidance aligned --compile
    python benchmarks/model.py --device cuda --precision bf16 --clips 16 --pairs 10

Times are of interleaved pairs (naive, ours, naive, ours ...), because machines drift; the ratio is the median of the
pairs' ratios. A training step is features, necks, classifiers, all losses and the backward pass; an evaluation step is
`embed`. Memory is what a step holds at its peak beyond weights and their gradients. On a GPU the share of the
device's arithmetic that the step uses (MFU) is given against a large matrix product measured beside it.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from allocations import AllocationLog
from oracle import Oracle

from keyreid.config import ClipConfig, LossConfig, ModelConfig
from keyreid.guidance import MODES
from keyreid.losses import Criterion
from keyreid.model import KeyReID, build_model

IDENTITIES, CAMERAS = 625, 6  # MARS
MATMUL_SIDE = 8192


def main() -> None:
    """Measure and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="vit_base_patch16_224")
    parser.add_argument("--guidance", choices=list(MODES), default="released")
    parser.add_argument("--clips", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--compile", action="store_true", help="time a training step as it is and compiled, instead")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch, on a CPU")
    parser.add_argument("--cpu-time", action="store_true", help="CPU-seconds: for a machine that others use too")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(arguments.threads)
    clock = time.process_time if arguments.cpu_time else time.perf_counter

    config = ModelConfig(backbone=arguments.backbone, guidance=arguments.guidance, drop_path=0.0)
    clip = ClipConfig()
    ours = build_model(config, clip, IDENTITIES, CAMERAS)
    heads = ours.global_branch.block.attention.heads
    naive = Oracle(ours, heads=heads, local_heads=config.local_heads).to(arguments.device)
    ours.to(arguments.device)
    criterion = Criterion(LossConfig(), IDENTITIES, ours.width, ours.part_width, ours.parts).to(arguments.device)
    clips, labels, erased = random_clips(ours, arguments.clips, arguments.device)

    def precision():
        return torch.autocast(arguments.device, torch.bfloat16, enabled=arguments.precision == "bf16")

    def training_step(network: torch.nn.Module) -> None:
        network.train()
        for parameter in network.parameters():
            parameter.grad = None
        with precision():
            features = network.features(*clips)
            total, _ = criterion(features, network.heads(features), labels, erased)
        total.backward()

    def evaluation_step(network: torch.nn.Module) -> None:
        network.eval()
        with torch.inference_mode(), precision():
            network.embed(*clips)

    print(
        f"{arguments.backbone}, {arguments.guidance}, {arguments.clips} clips of {clip.frames} frames, "
        f"{arguments.precision} on {arguments.device}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    if arguments.compile:
        compiled = build_model(config, clip, IDENTITIES, CAMERAS).to(arguments.device)
        compiled.load_state_dict(ours.state_dict())
        compiled.compile()
        pairs = interleaved(lambda: training_step(ours), lambda: training_step(compiled), arguments.pairs, clock)
        ratios = sorted(eager / fast for eager, fast in pairs)
        print(f"training step, compiled: {statistics.median(ratios):.2f} times ({ratios[0]:.2f} to {ratios[-1]:.2f})")
        return
    forward_flops = {
        name: count_flops(lambda n=n: evaluation_step(n)) for name, n in (("naive", naive), ("ours", ours))
    }
    for name, flops in forward_flops.items():
        print(f"forward, {name}: {flops / arguments.clips / 1e9:.1f} GFLOP a clip")

    for kind, step in (("training", training_step), ("evaluation", evaluation_step)):
        pairs = interleaved(lambda s=step: s(naive), lambda s=step: s(ours), arguments.pairs, clock)
        naive_time, ours_time = (statistics.median(times) for times in zip(*pairs, strict=True))
        ratios = sorted(theirs / mine for theirs, mine in pairs)
        print(
            f"{kind} step: naive {naive_time:.3f} s ({arguments.clips / naive_time:.2f} clips/s), "
            f"ours {ours_time:.3f} s ({arguments.clips / ours_time:.2f} clips/s), "
            f"{statistics.median(ratios):.2f} times (pairs {ratios[0]:.2f} to {ratios[-1]:.2f})"
        )
        if arguments.device == "cuda":
            flops = count_flops(lambda s=step: s(ours)) / ours_time
            best = matmul_flops(arguments.precision)
            print(
                f"{kind} step: {flops / 1e12:.0f} TFLOP/s, {flops / best:.0%} of a matrix product's {best / 1e12:.0f}"
            )

    naive_bytes = peak_memory(naive, lambda: training_step(naive), arguments.device)
    plain_bytes = peak_memory(ours, lambda: training_step(ours), arguments.device)
    evaluation_bytes = [peak_memory(n, lambda n=n: evaluation_step(n), arguments.device) for n in (naive, ours)]
    ours.checkpoint_activations = True
    checkpointed_bytes = peak_memory(ours, lambda: training_step(ours), arguments.device)
    print(
        f"training step's memory beyond weights and gradients: naive {naive_bytes / 1e6:.0f} MB, "
        f"ours {plain_bytes / 1e6:.0f} MB ({plain_bytes / naive_bytes:.2f} of it), "
        f"with activation checkpointing {checkpointed_bytes / 1e6:.0f} MB ({checkpointed_bytes / naive_bytes:.2f})"
    )
    print("evaluation step's memory: naive {:.1f} MB, ours {:.1f} MB".format(*(n / 1e6 for n in evaluation_bytes)))


def random_clips(
    model: KeyReID, clips: int, device: str
) -> tuple[tuple[torch.Tensor, ...], torch.Tensor, torch.Tensor]:
    """Inputs, labels (two clips an identity) and erased flags."""
    images = torch.rand(clips, model.frames, 3, *model.image_size) * 2 - 1
    guidance = torch.rand(clips, model.frames, model.parts, *model.patch_grid)
    inputs = (images, model.guidance.scaled(guidance), torch.arange(clips) % CAMERAS)
    labels, erased = torch.arange(clips) // 2, torch.randint(0, 2, (clips, model.frames))
    return tuple(tensor.to(device) for tensor in inputs), labels.to(device), erased.to(device)


def interleaved(first: Callable, second: Callable, pairs: int, clock: Callable) -> list[tuple[float, float]]:
    """Seconds of each call, in turns, after one of each to warm up."""
    first(), second()
    return [(seconds(first, clock), seconds(second, clock)) for _ in range(pairs)]


def seconds(function: Callable, clock: Callable = time.perf_counter) -> float:
    """Seconds of a call, the GPU's work included."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = clock()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return clock() - start


def count_flops(function: Callable) -> int:
    """Floating-point operations of a call's matrix products, convolutions and attentions, by torch's counter.

    The counter does not know the fused attention of CPUs, so attention is done by matrix products while it counts.
    """
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def matmul_flops(precision: str) -> float:
    """FLOP/s that this GPU reaches in a large square matrix product."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a = torch.randn(MATMUL_SIDE, MATMUL_SIDE, device="cuda", dtype=dtype)
    best = min(seconds(lambda: a @ a) for _ in range(10))
    return 2 * MATMUL_SIDE**3 / best


def peak_memory(network: torch.nn.Module, step: Callable, device: str) -> int:
    """Most bytes that a step holds beyond weights, gradients and whatever was there before it."""
    if device == "cuda":
        for parameter in network.parameters():
            parameter.grad = None
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        gradients = sum(p.grad.nbytes for p in network.parameters() if p.grad is not None)
        return torch.cuda.max_memory_allocated() - before - gradients
    with AllocationLog() as log:
        weights = {log.number(tensor) for tensor in (*network.parameters(), *network.buffers())}
        step()
        gradients = {log.number(p.grad) for p in network.parameters() if p.grad is not None}
    return log.peak(weights | gradients)


if __name__ == "__main__":
    main()
