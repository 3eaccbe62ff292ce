"""Generation defaults: what the checkpoint's files say, laid over vLLM's neutral values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from quire.errors import CheckpointError
from quire.serving.frontend.generation_defaults import GenerationDefaults


def write(directory: Path, name: str, content: dict[str, Any]) -> None:
    (directory / name).write_text(json.dumps(content))


def test_without_files_the_defaults_are_neutral(tmp_path: Path) -> None:
    assert GenerationDefaults.from_directory(tmp_path) == GenerationDefaults(
        max_tokens=16, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, eos_token_ids=()
    )


def test_the_checkpoint_replaces_what_it_names(tmp_path: Path) -> None:
    write(
        tmp_path,
        "generation_config.json",
        {"temperature": 0.6, "top_p": 0.9, "max_new_tokens": 200, "top_k": None, "do_sample": False},
    )
    assert GenerationDefaults.from_directory(tmp_path) == GenerationDefaults(
        max_tokens=200, temperature=0.6, top_p=0.9
    )


@pytest.mark.parametrize(
    ("generation", "model", "expected"),
    [
        ({"eos_token_id": [1, 2]}, {"eos_token_id": 3}, (1, 2)),
        ({"eos_token_id": 0}, {"eos_token_id": 3}, (0,)),
        ({"eos_token_id": None}, {"eos_token_id": 3}, (3,)),
        ({}, {"eos_token_id": [3, 4]}, (3, 4)),
        ({}, {"eos_token_id": None}, ()),
    ],
)
def test_end_ids_come_from_the_generation_config_then_the_model(
    tmp_path: Path, generation: dict[str, Any], model: dict[str, Any], expected: tuple[int, ...]
) -> None:
    write(tmp_path, "generation_config.json", generation)
    write(tmp_path, "config.json", model)
    assert GenerationDefaults.from_directory(tmp_path).eos_token_ids == expected


def test_top_k_of_minus_1_keeps_all(tmp_path: Path) -> None:
    write(tmp_path, "generation_config.json", {"top_k": -1})
    assert GenerationDefaults.from_directory(tmp_path).top_k == 0


@pytest.mark.parametrize(
    ("field", "value"),
    [("top_p", 0), ("temperature", -1), ("max_new_tokens", 0), ("eos_token_id", "x"), ("min_p", 2)],
)
def test_a_value_that_no_request_may_have_is_refused(tmp_path: Path, field: str, value: object) -> None:
    write(tmp_path, "generation_config.json", {field: value})
    with pytest.raises(CheckpointError, match=rf"generation_config\.json .*{field}"):
        GenerationDefaults.from_directory(tmp_path)


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"/config\.json "):
        GenerationDefaults.from_directory(tmp_path)
