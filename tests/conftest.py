"""Fixtures shared by the tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def visbio_data() -> Path:
    """Return the folder of the real data: `VISBIO_DATA`, else `shared/data` beside the project."""
    folder = Path(os.environ.get("VISBIO_DATA") or Path(__file__).parents[2] / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}: set VISBIO_DATA to its folder")
    return folder
