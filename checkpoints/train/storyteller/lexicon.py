"""The words, tables and templates of the corpus, read from the plain-text files in ``text/``.

Three kinds of file: lists (``name: a, b, c``), tables (``== name: columns`` and rows divided by ``|``), and
templates (``== name`` and one template a line, or several lines divided by ``---``). What a template means is
``grammar``'s business.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

Row = dict[str, str]


@dataclass
class Lexicon:
    """Everything that texts are made of, by name."""

    lists: dict[str, list[str]] = field(default_factory=dict)
    tables: dict[str, list[Row]] = field(default_factory=dict)

    @classmethod
    def load(cls, folder: Path) -> Lexicon:
        """Read the files in ``folder``; raises ``ValueError`` where a row does not fit its columns."""
        lexicon = cls()
        for line in _lines(folder / "words.txt"):
            name, words = line.split(":", 1)
            lexicon.lists[name] = [word.strip() for word in words.split(",")]
        for header, body in _sections(folder / "tables.txt"):
            name, columns = header.split(":")
            keys = [column.strip() for column in columns.split("|")]
            lexicon.tables[name] = [_row(keys, line) for line in body]
        for file in ("rules.txt", "beats.txt"):
            for header, body in _sections(folder / file):
                lexicon.lists[header] = [line for line in body if line]
        for file in ("stories.txt", "talks.txt"):
            for header, body in _sections(folder / file):
                templates = "\n".join(body).split("\n---\n")
                lexicon.lists[header] = [template.strip() for template in templates]
        keys = ["question", "short", "whole"]
        for name in ("facts", "questions"):
            lexicon.tables[name] = [_row(keys, line) for line in _lines(folder / f"{name}.txt")]
        return lexicon


def _lines(path: Path) -> list[str]:
    """Lines of a file without the empty ones and the comment at its head."""
    return [line for line in path.read_text(encoding="utf-8").splitlines() if line and line[:2] != "# "]


def _sections(path: Path) -> list[tuple[str, list[str]]]:
    """The parts of a file that begin with ``== header``."""
    parts = path.read_text(encoding="utf-8").split("\n== ")
    return [(part.split("\n")[0], part.rstrip("\n").split("\n")[1:]) for part in parts[1:]]


def _row(keys: list[str], line: str) -> Row:
    cells = [cell.strip() for cell in line.split(" | ")]
    if len(cells) != len(keys):
        raise ValueError(f"{len(cells)} cells where {len(keys)} belong ({', '.join(keys)}): {line!r}")
    return dict(zip(keys, cells, strict=True))
