"""How one request's tokens are chosen and when it ends: the part of a request that the client sets."""

from __future__ import annotations

import msgspec


class SamplingParams(msgspec.Struct, frozen=True, array_like=True):
    """Sampling parameters of one request, already checked and with every default filled in.

    Names and meanings are vLLM's. The struct travels from frontend to scheduler as it is.
    """

    max_tokens: int = 16
    temperature: float = 1.0
    """0 is greedy."""
    top_k: int = 0
    """Candidates kept, by descending probability; 0 keeps all."""
    top_p: float = 1.0
    min_p: float = 0.0
    """Candidates below `min_p` times the best candidate's probability are dropped."""
    seed: int = 0
    """0 to 2**64 - 1. The frontend draws one for a request that brings none."""
    stop_token_ids: tuple[int, ...] = ()
    """Ids that end the request with `stop`, the end-of-sequence ids of the model among them."""

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature == 0.0
