"""Stop strings: finds the first one in text that comes in pieces, holding back what may begin one.

The result depends on the text alone, not on how it was cut into pieces: the stop string that is complete
first wins and, of several that end at the same character, the longest.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopStringFilter:
    """Passes text on up to the first stop string.

    Args:
        stop_strings: none of them empty; with none at all every text passes at once.
    """

    def __init__(self, stop_strings: Sequence[str]) -> None:
        self._patterns = [_Pattern(text) for text in stop_strings]
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """The text that is now certain to precede any stop string; empty once `stopped`."""
        if self.stopped:
            return ""
        if not self._patterns:
            return text
        start = len(self._held)
        text = self._held + text
        for end in range(start, len(text)):
            longest_hit = 0
            for pattern in self._patterns:
                if pattern.advance(text[end]):
                    longest_hit = max(longest_hit, pattern.length)
            if longest_hit:
                self.stopped, self._held = True, ""
                return text[: end + 1 - longest_hit]
        cut = len(text) - max(pattern.matched for pattern in self._patterns)
        self._held = text[cut:]
        return text[:cut]

    def flush(self) -> str:
        """The text held back, once it is known that nothing follows."""
        text, self._held = self._held, ""
        return text


class _Pattern:
    """Knuth, Morris and Pratt's automaton of one stop string: constant memory, linear time."""

    __slots__ = ("_fallback", "_text", "length", "matched")

    def __init__(self, text: str) -> None:
        self._text = text
        self.length = len(text)
        self.matched = 0
        """Characters of the stop string that the text so far ends with."""
        self._fallback = [0] * len(text)
        """For each length less 1: the longest proper beginning that is also its end."""
        for end in range(1, len(text)):
            shorter = self._fallback[end - 1]
            while shorter and text[shorter] != text[end]:
                shorter = self._fallback[shorter - 1]
            self._fallback[end] = shorter + (text[shorter] == text[end])

    def advance(self, character: str) -> bool:
        """Take one more character of the text; whether the stop string is complete with it."""
        while self.matched and self._text[self.matched] != character:
            self.matched = self._fallback[self.matched - 1]
        if self._text[self.matched] == character:
            self.matched += 1
        return self.matched == self.length
