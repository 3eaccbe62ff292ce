"""A request's tensors, checked and completed: what every part after this one may rely on.

Knows numpy arrays and the tensor table in `quire.interface`, not Triton. Every refusal is an
`InvalidRequestError` that names the field, the value and the limit, and comes before the work it saves: cheap
fields first, a prompt's size before its tokens.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from quire.errors import InvalidRequestError
from quire.interface import LLM_INPUTS
from quire.scheduling.sampling_params import SamplingParams
from quire.serving.frontend.generation_defaults import GenerationDefaults
from quire.text.tokenizer import Tokenizer

MAX_STOP_STRINGS = 16
MAX_STOP_STRING_BYTES = 1024
MIN_TEMPERATURE = 0.01
"""Smaller ones above 0 are raised to this, as vLLM does: logits divided by much less overflow float32."""

Tensors = Mapping[str, npt.NDArray[Any]]
"""By tensor name; strings are arrays of dtype object that hold bytes."""

_NUMPY_TYPES: dict[str, npt.DTypeLike] = {
    "BOOL": np.bool_,
    "INT32": np.int32,
    "UINT64": np.uint64,
    "FP32": np.float32,
    "STRING": np.object_,
}
_SPECS = {spec.name: spec for spec in LLM_INPUTS}


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One request, every field filled in."""

    prompt_token_ids: list[int]
    sampling_params: SamplingParams
    stop: tuple[str, ...] = ()
    """Stop strings; the frontend looks for them, the scheduler does not know them."""
    stream: bool = False
    echo: str = ""
    """What the text output begins with: the prompt's text unless it is excluded."""


