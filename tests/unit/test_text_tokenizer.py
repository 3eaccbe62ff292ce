"""The tokenizer: special tokens as the checkpoint wants them, and bounds that refuse nothing valid."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import normalizers

from quire.errors import CheckpointError
from quire.text.tokenizer import Tokenizer

BOS = 0


@pytest.fixture
def backend(byte_level_backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """A copy that the test may change."""
    return tokenizers.Tokenizer.from_str(byte_level_backend.to_str())


@pytest.fixture
def backend_without_bos(backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    description = json.loads(backend.to_str())
    description["post_processor"] = None
    return tokenizers.Tokenizer.from_str(json.dumps(description))


def test_the_post_processor_puts_the_bos_first(backend: tokenizers.Tokenizer) -> None:
    ids = Tokenizer(backend, bos_token="<s>").encode("the fox")
    assert ids[0] == BOS
    assert ids.count(BOS) == 1


@pytest.mark.parametrize("add_bos_token", [False, True])
def test_text_that_brings_the_bos_does_not_get_another(
    backend: tokenizers.Tokenizer, add_bos_token: bool
) -> None:
    tokenizer = Tokenizer(backend, bos_token="<s>", add_bos_token=add_bos_token)
    assert tokenizer.encode("<s>the fox") == tokenizer.encode("the fox")


def test_a_bos_that_only_the_configuration_asks_for_is_added_once(
    backend_without_bos: tokenizers.Tokenizer,
) -> None:
    tokenizer = Tokenizer(backend_without_bos, bos_token="<s>", add_bos_token=True)
    plain = Tokenizer(backend_without_bos, bos_token="<s>")
    assert tokenizer.encode("the fox") == [BOS, *plain.encode("the fox")]
    assert tokenizer.encode("<s>the fox") == tokenizer.encode("the fox")


def test_a_checkpoint_without_bos_gets_none(backend_without_bos: tokenizers.Tokenizer) -> None:
    tokenizer = Tokenizer(backend_without_bos)
    assert BOS not in tokenizer.encode("the fox")
    assert tokenizer.decode(tokenizer.encode("the fox")) == "the fox"


def test_truncation_and_padding_of_the_file_are_switched_off(backend: tokenizers.Tokenizer) -> None:
    length = len(Tokenizer(backend).encode("the fox and the dog"))
    backend.enable_truncation(max_length=2)
    backend.enable_padding(length=64)
    assert len(Tokenizer(backend).encode("the fox and the dog")) == length > 2


@given(text=st.text(max_size=60))
def test_no_text_that_fits_is_beyond_the_byte_bound(
    byte_level_tokenizer: Tokenizer, byte_fallback_tokenizer: Tokenizer, text: str
) -> None:
    for tokenizer in (byte_level_tokenizer, byte_fallback_tokenizer):
        assert len(text.encode()) <= tokenizer.max_text_bytes(len(tokenizer.encode(text)))


def test_the_byte_bound_allows_for_a_normalizer_that_shortens(backend: tokenizers.Tokenizer) -> None:
    backend.normalizer = normalizers.NFKC()
    tokenizer = Tokenizer(backend)
    text = "\N{MATHEMATICAL BOLD SMALL T}\N{MATHEMATICAL BOLD SMALL H}\N{MATHEMATICAL BOLD SMALL E}" * 100
    assert len(text.encode()) <= tokenizer.max_text_bytes(len(tokenizer.encode(text)))


@pytest.mark.parametrize("bos_entry", ["<s>", {"content": "<s>", "lstrip": False}])
def test_a_directory_is_read_with_either_form_of_the_bos(
    backend_without_bos: tokenizers.Tokenizer, tmp_path: Path, bos_entry: object
) -> None:
    backend_without_bos.save(str(tmp_path / "tokenizer.json"))
    options = {"bos_token": bos_entry, "add_bos_token": True, "tokenizer_class": "LlamaTokenizer"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(options))
    assert Tokenizer.from_directory(tmp_path).encode("the")[0] == BOS


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_damaged_file_is_named(backend: tokenizers.Tokenizer, tmp_path: Path, name: str) -> None:
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / name).write_text('{"bos_')
    with pytest.raises(CheckpointError, match=f"{name} "):
        Tokenizer.from_directory(tmp_path)


def test_a_missing_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is missing"):
        Tokenizer.from_directory(tmp_path)
