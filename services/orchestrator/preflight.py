"""What can be wrong with a stack of containers before anything of it starts: settings, ports, volumes.

`docker-compose.yml` runs it once, in the host's network, before everything else. It prints one line for each finding
(`docker compose logs preflight`) and exits 1 when the stack must not start. Running it beside a stack that is up is
fine: ports held by that stack's own services are not taken.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
import socket
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import httpx
from pydantic import SecretStr

from services.contracts.errors import StoreError
from services.platform.identity import is_proven, new_nonce
from services.platform.settings import MIN_TOKEN_CHARACTERS, known_variables
from services.platform.store_format import check_format, is_empty

REDIS_USER = 999
"""User and group `redis` of the image redis:7."""
ANSWER_SECONDS = 3.0
"""Of one question to whoever holds a port; a service on loopback answers at once."""
STARTING_SECONDS = 30.0
"""A container of ours holds its port before its service, which imports torch, answers on it."""
PAUSE_SECONDS = 0.5

IMAGE_VARIABLES = {"RATCHET_HOST": "0.0.0.0", "RATCHET_PORT": "8000", "RATCHET_STORE_URL": "/store"}
STACK_VARIABLES = {
    "RATCHET_HOST": "set RATCHET_BIND: the host's address the ports are published on",
    "RATCHET_PORT": "set RATCHET_ORCHESTRATOR_PORT, RATCHET_GENERATOR_PORT or RATCHET_REWARD_PORT",
    "RATCHET_STORE_URL": "set RATCHET_STORE: a folder of the host that holds the store",
    "RATCHET_REDIS_URL": "the stack runs its own Redis",
    **dict.fromkeys(
        ("RATCHET_URL", "RATCHET_ORCHESTRATOR_URL", "RATCHET_GENERATOR_URL", "RATCHET_REWARD_URL",
         "RATCHET_TRAINER_URL", "RATCHET_TRAINER_GENERATOR_URL"),
        "services of a stack know each other",
    ),
}  # fmt: skip
"""Variables that docker-compose.yml sets itself, so that the same in .env would do nothing; and what to do instead."""
ENV_FILE = "RATCHET_ENV_FILE"
SECRETS = ("RATCHET_TOKEN", "RATCHET_REDIS_PASSWORD")
INTERPOLATED = {name: name.replace("RATCHET_", "RATCHET_COMPOSE_") for name in (ENV_FILE, *SECRETS)}
"""Names under which the compose file hands on what compose itself read (.env, --env-file, the shell).

