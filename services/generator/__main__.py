"""`python -m services.generator`: run the generator."""

from __future__ import annotations

from services.generator.app import create_app
from services.generator.settings import GeneratorSettings
from services.platform.service import run_service
from services.platform.settings import settings_from_environment


def main() -> None:
    """Run until SIGTERM or SIGINT."""
    settings = settings_from_environment(GeneratorSettings)
    run_service("generator", lambda: create_app(settings), settings)


if __name__ == "__main__":
    main()
