"""`python -m services.generator`: run the generator."""

from __future__ import annotations

from services.generator.app import create_app
from services.generator.settings import GeneratorSettings
from services.platform.service import run_service


def main() -> None:
    """Run until SIGTERM or SIGINT."""
    settings = GeneratorSettings()  # pyright: ignore[reportCallIssue]  # required values come from the environment
    run_service("generator", lambda: create_app(settings), settings)


if __name__ == "__main__":
    main()
