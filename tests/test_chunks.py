"""Texts are cut into chunks of tokens: nothing is left out, and sentences and words stay whole where they can."""

import re

from hypothesis import given
from hypothesis import strategies as st

from worker.chunks import cut

texts = st.text(alphabet="ab .\n?\u3002\U0001f600", max_size=200)


def starts_of(text: str) -> list[int]:
    """Tokens of up to three letters, and marks; no token begins with a space."""
    return [match.start() for match in re.finditer(r"\w{1,3}|[^\w\s]", text)]


def pieces(text: str, *, size: int, overlap: int = 0) -> list[str]:
    return [text[span.start : span.end] for span in cut(text, starts_of(text), size=size, overlap=overlap)]


@given(texts, st.integers(1, 20), st.data())
def test_every_character_is_in_a_chunk_and_no_chunk_is_too_large(text: str, size: int, data: st.DataObject) -> None:
    overlap = data.draw(st.integers(0, size // 2))
    starts = starts_of(text)
    spans = cut(text, starts, size=size, overlap=overlap)
    assert bool(spans) == bool(starts)
    if not spans:
        return
    assert (spans[0].start, spans[0].first) == (0, 0)
    assert (spans[-1].end, spans[-1].last) == (len(text), len(starts))
    for span in spans:
        assert 1 <= span.last - span.first <= size
    for earlier, later in zip(spans, spans[1:], strict=False):  # noqa: RUF007
        assert earlier.start < later.start <= earlier.end < later.end
        assert 0 <= earlier.last - later.first <= overlap


def test_a_text_that_fits_is_one_chunk() -> None:
    assert pieces(" One sentence. And one more. ", size=100) == [" One sentence. And one more. "]


def test_a_chunk_ends_with_the_last_sentence_near_its_end() -> None:
    assert pieces("a b c d e f g h. i j k l m n", size=12)[0] == "a b c d e f g h. ", "three tokens before its limit"
    assert pieces("a b c. d e f g h i j k l m n o", size=12)[0] == "a b c. d e f g h i j k ", "that is too far back"


def test_quotes_lines_and_other_scripts_end_sentences_too() -> None:
    assert pieces('a b c d e f "g!" h i j k l', size=11)[0] == 'a b c d e f "g!" '
    assert pieces("a b c d e f g\nh i j k", size=8)[0] == "a b c d e f g\n"
    assert pieces("\u4e00 " * 9 + "\u4e00\u3002\u4e00 \u4e00 \u4e00", size=12)[0] == "\u4e00 " * 9 + "\u4e00\u3002"


def test_without_a_sentence_s_end_a_word_stays_whole() -> None:
    assert pieces("abc def ghi jklmno pqr", size=4) == ["abc def ghi ", "jklmno pqr"]


def test_without_a_word_s_end_a_chunk_is_full() -> None:
    assert pieces("abcdefghijklmno", size=2) == ["abcdef", "ghijkl", "mno"]


def test_what_a_chunk_repeats_begins_with_a_word() -> None:
    text = "aaa bbb cccccc ddd eee fff"
    assert pieces(text, size=6, overlap=2) == ["aaa bbb cccccc ddd eee ", "ddd eee fff"]
    assert pieces(text, size=5, overlap=2) == ["aaa bbb cccccc ddd ", "ddd eee fff"], "not in the middle of cccccc"


def test_tokens_that_begin_with_their_space_are_cut_alike() -> None:
    text = "abc def ghi. jkl mno"
    starts = [match.start() for match in re.finditer(r"\s?\w{1,3}|[^\w\s]", text)]
    assert [text[span.start : span.end] for span in cut(text, starts, size=5, overlap=2)] == [
        "abc def ghi.",
        " ghi. jkl mno",
    ]
