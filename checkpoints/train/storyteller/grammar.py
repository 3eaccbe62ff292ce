"""Turns a template into text: choices, names that stay the same through a text, and English spelling.

A template is text with three marks. ``[a|b|c]`` takes one of the choices, which may hold further marks.
``{name}`` draws from the list or table of that name once per text and repeats itself afterwards;
``{name2}`` is another draw from the same list; ``{name.column}`` is a cell of a table's row. ``<name>`` draws
anew each time and avoids what the text has used. Before a name may stand ``a`` (an article), ``pl`` (the
plural) or ``low`` (a small first letter); a name written with a capital gives a capital. What is drawn may be
a template itself.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from functools import cache

from storyteller.lexicon import Lexicon, Row

_MARK = re.compile(r"([\[\]|]|\{[^{}]*\}|<[^<> ]+>)")
_SENTENCE_START = re.compile(r"((?:^|[.!?]\s+|\.\"\s+|\n)\"?)([a-z])")
_ARTICLE = re.compile(r"\b([Aa])n? (?=([A-Za-z]+))")
_IRREGULAR = {
    "mouse": "mice", "wolf": "wolves", "sheep": "sheep", "deer": "deer", "fish": "fish", "goose": "geese",
    "potato": "potatoes", "tomato": "tomatoes", "mango": "mangoes", "postman": "postmen",
    "fisherman": "fishermen",
}  # fmt: skip


@dataclass(frozen=True)
class Draw:
    """A name to be filled in: ``modifier`` is "", "a", "pl" or "low"; ``fresh`` draws anew each time."""

    name: str
    column: str
    modifier: str
    capital: bool
    fresh: bool


@dataclass(frozen=True)
class Choice:
    """One of several sequences."""

    options: tuple[Sequence, ...]


Sequence = tuple[str | Draw | Choice, ...]


@cache
def parse(template: str) -> Sequence:
    """Read a template; raises ``ValueError`` where brackets do not match."""
    tokens = [token for token in _MARK.split(template) if token]
    sequence, position = _sequence(tokens, 0, inside=False)
    if position != len(tokens):
        raise ValueError(f"a bracket too many: {template!r}")
    return sequence


def _sequence(tokens: list[str], position: int, inside: bool) -> tuple[Sequence, int]:
    parts: list[str | Draw | Choice] = []
    while position < len(tokens):
        token = tokens[position]
        if inside and token in "|]":
            break
        if token == "[":
            choice, position = _choice(tokens, position + 1)
            parts.append(choice)
            continue
        parts.append(_draw(token) if len(token) > 1 and token[0] in "{<" else token)
        position += 1
    return tuple(parts), position


def _choice(tokens: list[str], position: int) -> tuple[Choice, int]:
    options: list[Sequence] = []
    while True:
        option, position = _sequence(tokens, position, inside=True)
        options.append(option)
        if position >= len(tokens):
            raise ValueError(f"a bracket that is never closed: {''.join(tokens)!r}")
        position += 1
        if tokens[position - 1] == "]":
            return Choice(tuple(options)), position


def _draw(token: str) -> Draw:
    modifier, _, path = token[1:-1].rpartition(" ")
    name, _, column = path.partition(".")
    capital = name[0].isupper() or modifier[:1].isupper()
    return Draw(name.lower(), column, modifier.lower(), capital, fresh=token[0] == "<")


class Writer:
    """Writes one text: remembers which names are taken and what was drawn."""

    def __init__(self, lexicon: Lexicon, rng: random.Random) -> None:
        self.lexicon = lexicon
        self.rng = rng
        self.bound: dict[str, str | Row] = {}
        self.taken: dict[str, set[str]] = {}

    def write(self, template: str) -> str:
        """Text of a template, spelled as English is."""
        return spell(self.expand(parse(template)))

    def expand(self, sequence: Sequence) -> str:
        """Text of a parsed template, before spelling."""
        parts: list[str] = []
        for part in sequence:
            if isinstance(part, Choice):
                parts.append(self.expand(part.options[self._index(len(part.options))]))
            elif isinstance(part, Draw):
                parts.append(self._fill(part))
            else:
                parts.append(part)
        return "".join(parts)

    def draw(self, name: str) -> str | Row:
        """An entry of a list or table that this text has not used yet, if there is one."""
        taken = self.taken.setdefault(name, set())
        entries: list[str] | list[Row] = self.lexicon.lists.get(name) or self.lexicon.tables[name]
        for _ in range(8):
            entry = entries[self._index(len(entries))]
            key = entry if isinstance(entry, str) else next(iter(entry.values()))
            if key not in taken:
                break
        taken.add(key)
        return entry

    def _index(self, count: int) -> int:
        """A random index that favours the first ones: a model of the text then has a clear first choice."""
        return int(count * self.rng.random() ** 1.6)

    def _fill(self, draw: Draw) -> str:
        if draw.fresh:
            value = self.draw(draw.name)
        elif draw.name in self.bound:
            value = self.bound[draw.name]
        else:
            value = self.draw(draw.name.rstrip("0123456789"))
            self.bound[draw.name] = value
        text = value if isinstance(value, str) else self._cell(value, draw.column)
        if "{" in text or "[" in text or "<" in text:
            text = self.expand(parse(text))
            if not draw.fresh and isinstance(value, str):
                self.bound[draw.name] = text
        return _modify(text, draw)

    def _cell(self, row: Row, column: str) -> str:
        if column:
            cells = row[column].split("/")
            return cells[self._index(len(cells))]
        first = next(iter(row))
        text = row[first]
        if "again" in row:
            row[first] = row["again"]
        return text


def _modify(text: str, draw: Draw) -> str:
    if draw.modifier == "a":
        text = "a " + text
    elif draw.modifier == "pl":
        text = plural(text)
    elif draw.modifier == "low":
        text = text[:1].lower() + text[1:]
    return text[:1].upper() + text[1:] if draw.capital else text


def plural(noun: str) -> str:
    """The plural of an English noun as far as the word lists need it."""
    if noun in _IRREGULAR:
        return _IRREGULAR[noun]
    if noun.endswith(("s", "x", "ch", "sh")):
        return noun + "es"
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + "s"


def spell(text: str) -> str:
    """Capitals at the start of sentences, and ``a`` or ``an`` by the word that follows."""
    text = _ARTICLE.sub(_article, text)
    return _SENTENCE_START.sub(lambda match: match.group(1) + match.group(2).upper(), text)


def _article(match: re.Match[str]) -> str:
    article, word = match.group(1), match.group(2).lower()
    vowel = word[0] in "aeiou" and not word.startswith(("uni", "use", "one", "eu"))
    return f"{article}n " if vowel or word == "hour" else f"{article} "
