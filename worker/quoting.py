"""Text of somebody else's that is put inside a message: it may say anything, and must not end the message.

Broken up is what the tokenizer takes for a token of its own making (`<|im_end|>`), and what the chat template writes
between messages (`[/INST]`): by a space behind the first character, so that a reader still sees what was there.
"""

import re
from typing import Any, NamedTuple

import jinja2

_SENTINELS = ("rekindle-0c7d1f", "rekindle-41be93", "rekindle-e2075a")
_ROUNDS = 8


class Quoted(NamedTuple):
    text: str
    """Empty where it can't be made harmless."""
    tokens: int


class Quoter:
    """For one tokenizer, of transformers."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        added = {token_id: token.content for token_id, token in tokenizer.added_tokens_decoder.items()}
        controls = {token_id: content for token_id, content in added.items() if _is_marker(content)}
        unknown = {tokenizer.unk_token_id}  # what stands for characters that the tokenizer lacks ends nothing
        self._control_ids = {*controls, *tokenizer.all_special_ids} - unknown
        markers = {*controls.values(), *_between_messages(tokenizer, [*added.values()])}
        longest_first = sorted(markers, key=lambda marker: (-len(marker), marker))
        self._markers = re.compile("|".join(map(re.escape, longest_first))) if markers else None

    def quote(self, text: str) -> Quoted:
        for _ in range(_ROUNDS):  # what is broken up may leave another one behind
            if self._markers is None or not self._markers.search(text):
                break
            text = self._markers.sub(lambda found: f"{found[0][0]} {found[0][1:]}", text)
        token_ids = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if not self._control_ids.isdisjoint(token_ids):  # a tokenizer that normalizes sees more than is written
            return Quoted("", 0)
        return Quoted(text, len(token_ids))


def _is_marker(text: str) -> bool:
    """A word is none: taking it apart would be worse than leaving it."""
    return len(text) > 1 and any(not (character.isalnum() or character.isspace()) for character in text)


def _between_messages(tokenizer: Any, tokens: list[str]) -> set[str]:
    """What the chat template writes between messages, cut at the tokenizer's own tokens."""
    if tokenizer.chat_template is None:
        return set()
    roles = ("user", "assistant", "user")
    messages = [{"role": role, "content": content} for role, content in zip(roles, _SENTINELS, strict=True)]
    try:
        rendered: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except (jinja2.TemplateError, ValueError):  # it renders no chat at all
        return set()
    cuts = sorted({*_SENTINELS, *filter(None, tokens)}, key=len, reverse=True)
    parts = re.split("|".join(map(re.escape, cuts)), rendered)
    return {part.strip() for part in parts if _is_marker(part.strip())}
