"""A stand-in for `triton_python_backend_utils`, which exists only inside the server's stubs."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

Arrays = Mapping[str, NDArray[Any]]


class TritonModelError(Exception):
    """What Triton raises by itself, as TritonModelException."""


@dataclass
class Tensor:
    tensor_name: str
    array: NDArray[Any]

    def name(self) -> str:
        return self.tensor_name

    def as_numpy(self) -> NDArray[Any]:
        return self.array.copy()


class TritonError:
    """An error with a status code."""

    INVALID_ARG, UNAVAILABLE, CANCELLED, INTERNAL, UNSUPPORTED, NOT_FOUND = range(6)

    def __init__(self, message: str, code: int) -> None:
        self.text = message
        self.code = code

    def message(self) -> str:
        return self.text


@dataclass
class InferenceResponse:
    tensors: list[Tensor] = field(default_factory=list)
    failure: TritonError | None = None

    def has_error(self) -> bool:
        return self.failure is not None

    def error(self) -> TritonError | None:
        return self.failure

    def output_tensors(self) -> list[Tensor]:
        return self.tensors

    def arrays(self) -> dict[str, NDArray[Any]]:
        return {tensor.tensor_name: tensor.array for tensor in self.tensors}


@dataclass
class IncomingRequest:
    """A request as a component gets it."""

    arrays: Arrays

    def inputs(self) -> list[Tensor]:
        return [Tensor(name, array) for name, array in self.arrays.items()]


@dataclass
class Metric:
    value: float = 0

    def set(self, value: float) -> None:
        self.value = value

    def increment(self, value: float) -> None:
        assert value >= 0, "a counter cannot go back"
        self.value += value


class StandIn(ModuleType):
    """The module. `answer` is what calls of other models get; `metrics` holds those that were made.

    While `answer` runs, `asked_for` names the outputs that the call wants.
    """

    TRITONSERVER_MEMORY_CPU = 0
    TRITONSERVER_RESPONSE_COMPLETE_FINAL = 1
    TritonModelException = TritonModelError

    def __init__(self) -> None:
        super().__init__("triton_python_backend_utils")
        self.Tensor = Tensor
        self.TritonError = TritonError
        self.answer: Callable[[str, dict[str, NDArray[Any]]], InferenceResponse]
        self.asked_for: list[str] = []
        self.metrics: dict[str, Metric] = {}

    def InferenceResponse(  # noqa: N802
        self, output_tensors: list[Tensor] | None = None, error: TritonError | None = None
    ) -> InferenceResponse:
        return InferenceResponse(output_tensors or [], error)

    def PreferredMemory(self, kind: int, device: int) -> tuple[int, int]:  # noqa: N802
        return kind, device

    def InferenceRequest(  # noqa: N802
        self,
        *,
        model_name: str,
        requested_output_names: list[str],
        inputs: list[Tensor],
        preferred_memory: object,
    ) -> Any:
        module = self

        class Call:
            def exec(self) -> InferenceResponse:
                module.asked_for = requested_output_names
                return module.answer(model_name, {tensor.tensor_name: tensor.array for tensor in inputs})

        return Call()

    class MetricFamily:
        GAUGE, COUNTER = range(2)

        def __init__(self, *, name: str, description: str, kind: int) -> None:
            self.name = name

        def Metric(self, *, labels: dict[str, str]) -> Metric:  # noqa: N802
            stand_in = sys.modules["triton_python_backend_utils"]
            assert isinstance(stand_in, StandIn)
            return stand_in.metrics.setdefault(self.name, Metric())


@contextmanager
def inside_triton(*modules: str) -> Iterator[tuple[StandIn, list[Any]]]:
    """The stand-in and these modules of `quire.serving`, imported as in a server.

    They are forgotten afterwards with all that they imported of `quire.serving`: it may hold the stand-in.
    """
    stand_in = StandIn()
    known = set(sys.modules)
    sys.modules[stand_in.__name__] = stand_in
    try:
        yield stand_in, [importlib.import_module(f"quire.serving.{name}") for name in modules]
    finally:
        del sys.modules[stand_in.__name__]
        for name in set(sys.modules) - known:
            if name.startswith("quire.serving."):
                del sys.modules[name]


def logits_answer(
    arrays: dict[str, NDArray[Any]], *, num_blocks: int = 8, epoch: int = 1
) -> InferenceResponse:
    """What an engine answers, with logits that name the rows they belong to."""
    rows = arrays["logits_indices"].astype(np.float32)
    return InferenceResponse(
        [
            Tensor("logits", np.stack([rows, rows + 1], axis=1)),
            Tensor("pool_info", np.array([num_blocks, epoch], np.int32)),
            Tensor("step", arrays["step"]),
        ]
    )
