"""What the logs never hold."""

from __future__ import annotations

import logging

import pytest

from services.platform.logs import configure_logging
from tests.fixtures.logs import JsonLogs, json_logs

__all__ = ["json_logs"]  # the fixture
SECRET = "client-1234"


@pytest.fixture(autouse=True)
def as_in_a_service(monkeypatch: pytest.MonkeyPatch) -> None:
    """A uvicorn that another test ran with its own logging keeps its lines from the root."""
    for name in ("uvicorn", "uvicorn.error"):
        monkeypatch.setattr(logging.getLogger(name), "propagate", True)


@pytest.mark.parametrize("line", ['%s - "WebSocket %s" [accepted]', '%s - "WebSocket %s" 403'])
def test_the_address_of_a_websocket_is_logged_without_its_query(json_logs: JsonLogs, line: str) -> None:
    configure_logging_again = 2  # filters must not pile up, nor the cut be lost
    for _ in range(configure_logging_again):
        logging.getLogger("uvicorn.error").info(line, "127.0.0.1:5", f"/ui/_nicegui_ws/socket.io/?client_id={SECRET}")
    lines = [found["event"] for found in json_logs.lines()]
    assert lines == [line % ("127.0.0.1:5", "/ui/_nicegui_ws/socket.io/")] * 2


def test_the_headers_of_a_connection_are_not_logged_even_for_debugging(json_logs: JsonLogs) -> None:
    level = logging.getLogger().level
    try:
        logging.getLogger().setLevel(logging.INFO)
        configure_logging("test", level="debug")
        assert not logging.getLogger("uvicorn.error").isEnabledFor(logging.DEBUG)
        assert logging.getLogger("services.any").isEnabledFor(logging.DEBUG)
        configure_logging("test", level="warning")
        assert not logging.getLogger("uvicorn.error").isEnabledFor(logging.INFO)
    finally:
        logging.getLogger().setLevel(level)
        logging.getLogger("uvicorn.error").setLevel(logging.NOTSET)
