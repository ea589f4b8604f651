"""What training tells people: one line an interval, and the same numbers for tracking."""

from __future__ import annotations

import resource
import time
from collections.abc import Mapping

import torch
from torch.utils.flop_counter import FlopCounterMode

from keyreid.config import Config
from keyreid.model import KeyReID

MATRIX_SIDE = 8192  # of the product that stands for what the GPU can do


class Meter:
    """Means and rates since the last report.

    Args:
        clips: a step's, over all ranks.
        total_steps: of the whole run, for the time left.

    Attributes:
        steps: applied since the last report.
    """

    def __init__(self, clips: int, total_steps: int) -> None:
        self.clips = clips
        self.total_steps = total_steps
        self._reset(0.0)

    def add(self, loss: float, terms: Mapping[str, torch.Tensor], gradient_norm: float | None) -> None:
        """Count a step that was applied."""
        self.steps += 1
        self._loss += loss
        for name, value in terms.items():
            self._terms[name] = self._terms.get(name, 0.0) + value
        if gradient_norm is not None:
            self._norm += gradient_norm

    def report(self, step: int, lr: float, waited_seconds: float, mfu_factor: float | None) -> dict[str, float]:
        """Numbers of the interval that ends after `step` steps, and start the next.

        Args:
            waited_seconds: time that this rank has waited for data since the run began.
            mfu_factor: FLOP a clip and GPU, over what the GPU can do in a second.
        """
        seconds = time.monotonic() - self._since
        steps = max(self.steps, 1)
        values = {"loss": self._loss / steps}
        values |= {name: float(value) / steps for name, value in self._terms.items()}
        values |= {
            "lr": lr,
            "gradient_norm": self._norm / steps,
            "clips_per_second": self.steps * self.clips / seconds,
            "data_wait_share": (waited_seconds - self._waited) / seconds,
            "memory_gigabytes": memory_gigabytes(),
            "seconds_left": (self.total_steps - step) * seconds / steps,
        }
        if mfu_factor is not None:
            values["mfu"] = values["clips_per_second"] * mfu_factor
        self._reset(waited_seconds)
        return values

    def _reset(self, waited_seconds: float) -> None:
        self._since = time.monotonic()
        self._waited = waited_seconds
        self.steps = 0
        self._loss = 0.0
        self._norm = 0.0
        self._terms: dict[str, torch.Tensor | float] = {}


def line(values: Mapping[str, float], epoch: int, epochs: int, step: int, total_steps: int) -> str:
    """All of a report in one line."""
    left = int(values["seconds_left"])
    mfu = f"  mfu {values['mfu']:.0%}" if "mfu" in values else ""
    pairs = "  ".join(
        f"{name} {values[f'{name}_global']:.3f}/{values[f'{name}_parts']:.3f}" for name in ("identity", "triplet")
    )
    centres = f"centre {values['centre_global']:.0f}/{values['centre_parts']:.0f}"
    return (
        f"epoch {epoch + 1}/{epochs}  step {step}/{total_steps}  loss {values['loss']:.4f}  {pairs}  {centres}  "
        f"attention {values['attention']:.3f}  accuracy {values['accuracy']:.1%}  lr {values['lr']:.2e}  "
        f"grad {values['gradient_norm']:.2f}  {values['clips_per_second']:.1f} clips/s  "
        f"data wait {values['data_wait_share']:.1%}  {values['memory_gigabytes']:.1f} GB{mfu}  "
        f"left {left // 3600}:{left // 60 % 60:02}:{left % 60:02}"
    )


def memory_gigabytes() -> float:
    """Most memory used so far: the GPU's where there is one, else the process's."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def mfu_factor(network: KeyReID, config: Config, ranks: int) -> float:
    """Share of one GPU's measured matrix rate that a clip a second on `ranks` GPUs takes.

    FLOP of a training step on a clip are three forward passes, without what checkpointing or accumulation repeat.
    """
    device = next(network.parameters()).device
    clip, model = config.clip, config.model
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
