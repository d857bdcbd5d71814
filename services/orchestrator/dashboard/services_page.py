"""The page of the services."""

from __future__ import annotations

from fastapi import Request

from services.orchestrator.dashboard import panels
from services.orchestrator.dashboard.layout import html, page, show


async def services_page(request: Request) -> None:
    """How each service is, asked anew every few seconds while somebody looks."""
    with page(request, "Services", "services") as viewer:
        html("<h1>Services</h1>")
        health = viewer.dashboard.health
        if not health.health:
            await health.look()
        cards = html(panels.services(health.health))
        viewer.watch(health, lambda: show(cards, panels.services(health.health)))
