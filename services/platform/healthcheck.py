"""Is a service up? Ready, or as far as it can be without a first model, or busy bringing one up.

`python -m services.platform.healthcheck` asks the service in this container (RATCHET_PORT) and exits 0 or 1 with one
line that says why; it is the images' HEALTHCHECK. A policy that is being loaded makes no container sick: the load has a
deadline of its own, after which the generator's state is `failed`, and this says no. Whether requests may be sent is
`/health/ready`. Standard library only, since it runs every few seconds.
"""

from __future__ import annotations

import http.client
import json
import os
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping

PROBE_SECONDS = 4.0
"""Of all questions together; below the HEALTHCHECK's own limit (5 s), so that a hang is told and not just counted."""

MODEL_ROUTES: Mapping[str, str] = {"generator": "/v1/policy", "reward": "/v1/scorers"}
"""Where a service that is not ready tells whether it has been given a model at all."""
GENERATOR_WAITS: Mapping[str, str] = {
    "empty": "waiting for a policy",
    "asleep": "asleep: a training has the GPU",
}
"""States of `GET /v1/policy` (`PolicyInfo`) in which nothing is wrong and nothing is served."""
GENERATOR_WORKS = frozenset({"starting", "swapping", "waking"})
"""States that end by themselves, in `serving` or, within the generator's deadlines, in `failed`."""


def waiting_for(service: str, model: object) -> str | None:
    """What a service that is well waits for before it can serve; None when it is not for that.

    Args:
        service: Its name.
        model: Body that its route in MODEL_ROUTES answered.
    """
    if service == "generator" and isinstance(model, dict):
        return GENERATOR_WAITS.get(str(model.get("state")))  # pyright: ignore[reportUnknownMemberType,reportUnknownArgumentType]
    if service == "reward" and model == []:
        return "waiting for a scorer"
    return None


def check(url: str) -> tuple[bool, str]:
    """Whether the service at `url` is up, and why."""
    deadline = time.monotonic() + PROBE_SECONDS
    try:
        status, body = _get(f"{url}/health/ready", deadline)
        if status == 200:
            return True, "ready"
        told: dict[str, object] = body if isinstance(body, dict) else {}  # pyright: ignore[reportUnknownVariableType]
        service, detail = str(told.get("service")), str(told.get("detail") or f"/health/ready answered {status}")
        if service in MODEL_ROUTES:
            model = _get(f"{url}{MODEL_ROUTES[service]}", deadline)[1]
            if waits := waiting_for(service, model):
                return True, waits
            if service == "generator" and isinstance(model, dict) and model.get("state") in GENERATOR_WORKS:  # pyright: ignore[reportUnknownMemberType]
                return True, detail
        return False, detail
    except (OSError, ValueError, http.client.HTTPException) as error:
        return False, f"{url} does not answer: {error}"


def _get(url: str, deadline: float) -> tuple[int, object]:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError(f"not within {PROBE_SECONDS:g} s")
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=left) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as answer:
        with answer:
            return answer.code, json.load(answer)


if __name__ == "__main__":
    up, why = check(f"http://127.0.0.1:{os.environ['RATCHET_PORT']}")
    print(why)
    sys.exit(0 if up else 1)
