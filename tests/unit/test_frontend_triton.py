"""The frontend's adapter to Triton, against a stand-in for the module that the server provides."""

from __future__ import annotations

import importlib
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from quire.errors import InvalidRequestError, QuireError
from quire.serving.stream import GenerationResponse

FINAL = 1
PATIENCE_S = 30.0


@dataclass
class FakeTensor:
    tensor_name: str
    array: NDArray[Any]


@dataclass
class FakeResponse:
    tensors: list[FakeTensor] = field(default_factory=list)
    error: Any = None

    def __getitem__(self, name: str) -> list[Any]:
        values: list[Any] = next(
            tensor.array for tensor in self.tensors if tensor.tensor_name == name
        ).tolist()
        return values

    @property
    def names(self) -> list[str]:
        return [tensor.tensor_name for tensor in self.tensors]


class FakeSender:
    """A response sender that, like Triton's, must not be touched once it has sent the final response."""

    def __init__(self) -> None:
        self.sent: list[tuple[FakeResponse, int]] = []
        self.is_sending = threading.Event()
        self.may_send = threading.Event()
        self.may_send.set()
        self.freed = False

    def send(self, response: FakeResponse, flags: int = 0) -> None:
        assert not self.freed
        self.freed = bool(flags)
        self.is_sending.set()
        assert self.may_send.wait(PATIENCE_S)
        self.sent.append((response, flags))

    def is_cancelled(self) -> bool:
        assert not self.freed, "the server would crash here"
        return True


@pytest.fixture
def triton(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """quire.serving.frontend, imported as in a server."""
    stand_in = SimpleNamespace(
        Tensor=FakeTensor,
        InferenceResponse=lambda output_tensors=(), error=None: FakeResponse(list(output_tensors), error),
        TritonError=lambda message, code: (message, code),
        TRITONSERVER_RESPONSE_COMPLETE_FINAL=FINAL,
    )
    stand_in.TritonError.INVALID_ARG = 3
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", stand_in)
    for name in ("quire.serving.tensors", "quire.serving.frontend"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield importlib.import_module("quire.serving.frontend")
    for name in ("quire.serving.tensors", "quire.serving.frontend"):
        sys.modules.pop(name, None)


def test_a_delta_is_text_and_ids_alone(triton: Any) -> None:
    sender = FakeSender()
    triton.TritonClient(sender).send(GenerationResponse("héllo", [3, 4]))
    [(response, flags)] = sender.sent
    assert flags == 0
    assert response.names == ["text_output", "output_ids"]
    assert response["text_output"] == ["héllo".encode()]
    assert response["output_ids"] == [3, 4]
    assert response.tensors[1].array.dtype == np.int32


def test_the_last_response_carries_reason_counts_and_the_final_flag(triton: Any) -> None:
    sender = FakeSender()
    triton.TritonClient(sender).send(GenerationResponse("", [5], "stop", 7, 9))
    [(response, flags)] = sender.sent
    assert flags == FINAL
    assert response["finish_reason"] == [b"stop"]
    assert response["num_input_tokens"] == [7]
    assert response["num_output_tokens"] == [9]


def test_an_error_is_final_and_keeps_its_status_code(triton: Any) -> None:
    sender = FakeSender()
    error: QuireError = InvalidRequestError("top_p is 2")
    triton.TritonClient(sender).send(error)
    [(response, flags)] = sender.sent
    assert flags == FINAL
    message, code = response.error
    assert message.endswith("top_p is 2")
    assert code == 3
    assert response.tensors == []


def test_triton_is_not_asked_about_a_request_that_has_had_its_final_response(triton: Any) -> None:
    client = triton.TritonClient(FakeSender())
    assert client.is_cancelled()
    client.send(GenerationResponse("", [5], "stop", 7, 9))
    assert not client.is_cancelled()


def test_triton_is_not_asked_while_the_final_response_is_being_sent(triton: Any) -> None:
    sender = FakeSender()
    sender.may_send.clear()
    client = triton.TritonClient(sender)
    sending = threading.Thread(target=client.send, args=(GenerationResponse("", [5], "stop", 7, 9),))
    sending.start()
    assert sender.is_sending.wait(PATIENCE_S)
    answers: list[bool] = []
    asking = threading.Thread(target=lambda: answers.append(client.is_cancelled()))
    asking.start()
    sender.may_send.set()
    for thread in (sending, asking):
        thread.join(PATIENCE_S)
    assert answers == [False]
