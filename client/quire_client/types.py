"""What a caller hands in and gets back: plain data, the same for the sync and the async client."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

Prompt = str | Sequence[int]
"""Text, tokenised by the server, or token ids."""


class SamplingOptions(TypedDict, total=False):
    """How to generate. What is left out or None takes the server's default for the model."""

    max_tokens: int | None
    """Tokens to generate at most."""
    temperature: float | None
    """0 is greedy."""
    top_k: int | None
    """Sample from the k likeliest tokens only; 0 switches it off."""
    top_p: float | None
    """Sample from the likeliest tokens that together have this probability."""
    min_p: float | None
    """Drop tokens less likely than this share of the likeliest one's probability."""
    seed: int | None
    """Makes sampling reproducible, on whatever server and in whatever company."""
    stop: Sequence[str] | None
    """The text ends before the first of these strings, at most 16."""
    exclude_input_in_output: bool | None
    """False puts the prompt before the generated text. Clients default to True."""


@dataclass(frozen=True, slots=True)
class Delta:
    """What was generated since the delta before."""

    text: str
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class GenerateResult:
    """A finished request."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    """`stop`: an end-of-sequence token or a stop string; `length`: max_tokens or the model's limit."""
    num_input_tokens: int
    num_output_tokens: int


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor of a model; -1 in its shape stands for any size."""

    name: str
    datatype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """A model as the server describes it."""

    name: str
    versions: tuple[str, ...]
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    server_version: str
    """Of tritonserver."""
