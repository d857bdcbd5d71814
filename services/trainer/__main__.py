"""`python -m services.trainer`: run the trainer service."""

from services.platform.service import run_service
from services.platform.settings import settings_from_environment
from services.trainer.app import build_app
from services.trainer.settings import TrainerSettings


def main() -> None:
    """Run the service with settings from the environment."""
    settings = settings_from_environment(TrainerSettings)
    run_service("trainer", lambda: build_app(settings), settings)


if __name__ == "__main__":
    main()
