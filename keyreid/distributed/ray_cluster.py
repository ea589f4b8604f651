"""Ray: joined, or started on this machine; and what every process needs that Ray starts as a rank."""

import logging
import os
import secrets
import socket
import sys
from typing import Any

# Before Ray is imported: nothing is sent to Ray's makers.
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ.setdefault("RAY_worker_register_timeout_seconds", "600")  # on a busy machine a process starts slowly
os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's 15 lets anything else on the machine starve a training

import ray
from ray._private import ray_constants
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from keyreid.distributed.launch import free_port
from keyreid.errors import ConfigError, KeyreidError

CONNECT_SECONDS = 5.0
START_ATTEMPTS = 3  # Ray gives its own processes 30 s, which a busy machine may not
OBJECT_STORE_BYTES = 128 * 2**20  # only reports pass through it


def start(address: str | None, log_to_driver: bool = False) -> None:
    """Join the Ray cluster at HOST:PORT, or start Ray on this machine; `ray.shutdown()` leaves or ends it.

    Raises:
        ConfigError: there is no cluster at the address.
        KeyreidError: Ray does not start here.
    """
    logging.getLogger("ray").setLevel(logging.CRITICAL)  # failures are told by who started the work
    common = {"log_to_driver": log_to_driver, "logging_level": logging.CRITICAL}
    if address is not None:
        host, _, port = address.rpartition(":")
        try:
            if port.isdecimal() and "/" not in host:  # Ray itself would try for ever to reach it
                socket.create_connection((host, int(port)), CONNECT_SECONDS).close()
            ray.init(address, **common)
        except (OSError, ValueError, RuntimeError) as error:
            raise ConfigError(f"{address}: no Ray cluster there that can be joined: {error}") from None
        return
    # Loopback alone: Ray has that for systems on which it supports no clusters. And a token that only its own processes
    # know; Ray asks for it by default, while a mode that is set after Ray was imported comes too late.
    ray_constants.ENABLE_RAY_CLUSTER = False
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    os.environ.pop("RAY_AUTH_MODE", None)
    # When the driver is killed, Ray's agents look for its other processes that long before they end too.
    os.environ.setdefault("RAY_gcs_rpc_server_reconnect_timeout_s", "10")
    for attempt in range(START_ATTEMPTS):
        try:
            ray.init("local", include_dashboard=False, object_store_memory=OBJECT_STORE_BYTES, **common)
            return
        except Exception as error:  # Ray raises no narrower one
            ray.shutdown()
            if "timed out during startup" not in str(error) or attempt + 1 == START_ATTEMPTS:
                raise KeyreidError(f"Ray does not start on this machine: {error}") from error


def start_processes(
    kind: "type[RayProcess]",
    ranks: int,
    group: PlacementGroup,
    cpus: float,
    gpus: float,
    threads: int,
    calls: int,
    directory: str,
) -> tuple[list[Any], tuple[str, int]]:
    """Actors of `kind`, one in each bundle of a placement group, and the address and port where they meet.

    Each holds `cpus` and `gpus`, computes with `threads`, and lets `calls` of its methods run at a time.
    """
    places = [PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=rank) for rank in range(ranks)]
    actors = [
        ray.remote(kind)
        .options(num_cpus=cpus, num_gpus=gpus, max_concurrency=calls, scheduling_strategy=place)
        .remote(rank, ranks, threads, directory)
        for rank, place in enumerate(places)
    ]
    return actors, ray.get(actors[0].meeting_point.remote())


class RayProcess:
    """One rank's process, as a Ray actor."""

    def __init__(self, rank: int, world_size: int, threads: int, directory: str) -> None:
        os.chdir(directory)  # where relative paths of the configuration begin
        del sys.argv[1:]  # Ray's own words, secrets among them, which a run's provenance must not show
        # Ray shows each actor its own GPU alone, so it is the first of its kind on any node.
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK="0", OMP_NUM_THREADS=str(threads))

    def meeting_point(self) -> tuple[str, int]:
        """An address and a free port of this node."""
        address = ray.util.get_node_ip_address()
        return address, free_port(address)

    def _meet_at(self, meeting_point: tuple[str, int]) -> None:
        os.environ.update(MASTER_ADDR=meeting_point[0], MASTER_PORT=str(meeting_point[1]))
