"""The Triton models and their tensors, as data.

`quire build` turns this into config.pbtxt; the components and the client take names and types from here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

from quire.errors import StartupError
from quire.execution.engine_state import STEP_ELEMENTS

DataType = Literal["BOOL", "UINT8", "INT32", "INT64", "UINT64", "FP32", "STRING"]
"""Triton's names; in config.pbtxt with `TYPE_` before them. STRING is BYTES on the wire."""

BACKEND = "quire"
LLM, SCHEDULER, ENGINE = "llm", "scheduler", "engine"
"""Names of the models. Clients call `llm`; the others answer only Quire's own processes, except that a plan
which Triton's own backend hosts asks nobody for a key."""

ACCESS_KEY_BYTES = 32


class EnginePlacement(StrEnum):
    """Where the engine runs; the parameter `engine` in every config.pbtxt of a repository."""

    HOSTED = "hosted"
    """As a Triton model: in a process of its own, or a plan in the server's."""
    IN_PROCESS = "in-process"
    """In the scheduler's process; the repository has no model `engine` then."""

    @classmethod
    def read(cls, parameters: Mapping[str, str]) -> EnginePlacement:
        """Take it from a model's parameters.

        Raises:
            StartupError: it is missing or unknown.
        """
        text = parameters.get("engine", "")
        try:
            return cls(text)
        except ValueError:
            raise StartupError(
                f"parameter engine of the model repository is {text!r}; it must be {' or '.join(cls)}: "
                "build the repository again with `quire build`"
            ) from None

    @property
    def models(self) -> tuple[str, ...]:
        """The models of a repository."""
        return (LLM, SCHEDULER, ENGINE) if self is EnginePlacement.HOSTED else (LLM, SCHEDULER)

    @property
    def engine_owner(self) -> str:
        """The model that loads the engine and has its files."""
        return ENGINE if self is EnginePlacement.HOSTED else SCHEDULER


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor of a model: -1 in `dims` stands for any size."""

    name: str
    data_type: DataType
    dims: tuple[int, ...] = (1,)
    optional: bool = False


LLM_INPUTS = (
    TensorSpec("text_input", "STRING", optional=True),
    TensorSpec("input_ids", "INT32", (-1,), optional=True),
    TensorSpec("max_tokens", "INT32", optional=True),
    TensorSpec("temperature", "FP32", optional=True),
    TensorSpec("top_k", "INT32", optional=True),
    TensorSpec("top_p", "FP32", optional=True),
    TensorSpec("min_p", "FP32", optional=True),
    TensorSpec("seed", "UINT64", optional=True),
    TensorSpec("stop", "STRING", (-1,), optional=True),
    TensorSpec("stream", "BOOL", optional=True),
    TensorSpec("exclude_input_in_output", "BOOL", optional=True),
)
LLM_OUTPUTS = (
    TensorSpec("text_output", "STRING"),
    TensorSpec("output_ids", "INT32", (-1,)),
    TensorSpec("finish_reason", "STRING"),
    TensorSpec("num_input_tokens", "INT32"),
    TensorSpec("num_output_tokens", "INT32"),
)
"""`finish_reason` and the counts come with the last response only."""

SCHEDULER_INPUTS = (TensorSpec("access_key", "UINT8", (ACCESS_KEY_BYTES,)), TensorSpec("command", "STRING"))
SCHEDULER_OUTPUTS = (TensorSpec("answer", "STRING"),)
"""Commands: `statistics` (answered with JSON) and `drain` (answered once no request is left)."""

STEP_INPUTS = (
    TensorSpec("input_ids", "INT32", (-1,)),
    TensorSpec("positions", "INT32", (-1,)),
    TensorSpec("slot_mapping", "INT32", (-1,)),
    TensorSpec("block_tables", "INT32", (-1, -1)),
    TensorSpec("query_start_loc", "INT32", (-1,)),
    TensorSpec("seq_lens", "INT32", (-1,)),
    TensorSpec("logits_indices", "INT32", (-1,)),
)
"""The engine contract's inputs, in its order."""

ENGINE_INPUTS = (
    TensorSpec("access_key", "UINT8", (ACCESS_KEY_BYTES,)),
    TensorSpec("step", "INT32"),
    *STEP_INPUTS,
)
ENGINE_OUTPUTS = (
    TensorSpec("logits", "FP32", (-1, -1)),
    TensorSpec("pool_info", "INT32", (2,)),
    TensorSpec("step", "INT32"),
)

PLAN_INPUTS = (
    *STEP_INPUTS,
    TensorSpec("sampling", "FP32", (-1, 5)),
    TensorSpec("step", "INT32", (STEP_ELEMENTS,)),
    TensorSpec("engine_state", "INT64", (-1,)),
)
"""What a TensorRT plan takes besides its pool, padded to one of its sizes; `padding.step_row` is `step`."""
PLAN_OUTPUTS = (
    TensorSpec("logits", "FP32", (-1, -1)),
    TensorSpec("sampled_ids", "INT32", (-1,)),
    TensorSpec("pool_info", "INT32", (2,)),
    TensorSpec("step_done", "INT32"),
)
"""What a plan gives: one row of logits and one token for each entry of `logits_indices`."""
PLAN_FILE = "model.plan"
POOL_INPUT_PREFIX = "kv_cache."
"""A plan's pool is its inputs `kv_cache.0` and so on, each INT64 [-1]."""


def plan_inputs(names: Iterable[str]) -> tuple[TensorSpec, ...]:
    """A plan's inputs as Triton sees them, by the names that its manifest lists."""
    specs = {spec.name: spec for spec in PLAN_INPUTS}
    return tuple(
        TensorSpec(name, "INT64", (-1,)) if name.startswith(POOL_INPUT_PREFIX) else specs[name]
        for name in names
    )
