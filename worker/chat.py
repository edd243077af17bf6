"""Render chat messages with a tokenizer's template: whole, or as the continuation of tokens that exist already."""

from collections.abc import Sequence
from typing import Any, TypedDict

import jinja2

from cache_store.errors import InvalidRequest
from worker.pieces import Encoded, encode_pieces

_SENTINEL = "rekindle-5bd1e995"
_EARLIER = ({"role": "user", "content": "hello"}, {"role": "assistant", "content": _SENTINEL})


class ChatMessage(TypedDict):
    role: str
    content: str


def start_chat(tokenizer: Any, messages: Sequence[ChatMessage], inserts: Sequence[str]) -> Encoded:
    """Tokens of a conversation's first messages, and where the parts `inserts` of them are. Raises InvalidRequest."""
    _check(tokenizer, messages)
    return encode_pieces(tokenizer, _render(tokenizer, messages, add_generation_prompt=True), inserts)


def continue_chat(
    tokenizer: Any, messages: Sequence[ChatMessage], history: Sequence[int], inserts: Sequence[str]
) -> Encoded:
    """Tokens of messages that follow a reply, and of nothing before them: `history` stays as it is, token for token.

    The template renders the messages after a made-up exchange, and what comes after its reply is the continuation.
    Raises InvalidRequest, also for templates that write an earlier exchange differently once another follows.
    """
    _check(tokenizer, messages)
    ending = _after_reply(_render(tokenizer, _EARLIER, add_generation_prompt=False))
    continuation = _after_reply(_render(tokenizer, (*_EARLIER, *messages), add_generation_prompt=True))
    if not continuation.startswith(ending):
        raise InvalidRequest("chat", "the model's chat template can't continue a conversation: send text or tokens")
    last = tokenizer.convert_ids_to_tokens(history[-1])
    at = ending.find(last) if history[-1] in tokenizer.all_special_ids or last in tokenizer.get_added_vocab() else -1
    if at < 0:  # the reply was cut short: the template's end of turn is still to come
        return encode_pieces(tokenizer, continuation, inserts)
    # Encoded together with the token that the history ends with, because some tokenizers mark the start of a text.
    token_ids, bounds = encode_pieces(tokenizer, continuation[at:], inserts)
    assert token_ids[0] == history[-1], f"{last!r} was encoded as {token_ids[0]}"
    return Encoded(token_ids[1:], tuple(bound - 1 for bound in bounds))


def _check(tokenizer: Any, messages: Sequence[ChatMessage]) -> None:
    if not messages:
        raise InvalidRequest("chat", "needs at least one message")
    if tokenizer.chat_template is None:
        raise InvalidRequest("chat", "the model has no chat template: send text or tokens")


def _render(tokenizer: Any, messages: Sequence[Any], *, add_generation_prompt: bool) -> str:
    try:
        text: str = tokenizer.apply_chat_template(
            [*messages], tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except (jinja2.TemplateError, ValueError) as error:  # ValueError: several templates and no default
        raise InvalidRequest("chat", f"the model's chat template refuses these messages: {error}") from error
    return text


def _after_reply(rendered: str) -> str:
    before, found, after = rendered.rpartition(_SENTINEL)
    if not found or _SENTINEL in before:
        raise InvalidRequest("chat", "the model's chat template can't continue a conversation: send text or tokens")
    return after
