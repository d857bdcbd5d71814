"""`python -m services.reward`: run the reward service."""

from __future__ import annotations

from services.platform.service import run_service
from services.platform.settings import settings_from_environment
from services.reward.app import create_app
from services.reward.settings import RewardSettings


def main() -> None:
    """Run until SIGTERM or SIGINT."""
    settings = settings_from_environment(RewardSettings)
    run_service("reward", lambda: create_app(settings), settings)


if __name__ == "__main__":
    main()
