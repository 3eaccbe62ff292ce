"""The frontend component: what clients call as the model `llm`.

Translates between Triton's requests and responses and plain Python; parsing is `request_parsing`'s, all that
comes after it `outstanding`'s. The model is decoupled: `execute` returns at once and responses follow from
other threads, the last one with Triton's final flag.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils  # type: ignore[import-not-found]

from quire.errors import QuireError
from quire.execution.manifest import read_manifest
from quire.serving.channel import FrontendChannel
from quire.serving.component import ComponentArguments, join_server
from quire.serving.frontend.dead_scheduler import DeadSchedulerWatch
from quire.serving.frontend.generation_defaults import GenerationDefaults
from quire.serving.frontend.outstanding import OutstandingRequests
from quire.serving.frontend.request_parsing import RequestParser
from quire.serving.frontend.stream import GenerationResponse
from quire.serving.messages import Refusal, StepTokens
from quire.serving.server_end import ServerEnd
from quire.serving.tensors import Arrays, error_response, input_arrays, response, string_array
from quire.text.tokenizer import Tokenizer

CLOSE_TIMEOUT_S = 2.0
"""How long `finalize` waits for each thread."""

logger = logging.getLogger(__name__)


class Frontend:
    """One instance of the model `llm`.

    Args:
        arguments: what Triton said when it loaded the model.

    Raises:
        StartupError: a setting or engine.json does not fit.
        CheckpointError: a file of the tokenizer or its configuration is missing or damaged.
    """

    def __init__(self, arguments: ComponentArguments) -> None:
        files = arguments.files_dir
        manifest = read_manifest(arguments.engine_dir)
        tokenizer = Tokenizer.from_directory(files)
        self._parser = RequestParser(
            tokenizer,
            GenerationDefaults.from_directory(files),
            vocab_size=manifest.model.vocab_size,
            max_model_len=arguments.settings().within(manifest.limits).max_model_len,
        )
        self._rendezvous = join_server()
        self._server_end = ServerEnd(self._rendezvous)
        self._dead_scheduler = DeadSchedulerWatch(self._rendezvous, self._server_end.begin)
        self._outstanding = OutstandingRequests(tokenizer, self._open_channel)

    def _open_channel(
        self,
        on_step: Callable[[StepTokens], None],
        on_refusal: Callable[[Refusal], None],
        on_lost: Callable[[str], None],
    ) -> FrontendChannel:
        name = f"frontend {os.getpid()}"
        return FrontendChannel(
            self._rendezvous,
            name,
            on_step,
            on_refusal,
            on_lost,
            on_no_answer=self._dead_scheduler.check,
        )

    def execute(self, requests: Sequence[Any]) -> None:
        """Accept or refuse each of Triton's requests; their responses come later or were sent already."""
        for request in requests:
            client = TritonClient(request.get_response_sender())
            try:
                generation_request = self._parser.parse(input_arrays(request))
            except QuireError as error:
                client.send(error)
            except Exception:
                logger.exception("a request cannot be read")
                client.send(QuireError("the request could not be read; the server's log says why"))
            else:
                self._outstanding.accept(generation_request, client)

    def finalize(self) -> None:
        """End outstanding requests, then threads and connections."""
        self._outstanding.close(CLOSE_TIMEOUT_S)
        self._server_end.complete()
        self._rendezvous.close()


class TritonClient:
    """The client of one request, reached through Triton's response sender."""

    def __init__(self, sender: Any) -> None:
        self._sender = sender
        # Triton frees what `is_cancelled` looks at as soon as the final response is sent, without a check.
        self._final_lock = threading.Lock()
        self._final_sent = False

    def send(self, generated: GenerationResponse | QuireError) -> None:
        """Send a response; a round trip of about 0.2 ms, during which other threads run."""
        if isinstance(generated, QuireError):
            self._send_final(error_response(generated))
            return
        arrays: Arrays = {
            "text_output": string_array(generated.text),
            "output_ids": np.array(generated.output_ids, dtype=np.int32),
        }
        if generated.finish_reason is None:
            self._sender.send(response(arrays))
            return
        arrays["finish_reason"] = string_array(generated.finish_reason)
        arrays["num_input_tokens"] = np.array([generated.num_input_tokens], dtype=np.int32)
        arrays["num_output_tokens"] = np.array([generated.num_output_tokens], dtype=np.int32)
        self._send_final(response(arrays))

    def _send_final(self, final_response: Any) -> None:
        with self._final_lock:
            self._final_sent = True
            self._sender.send(final_response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def is_cancelled(self) -> bool:
        """Ask Triton whether the client cancelled or closed its stream; a round trip of about 0.07 ms."""
        with self._final_lock:
            return not self._final_sent and bool(self._sender.is_cancelled())
