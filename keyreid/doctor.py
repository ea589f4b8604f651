"""What this machine can do for keyreid: each thing is tried, not only looked for."""

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from keyreid.errors import install_hint
from keyreid.resources import home

LEAST_FREE_GB = {"here": 20.0, "temporary files": 2.0, "shared memory": 1.0}
TIMEOUT_SECONDS = 20
EXTRAS = ("tune", "search", "export", "remote")


@dataclass(frozen=True)
class Check:
    """One line of the report."""

    state: Literal["ok", "missing", "broken", "note"]  # missing: not installed; note: worth knowing
    found: str  # versions, counts, or the reason
    remedy: str = ""  # the command or step that mends it
    name: str = ""  # of CHECKS


def examine(names: Sequence[str] = ()) -> list[Check]:
    """Run the checks of these names, or all, in the order of CHECKS; a check that fails is a finding itself."""
    return [_examine(name) for name in CHECKS if not names or name in names]


def failures(checks: Sequence[Check], required: Sequence[str]) -> list[Check]:
    """Those that stop a user: what is required and not well."""
    return [each for each in checks if each.name in {*REQUIRED, *required} and each.state in ("missing", "broken")]


def _examine(name: str) -> Check:
    try:
        check = CHECKS[name]()
    except Exception as error:  # whatever a broken installation raises
        reason = str(error).strip().splitlines() or [type(error).__name__]
        check = Check("broken", f"{type(error).__name__}: {reason[0]}")
    remedy = check.remedy or ("" if check.state == "ok" else REMEDIES.get(name, ""))
    return replace(check, name=name, remedy=remedy)


def _python() -> Check:
    found = f"{sys.version.split()[0]} in {sys.prefix}"
    wanted = metadata("keyreid")["Requires-Python"]
    if not SpecifierSet(wanted).contains(".".join(map(str, sys.version_info[:3]))):
        return Check("broken", found, f"use Python {wanted}; launch/quickstart looks for one")
    return Check("ok", found)


def _requirements(extra: str = "") -> Check:
    """Compare what is installed with the ranges of keyreid's dependencies, of an extra or without."""
    every = map(Requirement, requires("keyreid") or [])
    wanted = [each for each in every if (each.marker.evaluate({"extra": extra}) if each.marker else not extra)]
    absent, other = [], []
    for requirement in wanted:
        try:
            found = version(requirement.name)
            if not requirement.specifier.contains(found, prereleases=True):
                other.append(f"{requirement.name} {found} (wanted: {requirement.specifier})")
        except PackageNotFoundError:
            absent.append(requirement.name)
    if not wanted:
        return Check("missing", "this installation is older than its extras")
    if absent:
        return Check("missing", "; ".join([", ".join(absent), *other]))
    return Check("note", ", ".join(other)) if other else Check("ok", f"{len(wanted)} in their ranges")


def _gpu() -> Check:
    import torch

    if torch.cuda.is_available():
        gpus = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
        kinds = ", ".join(sorted({f"{gpu.name} {gpu.total_memory / 2**30:.0f} GiB" for gpu in gpus}))
        x = torch.ones(64, 64, device="cuda")
        if float((x @ x).sum()) != 64**3:
            raise RuntimeError("a product on the GPU is wrong")
        return Check("ok", f"{len(gpus)} x {kinds}, CUDA {torch.version.cuda}, torch {torch.__version__}")
    if shutil.which("nvidia-smi"):
        found = f"a driver is there, but torch {torch.__version__} sees no GPU"
        return Check("broken", found, "nvidia-smi; update the driver")
    return Check("note", f"none; torch {torch.__version__} computes on {os.cpu_count()} CPU cores")


def _dali() -> Check:
    checked = _requirements("dali")
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
    return Check(checked.state, f"nvidia-dali {version('nvidia-dali-cuda130')} decodes")


def _deepspeed() -> Check:
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    return Check("ok", f"{deepspeed.__version__} loads; none of its compiled ops is needed")


