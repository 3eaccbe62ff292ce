"""What `transformers` generates from the same checkpoint: the yardstick for greedy output.

Batch shapes change rounding, so where the reference's two best logits are closer than `NEAR_TIE`, either
token is right; the comparison goes on with the token that was generated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

NEAR_TIE = 2e-4
MAX_NEAR_TIES = 1 / 5000
"""Share of tokens that may be decided by a near tie."""


@dataclass(frozen=True, slots=True)
class Agreement:
    """How a generated sequence compares with the reference."""

    tokens: int
    near_ties: int
    """Tokens that are the reference's second choice, by less than `NEAR_TIE`."""
    wrong: tuple[int, ...]
    """Output positions of tokens that the reference would not have chosen."""


class Reference:
    """The checkpoint in `transformers`, in float32."""

    def __init__(self, checkpoint: Path) -> None:
        self._tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
        self._model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
        self._model.requires_grad_(False)

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt, special tokens included."""
        return list(self._tokenizer(text)["input_ids"])

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of generated ids, special tokens left out."""
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=True))

    def compare(self, prompt: Sequence[int], generated: Sequence[int]) -> Agreement:
        """Whether each generated token is the greedy choice after what came before it."""
        ids = torch.tensor([[*prompt, *generated]])
        with torch.inference_mode():
            logits = self._model(ids).logits[0, len(prompt) - 1 : -1]
        behind = logits.max(dim=-1).values - logits.gather(1, torch.tensor(generated)[:, None])[:, 0]
        return Agreement(
            tokens=len(generated),
            near_ties=int(((behind > 0) & (behind < NEAR_TIE)).sum()),
            wrong=tuple(torch.nonzero(behind >= NEAR_TIE)[:, 0].tolist()),
        )
