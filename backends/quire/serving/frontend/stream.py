"""One request's way back: token ids in, responses out.

The channel's thread adds tokens and the end, a sender takes responses; text, stop strings and counting happen
when a response is taken, so tokens that gathered meanwhile leave together. No Triton here.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

from quire.errors import QuireError
from quire.scheduling.request import FinishReason
from quire.serving.frontend.request_parsing import GenerationRequest
from quire.text.detokenizer import IncrementalDetokenizer
from quire.text.stop_strings import StopStringFilter
from quire.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class GenerationResponse:
    """What a request generated since its response before; the last one says why it ended."""

    text: str
    output_ids: list[int]
    """Only generated ids, never the prompt's, whether or not the text begins with the prompt."""
    finish_reason: FinishReason | None = None
    num_input_tokens: int = 0
    """This and `num_output_tokens` are set in the last response only."""
    num_output_tokens: int = 0


class ResponseStream:
    """The responses of one request, in order: any number of deltas, then exactly one final response.

    `take_response` may be called from one thread at a time, everything else from any thread.

    Args:
        request: what was asked for.
        tokenizer: of the checkpoint.
    """

    def __init__(self, request: GenerationRequest, tokenizer: Tokenizer) -> None:
        self._request = request
        self._detokenizer = IncrementalDetokenizer(tokenizer, request.prompt_token_ids)
        self._stop_filter = StopStringFilter(request.stop)
        self._lock = threading.Lock()
        self._arrived: list[int] = []
        self._end: FinishReason | QuireError | None = None
        self._text = request.echo
        self._token_ids: list[int] = []
        self._num_output_tokens = 0
        self.ended = False
        """Whether the final response has been taken."""
        self._cancelled = False
        self._released = False

    @property
    def waits_for_end(self) -> bool:
        """Whether tokens need no attention before the request's end."""
        return not self._request.stream and not self._request.stop

    @property
    def ended_early(self) -> bool:
        """Whether the request ended while the scheduler may still go on with it."""
        return self.ended and not isinstance(self._end, str)

    def add_token(self, token_id: int) -> None:
        """A token that the scheduler reports."""
        with self._lock:
            self._arrived.append(token_id)

    def finish(self, reason: FinishReason) -> None:
        """The scheduler ended the request with the tokens added so far."""
        with self._lock:
            self._set_end(reason)

    def fail(self, error: QuireError) -> None:
        """The request ends with an error, in place of what it may still have to say."""
        with self._lock:
            self._set_end(error)

    def cancel(self, error: QuireError) -> None:
        """Like `fail`, but there is nothing to send, not even the final response, until `release`.

        In one step: a sender takes what there was to send before, or nothing.
        """
        with self._lock:
            self._cancelled = True
            self._set_end(error)

    def release(self) -> None:
        """From now on nothing is withheld, whether `cancel` came before or comes later."""
        with self._lock:
            self._released = True

    def _set_end(self, end: FinishReason | QuireError) -> None:
        """The first end counts. Called with the lock held."""
        if self._end is None:
            self._end = end

    def take_response(self) -> GenerationResponse | QuireError | None:
        """What there is to send now: a delta, the final response, the final error, or nothing yet."""
        if self.ended:
            return None
        with self._lock:
            if self._cancelled and not self._released:
                return None
            token_ids, self._arrived = self._arrived, []
            end = self._end
        if isinstance(end, QuireError):
            self.ended = True
            return end
        for token_id in token_ids:
            self._absorb(token_id)
            if self._stop_filter.stopped:
                return self._final("stop")
        if end is not None:
            self._text += self._stop_filter.push(self._detokenizer.flush())
            if self._stop_filter.stopped:
                return self._final("stop")
            self._text += self._stop_filter.flush()
            return self._final(end)
        if token_ids and self._request.stream:
            return GenerationResponse(*self._take_delta())
        return None

    def abandon(self, error: QuireError) -> QuireError:
        """End at once with `error`, whatever was still to come."""
        self.ended = True
        self._end = error
        return error

    def _absorb(self, token_id: int) -> None:
        """Count a token and turn it into text; the token that ends a text has none."""
        self._token_ids.append(token_id)
        self._num_output_tokens += 1
        if token_id not in self._request.sampling_params.stop_token_ids:
            self._text += self._stop_filter.push(self._detokenizer.push(token_id))

    def _take_delta(self) -> tuple[str, list[int]]:
        delta = self._text, self._token_ids
        self._text, self._token_ids = "", []
        return delta

    def _final(self, reason: FinishReason) -> GenerationResponse:
        self.ended = True
        return GenerationResponse(
            *self._take_delta(),
            finish_reason=reason,
            num_input_tokens=len(self._request.prompt_token_ids),
            num_output_tokens=self._num_output_tokens,
        )
