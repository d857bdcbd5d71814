"""A light service for the tests of the local stack: the real frame, no model."""

import subprocess
import sys
from typing import Any

from fastapi import FastAPI

from services.platform.service import create_service, run_service
from services.platform.settings import ServiceSettings


def build() -> FastAPI:
    name = sys.argv[1]
    app = create_service(name, title=name, version="0")
    if name == "generator":
        # What vLLM's engine is to a gateway: a grandchild that no group kill reaches.
        subprocess.Popen(["sleep", "1000"], start_new_session=True)

        @app.get("/v1/policy")
        def policy() -> dict[str, Any]:
            return {"state": "empty"}

    return app


if __name__ == "__main__":
    run_service(sys.argv[1], build, ServiceSettings())  # pyright: ignore[reportCallIssue]
