"""`python -m services.reward`: run the reward service."""

from __future__ import annotations

from services.platform.service import run_service
from services.reward.app import create_app
from services.reward.settings import RewardSettings


def main() -> None:
    """Run until SIGTERM or SIGINT."""
    settings = RewardSettings()  # pyright: ignore[reportCallIssue]  # required values come from the environment
    run_service("reward", lambda: create_app(settings), settings)


if __name__ == "__main__":
    main()
