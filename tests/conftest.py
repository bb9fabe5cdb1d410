"""What holds for every test: unwritten memory betrays itself, random numbers repeat, there are two threads."""

import os
import random
from collections.abc import Iterator

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads of a busy machine wait for one another
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic algorithms on a GPU ask for it

import numpy as np
import pytest
import torch

from sgsc.kernels import OPS, backend, extension
from sgsc.kernels.op import isa, isas, set_isa
from tests.blobs import keep, trained  # noqa: F401  fixtures
from tests.trainers import bert, hf, lightning  # noqa: F401  fixtures


def pytest_report_header() -> str:
    return f"sgsc kernels on {backend(OPS['fake_quantize'])}"


@pytest.fixture(autouse=True, scope="session")
def two_threads():
    """As many as every machine that builds this has; more would only hide races behind larger blocks."""
    torch.set_num_threads(2)


@pytest.fixture(autouse=True)
def uninitialised_memory_is_nan():
    """Memory that torch hands out unwritten reads as NaN, or 255, also where C++ asks for it.

    A kernel that leaves an element unwritten then fails instead of passing by luck.
    """
    before = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before)
    torch.utils.deterministic.fill_uninitialized_memory = fill


@pytest.fixture
def quiet_optuna():
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    yield
    optuna.logging.set_verbosity(optuna.logging.INFO)


@pytest.fixture(autouse=True)
def seeded():
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(params=isas() or ["plain PyTorch"])
def level(request) -> Iterator[str]:
    """The instruction set in force; without the extension the operations run in plain PyTorch."""
    if not extension.LOADED:
        yield request.param
        return
    before = set_isa(request.param)
    assert isa() == request.param
    yield request.param
    set_isa(before)
