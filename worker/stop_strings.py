"""Cut a stream of text at the first stop string, holding back whatever might yet become one."""

from collections.abc import Sequence


class StopStrings:
    """One reply's. What comes out never contains any part of a stop string, however the text was cut into pieces."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(dict.fromkeys(stops))
        self._longest = max(map(len, self._stops), default=0)
        self._held = ""

    def push(self, text: str) -> tuple[str, str | None]:
        """Return the text that may be shown now, and the stop string that ended it, if one did.

        The first to be complete wins, and of those that complete together the longest. Push nothing after one did.
        """
        self._held += text
        ends = [(at + len(stop), at, stop) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if ends:
            _, start, stop = min(ends)
            shown, self._held = self._held[:start], ""
            return shown, stop
        cut = len(self._held) - self._pending()
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown, None

    def flush(self) -> str:
        """The text ends here: what was held back was no stop string."""
        shown, self._held = self._held, ""
        return shown

    def _pending(self) -> int:
        """Length of the longest end of the text that begins a stop string."""
        for length in range(min(self._longest - 1, len(self._held)), 0, -1):
            end = self._held[-length:]
            if any(stop.startswith(end) for stop in self._stops):
                return length
        return 0
