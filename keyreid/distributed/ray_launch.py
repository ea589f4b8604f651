"""Ranks that a Ray cluster places: `keyreid train CONFIG --ray HOST:PORT --ranks N`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from keyreid.distributed.preemption import StopRequest
from keyreid.distributed.ray_cluster import RayProcess, ray, start, start_processes
from keyreid.errors import ConfigError, KeyreidError

POLL_SECONDS = 0.2
GRACE_SECONDS = 10.0  # for ranks that are left after one failed
PLACE_SECONDS = 600.0  # a busy cluster's patience; then the run is refused
LOCAL = "local"
Work = Callable[..., Any]  # picklable; called on each rank with `stop=`, a StopRequest to ask


class WorkingRank(RayProcess):
    """A rank with threads: the work runs in one while another hears of stop signals."""

    def __init__(self, *position: object) -> None:
        super().__init__(*position)
        self._stop = StopRequest()

    def run(self, work: Work, meeting_point: tuple[str, int]) -> Any:
        """Do the work; gives what it gives."""
        self._meet_at(meeting_point)
        return work(stop=self._stop)

    def stop(self, number: int) -> None:
        """Save and end after the current step."""
        self._stop.ask(number)


def run_on_ray(work: Work, address: str, ranks: int | None, check_ranks: Callable[[int], None]) -> Any:
    """Do `work` on `ranks` processes of the cluster; default one for each of its GPUs, one where there is none.

    Ray places them as close together as it can, one GPU each where there are GPUs. Stop signals are passed on, a rank
    that fails ends all. Every node sees the same files under the same paths.

    Args:
        work: for example `functools.partial(keyreid.training.run.train, config)`; it joins the ranks itself.
        address: HOST:PORT of the cluster, "auto" for the one that this machine belongs to, "local" to start Ray here.
        check_ranks: raises where the work cannot be done on that many.

    Returns:
        what the work gives on the first rank.

    Raises:
        ConfigError: no cluster there, or too small a one.
        KeyreidError: a rank failed; the message says which and why.
    """
    start(None if address == LOCAL else address, log_to_driver=True)
    try:
        there = ray.cluster_resources()
        gpus = int(there.get("GPU", 0))
        ranks = ranks or max(1, gpus)
        check_ranks(ranks)
        share = {"GPU": 1.0, "CPU": 1.0} if gpus else {"CPU": 1.0}
        group = _place(share, ranks, there)
        options = {"threads": max(1, int(there["CPU"]) // ranks), "calls": 2, "directory": str(Path.cwd())}
        shares = share["CPU"], share.get("GPU", 0)
        actors, meeting_point = start_processes(WorkingRank, ranks, group, *shares, **options)
        with StopRequest() as stop:
            return _run(actors, meeting_point, work, stop)
    finally:
        ray.shutdown()


def _place(share: dict[str, float], ranks: int, there: dict[str, float]) -> Any:
    for name, each in share.items():
        if ranks * each > there.get(name, 0):
            there_is = there.get(name, 0)
            raise ConfigError(f"--ranks {ranks}: each needs {each:g} {name}, the Ray cluster has {there_is:g}")
    group = ray.util.placement_group([share] * ranks, strategy="PACK")
    if not group.wait(PLACE_SECONDS):
        raise KeyreidError(f"the Ray cluster had no room for {ranks} ranks within {PLACE_SECONDS:.0f} s")
    return group


def _run(actors: list[Any], meeting_point: tuple[str, int], work: Work, stop: StopRequest) -> Any:
    runs = [actor.run.remote(work, meeting_point) for actor in actors]
    pending, told = runs, False
    while pending:
        done, pending = ray.wait(pending, timeout=POLL_SECONDS)
        for run in done:
            try:
                ray.get(run)
            except ray.exceptions.RayError as error:
                if pending:  # a while for tracking to close, then by force
                    ray.wait(pending, num_returns=len(pending), timeout=GRACE_SECONDS)
                for actor in actors:
                    ray.kill(actor)
                cause = getattr(error, "cause", None)
                what = cause if isinstance(cause, KeyreidError) else error
                raise KeyreidError(f"rank {runs.index(run)} failed, the others were ended: {what}") from None
        if stop.signal is not None and not told:
            told = True
            ray.get([actor.stop.remote(stop.signal) for actor in actors])
    return ray.get(runs[0])
