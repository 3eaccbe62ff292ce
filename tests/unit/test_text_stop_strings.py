"""Stop strings: the first one complete ends the text, however the text was cut into pieces."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import example, given, settings
from hypothesis import strategies as st

from quire.text.stop_strings import StopStringFilter

LETTERS = "ab"
texts = st.text(LETTERS, min_size=4, max_size=30)
stop_lists = st.lists(st.text(LETTERS, min_size=1, max_size=5), min_size=1, max_size=3)


def cut_at_first_stop(text: str, stop_strings: list[str]) -> tuple[str, bool]:
    """The rule, spelled out: earliest end wins, then the longest."""
    for end in range(1, len(text) + 1):
        complete = [len(stop) for stop in stop_strings if text[:end].endswith(stop)]
        if complete:
            return text[: end - max(complete)], True
    return text, False


def may_begin_a_stop(text: str, stop_strings: list[str]) -> bool:
    return any(stop.startswith(text) for stop in stop_strings)


@settings(max_examples=400)
@example(text="ab", stop_strings=["ab", "b"], cuts=[1])
@example(text="ab", stop_strings=["b", "ab"], cuts=[])
@given(text=texts, stop_strings=stop_lists, cuts=st.lists(st.integers(0, 40)))
def test_the_result_is_that_of_the_whole_text_however_it_is_cut(
    text: str, stop_strings: list[str], cuts: list[int]
) -> None:
    places = sorted({0, len(text), *(min(cut, len(text)) for cut in cuts)})
    stop_filter = StopStringFilter(stop_strings)
    passed = "".join(stop_filter.push(text[start:end]) for start, end in pairwise(places))
    assert (passed + stop_filter.flush(), stop_filter.stopped) == cut_at_first_stop(text, stop_strings)


@settings(max_examples=400)
@given(text=texts, stop_strings=stop_lists)
def test_only_text_that_may_begin_a_stop_string_is_held_back(text: str, stop_strings: list[str]) -> None:
    stop_filter = StopStringFilter(stop_strings)
    passed = stop_filter.push(text)
    if stop_filter.stopped:
        return
    held = text[len(passed) :]
    assert text == passed + held
    longer = [text[start:] for start in range(len(passed))]
    assert not held or may_begin_a_stop(held, stop_strings)
    assert not any(may_begin_a_stop(beginning, stop_strings) for beginning in longer)


def test_nothing_passes_after_a_stop_string() -> None:
    stop_filter = StopStringFilter(["END"])
    assert stop_filter.push("one END two") == "one "
    assert stop_filter.push(" three") == ""
    assert stop_filter.flush() == ""


def test_a_beginning_that_comes_to_nothing_is_passed_on() -> None:
    stop_filter = StopStringFilter(["</answer>"])
    assert stop_filter.push("x </ans") == "x "
    assert stop_filter.push("is no tag") == "</ansis no tag"
