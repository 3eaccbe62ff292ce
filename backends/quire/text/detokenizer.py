"""Token ids to text as they come, so that a character is never split and nothing is said twice.

The `tokenizers` library's DecodeStream holds back what may be part of a character; this adds what a stream
of generated text needs around it: the end of the prompt as context, the rest at the end, and a way on when
the bytes turn out to be no text at all.
"""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers.decoders import DecodeStream

from quire.text.tokenizer import Tokenizer

CONTEXT_TOKENS = 6
"""Last ids of the prompt that the first text is decoded with. Decoders look back a token or two: some drop
a leading space at the very start of a text only."""
MAX_HELD_TOKENS = 16
"""When this many tokens have brought no text, they are bytes of no character and are given out as such."""
MAX_UNFINISHED_TOKENS = 3
"""A character has at most 4 bytes and a token at least one, so an unfinished one has at most 3 tokens."""
REPLACEMENT_CHARACTER = "\N{REPLACEMENT CHARACTER}"


class IncrementalDetokenizer:
    """Text of one request's output, delta by delta.

    All deltas and the flush, joined, are what decoding prompt and output in one go adds to the prompt.

    Args:
        tokenizer: of the checkpoint.
        prompt_token_ids: what the output continues; its own text is not given out.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._context: list[int] = []
        self._held: list[int] = []
        self._stream = self._restarted(prompt_token_ids)

    def push(self, token_id: int) -> str:
        """Text that this token completes, empty while it may end within a character."""
        self._held.append(token_id)
        try:
            text: str | None = self._stream.step(self._tokenizer.backend, token_id)
        except Exception:  # DecodeStream raises bare Exception when a token changes text already given out
            return self._give_out(len(self._held))
        if text is not None:
            self._context, self._held = self._held, []
            return text
        if len(self._held) > MAX_HELD_TOKENS:
            return self._give_out(len(self._held) - MAX_UNFINISHED_TOKENS)
        return ""

    def flush(self) -> str:
        """Text of what is still held; an unfinished character becomes U+FFFD."""
        return self._give_out(len(self._held)) if self._held else ""

    def _give_out(self, count: int) -> str:
        """Text of the first `count` held tokens as they are; the others start afresh."""
        given_out, rest = self._held[:count], self._held[count:]
        before = self._tokenizer.decode(self._context)
        whole = self._tokenizer.decode(self._context + given_out)
        text = whole[len(before) :] if whole.startswith(before) else self._tokenizer.decode(given_out)
        self._held = []
        self._stream = self._restarted(self._context + given_out)
        return text + "".join(map(self.push, rest))

    def _restarted(self, token_ids: Sequence[int]) -> DecodeStream:
        """A stream that goes on after `token_ids`."""
        self._context = self._last_whole_characters(token_ids)
        return DecodeStream(ids=self._context, skip_special_tokens=True)

    def _last_whole_characters(self, token_ids: Sequence[int]) -> list[int]:
        """About `CONTEXT_TOKENS` of the last ids, without an unfinished character at the end.

        A few starting points are tried, since one within a character can spoil the whole piece; where the
        ids are no text, there is no context.
        """
        for num_unfinished in range(MAX_UNFINISHED_TOKENS + 1):
            end = len(token_ids) - num_unfinished
            for length in range(CONTEXT_TOKENS, CONTEXT_TOKENS + MAX_UNFINISHED_TOKENS + 1):
                context = list(token_ids[max(end - length, 0) : max(end, 0)])
                if not self._tokenizer.decode(context).endswith(REPLACEMENT_CHARACTER):
                    return context
        return []
