"""What every test may count on: a fixed seed, one thread a worker, an empty compile cache."""

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator

import pytest
import torch

CACHE = "TORCHINDUCTOR_CACHE_DIR"
if (
    not torch.cuda.is_available()
):  # then Triton runs kernels on the CPU; it asks when it is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_configure(config: pytest.Config) -> None:
    """Give the whole session one new compile cache; workers inherit it, so they share it."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)
        return
    folder = tempfile.mkdtemp(prefix="padst-inductor-")
    before = os.environ.get(CACHE)

    def clean() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        if before is None:
            os.environ.pop(CACHE, None)
        else:
            os.environ[CACHE] = before

    os.environ[CACHE] = folder
    config.add_cleanup(clean)


@pytest.fixture(autouse=True)
def _independent() -> Iterator[None]:
    """Let no test see another's random numbers, threads or share of the recompile limit."""
    torch.manual_seed(0)
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    threads = torch.get_num_threads()
    yield
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


@pytest.fixture
def generator() -> torch.Generator:
    """Return a seeded generator of random numbers."""
    return torch.Generator().manual_seed(0)


@pytest.fixture
def device() -> torch.device:
    """Return the GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
