"""What all tests share: where things are, and few threads."""

import os
from pathlib import Path

import pytest

import caco  # noqa: F401  # isort: skip  # before torch, as CACO_INSTRUCTIONS asks
import torch

# Of the processes that tests start, too: beside other tests, several threads mostly wait for one another.
os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(scope="session", autouse=True)
def few_threads() -> None:
    """Small tensors are faster, and sums come in one order, with one thread."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def repo_root() -> Path:
    return Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared_data(repo_root: Path) -> Path:
    """The folder of zipped image sets that may lie beside the checkout."""
    folder = repo_root.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"needs the image sets in {folder}, which is not there")
    return folder
