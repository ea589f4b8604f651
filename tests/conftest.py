"""Fixtures that several test files use."""

from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"
LONGEST = ("test_tuning_search.py", "slurm", "test_training_resume.py", "test_docs.py")


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Two processes share the suite: a file's tests stay together, all of Slurm's do, and the longest begin first."""

    def group(item: pytest.Item) -> str:
        return "slurm" if item.path.parent.name == "slurm" else item.path.name

    for item in items:
        item.add_marker(pytest.mark.xdist_group(group(item)))
    items.sort(key=lambda item: LONGEST.index(group(item)) if group(item) in LONGEST else len(LONGEST))


@pytest.fixture(scope="session")
def shared() -> Path:
    """Facts of the published model and real data that may not be redistributed; absent from a user's clone."""
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED} is not there: it holds third-party data and numbers that are not part of the project")
    return SHARED
