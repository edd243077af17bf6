"""Structured logs: one line an event, with the ids of request, session, turn and worker."""

import logging
import sys
from typing import Any

import structlog

from server.config import LogFormat, LogLevel


def set_up_logs(log_format: LogFormat, level: LogLevel) -> None:
    """Write to stderr from now on. Called once, by the process's entry point: libraries and tests keep their own."""
    as_json = log_format == "json" or (log_format == "auto" and not sys.stderr.isatty())
    # Tracebacks without the values of locals: those hold conversations.
    plain = structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)
    renderer: Any = structlog.processors.JSONRenderer() if as_json else plain
    processors: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    if as_json:
        processors.append(structlog.processors.format_exc_info)  # the console's renderer does it itself
    structlog.configure(
        processors=[*processors, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, level.upper())),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
