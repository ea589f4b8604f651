"""Predicted efficiency of training on 1 to 512 GPUs, and what a step spends; docs/scaling.md explains every number.

    python benchmarks/scaling.py [--clips 16 64] [--float32-gradients]

Bytes and memory of heads and losses are the formulas of keyreid/training/costs.py, which tests hold against counts.
"""

from __future__ import annotations

import argparse
import math
from typing import NamedTuple

from keyreid.config import Config, check_config
from keyreid.training import costs

GPUS_A_NODE = 8
MATRIX_FLOPS = 989e12  # H100 SXM, dense bf16 (vendor's datasheet)
DOUBLE_FLOPS, SINGLE_FLOPS = 67e12, 67e12  # its float64 matrix products, its float32 without TF32 (datasheet)
MEMORY_BYTES = 3.35e12  # a second (datasheet)
MFU = 0.40  # share of it that a ViT's forward and backward pass reach, and other products; assumed
NVLINK_BYTES = 450e9  # a second, GPU and direction (datasheet: 900 GB/s both ways)
NETWORK_BYTES = 50e9  # a second, GPU and direction: one 400 Gb/s port for each GPU
BUS_SHARE = 0.8  # of a link's or the memory's rate that large work reaches; assumed
HIDDEN = 0.7  # share of the backward pass during which gradients travel beside computing; assumed
LATENCY = 20e-6  # seconds a collective and node, of sums a level of NCCL's tree; assumed
PASSES = 30  # times that heads and losses read or write all features of own rows, counted from the code
# Processor seconds a clip, K = 4: of the batch where it is one lane, of own in a lane a node; benchmarks/planning.py
PLAN_ALL, PLAN_OWN = 14e-6, 60e-6
CONTROL = "how many centres", "which centres"  # between processors, while the GPU computes the step before; assumed
START = 7.9, 10.0  # seconds: imports (measured, 2 cores), processes and NCCL; assumed
HOST_BYTES = 10e9  # a second, from a GPU to its host's memory; assumed


class Network(NamedTuple):
    """What a step needs of a network: sizes at 256 x 128 pixels, 4 frames, 6 parts, 625 identities."""

    name: str
    parameters: float
    forward_flop: float  # a clip, by torch's counter
    width: int


NETWORKS = (Network("ViT-B", 219e6, 84.5e9, 768), Network("ViT-L", 519e6, 319e9, 1024))
IDENTITIES, TRACKLETS = 625, 4


class Step(NamedTuple):
    """Seconds of a step of one GPU; all but `plan` follow each other."""

    compute: float
    heads: float
    losses: float
    gather: float
    messages: float  # sums, and rows of centres to and from their owners
    gradients: float  # what of their traffic no computing hides
    plan: float  # of a reader's processor, beside the rest

    @property
    def efficiency(self) -> float:
        """Share of it that computes the network."""
        return self.compute / max(sum(self[:-1]), self.plan)


