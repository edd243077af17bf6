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
    def __init__(self, detokenizer: Detokenizing, stops: Sequence[str]) -> None:
        self._detokenizer = detokenizer
        self._stops = StopStrings(stops) if stops else None
        self.num_tokens = 0
        """Tokens of the reply: none after the one that completed a stop string."""
        self.stop_string: str | None = None
        """The one that ended the reply, once it has."""

    def push(self, tokens: Sequence[Token]) -> Piece:
        """Take what was generated next. What comes after a stop string is not part of the reply."""
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
            return ""
        text = self._detokenizer.flush()
        if self._stops is None:
            return text
        shown, self.stop_string = self._stops.push(text)
        return shown + self._stops.flush()
