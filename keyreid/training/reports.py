"""What training tells people: one line an interval, and the same numbers for tracking."""

import contextlib
import logging
import resource
import time
from collections.abc import Iterator, Mapping
from types import SimpleNamespace

import torch
from torch.utils.flop_counter import FlopCounterMode

from keyreid.config import Config
from keyreid.distributed.ranks import Ranks
from keyreid.model import KeyReID
from keyreid.tracking import Tracker

log = logging.getLogger(__name__)
PROFILE_AFTER_STEPS = 10
MATRIX_SIDE = 8192  # of the product that stands for what the GPU can do


class Meter:
    """Means and rates since the last report, of `steps` that were applied; none, no report.

    Args:
        clips: a step's, over all ranks.
        total_steps: of the whole run, for the time left.
        mfu_factor: FLOP a clip and GPU, over what the GPU can do in a second; None where it is not measured.
    """

    def __init__(self, clips: int, total_steps: int, mfu_factor: float | None = None) -> None:
        self.clips, self.total_steps, self.mfu_factor = clips, total_steps, mfu_factor
        self._reset(0.0)

    def add(self, terms: Mapping[str, torch.Tensor], gradient_norm: torch.Tensor | float | None) -> None:
        """Count a step that was applied; numbers stay on the device until they are reported."""
        self.steps += 1
        norm = 0.0 if gradient_norm is None else gradient_norm
        for name, value in {**terms, "gradient_norm": norm}.items():
            self._sums[name] = self._sums.get(name, 0.0) + value

    def report(self, step: int, lr: float, waited_seconds: float) -> dict[str, float]:
        """Numbers of the interval that ends after `step` steps; this rank has waited that long for data in all."""
        seconds = time.monotonic() - self._since
        values = {name: float(value) / self.steps for name, value in self._sums.items()}
        values |= {
            "lr": lr,
            "clips_per_second": self.steps * self.clips / seconds,
            "data_wait_share": (waited_seconds - self._waited) / seconds,
            "memory_gigabytes": memory_gigabytes(),
            "seconds_left": (self.total_steps - step) * seconds / self.steps,
        }
        if self.mfu_factor is not None:
            values["mfu"] = values["clips_per_second"] * self.mfu_factor
        self._reset(waited_seconds)
        return values

    def _reset(self, waited_seconds: float) -> None:
        self._since = time.monotonic()
        self._waited = waited_seconds
        self.steps = 0
        self._sums: dict[str, torch.Tensor | float] = {}


def line(values: Mapping[str, float], epoch: int, epochs: int, step: int, total_steps: int) -> str:
    """All of a report in one line."""
    left = int(values["seconds_left"])
    mfu = f"  mfu {values['mfu']:.0%}" if "mfu" in values else ""
    branches = [name.removesuffix("_global") for name in values if name.endswith("_global")]
    pairs = "  ".join(f"{n} {_short(values[f'{n}_global'])}/{_short(values[f'{n}_parts'])}" for n in branches)
    return (
        f"epoch {epoch + 1}/{epochs}  step {step}/{total_steps}  loss {values['loss']:.4f}  {pairs}  "
        f"attention {values['attention']:.3f}  accuracy {values['accuracy']:.1%}  lr {values['lr']:.2e}  "
        f"grad {values['gradient_norm']:.2f}  {values['clips_per_second']:.1f} clips/s  "
        f"data wait {values['data_wait_share']:.1%}  {values['memory_gigabytes']:.1f} GB{mfu}  "
        f"left {left // 3600}:{left // 60 % 60:02}:{left % 60:02}"
    )


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3f}"


def memory_gigabytes() -> float:
    """Most memory used so far: the GPU's where there is one, else the process's."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def mfu_factor(network: KeyReID, config: Config, ranks: int) -> float:
    """Share of one GPU's measured matrix rate that a clip a second on `ranks` GPUs takes.

    FLOP of a training step on a clip are three forward passes, without what checkpointing or accumulation repeat.
    """
    device, clip, model = next(network.parameters()).device, config.clip, config.model
    images = torch.zeros(1, clip.frames, 3, clip.height, clip.width, device=device)
    guidance = torch.zeros(1, clip.frames, model.parts, *network.patch_grid, device=device)
    was_training = network.training
    network.eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network.features(images, guidance, torch.zeros(1, dtype=torch.long, device=device))
    network.train(was_training)
    return 3 * counter.get_total_flops() / (ranks * _matrix_flops_a_second(device, config.training.precision))


def _matrix_flops_a_second(device: torch.device, precision: str) -> float:
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision]
    a, b = (torch.randn(MATRIX_SIDE, MATRIX_SIDE, device=device, dtype=dtype) for _ in range(2))
    times = []
    for _ in range(8):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        a @ b
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return 2 * MATRIX_SIDE**3 / sorted(times)[len(times) // 2]


@contextlib.contextmanager
def profiled(config: Config, ranks: Ranks, tracker: Tracker, step: int) -> Iterator[torch.profiler.profile]:
    """torch.profiler over `profile_steps` steps of the first rank, counted by `.step()` from `step` on; an artifact."""
    steps = config.training.profile_steps
    if not steps or not ranks.first:
        yield SimpleNamespace(step=lambda: None)
        return
    first = step + PROFILE_AFTER_STEPS
    path = config.run_dir / "profile" / f"steps-{first}-{first + steps}.json"
    path.parent.mkdir(parents=True, exist_ok=True)

    def keep(profile: torch.profiler.profile) -> None:
        profile.export_chrome_trace(str(path))
        tracker.artifact(path, "profile")
        log.info("profile: %s (open it in Perfetto or chrome://tracing)", path)

    schedule = torch.profiler.schedule(wait=PROFILE_AFTER_STEPS - 1, warmup=1, active=steps, repeat=1)
    with torch.profiler.profile(schedule=schedule, on_trace_ready=keep) as profiler:
        yield profiler
