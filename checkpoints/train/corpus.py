"""The text that the small checkpoint is trained on, all of it written by the rules in ``storyteller``.

``document(seed)`` is one text: a story, a tale in chapters, questions and answers, a conversation, a letter,
a recipe, a few sums. The same seed always gives the same text. Run as a program, it prints a few of them:
``python corpus.py [how many]``.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

from storyteller import counting, questions, tales
from storyteller.cast import bind
from storyteller.grammar import Writer
from storyteller.lexicon import Lexicon


def _talk(writer: Writer) -> str:
    """A conversation, letter, recipe, poem or another of the short kinds."""
    bind(writer)
    kinds = ("dialogue", "letter", "diary", "message", "recipe", "report", "about", "poem", "riddle")
    kind = writer.rng.choices(kinds, weights=(30, 10, 8, 10, 8, 8, 20, 4, 2))[0]
    return writer.write(str(writer.draw(kind)))


# Kinds of text and how often each is written. A tale is about six times as long as a story.
_KINDS: tuple[tuple[Callable[[Writer], str], int], ...] = (
    (tales.story, 46),
    (tales.fable, 5),
    (tales.tale, 4),
    (_talk, 24),
    (questions.questions, 11),
    (questions.statements, 4),
    (counting.counting, 2),
    (counting.sums, 2),
    (counting.problem, 2),
)


@cache
def _lexicon() -> Lexicon:
    return Lexicon.load(Path(__file__).parent / "storyteller" / "text")


def document(seed: int) -> str:
    """The text with this number."""
    rng = random.Random(seed)
    kind = rng.choices([kind for kind, _ in _KINDS], weights=[weight for _, weight in _KINDS])[0]
    return kind(Writer(_lexicon(), rng)).strip()


if __name__ == "__main__":
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    print("\n\n----\n\n".join(document(seed) for seed in range(count)))
