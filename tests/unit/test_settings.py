"""Serving settings against the limits that an engine was built for."""

from __future__ import annotations

import pytest

from quire.errors import SettingsError
from quire.execution.manifest import EngineLimits
from quire.settings import ServingSettings

LIMITS = EngineLimits(max_num_seqs=256, max_num_batched_tokens=2048, max_model_len=2048)


def test_limits_that_are_not_set_are_the_engines() -> None:
    resolved = ServingSettings(max_num_seqs=8).within(LIMITS)
    assert (resolved.max_num_seqs, resolved.max_num_batched_tokens, resolved.max_model_len) == (8, 2048, 2048)


def test_a_step_that_cannot_hold_a_token_of_every_request_is_refused() -> None:
    settings = ServingSettings(max_num_batched_tokens=5)
    with pytest.raises(SettingsError, match=r"max_num_batched_tokens is 5; it must be at least .* 256"):
        settings.within(LIMITS)


def test_as_many_tokens_as_requests_are_enough() -> None:
    resolved = ServingSettings(max_num_seqs=5, max_num_batched_tokens=5).within(LIMITS)
    assert resolved.max_num_batched_tokens == 5


def test_a_share_of_the_gpus_memory_is_in_percent() -> None:
    assert ServingSettings.read({}, {}).gpu_memory_utilization == 90
    chosen = ServingSettings.read({}, {"QUIRE_GPU_MEMORY_UTILIZATION": "55"})
    assert chosen.gpu_memory_utilization == 55


@pytest.mark.parametrize("percent", ["0", "100", "0.9"])
def test_a_share_of_the_gpus_memory_that_is_none_is_refused(percent: str) -> None:
    with pytest.raises(SettingsError, match=f"gpu_memory_utilization is '?{percent}'?.* it must be"):
        ServingSettings.read({"gpu_memory_utilization": percent}, {})