Under its own name a variable is what the env file of the containers says."""
OBSERVED = "RATCHET_COMPOSE_OBSERVABILITY"
"""Set by deploy/compose.observability.yml: its ports are to be published too."""
COMPOSE_VARIABLES = frozenset(
    {"RATCHET_TOKEN", "RATCHET_REDIS_PASSWORD", "RATCHET_BIND", "RATCHET_ORCHESTRATOR_PORT", "RATCHET_GENERATOR_PORT",
     "RATCHET_REWARD_PORT", "RATCHET_STORE", "RATCHET_UID", "RATCHET_GID", "RATCHET_TAG", "RATCHET_ENV_FILE",
     "RATCHET_GPUS", "RATCHET_GENERATOR_GPUS", "RATCHET_REWARD_GPUS", "RATCHET_TRAINER_GPUS", "RATCHET_TRACKERS",
     "RATCHET_GRAFANA_PORT", "RATCHET_PROMETHEUS_PORT", "RATCHET_PROMETHEUS_RETENTION"}
)  # fmt: skip
"""Variables that the compose files themselves read."""


@dataclass(frozen=True)
class PublishedPort:
    """A port of the host that a service is to be published on, and how the one of this stack is known.

    Ours prove that they know the token; of a program that cannot, `route` answers with JSON that has `shows` in it.
    """

    service: str
    variable: str
    route: str = ""
    shows: str = ""


PORTS = (
    PublishedPort("orchestrator", "RATCHET_ORCHESTRATOR_PORT"),
    PublishedPort("generator", "RATCHET_GENERATOR_PORT"),
    PublishedPort("reward", "RATCHET_REWARD_PORT"),
)
OBSERVABILITY_PORTS = (
    PublishedPort("Grafana", "RATCHET_GRAFANA_PORT", "/api/dashboards/uid/ratchet", '"uid":"ratchet"'),
    PublishedPort("Prometheus", "RATCHET_PROMETHEUS_PORT", "/api/v1/rules", '"name":"NobodyConducts"'),
)
"""Known by a dashboard and an alert of ours. Another stack has them too; then Docker says that the port is taken."""


@dataclass(frozen=True)
class Volume:
    """A volume of the stack: where preflight sees it, and whose it must be."""

    folder: Path
    name: str
    uid: int
    gid: int


def check_settings(environment: Mapping[str, str]) -> list[str]:
    """Problems of the variables in .env: those that nothing reads, or that the stack sets itself."""
    problems: list[str] = []
    known = known_variables() | COMPOSE_VARIABLES | set(INTERPOLATED.values()) | {OBSERVED}
    for name, value in environment.items():
        if not name.startswith("RATCHET_") or IMAGE_VARIABLES.get(name) == value:
            continue
        if name in STACK_VARIABLES:
            problems.append(f"{name} in .env would do nothing, the stack sets it itself; {STACK_VARIABLES[name]}")
        elif name not in known:
            near = difflib.get_close_matches(name, known, n=2)
            hint = f"did you mean {' or '.join(near)}?" if near else "remove it, or check its spelling"
            problems.append(f"{name} in .env would do nothing, no service reads it; {hint}")
    if len(environment.get("RATCHET_TOKEN", "")) < MIN_TOKEN_CHARACTERS:
        problems.append(
            f"RATCHET_TOKEN in .env has fewer than {MIN_TOKEN_CHARACTERS} characters; remove the line, and 'make env' "
            "makes a good one"
        )
    for name in ("RATCHET_UID", "RATCHET_GID"):
        if not re.fullmatch(r"[1-9]\d{0,8}", environment.get(name, "")):
            problems.append(
                f"{name}={environment.get(name)} in .env is not a user that services may run as: a number, not 0"
            )
    return problems


def check_env_file(environment: Mapping[str, str]) -> list[str]:
    """Problems of another env file than .env: compose has to be told of it, and it has to name itself."""
    file = environment.get(INTERPOLATED[ENV_FILE], ".env")
    remedy = (
        f"To use another file than .env, let it name itself (a line {ENV_FILE}=NAME in it, as "
        f"'{ENV_FILE}=NAME make env' writes it), and give it to every command: docker compose --env-file NAME ..."
    )
    named = environment.get(ENV_FILE, ".env")
    if named != file:
        return [f"containers are given the settings of {file}, in which {ENV_FILE} is {named}. {remedy}"]
    return [
        f"{name} in {file}, whose settings containers are given, is another than the one that compose has read from "
        f".env, from --env-file or from the shell. {remedy}"
        for name in SECRETS
        if name in environment and environment[name] != environment.get(INTERPOLATED[name], environment[name])
    ]


def check_ports(environment: Mapping[str, str], starting_seconds: float = STARTING_SECONDS) -> list[str]:
    """Problems of the host's ports that the stack is to publish."""
    host, token = environment["RATCHET_BIND"], SecretStr(environment["RATCHET_TOKEN"])
    seen: dict[str, str] = {}
    problems: list[str] = []
    for port in (*PORTS, *(OBSERVABILITY_PORTS if OBSERVED in environment else ())):
        text = environment[port.variable]
        if not re.fullmatch(r"\d{1,5}", text) or not 1 <= int(text) <= 65535:
            problems.append(f"{port.variable}={text} is not a port; 1 to 65535 are")
        elif text in seen:
            problems.append(f"{port.variable} and {seen[text]} are both {text}; each needs a port of its own")
        elif (trouble := _bind(host, int(text))) and not _is_ours(host, int(text), port, token, starting_seconds):
            problems.append(
                f"port {text} of {host}, for the {port.service}, cannot be had: {trouble}. Stop what uses it "
                f"(ss -ltnp 'sport = :{text}' shows it), or set {port.variable} in .env to a free one"
            )
        seen[text] = port.variable
    return problems


