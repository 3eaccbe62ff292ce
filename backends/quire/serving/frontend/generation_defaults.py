"""What a checkpoint says about generating: its sampling defaults and the ids that end a text.

vLLM's rule: the values of generation_config.json (temperature, top_k, top_p, min_p, max_new_tokens) replace
the defaults of `SamplingParams`, and a request's values replace both. `do_sample` is ignored, as vLLM does:
greedy decoding is asked for with temperature 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypeVar

import msgspec

from quire.errors import CheckpointError
from quire.scheduling.sampling_params import SamplingParams

_NEUTRAL = SamplingParams()
_TokenId = Annotated[int, msgspec.Meta(ge=0)]


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """Values for what a request leaves out."""

    max_tokens: int = _NEUTRAL.max_tokens
    """Lowered for a prompt that leaves less room; only a request's own value is refused then."""
    temperature: float = _NEUTRAL.temperature
    top_k: int = _NEUTRAL.top_k
    top_p: float = _NEUTRAL.top_p
    min_p: float = _NEUTRAL.min_p
    eos_token_ids: tuple[int, ...] = ()
    """Ids that end a text, empty for a checkpoint that has none."""

    @classmethod
    def from_directory(cls, directory: Path) -> GenerationDefaults:
        """Read generation_config.json and config.json of a checkpoint; either may be missing.

        Raises:
            CheckpointError: a file is damaged or holds a value that no request may have.
        """
        generation = _read(directory / "generation_config.json", _GenerationConfig)
        end = generation.eos_token_id
        if end is None:
            end = _read(directory / "config.json", _ModelConfig).eos_token_id
        if end is None:
            end = []
        chosen = {
            "max_tokens": generation.max_new_tokens,
            "temperature": generation.temperature,
            "top_k": None if generation.top_k is None else max(generation.top_k, 0),
            "top_p": generation.top_p,
            "min_p": generation.min_p,
        }
        return cls(
            **{name: value for name, value in chosen.items() if value is not None},  # type: ignore[arg-type]
            eos_token_ids=(end,) if isinstance(end, int) else tuple(end),
        )


class _GenerationConfig(msgspec.Struct):
    """The fields of generation_config.json that matter here, with the bounds that requests have too."""

    max_new_tokens: Annotated[int, msgspec.Meta(ge=1)] | None = None
    temperature: Annotated[float, msgspec.Meta(ge=0)] | None = None
    top_k: Annotated[int, msgspec.Meta(ge=-1)] | None = None
    top_p: Annotated[float, msgspec.Meta(gt=0, le=1)] | None = None
    min_p: Annotated[float, msgspec.Meta(ge=0, le=1)] | None = None
    eos_token_id: _TokenId | list[_TokenId] | None = None


class _ModelConfig(msgspec.Struct):
    """The field of config.json that matters here."""

    eos_token_id: _TokenId | list[_TokenId] | None = None


_Config = TypeVar("_Config", _GenerationConfig, _ModelConfig)


def _read(path: Path, kind: type[_Config]) -> _Config:
    """Contents of a JSON file; nothing set where there is no such file."""
    if not path.is_file():
        return kind()
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except (OSError, msgspec.DecodeError) as error:
        raise CheckpointError(f"{path} cannot be used: {error}") from None
