"""Text to tokens and back, by a transformers tokenizer. The only file that knows how tokenizers misbehave."""

from collections.abc import Callable, Sequence
from typing import Any

from transformers import AutoTokenizer

from worker import pieces
from worker.chat import ChatMessage, continue_chat, start_chat
from worker.model.presets_tokenizer import byte_tokenizer
from worker.model.shipped import locate
from worker.pieces import Encoded
from worker.quoting import Quoted, Quoter

_BROKEN = "\ufffd"
_MAX_PENDING = 32
"""Tokens that are held while they may still become a character. Those of one character are at most 4, but some
tokenizers judge a run of bytes only as a whole."""

_CONTEXT = 8
"""Tokens before the reply that say whether its first word has a space before it."""


class Detokenizer:
    """One reply's tokens into text, piece by piece: the pieces together are the text of all tokens together."""

    def __init__(self, decode: Callable[[list[int]], str], context: Sequence[int] = ()) -> None:
        self._decode = decode
        self._window = list(context)  # since the last two places where the text was whole
        self._num_old = len(self._window)
        self._shown = len(decode(self._window).rstrip(_BROKEN)) if context else 0

    def push(self, token_ids: Sequence[int]) -> str:
        """Return the text that is certain now: never half a character."""
        # One at a time: a run of bytes that ends within a character may be whole after any token before.
        return "".join(map(self._push, token_ids))

    def _push(self, token_id: int) -> str:
        self._window.append(token_id)
        text = self._decode(self._window)
        if not text.endswith(_BROKEN):
            return self._show(text)
        if len(self._window) - self._num_old > _MAX_PENDING:
            return self._advance(text[:-1])
        return self._advance(text.rstrip(_BROKEN))

    def flush(self) -> str:
        """The reply ends here: what is left of a character shows as U+FFFD."""
        return self._advance(self._decode(self._window))

    def _advance(self, certain: str) -> str:
        piece = certain[self._shown :]
        self._shown += len(piece)
        return piece

    def _show(self, text: str) -> str:
        piece = self._advance(text)
        if piece:  # without any text (special tokens) the window could not tell whether a space comes next
            del self._window[: self._num_old]
            self._num_old = len(self._window)
            self._shown = len(self._decode(self._window))
        return piece


class TextCodec:
    """A model's tokenizer. Encode from one thread at a time; decode from any."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._quoter = Quoter(tokenizer)
        self.vocab_size = len(tokenizer)
        self.longest_token = max(map(len, tokenizer.get_vocab()))
        """Characters that one token stands for at most (bytes, where the vocabulary is of bytes: no fewer)."""

    def encode(self, text: str, *, is_first: bool) -> tuple[int, ...]:
        """Tokens of a text as it is; with the model's special tokens (BOS) only where a conversation begins."""
        return pieces.encode(self._tokenizer, text, is_first=is_first)

    def encode_input(self, text: str, inserts: Sequence[str], *, is_first: bool) -> Encoded:
        """As `encode`, and where its parts `inserts` are, each with the tokens that it has by itself."""
        return pieces.encode_pieces(self._tokenizer, text, inserts, is_first=is_first)

    def encode_chat(
        self, messages: Sequence[ChatMessage], history: Sequence[int], inserts: Sequence[str] = ()
    ) -> Encoded:
        """Tokens of chat messages and of the reply's beginning, as they follow `history`, and where `inserts` are.

        Raises InvalidRequest("chat") where the template can't render them.
        """
        if history:
            return continue_chat(self._tokenizer, messages, history, inserts)
        return start_chat(self._tokenizer, messages, inserts)

    def quote(self, text: str) -> Quoted:
        """Text of somebody else's as it may stand in a message."""
        return self._quoter.quote(text)

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of whole tokens, without special ones."""
        text: str = self._tokenizer.decode(
            list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text

    def detokenizer(self, prompt: Sequence[int] = ()) -> Detokenizer:
        """For the reply to `prompt`."""
        return Detokenizer(self.decode, prompt[-_CONTEXT:])


def load_tokenizer(model: str, vocab_size: int) -> TextCodec:
    """The tokenizer of a shipped model, a model directory or a hub id; of a preset:NAME the byte tokenizer for
    `vocab_size` ids."""
    if model.startswith("preset:"):
        return TextCodec(byte_tokenizer(vocab_size))
    return TextCodec(AutoTokenizer.from_pretrained(locate(model)))
