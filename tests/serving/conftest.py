"""The small checkpoint, built once and served once for all tests that don't need a server of their own."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.serving.reference import Reference
from tests.serving.running_server import QUIRE, RunningServer, serving

from quire_client import Client

REQUEST_TIMEOUT_S = 120


@pytest.fixture(scope="session")
def checkpoint() -> Path:
    return Path(__file__).parents[2] / "checkpoints" / "quire-small"


@pytest.fixture(scope="session")
def repository(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model repository of the small checkpoint, as `quire build` makes it."""
    output = tmp_path_factory.mktemp("serving") / "model_repository"
    subprocess.run([QUIRE, "build", checkpoint, "--output", output], check=True)
    return output


@pytest.fixture(scope="session")
def in_process_repository(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with the engine in the scheduler's process."""
    output = tmp_path_factory.mktemp("in_process") / "model_repository"
    command: list[str | Path] = [QUIRE, "build", checkpoint, "--output", output, "--engine", "in-process"]
    subprocess.run(command, check=True)
    return output


@pytest.fixture(scope="session")
def server(repository: Path) -> Iterator[RunningServer]:
    """A server with the repository's own limits and a pool that 256 streams do not fill."""
    with serving(repository, "--kv-cache-bytes=512MiB") as server:
        yield server


@pytest.fixture(scope="session")
def client(server: RunningServer) -> Iterator[Client]:
    with Client(server.ports.grpc_url, timeout_s=REQUEST_TIMEOUT_S) as client:
        yield client


@pytest.fixture(scope="session")
def reference(checkpoint: Path) -> Reference:
    return Reference(checkpoint)