def _bind(host: str, port: int) -> str | None:
    """Why a port cannot be listened on; None when it can."""
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((host, port))
    except OSError as error:
        return (error.strerror or str(error)).lower()
    return None


def _is_ours(host: str, port: int, published: PublishedPort, token: SecretStr, starting_seconds: float) -> bool:
    """Whether this stack's own service holds the port. Whoever it is, the token is not sent to it."""
    nonce = new_nonce()
    route = published.route or f"/health/identity?nonce={nonce}"
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    deadline = time.monotonic() + starting_seconds
    while True:
        try:
            answer = httpx.get(f"http://{shown}:{port}{route}", timeout=ANSWER_SECONDS, trust_env=False)
            if answer.status_code != 200:
                return False
            if published.shows:
                return published.shows in "".join(answer.text.split())
            return is_proven(token, published.service, nonce, answer.content)
        except httpx.ConnectError:
            return False
        except httpx.HTTPError:  # taken, and then hung up on: a container whose service does not listen yet
            if time.monotonic() > deadline:
                return False
            time.sleep(PAUSE_SECONDS)


def check_volumes(volumes: tuple[Volume, ...], *, adopt: bool = False) -> tuple[list[str], list[str]]:
    """Problems of the volumes, and what was mended: a fresh one is given to its user, the store gets its format."""
    problems: list[str] = []
    done: list[str] = []
    for volume in volumes:
        status = volume.folder.stat()
        if status.st_uid != volume.uid:
            if is_empty(volume.folder):
                os.chown(volume.folder, volume.uid, volume.gid)
                done.append(f"the volume '{volume.name}' is given to user {volume.uid}")
            else:
                problems.append(
                    f"the volume '{volume.name}' belongs to user {status.st_uid}, and its service runs as user "
                    f"{volume.uid}. Give it over: docker compose run --rm --no-deps --entrypoint chown preflight -R "
                    f"{volume.uid}:{volume.gid} {volume.folder}"
                    + (
                        f"; or set RATCHET_UID={status.st_uid} and RATCHET_GID={status.st_gid} in .env"
                        if status.st_uid and volume.uid != REDIS_USER
                        else ""
                    )
                )
        if volume.name == "store" and not problems:
            try:
                if told := check_format(volume.folder, adopt=adopt):
                    done.append(told)
            except StoreError as error:
                problems.append(
                    f"{error.detail}. Start with another one (RATCHET_STORE=/a/folder in .env, or 'docker volume rm' "
                    "after a backup), or run the version that wrote it. If you know that it has the layout of this "
                    "version, take it over: docker compose run --rm --no-deps preflight --adopt"
                )
    return problems, done


def main(arguments: list[str] | None = None) -> int:
    """Command line entry; 0 when the stack may start."""
    parser = argparse.ArgumentParser(description="Checks settings, ports and volumes before a stack starts.")
    parser.add_argument("--adopt", action="store_true", help="mark a store without a format number as of this version")
    options = parser.parse_args(arguments)
    composed = {name: os.environ[own] for name, own in INTERPOLATED.items() if own in os.environ}
    environment = {**os.environ, **composed}
    problems = check_env_file(os.environ) or check_settings(environment)
    if not problems:
        uid, gid = int(environment["RATCHET_UID"]), int(environment["RATCHET_GID"])
        volumes = (
            Volume(Path("/store"), "store", uid, gid),
            Volume(Path("/cache"), "cache", uid, gid),
            Volume(Path("/redis"), "redis", REDIS_USER, REDIS_USER),
        )
        found, done = check_volumes(volumes, adopt=options.adopt)
        problems = found + ([] if options.adopt else check_ports(environment))
        for line in done:
            print(f"preflight: {line}")
    for problem in problems:
        print(f"preflight: ERROR: {problem}")
    print("preflight: nothing was started; mend the above and run this again" if problems else "preflight: all is well")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
