"""Stories: a plot or a string of beats between an opening and an ending, fables, and tales in chapters."""

from __future__ import annotations

from storyteller.cast import bind
from storyteller.grammar import Writer

# What a chapter keeps of the one before it: the persons. Places and things are drawn again.
_LASTING = {"hero", "friend", "elder", "hero2"} | {
    word + number for word in ("he", "him", "his", "himself") for number in ("", "2", "3", "4", "6")
}


def story(writer: Writer) -> str:
    """A short story of one plot, sometimes with a title."""
    bind(writer)
    title, body = _episode(writer, "oneday")
    opening = writer.write("<opening>") + writer.rng.choice((" ", "\n\n"))
    return _titled(writer, title, opening + body + _ending(writer))


def fable(writer: Writer) -> str:
    """A story about animals that ends in a thought."""
    bind(writer)
    title, body = _split(str(writer.draw("fable")))
    writer.bound["oneday"] = str(writer.draw("oneday"))
    return _titled(writer, writer.write(title), writer.write(body))


def tale(writer: Writer) -> str:
    """A longer tale: three to eight chapters with the same persons."""
    bind(writer)
    chapters: list[str] = []
    last = writer.rng.randint(3, 8)
    for number in range(last):
        _forget(writer)
        title, body = _episode(writer, "nextday" if number else "oneday")
        heading = writer.write(f"Chapter {writer.lexicon.lists['chapterword'][number]}: {title}")
        lead = writer.write("<opening>") + "\n\n" if number == 0 else ""
        close = _ending(writer) if number == last - 1 else " " + writer.write("<night>")
        chapters.append(f"{heading}\n\n{lead}{body}{close}")
    return "\n\n".join(chapters)


def _episode(writer: Writer, day: str) -> tuple[str, str]:
    """Title and text of a plot, or of a journey put together from beats; ``day`` names how it begins."""
    writer.bound["oneday"] = str(writer.draw(day))
    if writer.rng.random() < 0.55:
        title, body = _split(str(writer.draw("plot")))
        return writer.write(title), writer.write(body)
    return _journey(writer)


def _journey(writer: Writer) -> tuple[str, str]:
    """A wish, the way, what came between, and the way back."""
    rng = writer.rng
    setting_out = " ".join(["<want>"] + ["<ready>"] * rng.randint(1, 2))
    middle = [" ".join(["<way>"] * rng.randint(1, 2)) + rng.choice((" <aside>", ""))]
    middle += ["<trouble>" + rng.choice((" <aside>", " <way>", "")) for _ in range(rng.randint(1, 2))]
    arrival = "<there>" + rng.choice((" <back>", " <back> <back>", ""))
    title = writer.write("[The Journey|A Long Way|{hero} Sets Out|To the {place2.name}|What {hero} Found]")
    return title, writer.write("\n\n".join([setting_out, *middle, arrival]))


def _ending(writer: Writer) -> str:
    return writer.rng.choice((" ", "\n\n")) + writer.write("<ending>") if writer.rng.random() < 0.7 else ""


def _titled(writer: Writer, title: str, text: str) -> str:
    return f"{title}\n\n{text}" if writer.rng.random() < 0.25 else text


def _split(template: str) -> tuple[str, str]:
    """Title and body of a plot."""
    title, _, body = template.partition("\n")
    return title.removeprefix("# "), body


def _forget(writer: Writer) -> None:
    writer.bound = {name: value for name, value in writer.bound.items() if name in _LASTING}
