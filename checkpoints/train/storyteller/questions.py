"""Questions with their answers, and the same facts as plain sentences."""

from __future__ import annotations

from storyteller.grammar import Writer
from storyteller.lexicon import Row

_FORMS = ("Question: {}\nAnswer: {}", "Question: {}\nAnswer: {}", "Q: {}\nA: {}", "User: {}\nAssistant: {}")


def questions(writer: Writer) -> str:
    """One to six questions, each with an answer, short or as a whole sentence."""
    form = writer.rng.choice(_FORMS)
    short = writer.rng.random() < 0.3
    pairs: list[str] = []
    for _ in range(writer.rng.choice((1, 1, 2, 3, 4, 6))):
        fact = _fact(writer)
        answer = fact["short"] if short else fact["whole"]
        pairs.append(form.format(fact["question"], answer))
    return "\n\n".join(pairs)


def statements(writer: Writer) -> str:
    """Two to seven facts, one sentence each."""
    divider = writer.rng.choice((" ", "\n"))
    return divider.join(_fact(writer)["whole"] for _ in range(writer.rng.randint(2, 7)))


def _fact(writer: Writer) -> Row:
    """A question and its answers, all about the same drawn names."""
    row = writer.draw("facts" if writer.rng.random() < 0.4 else "questions")
    assert isinstance(row, dict)
    writer.bound.clear()
    return {column: writer.write(template) for column, template in row.items()}
