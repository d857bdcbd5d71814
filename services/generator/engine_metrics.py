"""vLLM's own metrics, passed on under their own names beside the gateway's."""

from __future__ import annotations

from collections.abc import Iterator

from services.contracts.errors import RatchetError
from services.generator.policy import PolicyServer
from services.platform.logs import get_logger

log = get_logger(__name__)

SCRAPE_SECONDS = 2.0
"""vLLM answers in milliseconds, even under load; a silent one must not cost the gateway its scrape."""
PREFIX = "vllm:"
"""vLLM's process also tells of its Python and its HTTP server, under names that the gateway's process has too."""


class EngineMetrics:
    """Reads vLLM's metrics at a scrape; nothing while there is no engine, or while it does not answer."""

    def __init__(self, policy: PolicyServer) -> None:
        self._policy = policy

    async def __call__(self) -> bytes:
        """Its metrics in Prometheus' text format."""
        engine = self._policy.engine
        if engine is None:
            return b""
        try:
            text = await engine.client.metrics(SCRAPE_SECONDS)
        except RatchetError as error:
            log.debug("engine_metrics_missing", problem=error.detail)  # the watcher tells of a silent engine
            return b""
        return "".join(f"{line}\n" for line in own_lines(text)).encode()


def own_lines(text: str) -> Iterator[str]:
    """The lines of vLLM's metrics that are vLLM's: samples, HELP and TYPE."""
    for line in text.splitlines():
        name = line.split(" ", 3)[2] if line.startswith("# ") and line.count(" ") >= 2 else line
        if name.startswith(PREFIX):
            yield line
