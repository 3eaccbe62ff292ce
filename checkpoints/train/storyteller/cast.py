"""Who a text is about: names, pronouns and what they are to each other, as slots for the grammar."""

from __future__ import annotations

from storyteller.grammar import Writer
from storyteller.lexicon import Row

_PRONOUNS = {"he": ("he", "him", "his", "himself"), "she": ("she", "her", "her", "herself")}
_CHILDREN = {
    "he": ("boy", "young man", "farm boy", "schoolboy"),
    "she": ("girl", "young woman", "farm girl", "schoolgirl"),
}
_RELATIONS = ("friend", "friend", "best friend", "neighbour", "cousin", "old friend", "good friend")
_YOUNG = ("young", "little", "small", "clever", "quick")
_TALKING = ("fox", "rabbit", "bear", "mouse", "squirrel", "hedgehog", "owl", "frog", "beaver", "cat", "duck")


def bind(writer: Writer) -> None:
    """Fill the slots of the main persons: ``hero``, ``friend``, ``elder``, ``hero2`` and their pronouns."""
    animals = writer.rng.random() < 0.22
    hero = _person(writer, "", animals)
    friend = _person(writer, "2", animals)
    friend["rel"] = f"{writer.bound['his']} {writer.rng.choice(_RELATIONS)}"
    writer.bound["hero"], writer.bound["friend"] = hero, friend
    writer.bound["hero2"] = _person(writer, "6", animals)
    elder = writer.draw("elder")
    assert isinstance(elder, dict)
    name = elder["name"]
    _, _, noun = name.partition(" ")
    writer.bound["elder"] = {"name": name, "again": f"the {noun}"}
    _bind_pronouns(writer, elder["he"], "3")
    _bind_pronouns(writer, writer.rng.choice(("he", "she")), "4")


def _person(writer: Writer, number: str, animal: bool) -> Row:
    rng = writer.rng
    gender = rng.choice(("he", "she"))
    _bind_pronouns(writer, gender, number)
    if animal:
        return {"name": str(writer.draw("petname")), "kind": f"{rng.choice(_YOUNG)} {rng.choice(_TALKING)}"}
    name = str(writer.draw("boy" if gender == "he" else "girl"))
    if rng.random() < 0.3:
        job = writer.draw("job")
        assert isinstance(job, dict)
        return {"name": name, "kind": job["name"]}
    return {"name": name, "kind": rng.choice(_CHILDREN[gender])}


def _bind_pronouns(writer: Writer, gender: str, number: str) -> None:
    for slot, word in zip(("he", "him", "his", "himself"), _PRONOUNS[gender], strict=True):
        writer.bound[slot + number] = word
