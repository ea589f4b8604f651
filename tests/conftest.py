"""Fixtures that several test files use."""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# How many inputs a fuzz test gives its reader; `thorough` takes half an hour of one processor.
settings.register_profile(
    "quick", max_examples=100, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
settings.register_profile("ci", settings.get_profile("quick"), max_examples=500)
settings.register_profile("thorough", settings.get_profile("quick"), max_examples=10_000)
settings.load_profile("quick")

SHARED = Path(__file__).resolve().parents[2] / "shared"
LONGEST = ("tests/slurm", "tests/test_tuning_search.py", "tests/test_training_resume.py", "tests/test_docs.py")


def group(nodeid: str) -> str:
    """What stays together in one process: the tests of a file, and all that share the Slurm cluster."""
    file = nodeid.split("::")[0]
    return "tests/slurm" if file.startswith("tests/slurm/") else file


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest begin first, so that two processes end together."""
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(group(item.nodeid), len(order)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log):
    """Groups as above; xdist 3.8's own marks of groups do nothing under pytest 9.2."""
    from xdist.scheduler import LoadFileScheduling

    scheduler = LoadFileScheduling(config, log)
    scheduler._split_scope = group
    return scheduler


@pytest.fixture(scope="session")
def shared() -> Path:
    """Facts of the published model and real data that may not be redistributed; absent from a user's clone."""
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED} is not there: it holds third-party data and numbers that are not part of the project")
    return SHARED
