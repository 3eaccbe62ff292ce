"""What `quire profile` makes of the times that TensorRT reports."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from quire.cli import app
from quire.errors import CheckpointError
from quire_build.tensorrt.profile import StepProfile, medians, report, weight_bytes

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
PROFILE = StepProfile(
    batch=32,
    context=1000,
    layers_ms={
        "Linear:a.qkv": 1.0,
        "KvWrite:a": 0.25,
        "PagedAttend:a": 0.5,
        "Linear:b": 2.0,
        "Sample:ids": 0.125,
        "StepBegin:token_ids": 0.0625,
        "gather": 0.0625,
    },
    weight_bytes=3_000_000_000,
    kv_bytes=1_000_000_000,
    bandwidth_gb_s=2000.0,
)


def test_layers_are_summed_by_kind_and_what_is_no_operator_of_ours_is_the_rest() -> None:
    assert PROFILE.kinds_ms == {
        "linear layers": 3.0,
        "attention": 0.5,
        "norm of heads, KV write": 0.25,
        "sampling": 0.125,
        "rest": 0.125,
    }
    assert list(PROFILE.kinds_ms)[:2] == ["linear layers", "attention"]
    assert sum(PROFILE.kinds_ms.values()) == PROFILE.total_ms


def test_the_report_holds_the_time_against_reading_weights_and_kv_once() -> None:
    assert PROFILE.floor_ms == 2.0
    first, second, *_ = report(PROFILE)
    assert "layers take 4.000 ms" in first and "takes 2.000 ms (50%)" in first
    assert second.split() == ["linear", "layers", "3.000", "ms", "75.0%"]


def test_a_layer_counts_with_its_median() -> None:
    assert medians([{"a": 1.0, "b": 5.0}, {"a": 9.0, "b": 5.0}, {"a": 2.0, "b": 6.0}]) == {"a": 2.0, "b": 5.0}


@pytest.mark.parametrize("tied", [False, True])
def test_only_a_tied_embedding_is_read_as_a_whole(tmp_path: Path, tied: bool) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIG | {"tie_word_embeddings": tied}))
    layer = 2 * 32 + 2 * 32 * 32 + 2 * 16 * 32 + 3 * 48 * 32
    assert weight_bytes(path, 2) == 2 * (2 * layer + 32 + 100 * 32)


def test_a_missing_config_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nothing\.json"):
        weight_bytes(tmp_path / "nothing.json", 2)


def test_a_repository_without_an_engine_is_refused_in_one_line(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["profile", str(tmp_path)])
    assert result.exit_code == 1
    assert "engine.json" in result.output and "Traceback" not in result.output
