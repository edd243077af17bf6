"""Text in and out: encoding, chat continuations, incremental detokenization, stop strings."""

from functools import cache
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from cache_store.errors import InvalidRequest
from worker.chat import ChatMessage
from worker.model.presets_tokenizer import BOS_TOKEN_ID, EOS_TOKEN_ID, MIN_VOCAB_SIZE, byte_tokenizer
from worker.stop_strings import StopStrings
from worker.text import TextCodec, load_tokenizer

LLAMA_2_TEMPLATE = """\
{%- for message in messages -%}
    {%- if (message.role == "user") != (loop.index0 % 2 == 0) -%}{{ raise_exception("roles must alternate") }}{%- endif -%}
    {%- if message.role == "user" -%}{{ bos_token + "[INST] " + message.content + " [/INST]" }}
    {%- else -%}{{ " " + message.content + " " + eos_token }}{%- endif -%}
{%- endfor -%}"""  # noqa: E501


def llama_style_tokenizer() -> PreTrainedTokenizerFast:
    """Pieces with a marker for spaces, unknown characters as bytes, as sentencepiece makes them: Llama 2's decoder."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", *map(chr, range(33, 127)), "▁h", "▁hi", "▁w", "▁wo", "é"]
    merges = [("▁", "h"), ("▁h", "i"), ("▁", "w"), ("▁w", "o")]
    vocab = {piece: token_id for token_id, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in pieces[:3]])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        chat_template=LLAMA_2_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


BYTES = TextCodec(byte_tokenizer(1000))
LLAMA = TextCodec(llama_style_tokenizer())
CODECS = pytest.mark.parametrize("codec", [BYTES, LLAMA], ids=["bytes", "llama"])
unicode_text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd"))


def in_pieces(data: st.DataObject, items: Any) -> list[Any]:
    """Cut a sequence at random places."""
    cuts = sorted(data.draw(st.sets(st.integers(0, len(items)), max_size=len(items) + 1)) | {0, len(items)})
    return [items[start:end] for start, end in pairwise(cuts)]


@CODECS
def test_a_long_run_of_bytes_that_ends_within_a_character_is_held_to_the_last_whole_one(codec: TextCodec) -> None:
    token_ids = codec.encode("0" + "\U00010000" * 12, is_first=False)
    detokenizer = codec.detokenizer()
    assert not any("\ufffd" in detokenizer.push(piece) for piece in (token_ids[:-2], token_ids[-2:]))


@CODECS
@settings(deadline=None)
@given(text=unicode_text, data=st.data())
def test_pieces_add_up_to_the_text_and_hold_no_broken_character(
    codec: TextCodec, text: str, data: st.DataObject
) -> None:
    prompt, token_ids = codec.encode("hi", is_first=True), codec.encode(text, is_first=False)
    detokenizer = codec.detokenizer(prompt)
    pieces = [detokenizer.push(piece) for piece in in_pieces(data, token_ids)]
    assert detokenizer.flush() == ""
    assert not any("\ufffd" in piece for piece in pieces)
    assert codec.decode(prompt) + "".join(pieces) == codec.decode([*prompt, *token_ids])


@settings(deadline=None)
@given(raw=st.binary(max_size=80), data=st.data())
def test_broken_bytes_come_out_as_decoding_them_at_once_would_show_them(raw: bytes, data: st.DataObject) -> None:
    token_ids = [byte_ids()[byte] for byte in raw]
    detokenizer = BYTES.detokenizer()
    pieces = [detokenizer.push(piece) for piece in in_pieces(data, token_ids)]
    assert "".join(pieces) + detokenizer.flush() == raw.decode(errors="replace")


@cache
def byte_ids() -> list[int]:
    """The byte tokenizer's token of each byte, found from characters that contain it."""
    found: dict[int, int] = {}
    for character in [*map(chr, range(0x800)), *(chr(c << 6) for c in range(0x20, 0x4400) if not 0x360 <= c < 0x380)]:
        found.update(zip(character.encode(), BYTES.encode(character, is_first=False), strict=True))
    rest = iter(sorted(set(range(5, MIN_VOCAB_SIZE)) - set(found.values())))  # bytes that UTF-8 never uses
    return [found[byte] if byte in found else next(rest) for byte in range(256)]


def test_an_emoji_shows_with_its_last_byte_and_not_before() -> None:
    detokenizer = BYTES.detokenizer()
    pieces = [detokenizer.push([token_id]) for token_id in BYTES.encode("a👩b", is_first=False)]
    assert pieces == ["a", "", "", "", "👩", "b"]


