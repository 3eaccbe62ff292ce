"""Asking the scheduler of a running server to finish what it has and take nothing new.

Triton refuses calls between models as soon as it gets SIGTERM, so that requests under way would fail:
whoever stops a server drains it first.
"""

from __future__ import annotations

import numpy as np
from tritonclient.grpc import InferenceServerClient, InferInput
from tritonclient.utils import InferenceServerException

from quire.errors import QuireError
from quire.interface import ACCESS_KEY_BYTES, SCHEDULER


class DrainError(QuireError):
    """The scheduler did not answer that it is idle."""


def drain(url: str, access_key: bytes, *, timeout_s: float) -> None:
    """Return once the server at `url` (`host:port` of gRPC) has finished every request.

    Raises:
        DrainError: it refused, cannot be reached, or wasn't idle after `timeout_s` seconds.
    """
    key = InferInput("access_key", [ACCESS_KEY_BYTES], "UINT8")
    key.set_data_from_numpy(np.frombuffer(access_key, np.uint8))
    command = InferInput("command", [1], "BYTES")
    command.set_data_from_numpy(np.array([b"drain"], np.object_))
    client = InferenceServerClient(url)
    try:
        client.infer(SCHEDULER, [key, command], client_timeout=timeout_s)
    except InferenceServerException as error:
        raise DrainError(error.message()) from error
    finally:
        client.close()
