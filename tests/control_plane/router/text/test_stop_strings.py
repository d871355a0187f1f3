"""However the text is cut, what a client reads ends at the first stop string, and nothing it read is taken back."""

from collections.abc import Sequence

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from control_plane.router.text.stop_strings import StopMatcher, StopStrings
from engine.base import limits

few_letters = st.text(alphabet="ab", max_size=12)
stop_sets = st.lists(st.text(alphabet="ab", min_size=1, max_size=5), min_size=1, max_size=4)


def reference(text: str, stops: Sequence[str], include: bool) -> tuple[str, str | None]:
    """The match that ends first; of those that end together, the longest."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            match = max(found, key=len)
            return text[: end if include else end - len(match)], match
    return text, None


def read(pieces: Sequence[str], stops: Sequence[str], include: bool = False) -> tuple[list[str], str | None]:
    matcher = StopMatcher(StopStrings(stops), include=include)
    out = []
    for piece in pieces:
        out.append(matcher.push(piece))
        if matcher.matched is not None:
            break
    return [*out, matcher.finish()], matcher.matched


@given(st.lists(few_letters, max_size=8), stop_sets, st.booleans())
@example(["aa", "b"], ["ab", "aab"], False)  # two that end together
@example(["ab", "ab", "b"], ["abb", "b"], True)  # one inside another's beginning
def test_any_cut_of_any_text_reads_as_the_plain_reference(pieces: list[str], stops: list[str], include: bool) -> None:
    out, matched = read(pieces, stops, include)
    assert ("".join(out), matched) == reference("".join(pieces), stops, include)


@given(st.lists(few_letters, max_size=8), stop_sets)
def test_what_is_read_is_final_and_no_more_is_held_than_may_begin_a_stop_string(
    pieces: list[str], stops: list[str]
) -> None:
    matcher = StopMatcher(StopStrings(stops), include=False)
    pushed = sent = ""
    for piece in pieces:
        pushed += piece
        sent += matcher.push(piece)
        if matcher.matched is not None:
            return
        held = pushed[len(sent) :]
        beginnings = {stop[:length] for stop in stops for length in range(1, len(stop))}
        assert pushed.startswith(sent)
        assert held == max((begun for begun in beginnings if pushed.endswith(begun)), key=len, default="")


@given(st.lists(few_letters, min_size=1, max_size=6), stop_sets, st.integers(0, 6))
def test_matches_that_end_unarmed_do_not_count_and_may_have_begun_there(
    pieces: list[str], stops: list[str], unarmed: int
) -> None:
    matcher = StopMatcher(StopStrings(stops), include=False)
    out = ""
    for index, piece in enumerate(pieces):
        out += matcher.push(piece, armed=index >= unarmed)
        if matcher.matched is not None:
            break
    text, skipped = "".join(pieces), len("".join(pieces[:unarmed]))
    ends = [end for end in range(skipped + 1, len(text) + 1) if any(text[:end].endswith(stop) for stop in stops)]
    if not ends:
        assert (out + matcher.finish(), matcher.matched) == (text, None)
        return
    match = max((stop for stop in stops if text[: ends[0]].endswith(stop)), key=len)
    assert matcher.matched == match
    assert out == text[: ends[0] - len(match)]


@pytest.mark.parametrize(
    ("pieces", "out"),
    [
        (["one\n", "\ntwo"], ["one", ""]),
        (["one\n", "two\n", "three"], ["one", "\ntwo", "\nthree"]),
        (["EN", "EN", "D."], ["", "EN", ""]),
    ],
)
def test_held_text_comes_out_as_soon_as_it_is_certain(pieces: list[str], out: list[str]) -> None:
    matcher = StopMatcher(StopStrings(["\n\n", "END"]), include=False)
    assert [matcher.push(piece) for piece in pieces] == out


def test_a_complete_string_that_did_not_count_is_not_held_back() -> None:
    matcher = StopMatcher(StopStrings(["ab", "bcd"]), include=False)
    assert [matcher.push("xab", armed=False), matcher.push("c"), matcher.push("d")] == ["xa", "", ""]
    assert matcher.matched == "bcd"


def test_code_points_are_characters() -> None:
    assert read(["a😀", "e\u0301"], ["😀e"]) == (["a", "", ""], "😀e")


def test_work_and_memory_per_character_are_bounded_in_the_worst_case() -> None:
    """Sixteen strings that all begin alike, and a text that almost matches all of them, again and again."""
    longest = limits.STOP_STRING_CHARACTERS_MAX
    stops = ["a" * (longest - 1 - length) + "b" * (length + 1) for length in range(limits.STOP_STRINGS_MAX)]
    strings = StopStrings(stops)
    assert len(strings) <= sum(map(len, stops)) + 1
    steps = 0
    suffixes = strings.suffixes

    class Counted(list[int]):
        def __getitem__(self, index: object) -> int:  # type: ignore[override]
            nonlocal steps
            steps += 1
            return suffixes[index]  # type: ignore[index]

    strings.suffixes = Counted()
    matcher = StopMatcher(strings, include=False)
    text = ("a" * (longest - 2) + "c") * 20
    for character in text:
        matcher.push(character)
        assert len(matcher._held) < longest
    assert matcher.matched is None
    assert steps <= len(text)  # amortised: as many steps back as there were steps forward
