"""What a file means, read again when it has changed. A change for the worse is logged, and what was known stays."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

import structlog

from server.config import ConfigError

T = TypeVar("T")

_LOOK_S = 1.0
_log = structlog.get_logger(__name__)


class WatchedFile(Generic[T]):
    """`parse` makes of its bytes what they mean, or raises ConfigError: that message is logged, the file never."""

    def __init__(self, path: str, parse: Callable[[bytes], T], *, look_s: float = _LOOK_S) -> None:
        """Raises ConfigError, or OSError where the file can't be read."""
        self._path = Path(path)
        self._parse = parse
        self._look_s = look_s
        self._stamp = self._look()
        self._looked_s = time.monotonic()
        self._known = parse(self._path.read_bytes())

    def read(self) -> T:
        """What the file means now, or meant `look_s` ago."""
        now_s = time.monotonic()
        if now_s - self._looked_s < self._look_s:
            return self._known
        self._looked_s = now_s
        try:
            stamp = self._look()
            if stamp != self._stamp:
                self._stamp = stamp  # also of what can't be used: it is said once
                self._known = self._parse(self._path.read_bytes())
                _log.info("file read again", path=str(self._path))
        except (ConfigError, OSError) as error:
            _log.error("what the file said before stays", path=str(self._path), error=str(error))
        return self._known

    def _look(self) -> tuple[int, int, int]:
        """What changes when the file does."""
        stat = self._path.stat()
        return stat.st_mtime_ns, stat.st_ino, stat.st_size
