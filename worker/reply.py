"""One reply as its client sees it: whole characters, cut before the first stop string. Knows no protobuf."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from worker.calls import Token
from worker.stop_strings import StopStrings


class Detokenizing(Protocol):
    """A worker.text.Detokenizer."""

    def push(self, token_ids: Sequence[int]) -> str: ...
    def flush(self) -> str: ...


class Piece(NamedTuple):
    """What can be sent now. Tokens are sent at once, their text when it is certain."""

    text: str
    tokens: Sequence[Token]


class Reply:
    def __init__(
        self, detokenizer: Detokenizing, stops: Sequence[str], *, begun: Sequence[int] = (), num_sent: int = 0
    ) -> None:
        """`begun` tokens of it, and `num_sent` characters, were sent by another worker: neither is sent again."""
        self._detokenizer = detokenizer
        self._stops = StopStrings(stops) if stops else None
        self._num_sent = num_sent
        self._begun_text = ""
        """Of the tokens that were sent before, what is to be sent with the next piece."""
        self.num_tokens = 0
        """Tokens of the reply: none after the one that completed a stop string."""
        self.stop_string: str | None = None
        """The one that ended the reply, once it has."""

        self._begun_text = self.push([Token(token_id) for token_id in begun]).text

    def push(self, tokens: Sequence[Token]) -> Piece:
        """Take what was generated next. What comes after a stop string is not part of the reply."""
        piece = self._push(tokens)
        return Piece(self._unsent(piece.text), piece.tokens)

    def _unsent(self, text: str) -> str:
        """The text with what was not sent of what came before it, without what was."""
        text, self._begun_text = self._begun_text + text, ""
        skipped = min(self._num_sent, len(text))
        self._num_sent -= skipped
        return text[skipped:]

    def _push(self, tokens: Sequence[Token]) -> Piece:
        if self.stop_string is not None:
            return Piece("", ())
        if self._stops is None:
            self.num_tokens += len(tokens)
            return Piece(self._detokenizer.push([token.token_id for token in tokens]), tokens)
        shown = ""
        for count, token in enumerate(tokens, start=1):
            text, self.stop_string = self._stops.push(self._detokenizer.push([token.token_id]))
            shown += text
            if self.stop_string is not None:
                tokens = tokens[:count]
                break
        self.num_tokens += len(tokens)
        return Piece(shown, tokens)

    def flush(self) -> str:
        """The text that was held back, now that the reply has ended."""
        if self.stop_string is not None:
            return self._unsent("")
        text = self._detokenizer.flush()
        if self._stops is None:
            return self._unsent(text)
        shown, self.stop_string = self._stops.push(text)
        return self._unsent(shown + self._stops.flush())
