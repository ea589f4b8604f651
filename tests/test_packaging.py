"""What is installed: ranges and exact versions agree, and a wheel holds all that training and submitting need."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packed import make_dataset, pack_dataset

REPOSITORY = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
DECLARED = [
    Requirement(text)
    for text in sum(PROJECT["optional-dependencies"].values(), PROJECT["dependencies"])  # with those of the extras
]
PINNED = {
    canonicalize_name(pin.name): str(pin.specifier).removeprefix("==")
    for pin in map(Requirement, re.findall(r"^[^#\n]+", (REPOSITORY / "constraints.txt").read_text(), re.MULTILINE))
}


@pytest.mark.parametrize("requirement", DECLARED, ids=str)
def test_every_dependency_has_a_range_and_in_it_an_exact_version(requirement):
    assert requirement.specifier
    assert PINNED[canonicalize_name(requirement.name)] in requirement.specifier


def test_the_oldest_python_promised_is_one_that_every_dependency_takes():
    oldest = re.fullmatch(r">=(3\.\d+)", PROJECT["requires-python"])[1]
    refused = {}
    for name, pin in PINNED.items():
        try:
            distribution = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        wanted = distribution.metadata.get("Requires-Python")
        if distribution.version == pin and wanted and f"{oldest}.0" not in SpecifierSet(wanted):
            refused[name] = wanted
    assert not refused
    assert f"(3, {oldest.split('.')[1]})" in (REPOSITORY / "launch" / "environment.sh").read_text()


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The `keyreid` of a wheel in an environment of its own; the other packages are those of this one."""
    folder = tmp_path_factory.mktemp("installed")
    source, environment = folder / "source", folder / "environment"
    junk = shutil.ignore_patterns("__pycache__", "site.env")
    for name in ("keyreid", "configs", "launch", "slurm"):
        shutil.copytree(REPOSITORY / name, source / name, ignore=junk)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, source]
    subprocess.run(build, check=True, cwd=folder, env=bare_environment())
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    shutil.rmtree(source)
    (wheel,) = folder.glob("keyreid-*.whl")
    python = environment / "bin" / "python"
    install = [*pip, "--python", python, "install", "--no-deps", "--no-index", wheel]
    subprocess.run(install, check=True, cwd=folder, env=bare_environment())
    (packages,) = environment.glob("lib/python*/site-packages")
    (packages / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")  # after this environment's own
    return environment / "bin" / "keyreid"


def bare_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "KEYREID_HOME")}


@pytest.mark.slow
def test_a_wheel_trains_and_submits_from_an_empty_folder(installed, tmp_path):
    pack_dataset(make_dataset(tmp_path / "raw"), tmp_path / "raw", tmp_path / "shards")
    empty = tmp_path / "empty"
    empty.mkdir()

    def keyreid(*words: str) -> str:
        environment = bare_environment() | {"OMP_NUM_THREADS": "1"}
        result = subprocess.run([installed, *words], cwd=empty, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    package = next(installed.parents[1].glob("lib/python*/site-packages/keyreid"))
    assert keyreid("--version") == f"keyreid {metadata.version('keyreid')}\n"  # a wheel knows of no commit
    listed = keyreid("config", "--list")
    assert f"In {package};" in listed
    shards = f"data.shards={tmp_path / 'shards'}"
    plan = keyreid("train", "--dataset-name", "MARS", "--dry-run", "--", shards)
    assert "4 training identities" in plan and "M parameters" in plan
    for path in sorted((REPOSITORY / "configs").rglob("*.yaml")):
        name = str(path.relative_to(REPOSITORY))
        assert name in listed
        if "tune" not in name:
            assert f"name: {path.stem.replace('mars_large', 'mars-large')}\n" in keyreid("config", name)
    submitted = keyreid("submit", "train", "configs/walkers.yaml", shards, "--nodes=2", "--dry-run")
    assert f"{package}/slurm/train.sbatch configs/walkers.yaml {shards}\n" in submitted
    assert f"KEYREID_HOME={package} " in submitted
    assert submitted.endswith((REPOSITORY / "slurm" / "train.sbatch").read_text() + "\n")
    for path in (REPOSITORY / "slurm").glob("*[!v]"):  # all but somebody's site.env
        assert (package / "slurm" / path.name).read_bytes() == path.read_bytes()
    for name in ("install-pose", "install-slurm"):
        assert os.access(package / "launch" / name, os.X_OK)
    assert not list(empty.iterdir())
