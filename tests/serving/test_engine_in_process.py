"""A repository whose engine runs in the scheduler's process, from build to Ctrl-C."""

from __future__ import annotations

from pathlib import Path

import tritonclient.grpc
from tests.serving.reference import Reference
from tests.serving.running_server import ENDLESS, PROMPT, RunningServer, leaves_nothing, long_stream

from quire_client import Client

PROMPTS = (PROMPT, "The little fox", "Question: What")


def test_it_serves_the_text_of_transformers_with_two_models_and_ctrl_c_leaves_nothing(
    in_process_repository: Path, reference: Reference
) -> None:
    with leaves_nothing(in_process_repository) as server:
        assert ready_models(server) == {"llm", "scheduler"}
        with Client(server.ports.grpc_url) as client:
            for prompt in PROMPTS:
                result = client.generate(prompt, max_tokens=64, temperature=0)
                assert reference.compare(reference.encode(prompt), result.token_ids).wrong == ()
                assert result.text == reference.decode(result.token_ids)
        under_way = long_stream(server)
        server.interrupt()
        assert under_way.result().num_output_tokens == ENDLESS["max_tokens"]
        assert server.wait() == 0


def ready_models(server: RunningServer) -> set[str]:
    """The models of a server that says that it is ready."""
    with tritonclient.grpc.InferenceServerClient(server.ports.grpc_url) as triton:
        assert triton.is_server_ready()
        index = triton.get_model_repository_index(as_json=True)["models"]
    return {model["name"] for model in index if model["state"] == "READY"}
