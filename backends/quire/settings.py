"""Serving settings: what the operator chooses, in one place with its default and its check.

A setting is a parameter in the models' config.pbtxt (`quire build` writes the defaults) and a flag of
`quire serve`, which hands it to the server's processes as an environment variable (`QUIRE_` and the name
in capitals); the environment wins. Limits beyond what the engine was built for are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

from quire.errors import SettingsError
from quire.execution.manifest import EngineLimits

ENVIRONMENT_PREFIX = "QUIRE_"


@dataclass(frozen=True, slots=True)
class ServingSettings:
    """Settings of one server start. 0 means: derived at start, as each field says."""

    max_num_seqs: int = 0
    """Requests that run at the same time; 0 takes the engine's limit."""
    max_num_batched_tokens: int = 0
    """Tokens computed in one step, over all requests; 0 takes the engine's limit."""
    max_model_len: int = 0
    """Tokens of prompt and output of one request; 0 takes the engine's limit."""
    kv_cache_bytes: int = 0
    """Size of the KV pool in bytes; 0 takes a fraction of the free memory, with a cap, or of a GPU's memory
    what `gpu_memory_utilization` leaves."""
    gpu_memory_utilization: int = 90
    """Percent of a GPU's memory that may be in use once the KV pool is there, 1 to 99."""
    threads: int = 0
    """Threads of the CPU runtime; 0 takes the cores that this process may use."""
    max_queued_requests: int = 4096
    """Requests that may wait for admission; more are refused."""
    step_timeout_s: int = 120
    """Seconds after which a step that has not come back counts as failed."""

    @classmethod
    def read(cls, parameters: Mapping[str, str], environment: Mapping[str, str]) -> ServingSettings:
        """Take each setting from the environment, else from the model's parameters, else its default.

        Raises:
            SettingsError: a value is not a whole number of at least 0, or not in its range.
        """
        values: dict[str, int] = {}
        for field in fields(cls):
            variable = ENVIRONMENT_PREFIX + field.name.upper()
            source, text = (
                (variable, environment[variable])
                if variable in environment
                else (f"parameter {field.name}", parameters.get(field.name))
            )
            if text is None:
                continue
            if not text.isascii() or not text.isdigit():
                raise SettingsError(f"{source} is {text!r}; it must be a whole number of at least 0")
            values[field.name] = int(text)
        settings = cls(**values)
        if not 1 <= settings.gpu_memory_utilization <= 99:
            raise SettingsError(
                f"gpu_memory_utilization is {settings.gpu_memory_utilization} percent; it must be 1 to 99"
            )
        return settings

    def within(self, limits: EngineLimits) -> ServingSettings:
        """Fill in the engine's limits where none is set, and refuse what exceeds them.

        Raises:
            SettingsError: a limit is above the engine's, or a step cannot hold a token of each request.
        """
        resolved: dict[str, int] = {}
        for name in ("max_num_seqs", "max_num_batched_tokens", "max_model_len"):
            chosen, built_for = getattr(self, name), getattr(limits, name)
            if chosen > built_for:
                raise SettingsError(
                    f"{name} is {chosen}, but the engine was built for at most {built_for}; "
                    f"lower it or build again with `quire build --{name.replace('_', '-')} {chosen}`"
                )
            resolved[name] = chosen or built_for
        if resolved["max_num_batched_tokens"] < resolved["max_num_seqs"]:
            raise SettingsError(
                f"max_num_batched_tokens is {resolved['max_num_batched_tokens']}; it must be at least "
                f"max_num_seqs, {resolved['max_num_seqs']}, for each running request to get a token"
            )
        return replace(self, **resolved)
