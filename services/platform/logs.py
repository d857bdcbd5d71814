"""JSON logs on stdout, with the request and job ids of whatever is being done."""

from __future__ import annotations

import logging
import sys
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, Literal

import structlog

QUIET_LOGGERS = ("httpx", "httpcore", "uvicorn.access", "stamina", "urllib3", "filelock")
"""One line per poll of theirs would bury ours."""

CONNECTIONS = "uvicorn.error"
"""uvicorn tells here, and not in its access log, of each WebSocket, with its whole address."""


def _without_queries(record: logging.LogRecord) -> bool:
    """Cut the queries off the addresses in a record: they hold what names a page or a client."""
    if isinstance(record.args, tuple):
        record.args = tuple(
            part.partition("?")[0] if isinstance(part, str) and part.startswith("/") else part for part in record.args
        )
    return True


def configure_logging(service: str, *, level: str = "info", fmt: Literal["json", "console"] = "json") -> None:
    """Send every log line, ours and the libraries', to stdout as one JSON object (or readable text)."""
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.StackInfoRenderer(),
    ]
    render: list[Any] = (
        [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
        if fmt == "json"
        else [structlog.dev.ConsoleRenderer(colors=False)]
    )
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *render],
        )
    )
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(level.upper())
    for name in QUIET_LOGGERS:
        logging.getLogger(name).setLevel(logging.WARNING)
    connections = logging.getLogger(CONNECTIONS)
    # Its debug lines hold the headers of every connection, and so the cookies.
    connections.setLevel(max(logging.INFO, root.level))
    if _without_queries not in connections.filters:
        connections.addFilter(_without_queries)
    structlog.contextvars.clear_contextvars()
    structlog.contextvars.bind_contextvars(service=service)


def get_logger(name: str) -> structlog.stdlib.BoundLogger:
    """Logger of a module: `log = get_logger(__name__)`, then `log.info("chunk_done", prompts=32)`."""
    return structlog.stdlib.get_logger(name)


@contextmanager
def log_context(**ids: Any) -> Generator[None]:
    """Add ids (job, run, request) to every line logged inside, in this task only."""
    with structlog.contextvars.bound_contextvars(**ids):
        yield
