"""`python -m services.orchestrator`: run the orchestrator until SIGTERM."""

from __future__ import annotations

from services.orchestrator.app import create_app
from services.orchestrator.settings import OrchestratorSettings
from services.platform.service import run_service
from services.platform.settings import settings_from_environment

if __name__ == "__main__":
    settings = settings_from_environment(OrchestratorSettings)
    run_service("orchestrator", lambda: create_app(settings), settings)
