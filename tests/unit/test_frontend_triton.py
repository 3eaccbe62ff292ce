"""The frontend's adapter to Triton: what it makes of responses, and when it leaves Triton alone."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from tests.unit.triton_stand_in import InferenceResponse, StandIn, TritonError, inside_triton

from quire.errors import InvalidRequestError
from quire.serving.frontend.stream import GenerationResponse

FINAL = StandIn.TRITONSERVER_RESPONSE_COMPLETE_FINAL
PATIENCE_S = 30.0
LAST = GenerationResponse("", [5], "stop", 7, 9)


class FakeSender:
    """A response sender that, like Triton's, must not be touched once it has sent the final response."""

    def __init__(self) -> None:
        self.sent: list[tuple[InferenceResponse, int]] = []
        self.is_sending = threading.Event()
        self.may_send = threading.Event()
        self.may_send.set()
        self._freed = False

    def send(self, response: InferenceResponse, flags: int = 0) -> None:
        assert not self._freed
        self._freed = bool(flags)
        self.is_sending.set()
        assert self.may_send.wait(PATIENCE_S)
        self.sent.append((response, flags))

    def is_cancelled(self) -> bool:
        assert not self._freed, "the server would crash here"
        return True


@pytest.fixture
def frontend() -> Iterator[Any]:
    """The module, imported as in a server."""
    with inside_triton("frontend.component") as (_, [module]):
        yield module


def test_a_delta_is_text_and_ids_alone(frontend: Any) -> None:
    sender = FakeSender()
    frontend.TritonClient(sender).send(GenerationResponse("héllo", [3, 4]))
    [(response, flags)] = sender.sent
    assert flags == 0
    arrays = response.arrays()
    assert list(arrays) == ["text_output", "output_ids"]
    assert arrays["text_output"].tolist() == ["héllo".encode()]
    assert arrays["output_ids"].tolist() == [3, 4]
    assert arrays["output_ids"].dtype == np.int32


def test_the_last_response_carries_reason_counts_and_the_final_flag(frontend: Any) -> None:
    sender = FakeSender()
    frontend.TritonClient(sender).send(LAST)
    [(response, flags)] = sender.sent
    assert flags == FINAL
    arrays = response.arrays()
    assert arrays["finish_reason"].tolist() == [b"stop"]
    assert arrays["num_input_tokens"].tolist() == [7]
    assert arrays["num_output_tokens"].tolist() == [9]


def test_an_error_is_final_and_keeps_its_status_code(frontend: Any) -> None:
    sender = FakeSender()
    frontend.TritonClient(sender).send(InvalidRequestError("top_p is 2"))
    [(response, flags)] = sender.sent
    assert flags == FINAL
    assert response.tensors == []
    error = response.error()
    assert error is not None
    assert error.code == TritonError.INVALID_ARG
    assert error.message().endswith("top_p is 2")


def test_triton_is_not_asked_about_a_request_that_has_had_its_final_response(frontend: Any) -> None:
    client = frontend.TritonClient(FakeSender())
    assert client.is_cancelled()
    client.send(LAST)
    assert not client.is_cancelled()


def test_triton_is_not_asked_while_the_final_response_is_being_sent(frontend: Any) -> None:
    sender = FakeSender()
    sender.may_send.clear()
    client = frontend.TritonClient(sender)
    answers: list[bool] = []
    sending = threading.Thread(target=client.send, args=(LAST,))
    asking = threading.Thread(target=lambda: answers.append(client.is_cancelled()))
    sending.start()
    assert sender.is_sending.wait(PATIENCE_S)
    asking.start()
    sender.may_send.set()
    for thread in (sending, asking):
        thread.join(PATIENCE_S)
    assert answers == [False]
