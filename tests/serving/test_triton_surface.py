"""The server answers as a Triton user expects: health, metadata, configuration, metrics, statistics."""

from __future__ import annotations

import urllib.request
from collections.abc import Iterator

import pytest
import tritonclient.grpc
import tritonclient.http
from tests.serving.running_server import RunningServer

from quire.interface import LLM_INPUTS, LLM_OUTPUTS
from quire_client import AsyncClient, Client


@pytest.fixture
def over_grpc(server: RunningServer) -> Iterator[tritonclient.grpc.InferenceServerClient]:
    with tritonclient.grpc.InferenceServerClient(server.ports.grpc_url) as client:
        yield client


@pytest.fixture
def over_http(server: RunningServer) -> Iterator[tritonclient.http.InferenceServerClient]:
    with tritonclient.http.InferenceServerClient(server.ports.http_url) as client:
        yield client


def get(port: int, path: str) -> tuple[int, str]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=30) as answer:
        return answer.status, answer.read().decode()


@pytest.mark.parametrize("path", ["/v2/health/live", "/v2/health/ready", "/v2/models/llm/ready"])
def test_http_health_is_200(server: RunningServer, path: str) -> None:
    assert get(server.ports.http, path)[0] == 200


def test_tritonclient_sees_server_and_models_ready(
    over_grpc: tritonclient.grpc.InferenceServerClient, over_http: tritonclient.http.InferenceServerClient
) -> None:
    for client in (over_grpc, over_http):
        assert client.is_server_live()
        assert client.is_server_ready()
        for model in ("llm", "scheduler", "engine"):
            assert client.is_model_ready(model)
        assert not client.is_model_ready("no_such_model")


def test_metadata_describes_the_tensors_of_the_interface(
    over_http: tritonclient.http.InferenceServerClient,
) -> None:
    metadata = over_http.get_model_metadata("llm")
    for described, specs in ((metadata["inputs"], LLM_INPUTS), (metadata["outputs"], LLM_OUTPUTS)):
        assert [(tensor["name"], tensor["shape"]) for tensor in described] == [
            (spec.name, list(spec.dims)) for spec in specs
        ]


def test_the_model_is_decoupled_and_uses_the_quire_backend(
    over_grpc: tritonclient.grpc.InferenceServerClient,
) -> None:
    config = over_grpc.get_model_config("llm", as_json=True)["config"]
    assert config["backend"] == "quire"
    assert config["model_transaction_policy"]["decoupled"] is True


def test_the_repository_index_lists_the_three_models(
    over_grpc: tritonclient.grpc.InferenceServerClient,
) -> None:
    index = over_grpc.get_model_repository_index(as_json=True)["models"]
    assert {(model["name"], model["state"]) for model in index} == {
        ("llm", "READY"),
        ("scheduler", "READY"),
        ("engine", "READY"),
    }


def test_metrics_are_served(server: RunningServer) -> None:
    status, text = get(server.ports.metrics, "/metrics")
    assert status == 200
    assert 'nv_inference_request_success{model="llm"' in text


async def test_quire_client_describes_model_and_health(server: RunningServer, client: Client) -> None:
    assert client.is_live()
    assert client.is_ready()
    info = client.model_info()
    assert info.name == "llm"
    assert [tensor.name for tensor in info.inputs] == [spec.name for spec in LLM_INPUTS]
    async with AsyncClient(server.ports.grpc_url) as async_client:
        assert await async_client.is_ready()
        assert await async_client.model_info() == info