class RequestParser:
    """Checks requests against one model.

    Args:
        tokenizer: of the checkpoint.
        defaults: for what a request leaves out.
        vocab_size: of the model; ids are below it.
        max_model_len: tokens of prompt and output together.
    """

    def __init__(
        self, tokenizer: Tokenizer, defaults: GenerationDefaults, vocab_size: int, max_model_len: int
    ) -> None:
        self._tokenizer = tokenizer
        self._defaults = defaults
        self._vocab_size = vocab_size
        self._max_model_len = max_model_len

    def parse(self, tensors: Tensors) -> GenerationRequest:
        """The request that `tensors` describe.

        Raises:
            InvalidRequestError: a field has a wrong type, shape or value, or two contradict each other.
        """
        defaults = self._defaults
        temperature = _temperature(tensors, defaults.temperature)
        top_k = _integer(tensors, "top_k", defaults.top_k, at_least=-1)
        top_p = _number(tensors, "top_p", defaults.top_p)
        if not 0 < top_p <= 1:
            raise InvalidRequestError(f"top_p is {top_p:g}; it must be above 0 and at most 1")
        min_p = _number(tensors, "min_p", defaults.min_p)
        if not 0 <= min_p <= 1:
            raise InvalidRequestError(f"min_p is {min_p:g}; it must be from 0 to 1")
        seed = _scalar(tensors, "seed")
        stop = _stop_strings(tensors)
        stream = _flag(tensors, "stream", default=False)
        exclude_input = _flag(tensors, "exclude_input_in_output", default=stream)
        max_tokens = _integer(tensors, "max_tokens", defaults.max_tokens, at_least=1)

        prompt_token_ids, prompt_text = self._prompt(tensors)
        room = self._max_model_len - len(prompt_token_ids)
        if "max_tokens" in tensors and max_tokens > room:
            raise InvalidRequestError(
                f"max_tokens is {max_tokens}; with a prompt of {len(prompt_token_ids)} tokens it can be at "
                f"most {room} (max_model_len is {self._max_model_len})"
            )
        sampling_params = SamplingParams(
            max_tokens=min(max_tokens, room),
            temperature=temperature,
            top_k=max(top_k, 0),
            top_p=top_p,
            min_p=min_p,
            seed=secrets.randbits(64) if seed is None else int(seed),
            stop_token_ids=defaults.eos_token_ids,
        )
        if exclude_input:
            prompt_text = ""
        elif prompt_text is None:
            prompt_text = self._tokenizer.decode(prompt_token_ids)
        return GenerationRequest(prompt_token_ids, sampling_params, stop, stream, echo=prompt_text)

    def _prompt(self, tensors: Tensors) -> tuple[list[int], str | None]:
        """Ids of the prompt, and its text where the request brought text."""
        if ("text_input" in tensors) == ("input_ids" in tensors):
            raise InvalidRequestError(
                "text_input and input_ids are both given; a request takes exactly one of them"
                if "text_input" in tensors
                else "neither text_input nor input_ids is given; a request takes exactly one of them"
            )
        if "input_ids" in tensors:
            return self._checked_ids("input_ids", _array(tensors, "input_ids")).tolist(), None
        encoded = _scalar(tensors, "text_input")
        room = self._max_model_len - 1
        limit = self._tokenizer.max_text_bytes(room)
        if len(encoded) > limit:
            raise InvalidRequestError(
                f"text_input has {len(encoded)} bytes; at most {limit} can fit into the {room} tokens of a "
                f"prompt (max_model_len {self._max_model_len} less 1 for the output)"
            )
        text = _decoded("text_input", encoded)
        if not text:
            raise InvalidRequestError("text_input is empty; it must have at least 1 character")
        ids = self._tokenizer.encode(text)
        self._checked_ids("text_input", np.asarray(ids, dtype=np.int64))
        return ids, text

    def _checked_ids(self, field: str, ids: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """`ids` [n], known to be a prompt that the model can continue."""
        if ids.size == 0:
            raise InvalidRequestError(f"{field} has no tokens; a prompt has at least 1")
        if ids.size >= self._max_model_len:
            raise InvalidRequestError(
                f"{field} has {ids.size} tokens; at most {self._max_model_len - 1} fit "
                f"(max_model_len {self._max_model_len} less 1 for the output)"
            )
        outside = ids[(ids < 0) | (ids >= self._vocab_size)]
        if outside.size:
            raise InvalidRequestError(
                f"{field} has token id {outside[0]}; ids must be from 0 to {self._vocab_size - 1}"
            )
        return ids


def _array(tensors: Tensors, name: str) -> npt.NDArray[Any]:
    """A tensor that is there, its type and shape as the interface says."""
    array, spec = tensors[name], _SPECS[name]
    if array.dtype != _NUMPY_TYPES[spec.data_type]:
        raise InvalidRequestError(f"{name} has the type {array.dtype}; it must be {spec.data_type}")
    if array.ndim != len(spec.dims) or any(
        wanted not in (-1, size) for wanted, size in zip(spec.dims, array.shape, strict=True)
    ):
        wanted = ["any" if size == -1 else size for size in spec.dims]
        raise InvalidRequestError(f"{name} has the shape {list(array.shape)}; it must be {wanted}")
    return array


def _scalar(tensors: Tensors, name: str) -> Any:
    """The one element of a tensor of shape [1], None where the request has no such tensor."""
    return _array(tensors, name)[0] if name in tensors else None


def _number(tensors: Tensors, name: str, default: float) -> float:
    value = _scalar(tensors, name)
    return default if value is None else float(value)


def _integer(tensors: Tensors, name: str, default: int, at_least: int) -> int:
    value = _scalar(tensors, name)
    if value is None:
        return default
    if value < at_least:
        raise InvalidRequestError(f"{name} is {value}; it must be at least {at_least}")
    return int(value)


def _flag(tensors: Tensors, name: str, default: bool) -> bool:
    value = _scalar(tensors, name)
    return default if value is None else bool(value)


def _temperature(tensors: Tensors, default: float) -> float:
    """0 or at least `MIN_TEMPERATURE`."""
    value = _number(tensors, "temperature", default)
    if not 0 <= value < math.inf:
        raise InvalidRequestError(f"temperature is {value:g}; it must be a finite number of at least 0")
    return value if value == 0 else max(value, MIN_TEMPERATURE)


def _stop_strings(tensors: Tensors) -> tuple[str, ...]:
    if "stop" not in tensors:
        return ()
    entries = _array(tensors, "stop")
    if entries.size > MAX_STOP_STRINGS:
        raise InvalidRequestError(f"stop has {entries.size} strings; at most {MAX_STOP_STRINGS} are allowed")
    for position, entry in enumerate(entries):
        if not 0 < len(entry) <= MAX_STOP_STRING_BYTES:
            raise InvalidRequestError(
                f"stop[{position}] has {len(entry)} bytes; it must have from 1 to {MAX_STOP_STRING_BYTES}"
            )
    return tuple(_decoded(f"stop[{position}]", entry) for position, entry in enumerate(entries))


def _decoded(field: str, encoded: bytes) -> str:
    try:
        return encoded.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidRequestError(
            f"{field} is not valid UTF-8: byte {error.start} is 0x{encoded[error.start]:02x}"
        ) from None