def test_half_a_character_at_the_end_shows_as_the_replacement_character() -> None:
    detokenizer = BYTES.detokenizer()
    assert detokenizer.push(BYTES.encode("x👩", is_first=False)[:-1]) == "x"
    assert detokenizer.flush() == "\ufffd"
    assert detokenizer.flush() == ""


@CODECS
def test_a_run_of_nothing_but_broken_bytes_is_not_held_for_ever(codec: TextCodec) -> None:
    detokenizer = codec.detokenizer(codec.encode("hi", is_first=True))
    continuation_byte = codec.encode("👩", is_first=False)[-1]
    assert "".join(detokenizer.push([continuation_byte]) for _ in range(200)).count("\ufffd") > 100


def test_special_tokens_show_nothing_and_words_keep_their_spaces() -> None:
    hi, wo = LLAMA.encode("hi wo", is_first=False)
    after_text = LLAMA.detokenizer([1, hi])
    assert [after_text.push([token_id]) for token_id in (wo, 2, hi, wo)] == [" wo", "", " hi", " wo"]
    at_start = LLAMA.detokenizer([1])
    assert [at_start.push([token_id]) for token_id in (hi, wo)] == ["hi", " wo"]


def test_only_the_first_text_of_a_conversation_gets_the_models_first_token() -> None:
    assert BYTES.encode("a", is_first=True)[0] == BOS_TOKEN_ID
    assert BYTES.encode("a", is_first=True)[1:] == BYTES.encode("a", is_first=False)


def test_all_ids_of_a_preset_decode_and_too_small_a_vocabulary_is_refused() -> None:
    codec = load_tokenizer("preset:tiny", 7000)
    assert codec.vocab_size == 7000
    assert codec.decode([6999]).startswith(" ")
    assert len({codec.decode([token_id]) for token_id in range(MIN_VOCAB_SIZE, 7000)}) == 7000 - MIN_VOCAB_SIZE
    with pytest.raises(ValueError, match="at least 261"):
        byte_tokenizer(260)


# Chat


def user(content: str) -> ChatMessage:
    return {"role": "user", "content": content}


@CODECS
def test_a_first_chat_is_what_the_template_gives(codec: TextCodec) -> None:
    expected = codec._tokenizer.apply_chat_template([user("hi")], add_generation_prompt=True)["input_ids"]
    assert codec.encode_chat([user("hi")], ()).token_ids == tuple(expected)


@CODECS
def test_a_continued_chat_has_the_tokens_of_the_whole_chat_rendered_at_once(codec: TextCodec) -> None:
    """Where encoding is context-free, turn by turn is the same as all at once."""
    turns: list[ChatMessage] = [user("hi"), {"role": "assistant", "content": "wo"}, user("wo")]
    history = codec.encode_chat(turns[:1], ()).token_ids
    whole = codec._tokenizer.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
    eos = codec._tokenizer.eos_token_id
    reply = whole[len(history) : whole.index(eos, len(history)) + 1]
    assert [*history, *reply, *codec.encode_chat(turns[2:], [*history, *reply]).token_ids] == whole


@CODECS
@given(data=st.data())
def test_parts_that_are_known_have_the_tokens_that_they_have_by_themselves(
    codec: TextCodec, data: st.DataObject
) -> None:
    words = st.sampled_from(["hi ", "wo", " é", "x\n", "👩"])
    parts = [f"<p{number}>{data.draw(words)}</p>" for number in range(data.draw(st.integers(0, 3)))]
    between = [data.draw(words) for _ in range(len(parts) + 1)]
    text = between[0] + "".join(part + after for part, after in zip(parts, between[1:], strict=True))
    history = [*codec.encode_chat([user("hi")], ()).token_ids] if data.draw(st.booleans()) else []
    for encoded in (
        codec.encode_input(text, parts, is_first=not history),
        codec.encode_chat([user(text)], history, parts),
    ):
        pairs = list(zip(encoded.insert_bounds[0::2], encoded.insert_bounds[1::2], strict=True))
        assert [encoded.token_ids[start:end] for start, end in pairs] == [
            codec.encode(part, is_first=False) for part in parts
        ]
    plain = codec.encode_input(text, [], is_first=not history)
    assert plain == (codec.encode(text, is_first=not history), ())


