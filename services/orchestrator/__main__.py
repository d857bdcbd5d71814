"""`python -m services.orchestrator`: run the orchestrator until SIGTERM."""

from __future__ import annotations

from services.orchestrator.app import create_app
from services.orchestrator.settings import OrchestratorSettings
from services.platform.service import run_service

if __name__ == "__main__":
    settings = OrchestratorSettings()  # pyright: ignore[reportCallIssue]  # token and store come from the environment
    run_service("orchestrator", lambda: create_app(settings), settings)
