"""Fixtures for all tests: paths, and a single thread."""

import os
from pathlib import Path

import pytest

import caco  # noqa: F401  # isort: skip  # before torch, because it sets torch's instruction set
import torch

# For processes that tests start, too: with several tests at a time, more threads would mostly wait for one another.
os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(scope="session", autouse=True)
def few_threads() -> None:
    """Use one thread: this is faster for small tensors, and sums are always computed in the same order."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def repo_root() -> Path:
    return Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared_data(repo_root: Path) -> Path:
    """The folder of zipped image sets beside the checkout; tests that need it are skipped if there is none."""
    folder = repo_root.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"needs the image sets in {folder}, which is not there")
    return folder
