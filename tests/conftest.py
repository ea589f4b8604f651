"""Fixtures that several test files use."""

from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """Facts of the published model and real data that may not be redistributed; absent from a user's clone."""
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED} is not there: it holds third-party data and numbers that are not part of the project")
    return SHARED