def recipe(gpus: int, clips: int, lanes: bool) -> Config:
    """A lane a node, or all clips compared."""
    number = max(1, gpus // GPUS_A_NODE)
    data = {"shards": "nowhere", "identities": gpus * clips // TRACKLETS, "tracklets": TRACKLETS, "lanes": number}
    return check_config({"data": data, "loss": {"compare": "lane" if lanes else "batch"}}, "benchmarks", Config)


def step(network: Network, gpus: int, clips: int, lanes: bool, gradient_bytes: int = 2, rails: int = 1) -> Step:
    """Predict one, for `clips` clips of each GPU.

    Args:
        gradient_bytes: 2 for bf16, with float32 weights; 4.
        rails: ports of a node that the rings use: 1 as this page always assumed; with more, weights are gathered in
            float32 after the step, which it never counted.
    """
    config, nodes = recipe(gpus, clips, lanes), max(1, gpus // GPUS_A_NODE)
    rate = _rate(gpus, rails)
    compute = 3 * network.forward_flop * clips / (MFU * MATRIX_FLOPS)
    layout, features = costs.Layout.of(config, gpus), network.width * (1 + 6 * 4)
    sent = costs.messages(config, network.width, gpus)
    gather = sum(_seconds(of, clips, rate) for of in sent if of.kind == "gather")
    messages = sum(_seconds(of, clips, rate) for of in sent if of.kind != "gather" and of.what not in CONTROL)
    heads = 6 * clips * features * IDENTITIES / (MFU * SINGLE_FLOPS)
    heads += PASSES * 4 * clips * features / (BUS_SHARE * MEMORY_BYTES)
    mined = 4 * clips * layout.scope * features / (MFU * DOUBLE_FLOPS)  # products: distances, then gradients
    losses = mined + 2 * (4 + 8 + 8) * layout.scope * features / (BUS_SHARE * MEMORY_BYTES)  # read, cast, read
    traffic = 0.0
    if gpus > 1:
        once = network.parameters * (gpus - 1) / gpus / rate
        rings = 2 if rails == 1 else 1  # reduce-scatter and all-gather, both hidden, as this page always assumed
        ring = rings * gradient_bytes * once + LATENCY * nodes
        traffic = max(0.0, ring - HIDDEN * compute * 2 / 3)
        if rails > 1:  # ZeRO 1 as DeepSpeed does it: float32 weights are gathered after the step, beside nothing
            traffic += 4 * once + LATENCY * nodes
    plan = PLAN_OWN * clips if config.data.lanes > 1 else PLAN_ALL * clips * gpus
    return Step(compute, heads, losses, gather, messages, traffic, plan)


def _rate(gpus: int, rails: int) -> float:
    """Bytes a second through a ring of so many GPUs."""
    return BUS_SHARE * (NVLINK_BYTES if gpus <= GPUS_A_NODE else min(NVLINK_BYTES, rails * NETWORK_BYTES))


def _seconds(of: costs.Message, clips: int, rate: float) -> float:
    nodes = max(1, of.ranks // GPUS_A_NODE)
    rate = rate if nodes > 1 else BUS_SHARE * NVLINK_BYTES
    if of.kind == "gather":
        return of.received / rate + LATENCY * nodes
    if of.kind == "sum":  # small ones: NCCL's tree, up and down
        return 2 * of.size / rate + LATENCY * (1 + 2 * math.ceil(math.log2(nodes)))
    # A rank speaks with the owners of its rows alone.
    return of.size / (BUS_SHARE * min(NETWORK_BYTES, rate)) + LATENCY * min(nodes, -(-clips // TRACKLETS))


def checkpoint(network: Network, gpus: int) -> float:
    """Seconds that training waits: each rank copies its part of weights and momentum."""
    return 2 * 4 * network.parameters / gpus / HOST_BYTES


def table(clips: list[int], gradient_bytes: int) -> None:
    """Efficiency by GPUs, networks and forms."""
    columns = [(network, each, lanes) for network in NETWORKS for each in clips for lanes in (False, True)]
    heads = [f"{network.name}, {each}, {'lanes' if lanes else 'batch'}" for network, each, lanes in columns]
    print(f"| nodes (GPUs) | {' | '.join(heads)} |\n|---|{'---|' * len(columns)}")
    for gpus, nodes in ((1, 1), *((8 * nodes, nodes) for nodes in (1, 2, 4, 8, 16, 32, 64))):
        found = (step(network, gpus, each, lanes, gradient_bytes) for network, each, lanes in columns)
        print(f"| {nodes} ({gpus}) | " + " | ".join(f"{of.efficiency:.0%}" for of in found) + " |")


def main() -> None:
    """Print the tables of docs/scaling.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, nargs="+", default=[16, 64], help="of each GPU")
    parser.add_argument("--float32-gradients", action="store_true")
    options = parser.parse_args()
    table(options.clips, 4 if options.float32_gradients else 2)
    print("\nMilliseconds of a step of 64 clips a GPU, on 512; plan is a reader's, beside the rest")
    print(f"| network, form, ports of a ring | {' | '.join(Step._fields)} | efficiency |\n|{'---|' * 9}")
    for network in NETWORKS:
        for lanes, rails, gradients in ((False, 1, 4), (False, 1, 2), (True, 1, 2), (True, 8, 2)):
            of = step(network, 512, 64, lanes, gradients, rails)
            form = f"{'lanes' if lanes else 'batch'}, {'bf16' if gradients == 2 else 'float32'} gradients"
            cells = " | ".join(f"{1e3 * seconds:.1f}" for seconds in of)
            print(f"| {network.name}, {form}, {rails} | {cells} | {of.efficiency:.0%} |")
    for network in NETWORKS:
        waits = " and ".join(f"{1e3 * checkpoint(network, gpus):.1f} ms on {gpus}" for gpus in (8, 512))
        print(f"\n{network.name}: start {sum(START):.0f} s; each checkpoint holds training for {waits} GPUs")
        held = [
            (gpus, sum(costs.memory(recipe(gpus, 64, lanes), network.width, IDENTITIES, gpus).values()) / 1e9)
            for gpus, lanes in ((8, False), (512, False), (512, True))
        ]
        words = ("{} GPUs, batch: {:.2f} GB", "{}, batch: {:.2f}", "{}, lanes: {:.2f}")
        print("heads and losses hold at most", "; ".join(w.format(*of) for w, of in zip(words, held, strict=True)))


if __name__ == "__main__":
    main()
