"""What this machine can do for keyreid: each thing is tried, not only looked for."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement

State = Literal["ok", "missing", "broken", "note"]
PYTHONS = ((3, 10), (3, 13))
LEAST_FREE_GB = {"here": 20.0, "temporary files": 2.0, "shared memory": 1.0}
TIMEOUT_SECONDS = 20


@dataclass(frozen=True)
class Check:
    """One line of the report.

    Attributes:
        name: what was looked at; `--require` takes the names in REQUIRED and OPTIONAL.
        state: ok; missing (not installed); broken (there, but it does not work); note (worth knowing).
        found: versions, counts, or the reason.
        remedy: the command or step that mends it.
    """

    name: str
    state: State
    found: str
    remedy: str = ""


def examine(names: Sequence[str] = ()) -> list[Check]:
    """Run the checks of these names, or all, in the order of CHECKS; a check that fails is a finding itself."""
    results = []
    for name, check in CHECKS.items():
        if names and name not in names:
            continue
        try:
            results.append(check())
        except Exception as error:  # whatever a broken installation raises
            reason = str(error).strip().splitlines() or [type(error).__name__]
            results.append(Check(name, "broken", f"{type(error).__name__}: {reason[0]}", REMEDIES.get(name, "")))
    return results


def failures(checks: Sequence[Check], required: Sequence[str]) -> list[Check]:
    """Those that stop a user: what is required and not well."""
    wanted = {*REQUIRED, *required}
    return [check for check in checks if check.name in wanted and check.state in ("missing", "broken")]


def _python() -> Check:
    found = f"{sys.version.split()[0]} in {sys.prefix}"
    if not PYTHONS[0] <= sys.version_info[:2] <= PYTHONS[1]:
        return Check("python", "broken", found, "use Python 3.10 to 3.13; launch/quickstart looks for one")
    return Check("python", "ok", found)


def _packages() -> Check:
    return _requirements("packages", "", REMEDIES["packages"])


def _requirements(name: str, extra: str, remedy: str) -> Check:
    """Compare what is installed with keyreid's pins, of an extra or without."""
    absent, other, count = [], [], 0
    for text in requires("keyreid") or []:
        requirement = Requirement(text)
        of_extra = requirement.marker is not None and requirement.marker.evaluate({"extra": extra})
        if (requirement.marker is not None) != bool(extra) or (extra and not of_extra):
            continue
        count += 1
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            absent.append(requirement.name)
            continue
        if not requirement.specifier.contains(found, prereleases=True):
            other.append(f"{requirement.name} {found} (tested: {str(requirement.specifier).removeprefix('==')})")
    if not count:
        return Check(name, "missing", "this installation is older than its extras", remedy)
    if absent:
        return Check(name, "missing", f"{', '.join(absent)}" + (f"; {', '.join(other)}" if other else ""), remedy)
    if other:
        return Check(name, "note", ", ".join(other), f"{remedy}, if something fails")
    return Check(name, "ok", f"{count} as tested")


def _extra(extra: str) -> Callable[[], Check]:
    return lambda: _requirements(
        extra, extra, f"pip install 'keyreid[{extra}]'  (in a clone: pip install -e '.[{extra}]')"
    )


def _gpu() -> Check:
    import torch

    built = torch.version.cuda
    if torch.cuda.is_available():
        gpus = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
        kinds = ", ".join(sorted({f"{gpu.name} {gpu.total_memory / 2**30:.0f} GiB" for gpu in gpus}))
        x = torch.ones(64, 64, device="cuda")
        if float((x @ x).sum()) != 64**3:
            raise RuntimeError("a product on the GPU is wrong")
        return Check("gpu", "ok", f"{len(gpus)} x {kinds}, CUDA {built}, torch {torch.__version__}")
    if shutil.which("nvidia-smi"):
        return Check(
            "gpu",
            "broken",
            f"a driver is there, but torch {torch.__version__} sees no GPU",
            "nvidia-smi; update the driver",
        )
    return Check("gpu", "note", f"none; torch {torch.__version__} computes on {os.cpu_count()} CPU cores")


def _dali() -> Check:
    checked = _requirements("dali", "dali", REMEDIES["dali"])
    if checked.state == "missing":
        return checked
    import cv2
    import numpy as np
    from nvidia.dali import fn, pipeline_def

    picture = cv2.imencode(".png", np.full((8, 4, 3), 77, np.uint8))[1]

    @pipeline_def(batch_size=1, num_threads=1, device_id=None)
    def decode():
        return fn.decoders.image(fn.external_source(lambda: [picture], batch=True), device="cpu")

    pipe = decode()
    pipe.build()
    (decoded,) = pipe.run()
    if not (np.asarray(decoded.at(0)) == 77).all():
        raise RuntimeError("a picture was decoded wrongly")
    return Check("dali", checked.state, f"nvidia-dali {version('nvidia-dali-cuda130')} decodes", checked.remedy)


