"""Commands to the scheduler of a running server, for whoever holds the access key of its start.

`drain` above all: Triton refuses calls between models as soon as it gets SIGTERM, so that requests under
way would fail; whoever stops a server lets the scheduler finish them first.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from tritonclient.grpc import InferenceServerClient, InferInput
from tritonclient.utils import InferenceServerException

from quire.errors import QuireError
from quire.interface import ACCESS_KEY_BYTES, SCHEDULER


class ControlError(QuireError):
    """The scheduler did not answer a command."""


def ask_scheduler(
    url: str, access_key: bytes, command: Literal["drain", "statistics"], *, timeout_s: float
) -> str:
    """Send a command to the server whose gRPC address is `url` (`host:port`), and return the answer.

    `drain` is answered once every request has finished, `statistics` with JSON.

    Raises:
        ControlError: it was refused, the server cannot be reached, or `timeout_s` seconds have passed.
    """
    key = InferInput("access_key", [ACCESS_KEY_BYTES], "UINT8")
    key.set_data_from_numpy(np.frombuffer(access_key, np.uint8))
    text = InferInput("command", [1], "BYTES")
    text.set_data_from_numpy(np.array([command.encode()], np.object_))
    client = InferenceServerClient(url)
    try:
        answer = client.infer(SCHEDULER, [key, text], client_timeout=timeout_s).as_numpy("answer")
    except InferenceServerException as error:
        raise ControlError(error.message()) from error
    finally:
        client.close()
    return str(answer[0].decode())
