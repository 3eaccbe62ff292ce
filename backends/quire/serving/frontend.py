"""The frontend component: what clients call as the model `llm`.

Translates between Triton's requests and responses and plain Python; parsing is `request_parsing`'s, all that
comes after it `outstanding`'s. The model is decoupled: `execute` returns at once and responses follow from
other threads, the last one with Triton's final flag.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import triton_python_backend_utils as pb_utils  # type: ignore[import-not-found]

from quire.errors import QuireError
from quire.execution.manifest import read_manifest
from quire.interface import ENGINE
from quire.serving.channel import FrontendChannel
from quire.serving.generation_defaults import GenerationDefaults
from quire.serving.messages import Refusal, StepTokens
from quire.serving.outstanding import OutstandingRequests
from quire.serving.rendezvous import Rendezvous
from quire.serving.request_parsing import RequestParser
from quire.serving.stream import GenerationResponse
from quire.settings import ServingSettings
from quire.text.tokenizer import Tokenizer

CLOSE_TIMEOUT_S = 2.0

logger = logging.getLogger(__name__)


class Frontend:
    """One instance of the model `llm`.

    Args:
        args: what Triton gives a model's `initialize`.

    Raises:
        StartupError: a setting or engine.json does not fit.
        CheckpointError: a file of the tokenizer or its configuration is missing or damaged.
    """

    def __init__(self, args: dict[str, str]) -> None:
        model_directory = Path(args["model_repository"])
        files = model_directory / args["model_version"]
        manifest = read_manifest(model_directory.parent / ENGINE / "1")
        parameters = json.loads(args["model_config"])["parameters"]
        settings = ServingSettings.read(
            {name: entry["string_value"] for name, entry in parameters.items()}, os.environ
        ).within(manifest.limits)
        tokenizer = Tokenizer.from_directory(files)
        self._parser = RequestParser(
            tokenizer,
            GenerationDefaults.from_directory(files),
            vocab_size=manifest.model.vocab_size,
            max_model_len=settings.max_model_len,
        )
        self._rendezvous = Rendezvous.for_server(os.getppid())

        def open_channel(
            on_step: Callable[[StepTokens], None],
            on_refusal: Callable[[Refusal], None],
            on_lost: Callable[[str], None],
        ) -> FrontendChannel:
            return FrontendChannel(
                self._rendezvous, args["model_instance_name"], on_step, on_refusal, on_lost
            )

        self._outstanding = OutstandingRequests(tokenizer, open_channel)

    def execute(self, requests: list[Any]) -> None:
        """Accept or refuse each of Triton's requests; their responses come later or were sent already."""
        for request in requests:
            client = TritonClient(request.get_response_sender())
            try:
                parsed = self._parser.parse({tensor.name(): tensor.as_numpy() for tensor in request.inputs()})
            except QuireError as error:
                client.send(error)
            except Exception:
                logger.exception("a request cannot be read")
                client.send(QuireError("the request could not be read; the server's log says why"))
            else:
                self._outstanding.accept(parsed, client)

    def finalize(self) -> None:
        """End outstanding requests, then threads and connections."""
        self._outstanding.close(CLOSE_TIMEOUT_S)
        self._rendezvous.close()


class TritonClient:
    """The client of one request, reached through Triton's response sender."""

    def __init__(self, sender: Any) -> None:
        self._sender = sender

    def send(self, response: GenerationResponse | QuireError) -> None:
        """Send a response; a round trip of about 0.2 ms, during which other threads run."""
        if isinstance(response, QuireError):
            error = pb_utils.TritonError(str(response), getattr(pb_utils.TritonError, response.code))
            self._sender.send(
                pb_utils.InferenceResponse(error=error), flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
            )
            return
        tensors = [_string("text_output", response.text), _integers("output_ids", response.output_ids)]
        if response.finish_reason is None:
            self._sender.send(pb_utils.InferenceResponse(tensors))
            return
        tensors += [
            _string("finish_reason", response.finish_reason),
            _integers("num_input_tokens", [response.num_input_tokens]),
            _integers("num_output_tokens", [response.num_output_tokens]),
        ]
        self._sender.send(
            pb_utils.InferenceResponse(tensors), flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
        )

    def is_cancelled(self) -> bool:
        """Ask Triton whether the client cancelled or closed its stream; a round trip of about 0.07 ms."""
        return bool(self._sender.is_cancelled())


def _string(name: str, text: str) -> Any:
    return pb_utils.Tensor(name, np.array([text.encode()], dtype=np.object_))


def _integers(name: str, values: list[int]) -> Any:
    array: npt.NDArray[np.int32] = np.array(values, dtype=np.int32)
    return pb_utils.Tensor(name, array)
