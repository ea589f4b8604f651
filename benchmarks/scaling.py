"""Predicted efficiency of data-parallel training on 1 to 64 nodes; docs/scaling.md explains every number.

python benchmarks/scaling.py
"""

from __future__ import annotations

from dataclasses import dataclass

GPUS_A_NODE = 8
MATRIX_FLOPS = 989e12  # H100 SXM, dense bf16 (vendor's datasheet)
MFU = 0.40  # share of it that a ViT's forward and backward pass reach; assumed
NVLINK_BYTES = 450e9  # a second, GPU and direction (datasheet: 900 GB/s both ways)
NETWORK_BYTES = 50e9  # a second, GPU and direction: one 400 Gb/s port for each GPU
BUS_SHARE = 0.8  # of a link's rate that a large all-reduce reaches; assumed
HIDDEN = 0.7  # share of the backward pass during which gradients travel beside computing; assumed
LATENCY = 20e-6  # seconds a collective and node; assumed
GATHERED_BYTES = 4  # features travel as float32


@dataclass(frozen=True)
class Network:
    """What a step needs of a network: sizes at 256 x 128 pixels, 4 frames, 6 parts, 625 identities."""

    name: str
    parameters: float
    forward_flop: float  # a clip, by torch's counter
    feature_width: int  # D + P * T * D


NETWORKS = (
    Network("ViT-B", 219e6, 84.5e9, 768 + 6 * 3072),
    Network("ViT-L", 519e6, 319e9, 1024 + 6 * 4096),
)


def efficiency(network: Network, nodes: int, clips: int) -> float:
    """Share of a step that computes, for `clips` clips per GPU; 1 on a single GPU without communication."""
    gpus = nodes * GPUS_A_NODE
    compute = 3 * network.forward_flop * clips / (MFU * MATRIX_FLOPS)
    backward = compute * 2 / 3
    gradients = _ring(network.parameters * 4, gpus, nodes)  # ZeRO 1: reduce-scatter + all-gather move what a ring does
    features = _gather(network.feature_width * GATHERED_BYTES * clips, gpus, nodes)
    visible = max(0.0, gradients - HIDDEN * backward) + features
    return compute / (compute + visible)


def _ring(size: float, gpus: int, nodes: int) -> float:
    return 2 * size * (gpus - 1) / gpus / (BUS_SHARE * _link(nodes)) + LATENCY * nodes


def _gather(size: float, gpus: int, nodes: int) -> float:
    return size * (gpus - 1) / (BUS_SHARE * _link(nodes)) + LATENCY * nodes


def _link(nodes: int) -> float:
    return NVLINK_BYTES if nodes == 1 else NETWORK_BYTES


def main() -> None:
    """Print the table of docs/scaling.md."""
    columns = [(network, clips) for network in NETWORKS for clips in (16, 64)]
    print(
        "| nodes (GPUs) | " + " | ".join(f"{network.name}, {clips} clips per GPU" for network, clips in columns) + " |"
    )
    print("|---|" + "---|" * len(columns))
    for nodes in (1, 2, 4, 8, 16, 32, 64):
        cells = [f"{efficiency(network, nodes, clips):.0%}" for network, clips in columns]
        print(f"| {nodes} ({nodes * GPUS_A_NODE}) | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