def _deepspeed() -> Check:
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from deepspeed.ops.op_builder.all_ops import ALL_OPS

    able = sorted(name for name, builder in ALL_OPS.items() if builder.is_compatible(verbose=False))
    ops = [name for name in able if name != "deepspeed_not_implemented"]
    compiler = "g++" if shutil.which(os.environ.get("CXX", "g++")) else "no C++ compiler"
    nvcc = ", nvcc" if shutil.which("nvcc") else ""
    return Check(
        "deepspeed",
        "ok",
        f"{version('deepspeed')}; none of its compiled ops is needed; {len(ops)} could be built ({compiler}{nvcc})",
    )


def _collectives() -> Check:
    import torch
    import torch.distributed as dist

    backends = ["gloo", *(["nccl"] if torch.cuda.is_available() else [])]
    if dist.is_initialized():
        return Check("collectives", "ok", f"in use: {dist.get_backend()}")
    for backend in backends:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        try:
            value = torch.ones(1, device="cuda" if backend == "nccl" else "cpu")
            dist.all_reduce(value)
        finally:
            dist.destroy_process_group()
    nccl = f"NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}" if "nccl" in backends else "NCCL needs a GPU"
    return Check("collectives", "ok", f"gloo works; {nccl}")


def _slurm() -> Check:
    if shutil.which("sinfo") is None:
        return Check(
            "slurm", "missing", "no sinfo, sbatch", "work on a login node; for the tests: launch/install-slurm"
        )
    asked = _ask(["scontrol", "ping"])
    if asked.returncode:
        reason = (asked.stderr or asked.stdout).strip().splitlines() or ["no answer"]
        return Check("slurm", "broken", f"installed, but no controller answers: {reason[0]}", "sinfo; ask who runs it")
    parts = _ask(["sinfo", "-h", "-o", "%P %D %G"]).stdout.split("\n")
    shown = "; ".join(line for line in parts[:4] if line)
    return Check("slurm", "ok", f"{_ask(['sinfo', '--version']).stdout.strip()}: {shown}")


def _mlflow() -> Check:
    import urllib.request

    uri = os.environ.get("MLFLOW_TRACKING_URI")
    found = f"mlflow {version('mlflow')}"
    if uri is None or not uri.startswith("http"):
        where = uri or "SQLite in the output folder"
        return Check("mlflow", "ok", f"{found}; runs go to {where}")
    try:
        with urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=5) as answer:
            return Check("mlflow", "ok", f"{found}; {uri} answers {answer.read(20).decode(errors='replace')}")
    except OSError as error:
        remedy = "check MLFLOW_TRACKING_URI; training goes on without it and sends later"
        return Check("mlflow", "note", f"{found}; {uri} does not answer: {error}", remedy)


def _pose() -> Check:
    if importlib.util.find_spec("openpifpaf") is None:
        return Check("pose", "missing", "OpenPifPaf is not installed", REMEDIES["pose"])
    from keyreid.pose import pifpaf

    return Check("pose", "ok", f"OpenPifPaf {version('openpifpaf')} decodes a pose to {pifpaf.check():.4f} pixels")


def _video() -> Check:
    import cv2

    backends = [cv2.videoio_registry.getBackendName(b) for b in cv2.videoio_registry.getStreamBackends()]
    state: State = "ok" if "FFMPEG" in backends else "missing"
    remedy = "" if state == "ok" else "pip install opencv-python-headless (its wheels hold FFmpeg)"
    return Check("video", state, f"OpenCV {cv2.__version__}: {', '.join(backends) or 'no backend'}", remedy)


def _disk() -> Check:
    import tempfile

    places = {"here": Path.cwd(), "temporary files": Path(tempfile.gettempdir()), "shared memory": Path("/dev/shm")}
    free = {name: shutil.disk_usage(path).free / 1e9 for name, path in places.items() if path.is_dir()}
    short = [name for name, gigabytes in free.items() if gigabytes < LEAST_FREE_GB[name]]
    found = ", ".join(f"{name} {gigabytes:.0f} GB" for name, gigabytes in free.items()) + " free"
    if short:
        return Check(
            "disk", "note", found, f"make room ({', '.join(short)}); MARS needs 5 GB of shards, a checkpoint 3"
        )
    return Check("disk", "ok", found)


def _ask(words: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False)


CHECKS: dict[str, Callable[[], Check]] = {
    "python": _python,
    "packages": _packages,
    "gpu": _gpu,
    "deepspeed": _deepspeed,
    "collectives": _collectives,
    "mlflow": _mlflow,
    "disk": _disk,
    "video": _video,
    "dali": _dali,
    "pose": _pose,
    "slurm": _slurm,
    "tune": _extra("tune"),
    "search": _extra("search"),
    "export": _extra("export"),
    "remote": _extra("remote"),
}
REQUIRED = ("python", "packages", "deepspeed", "collectives", "mlflow", "disk")
REMEDIES = {
    "dali": "pip install 'keyreid[dali]', or train with data.reader=plain",
    "pose": "launch/install-pose",
    "packages": "pip install --upgrade keyreid",
    "deepspeed": "pip install --force-reinstall --no-deps deepspeed, of the version in pyproject.toml",
}
