"""A stack of containers on a real engine, under a project name, ports and secrets of its own."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).parents[2]
SERVICES = ("generator", "reward", "trainer", "orchestrator")
CONTAINERS = ("redis", *SERVICES)
PUBLISHED = ("orchestrator", "generator", "reward")
TAG = "test"
COMMAND_SECONDS = 300.0
BUILD_SECONDS = 1500.0
POLL_SECONDS = 0.25


def docker(*arguments: str, seconds: float = COMMAND_SECONDS, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run docker on the engine that DOCKER_HOST (or docker's context) names."""
    done = subprocess.run(["docker", *arguments], capture_output=True, text=True, timeout=seconds, check=False)
    if check and done.returncode:
        raise AssertionError(
            f"docker {' '.join(arguments)} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
        )
    return done


def wait_until(what: str, condition: Callable[[], Any], seconds: float, *, poll_seconds: float = POLL_SECONDS) -> Any:
    """The first true answer of `condition`."""
    deadline = time.monotonic() + seconds
    while not (answer := condition()):
        assert time.monotonic() < deadline, f"{what} has not happened in {seconds:g} s"
        time.sleep(poll_seconds)
    return answer


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on at this moment."""
    with contextlib.ExitStack() as held:
        return [held.enter_context(socket.create_server(("127.0.0.1", 0))).getsockname()[1] for _ in range(count)]


class ComposeStack:
    """One compose project. `folder` gets its env file."""

    def __init__(self, folder: Path, **settings: str) -> None:
        self.project = f"ratchet-test-{secrets.token_hex(4)}"
        self.token = secrets.token_urlsafe(32)
        self.redis_password = secrets.token_urlsafe(32)
        self.ports: dict[str, int] = dict(zip(PUBLISHED, free_ports(3), strict=True))
        self.env_file = folder / f"{self.project}.env"
        values = {
            "RATCHET_TOKEN": self.token,
            "RATCHET_REDIS_PASSWORD": self.redis_password,
            "RATCHET_TAG": TAG,
            "RATCHET_ENV_FILE": str(self.env_file),
            **{f"RATCHET_{name.upper()}_PORT": str(port) for name, port in self.ports.items()},
            **settings,
        }
        self.env_file.write_text("".join(f"{name}={value}\n" for name, value in values.items()))
        self.http = httpx.Client(timeout=60, trust_env=False)

    def command(self, *arguments: str) -> list[str]:
        """A command line of docker compose for this project."""
        return ["compose", "--project-name", self.project, "--env-file", str(self.env_file), *arguments]

    def compose(
        self, *arguments: str, seconds: float = COMMAND_SECONDS, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Run docker compose from the repository's root. Variables of ours in the environment do not count."""
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("RATCHET_", "COMPOSE_"))}
        done = subprocess.run(
            ["docker", *self.command(*arguments)], cwd=ROOT, env=clean, capture_output=True, text=True,
            timeout=seconds, check=False,
        )  # fmt: skip
        if check and done.returncode:
            preflight = "" if arguments[0] == "logs" else self.logs("preflight")
            raise AssertionError(f"compose {' '.join(arguments)}: {done.returncode}\n{done.stderr}\n{preflight}")
        return done

    def logs(self, *services: str) -> str:
        """What services have written, both streams."""
        done = self.compose("logs", "--no-log-prefix", "--no-color", *services, check=False)
        return done.stdout.replace("\x1b[2K", "")

    def down(self) -> None:
        """Remove everything, volumes included, and check that nothing is left."""
        self.http.close()
        self.compose("--profile", "*", "down", "--volumes", "--timeout", "20")
        label = f"label=com.docker.compose.project={self.project}"
        for kind, command in (("container", ("ps", "-aq")), ("volume", ("volume", "ls", "-q")),
                              ("network", ("network", "ls", "-q"))):  # fmt: skip
            assert not docker(*command, "--filter", label).stdout.strip(), f"a {kind} is left"

    # -- containers ---------------------------------------------------------------------------------------------------

    def container(self, service: str) -> str:
        """Name of a service's container."""
        return f"{self.project}-{service}-1"

    def inspect(self, service: str) -> dict[str, Any]:
        """What the engine knows of a service's container."""
        return json.loads(docker("inspect", self.container(service)).stdout)[0]

    def exec(self, service: str, *command: str, check: bool = True) -> str:
        """Output of a command inside a service's container."""
        return docker("exec", self.container(service), *command, check=check).stdout

    def healthy(self, service: str) -> bool:
        """Whether the engine says so."""
        state = self.inspect(service)["State"]
        return state["Running"] and state["Health"]["Status"] == "healthy"

    def kill(self, service: str, restarted_seconds: float = 180) -> None:
        """`docker kill` and start a container again; returns once it is running."""
        before = self.inspect(service)["State"]["StartedAt"]
        docker("kill", self.container(service))
        # The engine takes a kill by hand for a wish to have it stopped, so that the restart policy does not apply.
        docker("start", self.container(service))
        wait_until(
            f"the restart of {service}",
            lambda: (state := self.inspect(service)["State"])["Running"] and state["StartedAt"] != before,
            restarted_seconds,
        )

    def run_python(self, network: str, code: str) -> subprocess.CompletedProcess[str]:
        """Run Python in a fresh container that shares one of the project's networks, or `host`."""
        where = network if network in ("host", "bridge") else f"{self.project}_{network}"
        image = f"ratchet-orchestrator:{TAG}"
        return docker("run", "--rm", "--network", where, "--entrypoint", "python", image, "-c", code, check=False)

    # -- published APIs -----------------------------------------------------------------------------------------------

    def url(self, service: str) -> str:
        """Where a service is published."""
        return f"http://127.0.0.1:{self.ports[service]}"

    def call(self, service: str, method: str, path: str, *, token: bool = True, **options: Any) -> httpx.Response:
        """One request to a published API."""
        headers = {"Authorization": f"Bearer {self.token}"} if token else {}
        return self.http.request(method, self.url(service) + path, headers=headers, **options)

    def read(self, service: str, path: str, seconds: float = 120, **params: Any) -> Any:
        """An answer's JSON; a service that is just restarting is asked again."""

        def ask() -> httpx.Response | None:
            try:
                answer = self.call(service, "GET", path, params=params)
            except httpx.TransportError:
                return None
            return answer if answer.status_code < 500 else None

        answer = wait_until(f"an answer to GET {path}", ask, seconds)
        assert answer.status_code == 200, answer.text
        return answer.json()
