"""Texts about numbers: counting, sums in figures and in words, and small problems."""

from __future__ import annotations

from storyteller.cast import bind
from storyteller.grammar import Writer, spell

_ONES = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)  # fmt: skip
_TENS = ("", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_GROUPS = (
    ("The days of the week are", "Monday Tuesday Wednesday Thursday Friday Saturday Sunday"),
    ("The seasons are", "spring summer autumn winter"),
    ("The months of the year are",
     "January February March April May June July August September October November December"),
    ("The alphabet is", "A B C D E F G H I J K L M N O P Q R S T U V W X Y Z"),
    ("The planets are", "Mercury Venus Earth Mars Jupiter Saturn Uranus Neptune"),
    ("The colours of the rainbow are", "red orange yellow green blue indigo violet"),
)  # fmt: skip


def words(number: int) -> str:
    """A number from 0 to 100 in English words."""
    if number < 20:
        return _ONES[number]
    if number == 100:
        return "one hundred"
    tens, ones = divmod(number, 10)
    return _TENS[tens] + (f"-{_ONES[ones]}" if ones else "")


def counting(writer: Writer) -> str:
    """Counting up, down or in steps, in words or figures, or a list that everybody learns."""
    rng = writer.rng
    if rng.random() < 0.2:
        lead, names = rng.choice(_GROUPS)
        *most, final = names.split()
        return f"{lead} {', '.join(most)} and {final}."
    step = rng.choice((1, 1, 1, 1, 2, 5, 10))
    last = step * rng.randint(5, 100 // step if step > 1 else 40)
    numbers = list(range(step, min(last, 100) + 1, step))
    lead = f"Let us count to {words(numbers[-1])}"
    if rng.random() < 0.25:
        numbers.reverse()
        lead = f"Let us count down from {words(numbers[0])}"
    if step > 1:
        lead += f" in steps of {words(step)}"
    spoken = rng.random() < 0.5
    return f"{lead}: {', '.join(words(n) if spoken else str(n) for n in numbers)}."


def sums(writer: Writer) -> str:
    """A few sums."""
    return "\n".join(_sum(writer) for _ in range(writer.rng.randint(2, 12)))


def _sum(writer: Writer) -> str:
    rng = writer.rng
    a, b = rng.randint(0, 20), rng.randint(0, 12)
    form = rng.randrange(6)
    if form == 0:
        return f"{a} + {b} = {a + b}"
    if form == 1:
        return f"{a + b} - {b} = {a}"
    if form == 2:
        a, b = rng.randint(1, 10), rng.randint(1, 10)
        return f"{a} × {b} = {a * b}"
    if form == 3:
        return spell(f"{words(a)} and {words(b)} make {words(a + b)}.")
    if form == 4:
        return f"Question: What is {a} plus {b}?\nAnswer: {a} plus {b} is {a + b}."
    return f"Question: What is {a + b} minus {b}?\nAnswer: {a + b} minus {b} is {a}."


def problem(writer: Writer) -> str:
    """A little story with a sum in it and its answer."""
    bind(writer)
    rng = writer.rng
    a, b = rng.randint(2, 12), rng.randint(1, 9)
    result = a + b
    middle = "{friend} gives {him} " + words(b) + " more."
    if rng.random() < 0.5:
        a, result = result, a
        middle = "{He} [gives " + words(b) + " to {friend}|eats " + words(b) + " of them]."
    left = words(result) + (" {fruit}." if result == 1 else " {pl fruit}.")
    return writer.write(
        "{hero} has " + words(a) + " {pl fruit}. " + middle + " How many {pl fruit} does {hero} have now?\n"
        "[Answer: {hero} has|{He} has|Now {he} has] " + left
    )
