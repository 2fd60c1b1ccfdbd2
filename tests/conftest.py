"""What every test runs under: one torch thread, no network, a device of choice, slow tests on request."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from typing import Any

# Before torch is imported: several test processes share the machine, so one thread each, and nothing comes from a hub.
os.environ.update(
    OMP_NUM_THREADS="1",
    MKL_NUM_THREADS="1",
    HF_HUB_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
)

import pytest
import torch

from . import postgres

torch.set_num_threads(1)

_connect = socket.socket.connect


def _connect_locally(self: socket.socket, address: Any) -> None:
    if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in ("127.0.0.1", "::1", "localhost"):
        raise PermissionError(f"a test opened a connection to {address[0]}: tests run without a network")
    _connect(self, address)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--run-slow", action="store_true", help="also run the tests marked slow (minutes)")
    parser.addoption("--write-docs", action="store_true", help="write the tables of docs/families.md")
    parser.addoption(
        "--device",
        default="cpu",
        metavar="NAME",
        help='torch device of the `device` fixture, "cpu" or "cuda" (default: cpu)',
    )


def pytest_configure(config: pytest.Config) -> None:
    socket.socket.connect = _connect_locally  # type: ignore[method-assign, assignment]
    name = config.getoption("--device")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise pytest.UsageError(f"--device {name}: torch sees no CUDA device here; use --device cpu")


def pytest_unconfigure() -> None:
    socket.socket.connect = _connect  # type: ignore[method-assign]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--run-slow"):
        return
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="slow: add --run-slow"))


@pytest.fixture(scope="session")
def device(pytestconfig: pytest.Config) -> torch.device:
    """The device of --device."""
    return torch.device(pytestconfig.getoption("--device"))


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def server(request: pytest.FixtureRequest) -> Iterator[str | None]:
    """The URL of a database server; None for SQLite, which has none."""
    if request.param == "sqlite":
        yield None
        return
    with postgres.server() as url:
        yield url