def test_a_part_that_a_template_changes_is_only_text() -> None:
    codec = TextCodec(byte_tokenizer(300))
    codec._tokenizer.chat_template = "{% for m in messages %}{{ m.content | upper }}{% endfor %}"
    assert codec.encode_input("a", ["", "b"], is_first=False) == (codec.encode("a", is_first=False), ())
    assert codec.encode_chat([user("a <p>b</p>")], (), ["<p>b</p>"]) == (codec.encode("A <P>B</P>", is_first=False), ())


@CODECS
def test_a_reply_that_was_cut_short_gets_its_end_of_turn(codec: TextCodec) -> None:
    history = [*codec.encode_chat([user("hi")], ()).token_ids, *codec.encode("wo", is_first=False)]
    eos = codec._tokenizer.eos_token_id
    cut = codec.encode_chat([user("wo")], history).token_ids
    assert cut.count(eos) == 1 + (codec is BYTES)  # the byte template also ends user turns with it
    ended = codec.encode_chat([user("wo")], [*history, eos]).token_ids
    assert ended.count(eos) == cut.count(eos) - 1
    assert cut[cut.index(eos) + 1 :] == ended


def test_a_template_that_closes_the_last_reply_differently_once_more_follows_is_served() -> None:
    """As Qwen3's, which shows an empty thought in the last reply only."""
    codec = TextCodec(byte_tokenizer(300))
    codec._tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|>{% if loop.last and m.role == 'assistant' %}<think></think>{% endif %}"
        "{{ m.content }}<|end|>\n{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    history = codec.encode_chat([user("a")], ()).token_ids
    continuation = codec.encode_chat([user("b")], [*history, EOS_TOKEN_ID])
    assert codec._tokenizer.decode(list(continuation.token_ids)) == "\n<|user|>b<|end|>\n<|assistant|>"


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        (None, "has no chat template"),
        ("{% for m in messages %}{{ m.content | upper }}{% endfor %}", "can't continue"),
        ("{{ messages[-1].content }}", "can't continue"),
        ("{% for m in messages %}{{ m.content }}{{ '!' if loop.last else '?' }}{% endfor %}", "can't continue"),
        ("{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}", "can't continue"),
        ("{% if messages[2] %}{{ raise_exception('too many') }}{% endif %}{{ messages[1].content }}", "too many"),
    ],
)
def test_a_template_that_cannot_continue_is_refused_with_the_reason(template: str | None, problem: str) -> None:
    codec = TextCodec(byte_tokenizer(300))
    codec._tokenizer.chat_template = template
    with pytest.raises(InvalidRequest, match=problem) as caught:
        codec.encode_chat([user("a")], [5, 6])
    assert caught.value.field == "chat"


@CODECS
@pytest.mark.parametrize("messages", [[], [{"role": "wizard", "content": "a"}]])
def test_messages_that_the_template_refuses_are_refused_by_name(codec: TextCodec, messages: list[ChatMessage]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        codec.encode_chat(messages, ())
    assert caught.value.field == "chat"


# Stop strings


def shown_of(stops: list[str], pieces: list[str]) -> tuple[str, str | None]:
    """What a client would see."""
    cutter, shown = StopStrings(stops), ""
    for piece in pieces:
        text, matched = cutter.push(piece)
        shown += text
        if matched is not None:
            return shown, matched
    return shown + cutter.flush(), None


@given(
    text=st.text("ab\u00e9", max_size=30), stops=st.lists(st.text("ab\u00e9", min_size=1, max_size=5)), data=st.data()
)
def test_a_reply_ends_before_the_first_stop_string_however_it_is_cut(
    text: str, stops: list[str], data: st.DataObject
) -> None:
    ends = sorted((text.find(stop) + len(stop), text.find(stop), stop) for stop in stops if stop in text)
    expected = (text[: ends[0][1]], ends[0][2]) if ends else (text, None)
    assert shown_of(stops, in_pieces(data, text)) == expected
    assert shown_of(stops, list(text)) == expected


@given(text=st.text("ab", max_size=20), stop=st.text("ab", min_size=2, max_size=4))
def test_text_is_held_back_only_while_it_may_become_a_stop_string(text: str, stop: str) -> None:
    cutter, shown = StopStrings([stop]), ""
    for number, character in enumerate(text, start=1):
        piece, matched = cutter.push(character)
        shown += piece
        if matched:
            return
        held = text[len(shown) : number]
        assert stop.startswith(held)
        assert not any(stop.startswith(text[start:number]) for start in range(len(shown)))


def test_without_stop_strings_nothing_is_held_back() -> None:
    assert StopStrings([]).push("abc") == ("abc", None)
