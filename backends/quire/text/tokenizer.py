"""The checkpoint's tokenizer: prompt text to token ids and back, special tokens as the checkpoint wants them.

Reads `tokenizer.json` (the `tokenizers` library does the work) and, where present, `tokenizer_config.json`
for the beginning-of-sequence token. Text that grows token by token is `quire.text.detokenizer`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec
import tokenizers

from quire.errors import CheckpointError

NORMALIZER_SHRINKAGE = 4
"""How many times shorter, in bytes, a normalizer may make a text: Unicode's compatibility forms turn a
4-byte mathematical letter into a 1-byte one."""


class Tokenizer:
    """Encodes prompts and decodes ids.

    Args:
        backend: the library's tokenizer; truncation and padding set in its file are switched off.
        bos_token: text of the beginning-of-sequence token, None where the checkpoint has none.
        add_bos_token: put it first even if the tokenizer's own post-processor does not.
    """

    def __init__(
        self, backend: tokenizers.Tokenizer, bos_token: str | None = None, add_bos_token: bool = False
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self._bos_token = bos_token
        self._bos_id = None if bos_token is None else backend.token_to_id(bos_token)
        self._add_bos_token = add_bos_token
        longest_token = max((len(token.encode()) for token in backend.get_vocab()), default=1)
        self._max_bytes_per_token = longest_token * (NORMALIZER_SHRINKAGE if backend.normalizer else 1)

    @classmethod
    def from_directory(cls, directory: Path) -> Tokenizer:
        """Load the tokenizer of a checkpoint directory.

        Raises:
            CheckpointError: tokenizer.json is missing or damaged, or tokenizer_config.json is.
        """
        path = directory / "tokenizer.json"
        if not path.is_file():
            raise CheckpointError(
                f"{path} is missing; Quire reads the tokenizer from it: save a fast one beside the weights"
            )
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise CheckpointError(f"{path} cannot be read as a tokenizer: {error}") from None
        options = _read_options(directory / "tokenizer_config.json")
        return cls(backend, options.bos_text, add_bos_token=bool(options.add_bos_token))

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt, special tokens included, the beginning-of-sequence token at most once.

        Lets other threads run meanwhile: of the library's calls only the batched ones release the GIL.
        """
        ids: list[int] = self.backend.encode_batch_fast([text])[0].ids
        if self._bos_id is None or self._bos_token is None:
            return ids
        if text.startswith(self._bos_token) and ids[:2] == [self._bos_id, self._bos_id]:
            return ids[1:]
        if self._add_bos_token and ids[:1] != [self._bos_id]:
            return [self._bos_id, *ids]
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids` without special tokens; bytes that are no valid UTF-8 become U+FFFD."""
        return self.backend.decode(ids, skip_special_tokens=True)

    def max_text_bytes(self, num_tokens: int) -> int:
        """Bytes of UTF-8 that `num_tokens` tokens can stand for at most.

        A bound that costs nothing: text beyond it need not be tokenised to know that it is too long. Tokens
        that swallow white space around them or any run of unknown characters are left out of account.
        """
        return self._max_bytes_per_token * num_tokens


class _SpecialToken(msgspec.Struct):
    """A special token as newer checkpoints write it."""

    content: str


class _Options(msgspec.Struct):
    """The fields of tokenizer_config.json that matter here."""

    bos_token: str | _SpecialToken | None = None
    add_bos_token: bool | None = None

    @property
    def bos_text(self) -> str | None:
        """Text of the beginning-of-sequence token."""
        return self.bos_token.content if isinstance(self.bos_token, _SpecialToken) else self.bos_token


def _read_options(path: Path) -> _Options:
    """Contents of tokenizer_config.json; nothing set where there is no such file."""
    if not path.is_file():
        return _Options()
    try:
        return msgspec.json.decode(path.read_bytes(), type=_Options)
    except (OSError, msgspec.DecodeError) as error:
        raise CheckpointError(f"{path} cannot be used: {error}") from None
