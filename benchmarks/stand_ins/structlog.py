"""What the engine uses of structlog, on the standard library's logging: where structlog is not installed."""

import logging
from typing import Any


class _Logger:
    def __init__(self, name: str) -> None:
        self._logger = logging.getLogger(name)

    def debug(self, event: str, **values: Any) -> None:
        self._log(logging.DEBUG, event, values)

    def info(self, event: str, **values: Any) -> None:
        self._log(logging.INFO, event, values)

    def warning(self, event: str, **values: Any) -> None:
        self._log(logging.WARNING, event, values)

    def error(self, event: str, *, exc_info: Any = None, **values: Any) -> None:
        self._log(logging.ERROR, event, values, exc_info=exc_info)

    def exception(self, event: str, **values: Any) -> None:
        self._log(logging.ERROR, event, values, exc_info=True)

    def _log(self, level: int, event: str, values: dict[str, Any], exc_info: Any = None) -> None:
        words = " ".join(f"{name}={value!r}" for name, value in values.items())
        self._logger.log(level, "%s %s", event, words, exc_info=exc_info)


def get_logger(name: str) -> _Logger:
    return _Logger(name)