def _collectives() -> Check:
    import torch
    import torch.distributed as dist

    if dist.is_initialized():
        return Check("ok", f"in use: {dist.get_backend()}")
    devices = {"gloo": "cpu"} | ({"nccl": "cuda"} if torch.cuda.is_available() else {})
    for backend, device in devices.items():
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        try:
            dist.all_reduce(torch.ones(1, device=device))
        finally:
            dist.destroy_process_group()
    nccl = f"NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}" if "nccl" in devices else "NCCL needs a GPU"
    return Check("ok", f"gloo works; {nccl}")


def _slurm() -> Check:
    if shutil.which("sinfo") is None:
        return Check("missing", "no sinfo, sbatch", f"work on a login node; for tests: {home()}/launch/install-slurm")
    ask = partial(subprocess.run, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False)
    ping = ask(["scontrol", "ping"])
    if ping.returncode:
        reason = (ping.stderr or ping.stdout).strip().splitlines() or ["no answer"]
        return Check("broken", f"installed, but no controller answers: {reason[0]}", "sinfo; ask who runs it")
    partitions = ask(["sinfo", "-h", "-o", "%P %D %G"]).stdout.split("\n")[:4]
    return Check("ok", f"{ask(['sinfo', '--version']).stdout.strip()}: {'; '.join(filter(None, partitions))}")


def _mlflow() -> Check:
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    found = f"mlflow {version('mlflow')}"
    if uri is None or not uri.startswith("http"):
        return Check("ok", f"{found}; runs are kept in {uri or 'SQLite in the output folder'}")
    try:
        with urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=5) as answer:
            return Check("ok", f"{found}; {uri} answers {answer.read(20).decode(errors='replace')}")
    except OSError as error:
        return Check("note", f"{found}; {uri} does not answer: {error}")


def _pose() -> Check:
    if importlib.util.find_spec("openpifpaf") is None:
        return Check("missing", "OpenPifPaf is not installed", f"PYTHON={sys.executable} {home()}/launch/install-pose")
    from keyreid.pose import pifpaf

    return Check("ok", f"OpenPifPaf {version('openpifpaf')} decodes a pose to {pifpaf.check():.4f} pixels")


def _video() -> Check:
    import cv2

    backends = list(map(cv2.videoio_registry.getBackendName, cv2.videoio_registry.getStreamBackends()))
    found = f"OpenCV {cv2.__version__}: {', '.join(backends) or 'no backend'}"
    return Check("ok" if "FFMPEG" in backends else "missing", found)


def _disk() -> Check:
    places = {"here": Path.cwd(), "temporary files": Path(tempfile.gettempdir()), "shared memory": Path("/dev/shm")}
    free = {name: shutil.disk_usage(path).free / 1e9 for name, path in places.items() if path.is_dir()}
    short = ", ".join(name for name, gigabytes in free.items() if gigabytes < LEAST_FREE_GB[name])
    found = ", ".join(f"{name} {gigabytes:.0f} GB" for name, gigabytes in free.items()) + " free"
    needs = f"make room ({short}); MARS needs 5 GB of shards, a checkpoint 3"
    return Check("note", found, needs) if short else Check("ok", found)


CHECKS: dict[str, Callable[[], Check]] = {
    "python": _python,
    "packages": _requirements,
    "gpu": _gpu,
    "deepspeed": _deepspeed,
    "collectives": _collectives,
    "mlflow": _mlflow,
    "disk": _disk,
    "video": _video,
    "dali": _dali,
    "pose": _pose,
    "slurm": _slurm,
    **{extra: partial(_requirements, extra) for extra in EXTRAS},
}
REQUIRED = ("python", "packages", "deepspeed", "collectives", "mlflow", "disk")
REMEDIES = {
    "packages": "run launch/quickstart in the clone again",
    "mlflow": "check MLFLOW_TRACKING_URI; training works without it and sends later",
    "deepspeed": "pip install --force-reinstall --no-deps deepspeed, of the version in constraints.txt",
    "video": "pip install opencv-python-headless (its wheels hold FFmpeg)",
    "dali": f"{install_hint('dali')}, or train with data.reader=plain",
    **{extra: install_hint(extra) for extra in EXTRAS},
}
