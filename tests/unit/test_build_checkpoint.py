"""A checkpoint is refused unless config.json accounts for all of it and serving can read its files."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from quire.errors import CheckpointError
from quire_build.checkpoint import Checkpoint, checkpoint_weights, load_decoder

SHIPPED = Path(__file__).parents[2] / "checkpoints" / "quire-small"
NUM_POSITIONS = 16

both_ways_of_reading = pytest.mark.parametrize("read", [load_decoder, checkpoint_weights])
Read = Callable[[Checkpoint, int], object]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A copy of the shipped checkpoint that a test may change."""
    return Path(shutil.copytree(SHIPPED, tmp_path / "checkpoint"))


def set_option(directory: Path, **options: object) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | options))


def add_tensors(directory: Path, *names: str) -> None:
    path = directory / "model.safetensors"
    save_file(load_file(path) | {name: torch.zeros(2) for name in names}, path)


@both_ways_of_reading
def test_a_config_with_fewer_layers_than_the_weights_have_is_refused(directory: Path, read: Read) -> None:
    set_option(directory, num_hidden_layers=4)
    unread = [name for name in load_file(directory / "model.safetensors") if ".layers.4." in name]
    with pytest.raises(CheckpointError, match=rf", {len(unread)} in all: .*config\.json") as caught:
        read(Checkpoint.open(directory), NUM_POSITIONS)
    shown = [name for name in unread if name in str(caught.value)]
    assert shown == sorted(unread)[:3] and ", ...;" in str(caught.value)


@both_ways_of_reading
def test_one_tensor_that_nobody_reads_is_refused_by_name(directory: Path, read: Read) -> None:
    add_tensors(directory, "model.layers.0.self_attn.q_norm.weight")
    with pytest.raises(CheckpointError, match=r"1 in all: model\.layers\.0\.self_attn\.q_norm\.weight;"):
        read(Checkpoint.open(directory), NUM_POSITIONS)


@both_ways_of_reading
def test_what_config_json_implies_may_be_stored_too(directory: Path, read: Read) -> None:
    set_option(directory, tie_word_embeddings=True)
    add_tensors(
        directory,
        "lm_head.weight",
        "model.rotary_emb.inv_freq",
        "model.layers.0.self_attn.rotary_emb.inv_freq",
    )
    read(Checkpoint.open(directory), NUM_POSITIONS)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("generation_config.json", '{"temperature": -3}'),
        ("generation_config.json", '{"top_p": 0}'),
        ("generation_config.json", "[]"),
        ("generation_config.json", "{"),
        ("tokenizer.json", "{"),
        ("tokenizer_config.json", '{"bos_token": 1}'),
        ("tokenizer_config.json", "{"),
    ],
)
def test_what_serving_would_refuse_is_refused(directory: Path, name: str, content: str) -> None:
    (directory / name).write_text(content)
    with pytest.raises(CheckpointError, match=re.escape(name)):
        Checkpoint.open(directory)


def test_a_checkpoint_without_its_tokenizer_is_refused(directory: Path) -> None:
    (directory / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is missing"):
        Checkpoint.open(directory)
