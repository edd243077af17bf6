"""Logs of a worker's process: tracebacks without the values of locals, because those hold conversations."""

from typing import TextIO

import structlog


def set_up_logs(output: TextIO | None = None) -> None:
    """Write to `output`, or to what is standard output then. Called once, by the process's entry point."""
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.dev.ConsoleRenderer(colors=False, exception_formatter=structlog.dev.plain_traceback),
        ],
        logger_factory=structlog.PrintLoggerFactory(output),
    )
